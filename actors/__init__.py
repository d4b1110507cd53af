"""What runs on the cluster: the training actor and its engine, the registry, keys and store.

Start at `training_actor` (the Ray shell), then `worker` (one run), then `engine` (one step).
Imports go one way: serve_app -> actors -> tg_tinker.
"""

import tg_tinker.cluster.ray_calls  # noqa: F401  (sets what Ray reads when it is first imported)
