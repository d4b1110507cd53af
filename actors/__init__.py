"""What runs on the cluster: training, sampling, the registry, keys and stores.

- process.py: what each process of ours does: files to itself, failures as values.
- engine/: one step on one base model.
- storage/: keys, signatures, and where ciphertext lies.
- sampling/: many requests on one base model.
- registry/: runs, artifacts, ledgers and audit logs in one database.
- privacy/: a private step, and attacks on it.
- artifacts/: artifacts published, fetched, copied, deleted.
- training/: the actor of a run. Start here, then the engine.
- operations/: what an operator runs.
- backend.py: all of that as the SDK calls it.

It imports the lower floors of `tg_tinker`, never its client, demo or commands, which reach it by
`tg_tinker.backend`. Importing the package loads neither torch nor Ray.
"""

import tg_tinker.cluster.ray_calls  # noqa: F401  (sets what Ray reads when it is first imported)
