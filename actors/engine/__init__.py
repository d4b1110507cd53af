"""One training step on one base model: batch, loss, gradient, optimizer, state.

- session.py: the main path of a run. Start here.
- model.py: base models and adapters by transformers and PEFT, one forward over a flat stream.
- loading.py: base models found, converted once, and read.
- lora.py: what is trained of a model: an adapter, or all weights.
- batching.py, attention.py, slots.py: examples as flat streams without padding; attention over
  them; keys and values of running sequences.
- losses.py, matmul.py: losses of single tokens; matrix products by oneDNN.
- gradients.py, optim.py: sums, means and their hashes; optimizers and schedules.
- checkpoint.py, lineage.py: the state between two steps as plain files; where weights come from.
- memory.py, timing.py: what a run needs at least; the time of each part of a step.

It imports values, `tg_tinker.storage` and `tg_tinker.data`. It knows no Ray, no database, no store
and no budget.
"""
