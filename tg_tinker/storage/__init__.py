"""Names the places where state is kept, and seals bytes: rules that client and cluster share.

- stores.py, databases.py, keyrings.py: the meaning of a store URI, a database URL and a keyring
  location. None of the three may contain a secret.
- sqlite_files.py: the URL of a SQLite file, and the path in such a URL.
- home.py, paths.py: the location of the home directory; absolute paths.
- files.py: small files, written completely and durably.
- envelope.py: sealing of bytes: keys, contexts, files, payloads.
- segments.py: the segments of a sealed file.

The package imports only the value modules of `tg_tinker`. It opens no store, no database and no
keyring: `actors.storage` and `actors.registry` do.
"""
