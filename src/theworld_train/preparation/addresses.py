"""Which network addresses a URL from a data file may lead to: those of the public internet alone."""

from __future__ import annotations

import ipaddress
import socket


def address_problem(address: str) -> str | None:
    """Says why an address is not connected to, or returns None if it is one of the public internet.

    The kinds are those of IANA's registries of special-purpose addresses, as `ipaddress` knows them.

    Args:
        address: A numeric IPv4 or IPv6 address.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and (ip.ipv4_mapped or ip.sixtofour or ip.teredo):
        return "an IPv4 address within an IPv6 one"
    kinds = {
        "an unspecified address": ip.is_unspecified,
        "a loopback address": ip.is_loopback,
        "a link-local address": ip.is_link_local,
        "a multicast address": ip.is_multicast,
        "a reserved address": ip.is_reserved,
        "a private address": ip.is_private,
        "not an address of the public internet": not ip.is_global,
    }
    return next((kind for kind, applies in kinds.items() if applies), None)


def resolve(host: str, port: int) -> list[str]:
    """Returns the numeric addresses of a host, in the order that the system prefers.

    Raises:
        OSError: If it has none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))
