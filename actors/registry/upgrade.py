"""A database of an older release brought to this one, after a backup of it was written."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from actors.registry.backup import write_backup
from actors.registry.database import Database
from actors.registry.revisions import revision_of, run_revisions
from tg_tinker.storage.databases import REVISION


def upgrade(database: str, backup: Path) -> tuple[str, str]:
    """Writes a backup, then brings a database to the revision of this release.

    Args:
        database: its URL.
        backup: a file that does not exist yet; `registry restore` takes it. Not written where the
            database is of this release already.

    Returns:
        The revisions before and after; the same where there was nothing to do.

    Raises:
        InvalidRequestError: the backup exists.
        StorageError: it is of a newer release, or a disk or a server refuses; the database is as it
            was.
    """
    with closing(Database(database, looks_only=True, other_revisions=True)) as found:
        with found.reading() as connection:
            before = revision_of(connection)
        if before is None or before == REVISION:
            return before or REVISION, REVISION
        write_backup(found, backup)
    with closing(Database(database, other_revisions=True)) as opened, opened.upgrading() as tx:
        if revision_of(tx) != REVISION:  # somebody else may have come first
            run_revisions(tx)
    return before, REVISION
