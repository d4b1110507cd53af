"""Opens pyarrow's filesystems; `answers` interprets their errors.

Credentials and endpoints come from the environment of the process, never from arguments: a pickled
filesystem contains its secrets in clear.

    s3      AWS_ACCESS_KEY_ID ..., profiles, instance roles; AWS_REGION or AWS_DEFAULT_REGION;
            AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL for a store that is not Amazon's
    gs      GOOGLE_APPLICATION_CREDENTIALS ...; CLOUD_STORAGE_EMULATOR_ENDPOINT
    abfss   AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN, else AZURE_CLIENT_ID ... and managed
            identities; AZURE_STORAGE_SERVICE_ENDPOINT for an emulator
    hdfs    libhdfs with its Hadoop configuration and Kerberos tickets
"""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from tg_tinker.errors import InvalidRequestError
from tg_tinker.hosts import stays_here
from tg_tinker.storage.stores import Location

REQUESTS = 3
"""How often the library sends an s3 request: a part of a large object can fail alone. A larger
number would exceed any deadline, because the pauses double."""


@dataclass(frozen=True)
class RetryPolicy:
    """How long a store may take.

    Attributes:
        connect_s: Seconds until a connection is established; s3 only.
        request_s: On s3, seconds without a byte after which a request fails; about six more while
            it sends. On gs, seconds during which the library repeats a request. On abfss and hdfs
            the limits of the libraries apply.
        attempts: The number of attempts of an operation. Within an attempt on s3, the library
            repeats each request (`REQUESTS`).
        deadline_s: Seconds after which no further attempt of an operation begins.
    """

    connect_s: float = 5.0
    request_s: float = 10.0
    attempts: int = 3
    deadline_s: float = 120.0


# --- opening -------------------------------------------------------------------------------------


def open_filesystem(location: Location, policy: RetryPolicy) -> Any:
    """Returns a `pyarrow.fs.FileSystem` that creates no bucket. Only hdfs connects here.

    Raises:
        InvalidRequestError: An environment variable is malformed.
        OSError: There is no connection (hdfs).
    """
    from pyarrow import fs

    match location.scheme:
        case "s3":
            return fs.S3FileSystem(
                region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
                connect_timeout=policy.connect_s,
                request_timeout=policy.request_s,
                retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=REQUESTS),
                # A small object is one request: the store has the old or the new one, never a part.
                allow_delayed_open=True,
                **_s3_endpoint(),
            )
        case "gs":
            _keep_from_proxies("CLOUD_STORAGE_EMULATOR_ENDPOINT")
            return fs.GcsFileSystem(
                anonymous="CLOUD_STORAGE_EMULATOR_ENDPOINT" in os.environ,
                retry_time_limit=timedelta(seconds=max(1.0, policy.request_s)),
            )
        case "abfss":
            _keep_from_proxies("AZURE_STORAGE_SERVICE_ENDPOINT")
            account, _, domain = location.host.partition(".dfs.")
            return fs.AzureFileSystem(
                account,
                account_key=_azure_key(),
                sas_token=os.environ.get("AZURE_STORAGE_SAS_TOKEN"),
                **_azure_endpoint(domain),
            )
        case _:
            return fs.HadoopFileSystem(location.host or "default", location.port)


def _s3_endpoint() -> dict[str, str]:
    endpoint = _endpoint("AWS_ENDPOINT_URL_S3") or _endpoint("AWS_ENDPOINT_URL")
    if not endpoint:
        return {}
    return {"scheme": endpoint[0], "endpoint_override": endpoint[1]}


def _azure_endpoint(domain: str) -> dict[str, str]:
    scheme, authority = _endpoint("AZURE_STORAGE_SERVICE_ENDPOINT") or ("https", "")
    return {
        "blob_storage_scheme": scheme,
        "dfs_storage_scheme": scheme,
        "blob_storage_authority": authority or f".blob.{domain}",
        "dfs_storage_authority": authority or f".dfs.{domain}",
    }


def _endpoint(variable: str) -> tuple[str, str] | None:
    """Returns scheme and `host:port` of an address in the environment; None if the variable is not
    set."""
    address = os.environ.get(variable)
    if not address:
        return None
    parts = urlsplit(address)
    plain = parts.scheme in ("http", "https") and parts.netloc and "@" not in parts.netloc
    if not plain or parts.path.strip("/") or parts.query:
        raise InvalidRequestError(
            f"the environment's {variable} is not an address: set it in the form https://HOST:PORT"
        )
    return parts.scheme, parts.netloc


def _keep_from_proxies(variable: str) -> None:
    """Exempts a store on this machine from the proxies that the environment names.

    Under gs and abfss, libcurl would send requests with their token to such a proxy. Arrow has no
    setting for that, but libcurl reads `no_proxy` for each request. s3 uses none of these proxies.
    """
    try:
        host = urlsplit(os.environ.get(variable, "")).hostname or ""
    except ValueError:
        return
    exempt = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
    if stays_here(host) and exempt != "*" and host not in exempt.split(","):
        os.environ["no_proxy"] = ",".join(filter(None, (exempt, host)))


def _azure_key() -> str | None:
    """Returns the key of the account; None if it is not set. Refuses a key that is not base64,
    which would end the whole process inside pyarrow."""
    key = os.environ.get("AZURE_STORAGE_KEY")
    try:
        base64.b64decode(key or "", validate=True)
    except binascii.Error:
        raise InvalidRequestError("the environment's AZURE_STORAGE_KEY is not base64") from None
    return key


# --- looking -------------------------------------------------------------------------------------


def bucket_exists(filesystem: Any, bucket: str) -> bool:
    from pyarrow.fs import FileType

    return bool(filesystem.get_file_info(bucket).type == FileType.Directory)


def files_below(filesystem: Any, path: str) -> list[Any]:
    """Returns a `pyarrow.fs.FileInfo` for each object below a folder, at any depth."""
    from pyarrow.fs import FileSelector

    selector = FileSelector(path, recursive=True, allow_not_found=True)
    return [info for info in filesystem.get_file_info(selector) if info.is_file]


def folders_in(filesystem: Any, path: str) -> list[str]:
    """Returns the names of the folders directly in a folder."""
    from pyarrow.fs import FileSelector, FileType

    # On gs arrow lists no folder that has no object of its own.
    if filesystem.type_name == "gcs":
        below = (info.path.removeprefix(f"{path}/") for info in files_below(filesystem, path))
        return list({name.partition("/")[0] for name in below if "/" in name})
    found = filesystem.get_file_info(FileSelector(path, allow_not_found=True))
    return [info.base_name for info in found if info.type == FileType.Directory]


def failures() -> tuple[type[Exception], ...]:
    """Returns the exception types that operations of a filesystem raise."""
    from pyarrow import ArrowException

    return (OSError, ArrowException)
