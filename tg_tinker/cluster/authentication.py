"""Makes Ray require its token of every program, and checks that a cluster does so.

Who has the token, or reaches a cluster that requires none, may run code as the cluster's user.
Ray's own default has changed between its versions, so it decides nothing here.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tg_tinker.cluster.other_users import is_exposed, keeps_out
from tg_tinker.cluster.ray_calls import lazy_ray
from tg_tinker.errors import ClusterUnavailableError, InvalidRequestError, StorageError
from tg_tinker.storage.files import written
from tg_tinker.storage.home import home_directory, unusable
from tg_tinker.storage.paths import absolute_path

TESTED_RAY = "2.60"
"""The oldest version of Ray that the tests have passed with; pyproject.toml allows no older one."""

ANSWERS_WITHIN_S = 30.0

_log = logging.getLogger("tg_tinker")

_HOW_TO_RENEW = (
    "remove it, so that the next start makes a new one, and restart the clusters that use it; if"
    " nobody else has used this machine, `chmod 600` it instead"
)
HOW_TO_CLOSE = (
    "make these folders yours and `chmod go-w` them, or set RAY_AUTH_TOKEN_PATH to a token in a"
    " folder that only you may enter"
)


_PATH = "RAY_AUTH_TOKEN_PATH"


def token_file(environment: Mapping[str, str] = os.environ) -> Path:
    """Returns the path of the file with Ray's token: the one that `RAY_AUTH_TOKEN_PATH` names, else
    Ray's own, else `ray-token` in the home of TG-Tinker.

    The last is for users without a home of their own that they may write to, as in a container that
    runs under a number alone. Ray finds this file after `name_token`.

    Raises:
        InvalidRequestError, StorageError: see `absolute_path` and `home_directory`.
    """
    if named := environment.get(_PATH):
        return absolute_path(Path(named))
    try:
        own = Path("~/.ray/auth_token").expanduser()
        there = next(one for one in (own, *own.parents) if one.exists())
        if not there.is_dir() or os.access(there, os.W_OK | os.X_OK):
            return own
    except (RuntimeError, OSError):  # no such user, or a folder is closed to this one
        pass
    return home_directory() / "ray-token"


def name_token() -> None:
    """Names the token's file to Ray, to its nodes and workers, where it is in TG-Tinker's home."""
    if (token := token_file()) == home_directory() / "ray-token":
        os.environ[_PATH] = str(token)


def _is_named(environment: Mapping[str, str]) -> bool:
    """Returns whether the operator has named the token's file, and not `name_token`."""
    named = environment.get(_PATH)
    return bool(named) and Path(str(named)) != home_directory() / "ray-token"


def check_token(environment: Mapping[str, str] = os.environ) -> bool:
    """Returns whether there is a token, which no other user can have read or replaced.

    Raises:
        StorageError: others may read Ray's own token file, or replace it.
    """
    if environment.get("RAY_AUTH_TOKEN"):
        return True
    token = token_file(environment)
    if not token.is_file():
        return False
    is_named = _is_named(environment)
    if not is_named and not is_exposed(token):
        _close(token)
    if wrong := wrong_with(token):
        wrong += ", and whoever has it may run code as you: "
        if not is_named:
            raise StorageError(wrong + (_HOW_TO_RENEW if is_exposed(token) else HOW_TO_CLOSE))
        # A mounted secret may have a mode that its user cannot choose.
        _log.warning("%s`chmod 600` it, or see docs/deployment.md", wrong)
    return True


def wrong_with(token: Path) -> str:
    """Returns who else may have the token of a file; an empty text if nobody."""
    if is_exposed(token):
        mode = token.stat().st_mode & 0o7777
        return f"Ray's token {token} has mode {mode:04o} or another owner, others may read it"
    if not keeps_out(token.parent):
        return f"others may write to the folder of Ray's token {token}, or to one above it"
    return ""


def make_token(environment: Mapping[str, str] = os.environ) -> None:
    """Makes Ray's token file with mode 0600, unless there is a token.

    Ray itself makes a file that all users of the machine may read.

    Raises:
        StorageError: the file cannot be made, or see `check_token`.
    """
    if check_token(environment) or _is_named(environment):
        return
    token = token_file(environment)
    try:
        token.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _close(token)
        with written(token, secrets.token_hex(32).encode()) as made, suppress(FileExistsError):
            os.link(made, token)  # Unless another program has made it meanwhile.
        wrong = "" if check_token(environment) else "its name is taken"
    except OSError as error:
        if token.parent == home_directory():
            raise unusable(token.parent, error) from None
        wrong = error.strerror or type(error).__name__
    if wrong:
        raise StorageError(
            f"cannot make Ray's token {token} ({wrong}): check that you own the folder, and that"
            " nothing else has this name"
        )


def _close(token: Path) -> None:
    """Closes the token's file and folder to others, as far as they are this user's."""
    for path, mode in ((token.parent, 0o700), (token, 0o600)):
        with suppress(OSError):
            path.chmod(mode)


def require_token() -> None:
    """Makes this process, and the Ray that it starts, use and require the token.

    Ray reads the setting at its import, which the program may have done before.

    Raises:
        ClusterUnavailableError: this version of Ray cannot do so.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    core = lazy_ray()._raylet
    try:
        core.Config.initialize("")
        does = core.get_authentication_mode() == core.AuthenticationMode.TOKEN
    except AttributeError:
        does = False
    if not does:
        raise ClusterUnavailableError(
            f"Ray {lazy_ray().__version__} does not require its token: install Ray {TESTED_RAY} or"
            " a newer version 2"
        )


def check_authenticated(address: str, environment: Mapping[str, str] = os.environ) -> None:
    """Checks that the cluster at ``host:port`` refuses a program without its token.

    The question carries no token, so a stranger who listens there learns none.

    Raises:
        InvalidRequestError: the cluster answers to everyone.
        ClusterUnavailableError: no cluster answers.
    """
    import grpc

    try:
        with _channel(address, environment) as channel:
            ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
            ask(b"", timeout=ANSWERS_WITHIN_S)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            return
        raise ClusterUnavailableError(
            f"no Ray cluster answers at {address} ({error.code().name}): check the address, and"
            " that RAY_USE_TLS and its certificates are the same as at the start of the cluster"
        ) from None
    except OSError as error:
        raise InvalidRequestError(
            f"a certificate of Ray's TLS cannot be read ({error.strerror}): correct the paths in"
            " RAY_TLS_CA_CERT, RAY_TLS_SERVER_CERT and RAY_TLS_SERVER_KEY"
        ) from None
    raise InvalidRequestError(
        f"the cluster at {address} requires no token, so whoever reaches it may run code and read"
        " your data: end it, and start it by `tg-tinker up` or with RAY_AUTH_MODE=token"
        " (docs/deployment.md)"
    )


def check_fits(address: str, how: str, environment: Mapping[str, str] = os.environ) -> None:
    """Checks that the cluster at ``host:port`` takes this program's token and versions.

    Ray itself says neither in time: it waits, or raises what is only a text.

    Args:
        how: how the address was found or named, for the error.

    Raises:
        ClusterUnavailableError: the cluster has another token, or another version of Ray or Python.
    """
    import grpc
    from google.protobuf.message import DecodeError

    ray = lazy_ray()
    messages = ray.core.generated.gcs_service_pb2
    about = messages.InternalKVGetRequest(namespace=b"cluster", key=b"CLUSTER_METADATA")
    token = (environment.get("RAY_AUTH_TOKEN") or _text_of(token_file(environment))).strip()
    try:
        with _channel(address, environment) as channel:
            ask = channel.unary_unary("/ray.rpc.InternalKVGcsService/InternalKVGet")
            answer = ask(
                about.SerializeToString(), timeout=ANSWERS_WITHIN_S,
                metadata=[("authorization", f"Bearer {token}")],
            )  # fmt: skip
        found = json.loads(messages.InternalKVGetReply.FromString(answer).value)
        theirs = found["ray_version"], found["python_version"]
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
            return  # Ray's own connection tells.
        raise ClusterUnavailableError(
            f"the Ray cluster at {address}, {how}, requires another token than this program has:"
            " set RAY_AUTH_TOKEN_PATH to a file with its token, or pass address='local' for an"
            " embedded cluster"
        ) from None
    except (ValueError, KeyError, TypeError, DecodeError):
        return
    try:
        ray._private.utils.check_version_info(found, address)
    except RuntimeError:
        ours = ray._private.utils.compute_version_info()
        raise ClusterUnavailableError(
            f"the Ray cluster at {address}, {how}, runs Ray {theirs[0]} on Python {theirs[1]}, and"
            f" this program Ray {ours[0]} on Python {ours[1]}: use the same versions, or pass"
            " address='local' for an embedded cluster"
        ) from None


def _text_of(token: Path) -> str:
    try:
        return token.read_text()
    except (OSError, UnicodeError):
        return ""


def _channel(address: str, environment: Mapping[str, str]) -> Any:
    """Returns a connection that no proxy of the environment sees, under TLS if Ray uses it."""
    import grpc

    options = [("grpc.enable_http_proxy", 0)]
    if environment.get("RAY_USE_TLS") != "1":
        return grpc.insecure_channel(address, options)
    names = ("RAY_TLS_CA_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_SERVER_CERT")
    files = [Path(environment.get(name, "")).read_bytes() for name in names]
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(*files), options)
