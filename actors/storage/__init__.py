"""Holds keys, and stores ciphertext: a store never sees a key or clear text.

- home.py: the home directory, created once.
- keyring.py, key_providers.py: the text of a keyring; who holds the tenant key.
- capabilities.py: what a client presents to receive a data key.
- signing.py: the key that signs heads, its public half, and how it followed older keys.
- secrets.py: the secrets that everything else is derived from, each with versions.
- store.py: sealed files of artifacts, the manifest last.
- manifest.py: the description of an artifact's files.
- objects.py, bucket.py, filesystems.py, answers.py: the interface of every store, and a local
  folder; buckets; access to pyarrow's filesystems; the meaning of a store's refusals.

The package imports `tg_tinker.storage` and `tg_tinker.records`. `actors.registry` decides which
artifacts exist, and `actors.artifacts` decides what they contain.
"""
