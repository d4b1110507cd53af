"""Artifacts on their way: sealed, published, fetched, copied, deleted.

- publish.py: files sealed under a key of their own, the manifest last.
- fetch.py: checked, opened, and only the one that was published.
- copies.py: copies, and fresh keys.
- delete.py: deleted in the registry, then in the store; shredded.
- adapters.py: adapters from elsewhere, and out to PEFT.

It imports `actors.registry` and `actors.storage`; adapters.py alone imports `actors.engine`, and no
other file may import that one: none of them loads torch. What the files mean is left to the engine.
"""
