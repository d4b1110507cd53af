"""Seals, publishes, fetches, copies and deletes artifacts.

- publish.py: sealing files under a new data key, and storing them with the manifest last.
- fetch.py: checking and opening an artifact, only if it is the one that was published.
- copies.py: copying an artifact, or resealing it under a fresh data key.
- delete.py: deleting in the registry, then in the store; shredding the data key.
- adapters.py: importing adapters from elsewhere, and exporting adapters to PEFT.

The package imports `actors.registry` and `actors.storage`. Only adapters.py imports
`actors.engine`, and no other file here may import adapters.py, so that no other file loads torch.
The engine alone interprets the content of an artifact's files.
"""
