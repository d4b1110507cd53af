"""Many requests at once on one base model, each with weights of its own.

- engine.py: continuous batching, token in and token out.
- requests.py: requests, their tokens, and whose turn it is.
- drawing.py: one token from one row of logits.
- adapters.py: LoRA adapters side by side.
- text.py: prompts, chunks and samples over tokens.
- snapshots.py: weights of a run at one step, on their way to where they are sampled from.

It imports `actors.engine` and the messages of `tg_tinker.cluster`. It opens no artifact and knows
no client: `serve_app` says which weights are meant, and who may ask.
"""
