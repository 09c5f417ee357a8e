"""Protects the guard of downloads: where they go, what they follow, and what they take."""

from __future__ import annotations

import socket
import ssl

import pytest

from tests.unit.preparation.conftest import HOST, PUBLIC, Site, picture, send
from theworld_train.preparation.addresses import address_problem
from theworld_train.preparation.download import MAX_REDIRECTS, Downloader, DownloadError


class NoConnectionError(AssertionError):
    """Raised where a test must not connect."""


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise NoConnectionError

    monkeypatch.setattr(socket, "socket", refuse)


def failure(downloader: Downloader, url: str) -> DownloadError:
    with pytest.raises(DownloadError) as caught:
        downloader.fetch(url)
    return caught.value


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("127.0.0.1", "loopback"),
        ("127.8.8.8", "loopback"),
        ("::1", "loopback"),
        ("10.0.0.1", "private"),
        ("172.16.5.4", "private"),
        ("192.168.1.1", "private"),
        ("fd00::1", "private"),
        ("169.254.169.254", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("224.0.0.1", "multicast"),
        ("ff02::1", "multicast"),
        ("0.0.0.0", "unspecified"),
        ("::", "unspecified"),
        ("240.0.0.1", "reserved"),
        ("255.255.255.255", "reserved"),
        ("100.64.0.1", "public internet"),
        ("192.0.2.1", "private"),
        ("::ffff:127.0.0.1", "IPv4 address within"),
        ("::ffff:8.8.8.8", "IPv4 address within"),
        ("2002:7f00:1::", "IPv4 address within"),
        ("64:ff9b::7f00:1", "reserved"),
    ],
)
@pytest.mark.usefixtures("unconnected")
def test_an_address_that_is_not_public_is_never_connected_to(address: str, kind: str):
    assert kind in (address_problem(address) or "")
    for resolved in ([address], [PUBLIC, address]):
        error = failure(Downloader(resolve=lambda host, port, found=resolved: found), "https://images.example/a.png")
        assert error.reason == "refused address"
        assert address in error.detail


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700::1111"])
def test_public_addresses_are_connected_to(address: str):
    assert address_problem(address) is None


@pytest.mark.usefixtures("unconnected")
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "2130706433", "0x7f.1", "[::ffff:7f00:1]"])
def test_numeric_hosts_are_judged_like_names(host: str):
    assert failure(Downloader(), f"https://{host}/a.png").reason in ("refused address", "unknown host")


@pytest.mark.parametrize(
    "url",
    [
        "http://images.example/a.png",
        "ftp://images.example/a.png",
        "file:///etc/passwd",
        "images.example/a.png",
        "https:///a.png",
        "https://me:secret@images.example/a.png",
        "https://images.example:22/a.png",
        "https://images.example:99999/a.png",
        "",
    ],
)
@pytest.mark.usefixtures("unconnected")
def test_other_urls_are_refused(url: str):
    assert failure(Downloader(resolve=lambda host, port: [PUBLIC]), url).reason == "refused URL"


def test_the_name_is_resolved_once_and_the_checked_address_connected_to(site: Site):
    asked = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["10.0.0.1"]

    assert site.downloader(rebinding).fetch(site.file("/a.png", picture())) == picture()
    assert asked == [HOST]
    assert site.hosts == {f"{HOST}:{site.port}"}


def test_an_address_that_does_not_answer_is_passed_over(site: Site):
    url = site.file("/a.png", picture())
    downloader = site.downloader(lambda host, port: ["127.0.0.2", "127.0.0.1"])
    assert downloader.fetch(url) == picture()


def test_the_certificate_has_to_be_trusted(site: Site):
    downloader = Downloader(
        site.downloader().limits, resolve=lambda host, port: ["127.0.0.1"], judge=lambda address: None
    )
    assert failure(downloader, site.file("/a.png", picture())).reason == "no trusted connection"


def test_the_certificate_has_to_be_the_hosts(site: Site):
    site.file("/a.png", picture())
    assert failure(site.downloader(), site.url("/a.png", "other.example")).reason == "no trusted connection"
    assert site.asked == {}


def test_a_lax_context_is_not_taken():
    context = ssl.create_default_context()
    context.check_hostname = False
    with pytest.raises(AssertionError):
        Downloader(context=context)


def test_redirects_are_followed_and_relative_ones_too(site: Site):
    site.file("/there/a.png", picture())
    site.redirect("/there/b", "a.png")
    assert site.downloader().fetch(site.redirect("/first", site.url("/there/b"))) == picture()


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("http://images.example/a.png", "refused URL"),
        ("https://images.example:22/a.png", "refused URL"),
        ("file:///etc/passwd", "refused URL"),
        ("https://inside.example:{port}/a.png", "refused address"),
        ("https://169.254.169.254:{port}/latest", "refused address"),
    ],
)
def test_redirects_are_checked_like_the_first_url(site: Site, target: str, reason: str):
    addresses = {HOST: ["127.0.0.1"], "inside.example": ["10.0.0.7"]}
    downloader = site.downloader(lambda host, port: addresses.get(host, [host]))
    assert failure(downloader, site.redirect("/out", target.format(port=site.port))).reason == reason


def test_redirects_end(site: Site):
    for number in range(MAX_REDIRECTS + 1):
        site.redirect(f"/{number}", f"/{number + 1}")
    site.file(f"/{MAX_REDIRECTS + 1}", picture())
    assert failure(site.downloader(), site.url("/0")).reason == "too many redirects"
    assert site.downloader().fetch(site.url("/1")) == picture()


@pytest.mark.parametrize("how", ["file", "unsized", "chunked"])
def test_a_file_ends_at_its_most_bytes(site: Site, how: str):
    serve = getattr(site, how)
    url = serve("/a.png", picture())
    most = len(picture())
    assert site.downloader(file_bytes=most).fetch(url) == picture()
    spent: list[int] = []
    with pytest.raises(DownloadError) as caught:
        site.downloader(file_bytes=most - 1).fetch(url, spent.append)
    assert caught.value.reason == "too large"
    assert bool(spent) == (how != "file")  # where the number is told, nothing is read


def test_a_file_without_end_is_left(site: Site):
    url = site.unsized("/endless", b"x" * 5_000_000)
    spent: list[int] = []
    with pytest.raises(DownloadError, match="too large"):
        site.downloader(file_bytes=100_000).fetch(url, spent.append)
    assert sum(spent) <= 200_000


@pytest.mark.parametrize("in_headers", [False, True])
def test_a_server_that_drips_is_left(site: Site, in_headers: bool):
    assert failure(site.downloader(seconds=0.4), site.dripping("/slow", in_headers)).reason == "too slow"


def test_a_file_that_is_cut_off_is_no_file(site: Site):
    site.answers["/cut"] = lambda handler: send(handler, 200, b"half", {"Content-Length": "8"})
    assert failure(site.downloader(), site.url("/cut")).reason == "connection failed"


def test_what_the_server_does_not_have_and_hosts_that_are_not(site: Site):
    assert failure(site.downloader(), site.url("/none")).reason == "HTTP 404"

    def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror("no such name")

    assert failure(site.downloader(unknown), site.url("/a")).reason == "unknown host"
