"""Runs, artifacts, ledgers, audit logs and API keys in one database that outlives every cluster.

- registry.py: the registry, a plain class. Start here; actor.py is its Ray shell.
- database.py, postgres.py: the door to the database, SQLite or PostgreSQL.
- group_commit.py: calls of many clients in turn, those that wait in one transaction.
- artifacts.py, orphans.py: the index of artifacts; what a sweep remembers.
- ledgers.py, plausibility.py: check and charge in one transaction; asserted samples.
- audit_log.py: a row in the transaction of what it records.
- heads.py, store_checks.py, deletions.py: an older or another database is noticed by ledgers, by
  the heads in a store, by deleted artifacts.
- head_keeper.py, rollback.py: signed heads of ledgers and of audit logs in the store.
- api_keys.py, key_names.py: API keys as hashes; tenant keys by more than their names.
- backup.py: all rows in one SQLite file, and back.

It imports `actors.storage`, `actors.process` and the SDK's records, never the engine. How privacy
is computed is left to `actors.privacy`; files of artifacts are written by `actors.artifacts`.
"""
