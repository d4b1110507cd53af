"""Ports that a server is to listen at."""

from __future__ import annotations

import socket
from typing import Any

from tg_tinker.errors import ClusterUnavailableError, InvalidRequestError


def addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    """Families and socket addresses of a host, IPv4 first.

    Raises:
        InvalidRequestError: it has none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise InvalidRequestError(
            f"host {host!r} has no address: 127.0.0.1 is this machine, 0.0.0.0 all its networks"
        ) from None
    return sorted(((entry[0], entry[4]) for entry in found), key=lambda pair: pair[0])


def check_port(host: str, port: int) -> None:
    """Whether a program may listen there.

    Serve itself sets SO_REUSEPORT: it would share the port of another server of this user.

    Raises:
        InvalidRequestError: a host without an address.
        ClusterUnavailableError: the port is taken, or the system does not give it.
    """
    family, address = addresses(host, port)[0]
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Serve does
            probe.bind(address)
    except OSError as error:
        raise ClusterUnavailableError(
            f"cannot listen on port {port} of {host} ({error.strerror}): stop the program that has"
            " it, or take another --port"
        ) from None
