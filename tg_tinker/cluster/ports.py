"""Checks the address and the port on which a server is to listen."""

from __future__ import annotations

import socket
from typing import Any

from tg_tinker.errors import ClusterUnavailableError, InvalidRequestError


def addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    """Returns the address families and socket addresses of a host, IPv4 first.

    Raises:
        InvalidRequestError: the host has no address.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise InvalidRequestError(
            f"host {host!r} has no address: use 127.0.0.1 (this machine) or 0.0.0.0 (all networks)"
        ) from None
    return sorted(((entry[0], entry[4]) for entry in found), key=lambda pair: pair[0])


def check_port(host: str, port: int) -> None:
    """Checks that a program may listen on a port.

    Serve sets SO_REUSEPORT and would share the port with another server of this user.

    Raises:
        InvalidRequestError: the host has no address.
        ClusterUnavailableError: the port is taken, or the system does not allow it.
    """
    family, address = addresses(host, port)[0]
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Serve does
            probe.bind(address)
    except OSError as error:
        raise ClusterUnavailableError(
            f"cannot listen on port {port} of {host} ({error.strerror}): stop the program that uses"
            " it, or choose another --port"
        ) from None
