"""Builds the application for Serve's own config files: `serve deploy serve.yaml`, `serve run`.

    import_path: serve_app.deploy:app
    args: {model_ref: HuggingFaceTB/SmolLM2-135M-Instruct}

`tg-tinker serve --write-config` writes such a file. Every request needs an API key.
"""

# Serve reads the type of `app`'s argument, so types are not strings here.
import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from actors.storage.home import STORE
from serve_app.application import Place, bound
from serve_app.http.access import HttpOptions
from tg_tinker.backend import actors_backend
from tg_tinker.cluster.connection import check_encrypted, check_requires_token
from tg_tinker.storage.databases import default_database
from tg_tinker.storage.home import home_directory
from tg_tinker.storage.keyrings import audit_folder, default_place, place_of
from tg_tinker.storage.stores import as_text


class Settings(BaseModel):
    """The `args` of the config file.

    Attributes:
        model_ref: a hub id, or the absolute path of a Hugging Face directory or a GGUF file.
        home, store, database, keyring: the locations, as in `ServiceClient`. If omitted, those of
            the user of the head node.
        num_cpus, num_gpus, num_threads: the resources of each replica.
        max_replicas: the maximum number of replicas.
        max_tokens: the maximum of `max_tokens` times completions, for one request.
        max_concurrent: the maximum number of concurrent requests of one key.
        deadline_s: the maximum time of one request in seconds.
    """

    model_config = ConfigDict(extra="forbid")

    model_ref: str
    dtype: str = "auto"
    namespace: str = "tg_tinker"
    home: str | None = None
    store: str | None = None
    database: str | None = None
    keyring: str | None = None
    num_cpus: Annotated[float, Field(ge=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    num_threads: Annotated[int, Field(ge=1)] | None = None
    max_replicas: Annotated[int, Field(ge=1)] = 1
    max_tokens: Annotated[int, Field(ge=1)] = 16_384
    max_concurrent: Annotated[int, Field(ge=1)] = 32
    deadline_s: Annotated[float, Field(gt=0)] = 300.0


def app(settings: Settings) -> serve.Application:
    """Returns the application, and starts the registry if none runs yet.

    The home of the registry must exist (`tg-tinker init`).

    Raises:
        InvalidRequestError: the cluster requires no token, or it has several machines and Ray's
            TLS is off.
    """
    home = Path(settings.home or home_directory())
    store = as_text(settings.store or str(home / STORE))
    keyring = place_of(settings.keyring) if settings.keyring else default_place(home)
    check_requires_token()
    check_encrypted()
    actors_backend().start_registry(
        settings.namespace,
        settings.database or default_database(home),
        str(keyring),
        str(audit_folder(keyring, home)),
        # `sole`: on a cluster, one registry alone uses the database.
        True,
    )
    place = Place(
        namespace=settings.namespace, model_ref=settings.model_ref, dtype=settings.dtype,
        home=str(home), store=store, num_cpus=settings.num_cpus,
        num_gpus=settings.num_gpus,
        threads=settings.num_threads or max(1, int(settings.num_cpus)),
    )  # fmt: skip
    options = HttpOptions(
        most_tokens=settings.max_tokens, most_at_once=settings.max_concurrent,
        deadline_s=settings.deadline_s,
    )  # fmt: skip
    return bound(place, options, settings.max_replicas)


def config(model_ref: str, dtype: str, host: str, port: int, replicas: int, namespace: str) -> str:
    """Returns a config file for `serve deploy`.

    The file gives the application the name by which `TrainingClient.sample` finds it.
    """
    place = Place(namespace, model_ref, dtype, home="", store="", num_cpus=1, num_gpus=0, threads=1)
    return f"""\
# On the head node, after `tg-tinker init` and `tg-tinker api-keys create`; Ray was started with
# RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve_app.http.sealed:middlewares (docs/sampling.md):
#     serve deploy FILE
proxy_location: HeadOnly
http_options: {{host: {json.dumps(host)}, port: {port}}}
logging_config: {{enable_access_log: false, log_level: WARNING}}
applications:
  - name: {place.name}  # programs that train on this model look for it, and so does the proxy
    route_prefix: /
    import_path: serve_app.deploy:app
    args:
      model_ref: {json.dumps(model_ref)}
      dtype: {dtype}
      namespace: {namespace}
      max_replicas: {replicas}
      num_cpus: 1  # of each replica
      num_gpus: 0
"""
