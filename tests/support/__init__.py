"""What tests share: fakes, servers, clusters, and slow, obvious versions of what is fast.

- fakes.py: the service in memory, and a tokenizer of single bytes.
- models.py: a two-layer model made on the spot, and homes that share it.
- helpers.py, privacy_helpers.py: the slow versions that engine and private step are compared with.
- sampling.py, runs.py: requests and what they got; runs that lose their actor.
- artifacts.py, stores.py, restored.py: a checkpoint; how stores are reached; older
  databases.
- audit.py, databases.py: audit logs and their tenants; SQLite and PostgreSQL.
- machines.py, processes.py: clusters that outlive their program; programs beside a test.
- storage_servers.py, disks.py, http_calls.py: object stores and a network that fail on demand; a
  disk that does; HTTP without a library.
- old_homes.py: homes of earlier releases, and the programs that made them.
- plaintext_program.py: everything a user does, with a secret in every place that takes one.

It imports the project freely and is imported by tests alone.
"""
