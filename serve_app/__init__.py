"""Holds the Ray Serve application that samples beside training, one for each base model.

- application.py: deploys the application on Ray Serve and connects to it.
- deploy.py: builds the application for Serve's own config files.
- replica/: the process that serves: weights and engines.
- http/: OpenAI's API, keys, limits and refusals.
- backend.py: the interface that the SDK calls.

The package imports `actors` and the lower packages of `tg_tinker`. No package imports it: the SDK
calls it through `tg_tinker.backend`.
"""

import tg_tinker.cluster.ray_calls  # noqa: F401  (sets the variables that Ray reads at its import)
