"""What tests share: fakes, servers, clusters, and slow, obvious versions of what is fast.

- fakes.py: the service in memory, and a tokenizer of single bytes.
- models.py, families.py: a two-layer model made on the spot, and homes that share it; tiny models
  of many families.
- chat_models.py: tokenizers of five kinds, and the chat templates of many families.
- helpers.py, privacy_helpers.py: the slow versions that engine and private step are compared with.
- exact_delta.py: the true delta of Poisson samples.
- sampling.py, runs.py: requests and what they got; runs that lose their actor.
- artifacts.py, stores.py, restored.py: a checkpoint; how stores are reached; older
  databases.
- audit.py, databases.py: audit logs and their tenants; SQLite and PostgreSQL.
- clusters.py, forked_workers.py: one embedded cluster for all modules, whose workers are forked
  from a process that has their libraries loaded.
- machines.py, two_nodes.py, processes.py: clusters that outlive their program; a cluster of two
  nodes; programs beside a test.
- kills.py: a process that dies at each of its calls of the disk.
- storage_servers.py, disks.py, http_calls.py, listener.py: object stores and a network that fail on
  demand; a disk that does; HTTP without a library; a server or proxy that keeps what it hears.
- messages.py: the messages that an operator can meet, and their page in docs/.
- other_user.py: a second user of this machine.
- serving.py, replicas.py: `tg-tinker serve` as a program, and its model asked without a server; the
  HTTP application in the process of the test.
- old_homes.py: homes of earlier releases, and the programs that made them.
- plaintext_program.py: everything a user does, with a secret in every place that takes one.

It imports the project freely and is imported by tests alone.
"""
