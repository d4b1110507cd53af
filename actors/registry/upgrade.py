"""Upgrades a database of an older release to this release, after writing a backup."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from actors.registry.backup import write_backup
from actors.registry.database import Database
from actors.registry.revisions import refuse_newer, revision_of, run_revisions
from tg_tinker.storage.databases import REVISION


def upgrade(database: str, backup: Path) -> tuple[str, str]:
    """Writes a backup, then upgrades a database to the revision of this release.

    Both happen in one transaction without any other change in between: the backup equals, row by
    row, the database that was upgraded. A process that is killed at any point leaves the old
    database or the new one.

    Args:
        database: The URL of the database.
        backup: A file that does not exist yet; `registry restore` takes it. It is not written if
            the database is of this release already or has no tables, and it is removed if the
            upgrade fails.

    Returns:
        The revisions before and after; equal if there was nothing to do.

    Raises:
        InvalidRequestError: The backup exists.
        StorageError: The database is of a newer release, or a disk or a server fails; the database
            is as it was.
    """
    with closing(Database(database, other_revisions=True)) as opened, opened.upgrading() as tx:
        before = revision_of(tx)
        # Another process may have upgraded it meanwhile.
        if before in (None, REVISION):
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
