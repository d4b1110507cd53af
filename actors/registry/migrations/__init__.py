"""Revisions of the registry's tables, in order. `actors.registry.revisions` runs them with Alembic.

- r0001_first_release.py: the tables of the first release whose homes can be upgraded.
- r0002_fencing_token.py: `registry.generation` becomes `registry.fencing_token`.
- r0003_api_key_macs.py: `api_keys` has a column `mac`.
- r0004_unit_sums.py: a table of what each unit has spent over all runs; datasets have a draw key.

A revision imports none of this project's modules: `schema` changes, and a released revision must
not. After the newest revision the tables are those that `schema` declares. A test compares the two
on SQLite and on PostgreSQL.
"""
