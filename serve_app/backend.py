"""Offers the functions of this package to the SDK, and imports each one when it is called.

`tg_tinker.backend.ServeBackend` declares the interface.
"""

from __future__ import annotations

from typing import Any

from tg_tinker import backend


class Backend:
    """The implementation of `tg_tinker.backend.ServeBackend`.

    The imported functions document what each method does.
    """

    def connect(self, embedded: bool, **where: Any) -> backend.Sampler:
        from serve_app.application import connect

        return connect(embedded, **where)

    def serve_http(
        self, host: str, port: int, replicas: int, where: dict[str, Any], **options: Any
    ) -> None:
        from serve_app.application import serve_http

        serve_http(host, port, replicas, where, **options)

    def end_http(self, within_s: float) -> None:
        from serve_app.application import end_http

        end_http(within_s)

    def config(
        self, model_ref: str, dtype: str, host: str, port: int, replicas: int, namespace: str
    ) -> str:
        from serve_app.deploy import config

        return config(model_ref, dtype, host, port, replicas, namespace)

    def seal_http(self) -> None:
        from serve_app.http.sealed import install

        install()


_: type[backend.ServeBackend] = Backend
"""For the type checker: it verifies that `Backend` has every method that the SDK may call."""
