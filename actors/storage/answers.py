"""Says what a store's refusal means, and what to do: S3 and compatible, Google, Azure, HDFS.

A refusal that only a person can end is never tried again, and has a sentence of its own. The
library's own text is never repeated: it contains URLs, on Azure with the token. Names of answers
are from the stores' lists of error codes (Amazon S3 "Error responses", Google Cloud Storage "HTTP
status and error codes", Azure "Common REST API error codes" and "Blob service error codes", and
`api-errors.go` of MinIO).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class NoBucketError(OSError):
    """The error for a bucket that does not exist."""


class SizeDiffersError(OSError):
    """The error for an object whose size in the store differs from what was sent."""


class Cause(NamedTuple):
    """The meaning of a store's refusal."""

    reason: str  # A stable name for programs.
    text: str
    remedy: str
    may_pass: bool = False  # Whether to try again.


NO_BUCKET = Cause(
    "no_bucket", "there is no such bucket", "create it (TG-Tinker never does), and"
)  # fmt: skip
TRUNCATED = Cause(
    "size_differs", "it has another number of bytes than it was sent",
    "check the network and any proxy between here and the store, and", True,
)  # fmt: skip
NO_LIBRARY = Cause(
    "no_library", "libjvm or libhdfs cannot be loaded",
    "install Java and Hadoop, set JAVA_HOME, HADOOP_HOME and CLASSPATH, and",
)  # fmt: skip
DENIED = Cause(
    "access_denied", "access denied",
    "grant the identity of the actors' credentials listing, reading, writing and deleting below"
    " the prefix, see that no policy of the bucket or the network forbids it, and",
)  # fmt: skip
UNEXPLAINED = Cause(
    "access_denied", "access denied, or the request not accepted, without a reason",
    "check in the environment of the actors that there are credentials, that they are right and"
    " have not expired, and that they permit listing, reading, writing and deleting below the"
    " prefix; then the clock of this machine, the region (AWS_REGION), that the account is active"
    " and pays, that the encryption key of the bucket may be used, and a proxy on the way, and",
)  # fmt: skip
EXPIRED = Cause(
    "expired_credentials", "the credentials have expired",
    "get new ones (a session token lasts hours; a role or a profile renews itself), put them into"
    " the environment where Ray starts, restart the cluster, and",
)  # fmt: skip
UNKNOWN_KEY = Cause(
    "unknown_credentials", "the store does not know or accept these credentials",
    "check which credentials the environment of the actors has, that they belong to this store"
    " (AWS_ENDPOINT_URL) and that nobody has disabled them, and",
)  # fmt: skip
WRONG_SECRET = Cause(
    "wrong_secret", "the signature of the request is wrong",
    "check the secret half of the credentials for missing or added characters, and that no proxy"
    " changes requests, and",
)  # fmt: skip
CLOCK = Cause(
    "clock", "the clock of this machine differs too much from the store's",
    "set the clock (NTP) on every node, and",
)  # fmt: skip
QUOTA = Cause(
    "quota_exceeded", "a quota of the store is used up",
    "remove what is no longer needed (`tg-tinker artifacts delete`, then `sweep`), or have the"
    " quota raised, and",
)  # fmt: skip
FULL = Cause(
    "store_full", "the disk of the store is full",
    "add space to the store or remove what is no longer needed, and",
)  # fmt: skip
REGION = Cause(
    "wrong_region", "the bucket is in another region or at another address",
    "set AWS_REGION to the region of the bucket, and AWS_ENDPOINT_URL if the store is not"
    " Amazon's, and",
)  # fmt: skip
ACCOUNT = Cause(
    "account_problem", "the account of the store is closed, disabled or does not pay",
    "ask who pays for the store, or its provider, and",
)  # fmt: skip
ENCRYPTION = Cause(
    "encryption_key", "the key service of the store refuses the key that encrypts the bucket",
    "see in the key service that the key exists and is enabled, and that the credentials may use"
    " it, and",
)  # fmt: skip
PROTECTED = Cause(
    "write_protected", "a lock, a retention rule or the storage class of the bucket forbids it",
    "use a bucket without object lock, retention and archive classes, and",
)  # fmt: skip
UNSUPPORTED = Cause(
    "unsupported", "the store does not support the request, or does not accept its form",
    "check the name of the bucket and the address of the store, and that it offers what"
    " docs/storage.md names, and",
)  # fmt: skip
BUSY = Cause(
    "busy", "the store is overloaded or limits the rate of requests",
    "wait, save less often or ask for a higher rate, and", True,
)  # fmt: skip
CERTIFICATE = Cause(
    "certificate", "the certificate of the store is not trusted here",
    "install the store's CA on every node, or correct the host in its address, and",
)  # fmt: skip
NO_NAME = Cause(
    "unknown_host", "the host of the store has no address here",
    "check the address of the store and the name server of this machine, and", True,
)  # fmt: skip

_NAMES = {
    NO_BUCKET: "NoSuchBucket ContainerNotFound",
    DENIED: (
        "AccessDenied AllAccessDisabled Forbidden AuthorizationFailure AuthorizationError"
        " AuthorizationPermissionMismatch AuthorizationProtocolMismatch InsufficientPermissions"
        " AuthorizationSourceIPMismatch AuthorizationServiceMismatch PERMISSION_DENIED"
        " AuthorizationResourceTypeMismatch InsufficientAccountPermissions"
    ),
    UNEXPLAINED: (
        "AuthenticationFailed InvalidAuthenticationInfo NoAuthenticationInformation"
        " MissingAuthenticationToken MissingSecurityHeader bare403"
    ),
    EXPIRED: "ExpiredToken ExpiredTokenException TokenRefreshRequired RequestExpired",
    UNKNOWN_KEY: (
        "InvalidAccessKeyId InvalidClientTokenId UnrecognizedClient UnrecognizedClientException"
        " InvalidToken InvalidSecurity NotSignedUp UNAUTHENTICATED AuthError"
    ),
    WRONG_SECRET: "SignatureDoesNotMatch InvalidSignature IncompleteSignature",
    CLOCK: "RequestTimeTooSkewed",
    QUOTA: ("QuotaExceeded XMinioAdminBucketQuotaExceeded DailyLimitExceeded TooManyBuckets"),
    FULL: "InsufficientStorage XMinioStorageFull http507",
    REGION: (
        "PermanentRedirect Redirect TemporaryRedirect AuthorizationHeaderMalformed"
        " IllegalLocationConstraintException InvalidRegion elsewhere bare301 bare307"
    ),
    ACCOUNT: (
        "AccountProblem AccountIsDisabled AccountDisabled BillingNotEnabled BillingDisabled"
        " UserProjectAccountProblem UserSuspended ContainerDisabled OptInRequired"
    ),
    PROTECTED: (
        "InvalidObjectState BlobImmutableDueToPolicy BlobArchived"
        " RetentionPolicyNotMet ObjectUnderActiveHold"
    ),
    UNSUPPORTED: (
        "InvalidBucketName NotImplemented MethodNotAllowed UNIMPLEMENTED InvalidURI"
        " InvalidResourceName UnsupportedHeader http405 http501"
    ),
    BUSY: (
        "SlowDown SlowDownRead SlowDownWrite ServiceUnavailable TooManyRequests Throttling"
        " ThrottlingException RequestThrottled ServerBusy RateLimitExceeded RequestLimitExceeded"
        " UserRateLimitExceeded RESOURCE_EXHAUSTED BandwidthLimitExceeded http429 http503"
    ),
    CERTIFICATE: "curl60 curl51 curl35 curl77",
    NO_NAME: "curl6",
}


def _plain(name: str) -> str:
    """Returns the letters and digits of a name: one error is ACCESS_DENIED and AccessDenied."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


_CAUSES = {_plain(name): cause for cause, names in _NAMES.items() for name in names.split()}

CAUSES = (*_NAMES, TRUNCATED, NO_LIBRARY, ENCRYPTION)
"""All known causes."""

_KEY_SERVICES = ("kms", "keyvault")
"""How the names of errors about the encryption key of a bucket begin."""

_CODES = tuple(map(re.compile, (
    r"Unable to parse ExceptionName: (\S+) Message",
    r"AWS Error (?!UNKNOWN|NETWORK_CONNECTION)(\w+)",
    r"AWS Error \[(code \d+)\]",
    r"error_info=\{reason=(\w+)",
    r"Azure Error: \[(\w+)\]",
    r"Status\((\w+)",
)))  # fmt: skip
"""Where the libraries' texts name the error: one name of the list decides, the first one known."""

_HTTP = re.compile(
    r"HTTP status (?:code: )?(\d{3})|http_status_code=(\d{3})|Azure Error: \[\w*\] (\d{3})"
)
_NO_BODY = "No response body"
_CURL = re.compile(r"curlCode: (\d+)")
_MAY_PASS = (408, 409, 425, 429)
"""Refusals of HTTP that may end by themselves, besides those from 500 on."""

_PERMANENT = ("INVALID_ARGUMENT", "FAILED_PRECONDITION", "OUT_OF_RANGE", "code")
"""How answers begin that come without a status of HTTP and never end by themselves."""


def cause_of(error: BaseException) -> Cause:
    """Returns why an operation failed."""
    if isinstance(error, NoBucketError):
        return NO_BUCKET
    if isinstance(error, SizeDiffersError):
        return TRUNCATED
    text = str(error)
    if re.search(r"Unable to load lib(jvm|hdfs)|attempt to load libhdfs failed", text):
        return NO_LIBRARY
    names, status = [*_names_in(text)], _status_in(text)
    for name in map(_plain, [*names, *_numbers_in(text, status, not names)]):
        if name in _CAUSES:
            return _CAUSES[name]
        if name.startswith(_KEY_SERVICES):
            return ENCRYPTION
    final = 300 <= status < 500 and status not in _MAY_PASS
    if final and not names:
        return UNEXPLAINED
    if final or any(name.startswith(_PERMANENT) for name in names):
        return Cause(
            "refused", f"it answered {names[0]}",
            "look this answer up in the documentation of the store, check the credentials, the"
            " address and the region, and",
        )  # fmt: skip
    named = names[0] if names else f"HTTP status {status}" if status else type(error).__name__
    return Cause("unavailable", named, "check the store's address and the network, and", True)


def _names_in(text: str) -> Iterator[str]:
    """Yields the names of the error in a text of the library, the most exact first."""
    if "Could not create a OAuth2 access token" in text:
        yield "UNAUTHENTICATED"
    # For a request without a body in its answer, the library guesses the name from the status.
    for code in () if _NO_BODY in text else _CODES:
        if found := code.search(text):
            yield found[1]


def _numbers_in(text: str, status: int, unnamed: bool) -> Iterator[str]:
    """Yields what a text says of an error without a name, or with one that is not known."""
    if "the bucket is located in" in text:
        yield "elsewhere"
    if _NO_BODY in text and "AWS Error ACCESS_DENIED" in text:
        yield "bare403"
    if unnamed:
        yield f"bare{status}"
    if found := _CURL.search(text):
        yield f"curl{found[1]}"
    yield f"http{status}"


def _status_in(text: str) -> int:
    """Returns the status of HTTP; 0 if the text has none."""
    found = _HTTP.search(text)
    return int(next(filter(None, found.groups()))) if found else 0
