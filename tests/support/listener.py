"""Listens at the loopback, keeps every byte that it gets, and gives one answer to everyone."""

from __future__ import annotations

import socket
import threading
from typing import Self


class Listener:
    """A server, or a proxy, that shows what programs send.

    Args:
        answer: what everyone gets after the head of the request and the body that it announces.
        keep_open_until: the event after which connections are closed; None closes them at once.
    """

    def __init__(
        self, answer: bytes, host: str = "127.0.0.1", keep_open_until: threading.Event | None = None
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family)
        self._answer, self._until = answer, keep_open_until
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self.heard = b""
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(20)
                self._receive(connection)
                connection.sendall(self._answer)
                if self._until is not None:
                    self._until.wait(20)

    def _receive(self, connection: socket.socket) -> None:
        """Reads one request whole: a connection that is closed with unread bytes is reset."""
        request, missing = b"", 1
        while missing > 0 and (piece := connection.recv(65_536)):
            request, self.heard = request + piece, self.heard + piece
            head, end, body = request.partition(b"\r\n\r\n")
            if end:
                _, _, length = head.lower().partition(b"content-length:")
                missing = int(length.split(b"\r\n")[0] or 0) - len(body)
