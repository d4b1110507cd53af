"""Says what a refusal of the registry's database means, and what to do.

SQLite gives its errors names. PostgreSQL gives statements a code (SQLSTATE), but a connection that
is refused has only the text of libpq or of the server. A server may be set to another language: its
codes are understood then, its texts are not. No text is repeated, because it may hold statements,
names and values.
"""

from __future__ import annotations

from typing import NamedTuple

import sqlalchemy as sa


class Refusal(NamedTuple):
    """The meaning of an error of the database."""

    text: str
    remedy: str
    phrases: tuple[str, ...] = ()  # Parts of the texts of libpq, psycopg, the server, pgbouncer.
    codes: tuple[str, ...] = ()  # SQLSTATE, or how a name of SQLite begins.


REFUSALS = (
    Refusal(
        "the password is wrong or missing, or the server has no such user",
        "correct the user in the URL, or give its password by PGPASSFILE (of mode 0600, or libpq"
        " ignores it), PGPASSWORD or ?passfile=FILE on the head node, and restart the cluster",
        ("password authentication failed", "no password supplied", "SASL authentication failed",
         "password retrieval failed", "auth failed", "server login failed"),
        ("28P01",),
    ),
    Refusal(
        "the server has no database of this name",
        "create it with encoding UTF8, or correct the name at the end of the URL",
        ('" does not exist: no such database', "no such database", "FATAL:  database"), ("3D000",),
    ),
    Refusal(
        "the server has no user of this name, or does not let it log in",
        "create it (CREATE ROLE ... LOGIN), or correct the user in the URL",
        ("FATAL:  role", "no such user", "is not permitted to log in"),
    ),
    Refusal(
        "the server does not let this user in from this machine",
        "add a line for this user, database and address to the server's pg_hba.conf, and reload it",
        ("no pg_hba.conf entry", "pg_hba.conf rejects connection"), ("28000",),
    ),
    Refusal(
        "the server takes no more connections",
        "close programs that use it, or raise max_connections of the server or the limit of this"
        " user, database or pooler",
        ("too many clients", "too many connections", "remaining connection slots",
         "no more connections allowed", "query_wait_timeout"),
        ("53300",),
    ),
    Refusal(
        "the server offers no TLS, and the URL demands it",
        "switch ssl on at the server, or use ?sslmode=disable on a network that you trust",
        ("server does not support SSL",),
    ),
    Refusal(
        "the certificate of the server is not trusted, or one of the files for TLS is missing",
        "correct sslrootcert, sslcert and sslkey in the URL, or the certificate of the server",
        ("certificate verify failed", "does not match host name", "root certificate file",
         "certificate file", "private key file", "SSL error"),
    ),
    Refusal(
        "the host of the server has no address here",
        "correct the host in the URL, or the name server of this machine",
        ("could not translate host name", "failed to resolve host", "Name or service not known"),
    ),
    Refusal(
        "the server is starting or stopping",
        "wait until it runs, and try again",
        ("the database system is", "not yet accepting connections"), ("57P01", "57P02", "57P03"),
    ),
    Refusal(
        "a pooler in front of the server does not pass on what the registry sets",
        "connect to the server itself, or see docs/storage.md",
        ("unsupported startup parameter",), ("26000", "42P05"),
    ),
    Refusal(
        "nobody listens at this host and port",
        "start the server, or correct host and port in the URL",
        ("Connection refused", "No such file or directory"),
    ),
    Refusal(
        "the server did not answer in time",
        "check the network and any firewall between here and the server",
        ("timeout expired", "timed out", "No route to host", "Network is unreachable"),
    ),
    Refusal(
        "the server is a standby, or writes are switched off",
        "connect to the primary server, or switch default_transaction_read_only off",
        codes=("25006", "SQLITE_READONLY"),
    ),
    Refusal(
        "the disk of the database is full",
        "free space or have a quota raised, and try again",
        codes=("53100", "SQLITE_FULL"),
    ),
    Refusal(
        "the server has no memory left",
        "give the server more memory, or end other programs on its machine",
        codes=("53200",),
    ),
    Refusal(
        "another program locks the database, or this one was too slow",
        "end other programs that use the database, and try again",
        codes=("55P03", "57014", "25P03", "57P05", "40P01", "SQLITE_BUSY", "SQLITE_LOCKED"),
    ),
    Refusal(
        "its user may not do this, or a table is missing",
        "let its user create and change tables in this database; restore a backup if a table is"
        " lost",
        codes=("42501", "42P01"),
    ),
    Refusal(
        "the disk of the database fails",
        "check the disk, then restore a backup if `tg-tinker registry check` finds damage",
        codes=("58030", "XX001", "XX002", "SQLITE_IOERR"),
    ),
    Refusal(
        "this user cannot open the file or its folder",
        "see that the folder exists, belongs to this user and can be written",
        codes=("SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_AUTH"),
    ),
)  # fmt: skip
"""Every refusal with a sentence of its own. The first that fits decides: an attempt at one address
may be refused by nobody, and at the next one by the server."""

_OTHER = Refusal(
    "for a reason that is not known here",
    "check that the database runs and is undamaged, that its disk is not full, that no other"
    " program locks it, and that its user may create and change tables",
)


def is_known(error: sa.exc.DBAPIError) -> bool:
    """Returns whether an error has a sentence of its own, by its code."""
    return any(_has_code(one, error) for one in REFUSALS)


def refusal_of(error: sa.exc.DBAPIError) -> Refusal:
    """Returns what an error means. A code goes before a text."""
    text = str(error.orig)
    by_code = (one for one in REFUSALS if _has_code(one, error))
    by_text = (one for one in REFUSALS if any(phrase in text for phrase in one.phrases))
    return next(by_code, None) or next(by_text, _OTHER)


def _has_code(refusal: Refusal, error: sa.exc.DBAPIError) -> bool:
    code = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "sqlite_errorname", "")
    return str(code).startswith(refusal.codes)
