"""Revisions of the registry's tables, in order; `actors.registry.revisions` has Alembic run them.

- r0001_first_release.py: the tables of the first release whose homes are upgraded.
- r0002_fencing_token.py: `registry.generation` becomes `registry.fencing_token`.

A revision imports nothing of ours: released, it is frozen, and `schema` goes on. What the newest
one leaves behind is what `schema` declares; a test compares the two on SQLite and PostgreSQL.
"""
