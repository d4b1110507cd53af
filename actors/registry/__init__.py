"""Holds runs, artifacts, ledgers, audit logs and API keys in one database that outlives every
cluster.

- registry.py: the registry, a set of parts over one database. Start here. actor.py is its Ray
  actor.
- runs.py: which actor owns a run, the run's last step, and the artifact it is restored from.
- catalogue.py, artifacts.py, orphans.py: reading the index of artifacts; changing the index; what a
  sweep remembers of a store.
- ledgers.py, book.py, uses.py, plausibility.py: checking and charging in one transaction; how
  ledgers are stored; counting the uses of units; testing a sample that the owner asserts.
- draws.py: the stream of Poisson draws of a dataset, and its key.
- audit_log.py, request_rows.py: audit rows, each in the transaction of the change it records;
  limiting the rows about requests.
- lookups.py: finding artifacts and runs by name; noting lookups of what another tenant owns.
- heads.py, rollback.py, head_keeper.py: detecting an older or different database by the signed
  heads in a store; writing the heads of a run's ledger to the store.
- deletions.py: comparing the index of artifacts with the audit log.
- data_keys.py, key_names.py: who receives a data key; recognizing the keys of a home.
- home_keys.py: rotating the signing key and the secrets beside the keyring.
- api_keys.py, grants.py: API keys of HTTP clients, stored as hashes; refusing an expired key;
  refusing rows that this registry did not write, or that were put back.
- schema.py: all tables.
- revisions.py, upgrade.py, migrations/: the revision of a database's tables; upgrading a database.
- database.py, postgres.py, refusals.py: access to the database, SQLite or PostgreSQL; what its
  errors mean.
- group_commit.py: running the calls of many clients in order; waiting calls share a transaction.
- backup.py, scratch.py: copying all rows to one SQLite file and back; a temporary registry.

The package imports `actors.storage`, `actors.process` and the SDK's records, never the engine.
`actors.privacy` computes privacy, and `actors.artifacts` writes the files of artifacts.
"""
