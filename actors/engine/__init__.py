"""One training step on one base model, from tokens to moved weights: plain classes of torch.

It stands on `tg_tinker` alone: no Ray, no database, no store, and nothing of privacy.

    session      the main path: forward_backward, optim_step, load and state
    model        base models in memory, probes, the forward over a flat stream
    loading      base models found, converted, read
    lora         what trains: an adapter or all weights
    batching     examples to flat streams
    attention    each example of a stream sees itself alone
    slots        keys and values of sequences that are being sampled
    losses       of tokens and examples
    matmul       products by oneDNN
    gradients    sums, means, private gradients, fingerprints
    optim        optimizers and schedules
    checkpoint   the state between two steps, as files
    lineage      what weights were trained on
    memory       what a run needs and what there is
    timing       the parts of a step, measured
"""
