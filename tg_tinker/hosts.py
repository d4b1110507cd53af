"""Tells which hosts are this machine, by their parsed addresses and not by their first letters."""

from __future__ import annotations

import ipaddress
import socket


def is_loopback(host: str) -> bool:
    """Returns whether only programs on this machine can listen at a host or reach it.

    Any other name than `localhost` counts as another machine, because only a resolver could tell:
    not every one knows that names below `localhost` are loopback (RFC 6761).
    """
    name = host.lower().removesuffix(".")
    if name == "localhost":
        return True
    address = _address(name)
    return address is not None and address.is_loopback


def stays_here(host: str) -> bool:
    """Returns whether a connection to a host stays on this machine.

    A connection to 0.0.0.0 or :: does so too, but a server there is reached from everywhere.
    """
    address = _address(host)
    return is_loopback(host) or (address is not None and address.is_unspecified)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Returns the address that a numeric host stands for, or None if the host is a name.

    The system accepts more forms than `ipaddress`, such as ``127.1`` and ``0x7f000001``.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, flags=socket.AI_NUMERICHOST)
        address = ipaddress.ip_address(found[0][4][0])
    except (OSError, ValueError):  # a UnicodeError of a name that is too long is a ValueError
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
