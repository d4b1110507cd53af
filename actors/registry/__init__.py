"""Runs, artifacts, ledgers, audit logs and API keys in one database that outlives every cluster.

- registry.py: the registry: parts over one database. Start here; actor.py is its Ray shell.
- runs.py: who acts for a run, how far it is, what it comes back from.
- catalogue.py, artifacts.py, orphans.py: which artifacts there are; changes of them; what a sweep
  remembers of a store.
- ledgers.py, book.py, uses.py, plausibility.py: check and charge in one transaction; ledgers as
  stored; uses of units; asserted samples.
- audit_log.py: a row in the transaction of what it records.
- heads.py, rollback.py, head_keeper.py: an older or another database is noticed by the signed heads
  in a store; the head that a run keeps there.
- deletions.py: artifacts against the audit log.
- data_keys.py, key_names.py: who is given a data key; tenant keys by more than their names.
- api_keys.py: API keys of HTTP clients, as hashes; where an expired one is refused.
- schema.py: all tables.
- revisions.py, upgrade.py, migrations/: which release's tables those are; a database brought here.
- database.py, postgres.py: the door to the database, SQLite or PostgreSQL.
- group_commit.py: calls of many clients in turn, those that wait in one transaction.
- backup.py, scratch.py: all rows in one SQLite file, and back; a registry that is thrown away.

It imports `actors.storage`, `actors.process` and the SDK's records, never the engine. How privacy
is computed is left to `actors.privacy`; files of artifacts are written by `actors.artifacts`.
"""
