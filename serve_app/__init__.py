"""The Ray Serve application that samples: one per base model, for `TrainingClient.sample`.

`application` deploys it and is what the SDK reaches it by, `replica` is what runs in each copy,
`engines` gives the slot engine a thread and each kind of weights an engine.
"""

import tg_tinker.cluster.ray_calls  # noqa: F401  (sets what Ray reads when it is first imported)
