"""Many requests at once on one base model; it stands on `engine`.

requests    requests, tokens, turns
engine      one forward for all of them, a token each
drawing     one token from one row of logits
adapters    many LoRA adapters on one base model
text        prompts in, texts out
snapshots   weights of a run on their way here
"""
