"""Holds everything that runs on the cluster: training, sampling, the registry, keys and stores.

- process.py: hardens each actor process, and returns failures as values.
- engine/: one step on one base model.
- storage/: keys, signatures, and the stores of ciphertext.
- sampling/: many requests on one base model.
- registry/: runs, artifacts, ledgers and audit logs in one database.
- privacy/: a private step, and attacks on it.
- artifacts/: publishes, fetches, copies and deletes artifacts.
- training/: the actor of a run. Start here, then read the engine.
- operations/: the commands of an operator.
- backend.py: the interface that the SDK calls.

The package imports the lower packages of `tg_tinker`, never its client, demo or commands. These
call the package through `tg_tinker.backend`. Importing the package loads neither torch nor Ray.
"""

import tg_tinker.cluster.ray_calls  # noqa: F401  (sets the variables that Ray reads at its import)
