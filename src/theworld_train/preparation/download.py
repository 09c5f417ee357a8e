"""Downloads one file from a URL that nobody vouches for.

A name is resolved once, all its addresses are judged, and the connection goes to one that was judged: between check and
connection the name is not asked for again, so it cannot come to mean another machine. Proxies of the environment are
not used, as they would resolve the name anew.
"""

from __future__ import annotations

import http.client
import os
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from urllib.parse import urljoin

import certifi
from urllib3 import HTTPResponse
from urllib3.connection import HTTPSConnection
from urllib3.exceptions import HTTPError, LocationValueError, NewConnectionError
from urllib3.exceptions import SSLError as UrllibSSLError
from urllib3.exceptions import TimeoutError as UrllibTimeoutError
from urllib3.util import Url, parse_url

from theworld_train import __version__
from theworld_train.preparation.addresses import address_problem, resolve

HTTPS_PORT = 443
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 5
#: Bytes that are taken from a connection at once.
CHUNK = 1 << 16
HEADERS = {
    "User-Agent": f"theworld-train/{__version__}",
    "Accept": "image/*",
    "Accept-Encoding": "identity",  # what is counted is what comes
}


@dataclass(frozen=True)
class Limits:
    """What one download may take.

    Attributes:
        file_bytes: Most bytes of a file.
        seconds: Most seconds until its last byte, redirects included. Resolving a name takes what the system lets it,
            and a TLS handshake may take as long once more.
        ports: Ports that may be connected to.
    """

    file_bytes: int = 20 * 2**20
    seconds: float = 30.0
    ports: Sequence[int] = (HTTPS_PORT,)


class DownloadError(Exception):
    """Raised for a file that cannot be had.

    Attributes:
        reason: One of a few kinds, to be counted.
        detail: What exactly.
    """

    def __init__(self, reason: str, detail: str) -> None:
        """Args: reason: one of a few kinds; detail: what exactly."""
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class TimedSocket(ssl.SSLSocket):
    """A TLS socket whose reads all end at one time, however little comes with each of them.

    Attributes:
        deadline: That time, by `time.monotonic`.
    """

    deadline: float

    def recv_into(self, *args: object, **kwargs: object) -> int:
        """Reads as its base does, for as long as there is time left."""
        self.settimeout(seconds_left(self.deadline))
        return super().recv_into(*args, **kwargs)  # type: ignore[arg-type]


def seconds_left(deadline: float) -> float:
    """Returns the seconds until a time by `time.monotonic`.

    Raises:
        TimeoutError: If it has passed.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def trusted() -> ssl.SSLContext:
    """Returns what certificates are verified by: those of SSL_CERT_FILE if it is set, else those of certifi."""
    return ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE") or certifi.where())


class Downloader:
    """Downloads files, each within the same limits; may be used by several threads."""

    def __init__(
        self,
        limits: Limits = Limits(),
        *,
        context: ssl.SSLContext | None = None,
        resolve: Callable[[str, int], list[str]] = resolve,
        judge: Callable[[str], str | None] = address_problem,
    ) -> None:
        """Keeps the rules.

        Args:
            limits: What a download may take.
            context: Verifies certificates, in which it has to be strict; see `trusted`.
            resolve: Returns the addresses of a host and port; raises OSError.
            judge: Says why an address is not connected to, or returns None.
        """
        self.limits = limits
        self._context = context or trusted()
        assert self._context.verify_mode == ssl.CERT_REQUIRED
        assert self._context.check_hostname
        self._context.sslsocket_class = TimedSocket
        self._resolve = resolve
        self._judge = judge

    def fetch(self, url: str, spend: Callable[[int], None] = lambda count: None) -> bytes:
        """Downloads a file.

        Args:
            url: Where it is; redirects are followed, and checked like it.
            spend: Is told of bytes as they come, and may raise to end it.

        Raises:
            DownloadError: If it cannot be had.
        """
        deadline = time.monotonic() + self.limits.seconds
        try:
            return self._follow(url, deadline, spend)
        except (TimeoutError, UrllibTimeoutError):
            raise DownloadError("too slow", f"not complete after {self.limits.seconds:g} s") from None
        except (ssl.SSLError, UrllibSSLError) as error:
            raise DownloadError("no trusted connection", str(error)) from error
        except (OSError, http.client.HTTPException, HTTPError, ValueError) as error:
            raise DownloadError("connection failed", f"{type(error).__name__}: {error}") from error

    def _follow(self, url: str, deadline: float, spend: Callable[[int], None]) -> bytes:
        for _ in range(1 + MAX_REDIRECTS):
            target = self.parse(url)
            with closing(self._connect(target, deadline)) as connection:
                headers = {"Host": target.netloc or "", **HEADERS}
                connection.request("GET", target.request_uri, headers=headers, preload_content=False)
                with closing(connection.getresponse()) as response:
                    if response.status not in REDIRECTS:
                        return self._body(response, deadline, spend)
                    location = response.headers.get("Location")
                if not location:
                    raise DownloadError(f"HTTP {response.status}", "a redirect that does not say where to")
                url = urljoin(url, location)
        raise DownloadError("too many redirects", f"more than {MAX_REDIRECTS}")

    def parse(self, url: str) -> Url:
        """Takes a URL apart.

        Raises:
            DownloadError: If it is not one that is fetched.
        """
        try:
            target = parse_url(url)
        except LocationValueError as error:
            raise DownloadError("refused URL", f"not a URL: {error}") from error
        if target.scheme != "https" or not target.host:
            raise DownloadError("refused URL", "not an https URL")
        if target.auth is not None:
            raise DownloadError("refused URL", "it holds a user name or password")
        if (target.port or HTTPS_PORT) not in self.limits.ports:
            raise DownloadError("refused URL", f"port {target.port or HTTPS_PORT}")
        return target

    def _connect(self, target: Url, deadline: float) -> HTTPSConnection:
        assert target.host is not None
        host, port = target.host.strip("[]"), target.port or HTTPS_PORT
        try:
            addresses = self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise DownloadError("unknown host", f"{host}: {error}") from error
        for address in addresses:
            problem = self._judge(address)
            if problem is not None:
                raise DownloadError("refused address", f"{host} is {address}, {problem}")
        for address in addresses[:-1]:
            with suppress(NewConnectionError):  # such as an IPv6 address on a machine without IPv6
                return self._connect_to(address, host, port, deadline)
        return self._connect_to(addresses[-1], host, port, deadline)

    def _connect_to(self, address: str, host: str, port: int, deadline: float) -> HTTPSConnection:
        """Connects to a judged address; the certificate has to be the host's all the same."""
        timeout = seconds_left(deadline)
        connection = HTTPSConnection(address, port, timeout=timeout, server_hostname=host, ssl_context=self._context)
        try:
            connection.connect()
            assert isinstance(connection.sock, TimedSocket)
            connection.sock.deadline = deadline
        except BaseException:
            connection.close()
            raise
        return connection

    def _body(self, response: HTTPResponse, deadline: float, spend: Callable[[int], None]) -> bytes:
        if response.status != 200:
            raise DownloadError(f"HTTP {response.status}", response.reason or "")
        most = self.limits.file_bytes
        too_large = DownloadError("too large", f"more than {most:,} bytes")
        length = response.headers.get("Content-Length", "")
        if length.isdigit() and int(length) > most:
            raise too_large
        pieces: list[bytes] = []
        received = 0
        while piece := response.read1(CHUNK, decode_content=False):
            seconds_left(deadline)
            spend(len(piece))
            received += len(piece)
            if received > most:
                raise too_large
            pieces.append(piece)
        return b"".join(pieces)
