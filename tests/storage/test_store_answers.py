"""Tests that each answer of a store has its own sentence, and that only some are tried again.

A server on this machine gives the answers in the forms of S3 and Google; the texts of Azure's
library are given as they are, because that library ends the process at some answers.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import pytest

from actors.storage.answers import CAUSES, cause_of
from actors.storage.filesystems import RetryPolicy
from actors.storage.objects import LocalFolder
from actors.storage.store import open_objects
from support.disks import Calls
from tg_tinker.errors import StorageError

SECRET = "token-4711"


class Answer(NamedTuple):
    status: int
    code: str = ""
    header: tuple[str, str] = ("x-x", "x")


class Handler(BaseHTTPRequestHandler):
    """Gives one answer to everything, by S3 without a body to HEAD."""

    protocol_version = "HTTP/1.1"
    answer = Answer(200)
    asked: list[str]
    google = False

    def handle_any(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        type(self).asked.append(self.command)
        status, code, header = self.answer
        if self.google:
            reasons = [{"reason": code, "domain": "global", "message": SECRET}]
            whole = {"error": {"code": status, "message": SECRET, "errors": reasons}}
            body = json.dumps(whole) if code else ""
        else:
            body = f"<Error><Code>{code}</Code><Message>{SECRET}</Message></Error>" if code else ""
        sent = b"" if self.command == "HEAD" else body.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if self.google else "application/xml")
        self.send_header(*header)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Handler]]:
    class Fresh(Handler):
        asked: list[str] = []  # noqa: RUF012

    server = ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", url)
    monkeypatch.setattr("actors.storage.filesystems.REQUESTS", 1)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    yield Fresh
    server.shutdown()
    server.server_close()


def refused(uri: str) -> StorageError:
    with pytest.raises(StorageError) as caught:
        open_objects(uri, RetryPolicy(connect_s=2, request_s=2, attempts=2)).read("x")
    assert SECRET not in str(caught.value)
    assert "canary" not in str(caught.value)
    assert caught.value.__suppress_context__
    return caught.value


S3 = {
    "expired_credentials": [(400, "ExpiredToken"), (400, "TokenRefreshRequired")],
    "clock": [(403, "RequestTimeTooSkewed")],
    "quota_exceeded": [(403, "QuotaExceeded"), (400, "XMinioAdminBucketQuotaExceeded")],
    "store_full": [(507, "InsufficientStorage"), (507, "XMinioStorageFull"), (507, "")],
    "wrong_region": [
        (301, "PermanentRedirect"), (400, "AuthorizationHeaderMalformed"), (301, ""),
        (400, "", ("x-amz-bucket-region", "eu-west-1")),
    ],
    "unknown_credentials": [(403, "InvalidAccessKeyId"), (400, "InvalidToken")],
    "wrong_secret": [(403, "SignatureDoesNotMatch")],
    "account_problem": [(403, "AccountProblem"), (403, "UserSuspended")],
    "encryption_key": [(400, "KMS.DisabledException"), (400, "KMS.NotFoundException")],
    "access_denied": [(403, "AccessDenied"), (403, ""), (401, ""), (400, "")],
    "write_protected": [(403, "RetentionPolicyNotMet")],
    "unsupported": [(405, "MethodNotAllowed"), (501, "NotImplemented")],
    "refused": [(403, "Some.Thing"), (400, "MalformedXML")],
    "busy": [(503, "SlowDown"), (429, "TooManyRequests"), (503, "")],
    "unavailable": [(500, "InternalError"), (502, "")],
}  # fmt: skip
GOOGLE = {
    "unknown_credentials": [(401, "authError")],
    "access_denied": [(403, "forbidden"), (403, "")],
    "quota_exceeded": [(403, "quotaExceeded"), (403, "dailyLimitExceeded")],
    "account_problem": [(403, "accountDisabled"), (403, "billingNotEnabled")],
    "write_protected": [(403, "retentionPolicyNotMet")],
    "refused": [(400, "invalid"), (412, "conditionNotMet")],
}
MAY_PASS = ("busy", "unavailable")


def cases(table: dict[str, list[tuple[int, str]]]) -> list[tuple[str, tuple[int, str]]]:
    return [(reason, answer) for reason, answers in table.items() for answer in answers]


@pytest.mark.parametrize(("reason", "answer"), cases(S3))
def test_an_answer_of_s3_has_its_sentence_and_is_tried_again_only_if_it_may_pass(
    reason: str, answer: tuple[int, str], store: type[Handler]
) -> None:
    """The first request is a HEAD, which S3 answers by a number alone."""
    store.answer = Answer(*answer)
    error = refused("s3://bucket/prefix")
    attempts = 1 + (reason in MAY_PASS)
    assert error.details == {"reason": reason, "attempts": attempts}, error
    assert store.asked.count("HEAD") == attempts
    assert len(store.asked) <= attempts + 1, "it asks for the reason once"


@pytest.mark.parametrize(("reason", "answer"), cases(GOOGLE))
def test_an_answer_of_google_has_its_sentence_and_is_not_tried_again(
    reason: str, answer: tuple[int, str], store: type[Handler]
) -> None:
    store.answer, store.google = Answer(*answer), True
    error = refused("gs://bucket/prefix")
    assert error.details == {"reason": reason, "attempts": 1}, error


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [(429, "rateLimitExceeded", "busy"), (500, "backendError", "unavailable")],
)
def test_an_answer_of_google_that_may_pass_is_tried_again(
    status: int, code: str, reason: str
) -> None:
    """The library itself repeats these for seconds."""
    text = f"Status(UNAVAILABLE: x error_info={{reason={code}, http_status_code={status}}})"
    assert cause_of(OSError(text)).reason == reason
    assert cause_of(OSError(text)).may_pass


@pytest.mark.parametrize(("code", "status", "reason"), [
    ("AuthenticationFailed", 403, "access_denied"),
    ("InvalidAuthenticationInfo", 400, "access_denied"),
    ("AuthorizationPermissionMismatch", 403, "access_denied"),
    ("", 403, "access_denied"),
    ("AccountIsDisabled", 403, "account_problem"),
    ("KeyVaultEncryptionKeyNotFound", 403, "encryption_key"),
    ("BlobImmutableDueToPolicy", 409, "write_protected"),
    ("OutOfRangeInput", 400, "refused"),
    ("ServerBusy", 503, "busy"),
    ("ContainerBeingDeleted", 409, "unavailable"),
    ("InternalError", 500, "unavailable"),
])  # fmt: skip
def test_an_answer_of_azure_has_its_sentence(code: str, status: int, reason: str) -> None:
    url = f"http://account.blob.core.windows.net/c?sig={SECRET}"
    cause = cause_of(OSError(f"GetProperties for '{url}' failed. Azure Error: [{code}] {status} x"))
    assert cause.reason == reason
    assert cause.may_pass == (reason in MAY_PASS)
    assert SECRET not in cause.text


@pytest.mark.parametrize(("number", "reason"), [(60, "certificate"), (6, "unknown_host")])
def test_a_connection_that_cannot_be_made_is_told_apart(number: int, reason: str) -> None:
    text = f"AWS Error NETWORK_CONNECTION during HeadBucket operation: curlCode: {number}, x"
    assert cause_of(OSError(text)).reason == reason


def test_a_bare_refusal_names_all_that_it_can_be(store: type[Handler]) -> None:
    store.answer = Answer(403)
    text = refused("s3://bucket").message
    for may_be in ("expired", "permit", "clock", "AWS_REGION", "account", "encryption key"):
        assert may_be in text


def test_each_cause_says_something_of_its_own() -> None:
    for part in ("text", "remedy"):
        assert len({getattr(cause, part) for cause in CAUSES}) == len(CAUSES)
    assert all(cause.remedy.endswith(", and") for cause in CAUSES)


# --- a folder -------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "says"), [
    (errno.ENOSPC, "free space"), (errno.EDQUOT, "quota"), (errno.EACCES, "owns what is in it"),
    (errno.EROFS, "read-only"), (errno.EIO, "check the disk"), (errno.ESTALE, "mount the network"),
    (errno.EMFILE, "ulimit"), (errno.ENXIO, "fix the disk"),
])  # fmt: skip
def test_a_disk_that_refuses_is_told_apart_too(
    code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(_: int) -> None:
        raise OSError(code, os.strerror(code))

    folder = LocalFolder(tmp_path)
    Calls(monkeypatch, spoil)
    with pytest.raises(StorageError, match=says) as caught:
        folder.put("x", b"1")
    assert caught.value.details == {"errno": code}
