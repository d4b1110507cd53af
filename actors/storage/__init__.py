"""Keys, and where ciphertext lies: a store never sees a key, nor clear text.

- home.py: the home directory, made once.
- keyring.py, key_providers.py: the text of a keyring; who holds the tenant key.
- capabilities.py: what a client shows to be given a data key.
- signing.py: the key that signs heads, and its public half.
- store.py: sealed files of artifacts, the manifest last.
- manifest.py: what an artifact consists of.
- objects.py, bucket.py, filesystems.py: what every store can do, and a folder; buckets; the door
  to pyarrow's file systems.

It imports `tg_tinker.storage` and `tg_tinker.records`. Which artifacts there are is left to
`actors.registry`, what is in them to `actors.artifacts`.
"""
