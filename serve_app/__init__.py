"""The Ray Serve application that samples, one for each base model, beside training.

- application.py: the door to Serve: deploys the application and reaches it.
- deploy.py: the application for Serve's own config files.
- replica/: what runs in each copy: weights and engines.
- http/: OpenAI's API, keys, limits, refusals.
- backend.py: all of that as the SDK calls it.

It imports `actors` and the lower floors of `tg_tinker`. Nothing imports it: the SDK reaches it by
`tg_tinker.backend`.
"""

import tg_tinker.cluster.ray_calls  # noqa: F401  (sets what Ray reads when it is first imported)
