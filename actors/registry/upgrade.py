"""A database of an older release brought to this one, after a backup of it was written."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from actors.registry.backup import write_backup
from actors.registry.database import Database
from actors.registry.revisions import refuse_newer, revision_of, run_revisions
from tg_tinker.storage.databases import REVISION


def upgrade(database: str, backup: Path) -> tuple[str, str]:
    """Writes a backup, then brings a database to the revision of this release.

    Both are one transaction, which no other change comes between: the backup is what was upgraded,
    to the row. Killed anywhere, it leaves the old database or the new one.

    Args:
        database: its URL.
        backup: a file that does not exist yet; `registry restore` takes it. Not written where the
            database is of this release already, or has no tables, and removed where it is not
            upgraded.

    Returns:
        The revisions before and after; the same where there was nothing to do.

    Raises:
        InvalidRequestError: the backup exists.
        StorageError: it is of a newer release, or a disk or a server refuses; the database is as it
            was.
    """
    with closing(Database(database, other_revisions=True)) as opened, opened.upgrading() as tx:
        before = revision_of(tx)
        if before in (None, REVISION):  # somebody else may have come first
            return REVISION, REVISION
        refuse_newer(before)
        write_backup(tx, backup)
        try:
            run_revisions(tx)
            opened.check_references(tx)
        except BaseException:
            backup.unlink(missing_ok=True)
            raise
    return before, REVISION
