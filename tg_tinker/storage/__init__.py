"""Where things are kept, and what is sealed: what the client and the cluster must agree on.

- stores.py, databases.py, keyrings.py: what the URI of a store, of a database and the place of a
  keyring mean. None of them may hold a secret.
- home.py: where the home directory is.
- files.py: small files, written whole and durable.
- envelope.py: sealing of bytes: keys, contexts, files, payloads.
- segments.py: the segments of a sealed file.

It imports the values of `tg_tinker` alone. It opens no store, no database and no keyring:
`actors.storage` and `actors.registry` do.
"""
