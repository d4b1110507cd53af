"""All that this package offers to the SDK, each imported when it is called.

`tg_tinker.backend.ServeBackend` declares it.
"""

from __future__ import annotations

from typing import Any

from tg_tinker import backend


class Backend:
    """See `tg_tinker.backend.ServeBackend`; what each does is documented where it is imported."""

    def connect(self, embedded: bool, **where: Any) -> backend.Sampler:
        from serve_app.application import connect

        return connect(embedded, **where)

    def serve_http(
        self, host: str, port: int, replicas: int, where: dict[str, Any], **options: Any
    ) -> None:
        from serve_app.application import serve_http

        serve_http(host, port, replicas, where, **options)

    def config(
        self, model_ref: str, dtype: str, host: str, port: int, replicas: int, namespace: str
    ) -> str:
        from serve_app.deploy import config

        return config(model_ref, dtype, host, port, replicas, namespace)

    def seal_http(self) -> None:
        from serve_app.http.sealed import install

        install()


_: type[backend.ServeBackend] = Backend
"""Checked by the type checker: what the SDK may call is here, with these arguments."""
