"""The application for Serve's own config files: `serve deploy serve.yaml`, `serve run`.

    import_path: serve_app.deploy:app
    args: {model_ref: HuggingFaceTB/SmolLM2-135M-Instruct}

`tg-tinker serve --write-config` writes such a file. Every request needs an API key.
"""

# Serve reads the type of `app`'s argument: types are no strings here.
import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from actors.storage.home import STORE
from serve_app.application import Place, bound
from serve_app.http.access import HttpOptions
from tg_tinker.backend import actors_backend
from tg_tinker.cluster.connection import check_encrypted
from tg_tinker.storage.databases import default_database
from tg_tinker.storage.home import home_directory
from tg_tinker.storage.keyrings import audit_folder, default_place, place_of
from tg_tinker.storage.stores import as_text


class Settings(BaseModel):
    """`args` of the config file.

    Attributes:
        model_ref: hub id, or absolute path of a Hugging Face directory or a GGUF file.
        home, store, database, keyring: where `ServiceClient` has them; of the head node's user
            when left out.
        num_cpus, num_gpus, num_threads: of each replica.
        max_replicas: copies of the model at most.
        max_tokens: of one request, times its completions.
        max_concurrent: requests of one key at a time.
        deadline_s: of one request.
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
    """Starts the registry where none runs yet; its home must exist (`tg-tinker init`).

    Raises:
        InvalidRequestError: several machines without Ray's TLS.
    """
    home = Path(settings.home or home_directory())
    store = as_text(settings.store or str(home / STORE))
    keyring = place_of(settings.keyring) if settings.keyring else default_place(home)
    check_encrypted()
    actors_backend().start_registry(
        settings.namespace,
        settings.database or default_database(home),
        str(keyring),
        str(audit_folder(keyring, home)),
        True,  # a cluster: it shares its database with none
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
    """A file for `serve deploy`, under the name by which `TrainingClient.sample` finds it."""
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
