"""Tells what other users of this machine cannot have written, replaced or opened.

Root, and the owner of `/`, may do anything here: they count as this user.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_MOST_BYTES = 65_536
_LISTENS = "0A"
"""The code of a listening socket in proc_net_tcp(5)."""

_TCP = tuple(Path("/proc/net", name) for name in ("tcp", "tcp6"))


def keeps_names(folder: Path) -> bool:
    """Returns whether nobody else can rename or replace what this user makes in a folder.

    In a sticky folder such as `/tmp`, others may still add files of their own.
    """
    return _nobody_writes(folder, even_if_sticky=False)


def keeps_out(folder: Path) -> bool:
    """Returns whether nobody else can add, rename or replace a file in a folder."""
    return _nobody_writes(folder, even_if_sticky=True)


def is_closed(folder: Path) -> bool:
    """Returns whether a path is a folder of this user, no link, which nobody else may enter."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and _is_closed(found)


def is_foreign_link(path: Path) -> bool:
    """Returns whether a path is a link of another user, who chooses where it leads."""
    return path.is_symlink() and path.lstat().st_uid not in _trusted()


def read_own(file: Path) -> str | None:
    """Returns the text of a file of this user; None if there is none, or others may write to it.

    The file is not found through a link in its own place. What is checked is what is read, so
    nobody can put another file there between the two. The caller checks the folder.
    """
    try:
        # Without O_NONBLOCK, a FIFO of another user would hold the program up.
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with suppress(OSError, UnicodeError), os.fdopen(descriptor, "rb") as opened:
        found = os.fstat(descriptor)
        # A second name may be that which another user gave to any file of this user.
        is_whole = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
        may_write = found.st_mode & 0o022 and not _is_hidden(file)
        if is_whole and _is_own(found) and not may_write:
            return opened.read(_MOST_BYTES).decode()
    return None


def is_exposed(file: Path) -> bool:
    """Returns whether others can read a file: its mode and the folders above it decide."""
    found = file.stat()
    return not _is_own(found) or (bool(found.st_mode & 0o077) and not _is_hidden(file))


def others_listen(address: str) -> bool:
    """Returns whether a program of another user listens at ``host:port`` of this machine.

    A port outlives no program: whoever comes first has the port that a cluster has left. Only Linux
    tells whose a port is; elsewhere, and about other machines, nothing is known.
    """
    host, _, port = address.rpartition(":")
    try:
        found = {_plain(info[4][0]) for info in socket.getaddrinfo(host.strip("[]"), None)}
        here = {one for one in found if _is_here(one)}
        return any(
            uid not in _trusted()
            for at, number, uid in _listeners()
            if here and number == int(port) and (at in here or at.is_unspecified)
        )
    except (OSError, ValueError):
        return False


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _listeners() -> Iterator[tuple[_Address, int, int]]:
    """Yields the address, the port and the owner of each listening socket of this machine."""
    for table in _TCP:
        with suppress(FileNotFoundError):
            for line in table.read_text().splitlines()[1:]:
                _, local, _, state, _, _, _, uid, *_ = line.split()
                if state == _LISTENS:
                    host, _, port = local.partition(":")
                    yield listed_address(host), int(port, 16), int(uid)


def listed_address(text: str) -> _Address:
    """Returns the address that proc_net_tcp(5) lists as words of four bytes in native order."""
    words = [bytes.fromhex(text[at : at + 8]) for at in range(0, len(text), 8)]
    packed = b"".join(word[:: 1 if sys.byteorder == "big" else -1] for word in words)
    return _plain(str(ipaddress.ip_address(packed)))


def _plain(text: str | int) -> _Address:
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _is_here(address: _Address) -> bool:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((str(address), 0))
        return True
    return False


def _nobody_writes(folder: Path, even_if_sticky: bool) -> bool:
    """Checks a folder and those above it, from `/` on, so that each is checked in its place."""
    try:
        place = folder.resolve(strict=True)
        for one in reversed((place, *place.parents)):
            found = one.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid not in _trusted():
                return False
            if _is_closed(found):
                return True  # Nobody else gets to what is below.
            sticky = found.st_mode & stat.S_ISVTX and not (even_if_sticky and one == place)
            if found.st_mode & 0o022 and not sticky:
                return False
    except (OSError, RuntimeError):
        return False
    return True


def _is_hidden(file: Path) -> bool:
    """Returns whether nobody else may enter one of the folders above a file."""
    return any(_is_closed(one.stat()) for one in file.resolve().parents)


def _is_closed(found: os.stat_result) -> bool:
    return _is_own(found) and not found.st_mode & 0o077


def _is_own(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid()


def _trusted() -> set[int]:
    """Returns the users that count as this one; in a container, root may have another number."""
    return {0, os.geteuid(), Path("/").stat().st_uid}
