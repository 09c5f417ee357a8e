"""A web server with a certificate of its own, and downloaders that reach it by names of the public internet."""

from __future__ import annotations

import contextlib
import io
import socketserver
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from theworld_train.preparation import Downloader, Limits
from theworld_train.preparation.addresses import address_problem

HOST = "images.example"
#: An address of the public internet, which stands for the server until the connection is made.
PUBLIC = "93.184.216.34"
#: Addresses that stand for public ones where a connection is made; nothing listens at the second.
OWN = ("127.0.0.1", "127.0.0.2")


def picture(color: str = "red", size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format="PNG")
    return buffer.getvalue()


class Site:
    """What the server answers, by path, and how often it was asked."""

    def __init__(self, port: int, certificate: Path) -> None:
        self.port = port
        self.certificate = certificate
        self.asked: Counter[str] = Counter()
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.hosts: set[str] = set()

    def url(self, path: str, host: str = HOST) -> str:
        return f"https://{host}:{self.port}{path}"

    def file(self, path: str, data: bytes) -> str:
        """Serves bytes, and returns their URL."""
        self.answers[path] = lambda handler: send(handler, 200, data, {"Content-Length": str(len(data))})
        return self.url(path)

    def redirect(self, path: str, to: str) -> str:
        self.answers[path] = lambda handler: send(handler, 302, b"", {"Location": to, "Content-Length": "0"})
        return self.url(path)

    def unsized(self, path: str, data: bytes) -> str:
        """Serves bytes whose number is not told."""
        self.answers[path] = lambda handler: send(handler, 200, data, {})
        return self.url(path)

    def chunked(self, path: str, data: bytes) -> str:
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)
        self.answers[path] = lambda handler: send(handler, 200, body, {"Transfer-Encoding": "chunked"})
        return self.url(path)

    def dripping(self, path: str, in_headers: bool = False) -> str:
        """Serves a byte now and then, so that no single read waits for long."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            if not in_headers:
                send(handler, 200, b"", {"Content-Length": "1000"})
            for _ in range(100):
                handler.wfile.write(b"H")
                time.sleep(0.05)

        self.answers[path] = answer
        return self.url(path)

    def downloader(self, resolve: Callable[[str, int], list[str]] | None = None, **limits: float) -> Downloader:
        """Returns one that trusts the server, and takes this machine for one of the public internet."""
        context = ssl.create_default_context(cafile=str(self.certificate))
        context.verify_flags |= ssl.VERIFY_X509_STRICT  # as Python 3.13 does by itself
        return Downloader(
            Limits(**{"ports": (self.port,), **limits}),
            context=context,
            resolve=resolve or (lambda host, port: ["127.0.0.1"]),
            judge=lambda address: None if address in OWN else address_problem(address),
        )


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        self.close_connection = True
        self.site.asked[self.path] += 1
        self.site.hosts.add(self.headers["Host"])
        with contextlib.suppress(OSError):  # the client may have had enough
            self.site.answers.get(self.path, lambda handler: send(handler, 404, b"", {"Content-Length": "0"}))(self)

    def log_message(self, *args: object) -> None:
        """Says nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing of clients that refuse the certificate."""


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for `images.example`, signed by itself, and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    files = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}"),
            *("-addext", "keyUsage=critical,digitalSignature,keyCertSign"),
            *("-out", str(files[0]), "-keyout", str(files[1])),
        ],
        check=True,
        capture_output=True,
    )
    return files


@pytest.fixture
def site(certificate: tuple[Path, Path]) -> Iterator[Site]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    handler = type("SiteHandler", (Handler,), {})
    server: socketserver.BaseServer = Server(("127.0.0.1", 0), handler)
    assert isinstance(server, ThreadingHTTPServer)
    # The handshake is left to the thread of the connection.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    found = Site(server.server_address[1], certificate[0])
    handler.site = found
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
