"""One training step on one base model: batch, loss, gradient, optimizer, state.

- session.py: the main path of a run. Start here.
- model.py: base models by transformers; one forward pass over a flat stream.
- loading.py, model_files.py, weights.py: finding, converting and reading base models; their files,
  opened once for hashing and loading; which of them hold the weights.
- probes.py: what a loaded model can do, found by comparison with transformers.
- lora.py: the trainable parameters of a model: an adapter by PEFT, or all weights.
- batching.py, attention.py, forward.py: examples as flat streams without padding; attention over
  flat streams; logits at wanted positions.
- slots.py, caches.py: keys and values of running sequences in one stream; sequences one by one.
- losses.py, matmul.py: losses of single tokens; matrix products by oneDNN.
- recompute.py: activations that are computed again in the backward pass.
- gradients.py, optim.py: sums, means and hashes of gradients; optimizers and schedules.
- corrected_adam.py, averages.py: Adam without the variance of the privacy noise; averages of the
  weights over the steps.
- checkpoint.py, lineage.py: the state between two steps as plain files; the origin of weights.
- memory.py, cpus.py, timing.py: the least memory that a run needs; the CPUs that it may use; the
  time of each part of a step.

The package imports the SDK's value types, `tg_tinker.storage` and `tg_tinker.data`. It has no
access to Ray, a database, a store or a budget.
"""
