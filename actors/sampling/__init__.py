"""Samples many requests at once on one base model, each with its own weights.

- engine.py: continuous batching, token in and token out.
- requests.py: requests, their tokens, and the scheduling of waiting requests.
- drawing.py: drawing one token from one row of logits.
- grammar.py: which tokens may come next in a JSON text that matches a schema.
- adapters.py: LoRA adapters side by side.
- text.py: from prompts to tokens, and from tokens to chunks and samples.
- snapshots.py: the weights of a run at one step, as they travel to the sampler.

The package imports `actors.engine` and the messages of `tg_tinker.cluster`. It opens no artifact
and handles no client: `serve_app` selects the weights and decides who may use them.
"""
