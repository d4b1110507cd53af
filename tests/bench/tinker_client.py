"""Runs a peer's side: `python tinker_client.py URL MODEL RANK RATE`, see `sides`.

The program runs in the peer's own environment with the peer's own SDK, and imports none of our
modules. It awaits both calls of a step, as our side does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import tinker


def datum(ids: list[int], labels: list[int]) -> tinker.Datum:
    """Returns a datum of Tinker.

    Our labels are at the position of their own token. Tinker's are at the token that predicts them.
    """
    targets = labels[1:]
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={
            "target_tokens": [max(label, 0) for label in targets],
            "weights": [float(label >= 0) for label in targets],
        },
    )


def mean_loss(data: list[tinker.Datum], output: Any) -> float:
    """Returns the loss in nats per labeled token, from log-probabilities.

    The servers' own losses are not comparable, because some are sums and some are means.
    """
    total = weight = 0.0
    for one, found in zip(data, output.loss_fn_outputs, strict=True):
        weights = one.loss_fn_inputs["weights"].data
        logprobs = found["logprobs"].data
        total -= sum(float(w) * float(p) for w, p in zip(weights, logprobs, strict=True))
        weight += sum(map(float, weights))
    return total / weight


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    url, model, rank, rate = sys.argv[1:]
    service = tinker.ServiceClient(base_url=url, api_key="tml-bench")
    client = service.create_lora_training_client(
        base_model=model, rank=int(rank), train_mlp=False, train_unembed=False
    )
    adam = tinker.AdamParams(learning_rate=float(rate))

    def evaluate(data: list[tinker.Datum]) -> float:
        return mean_loss(data, client.forward(data, "cross_entropy").result())

    def train(data: list[tinker.Datum]) -> float:
        output = client.forward_backward(data, "cross_entropy").result()
        client.optim_step(adam).result()
        return mean_loss(data, output)

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    works: dict[str, Callable[[list[tinker.Datum]], float]] = {"evaluate": evaluate, "train": train}
    answer({"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        loss = works[asked["do"]]([datum(ids, labels) for ids, labels in asked["rows"]])
        answer({"seconds": time.perf_counter() - started, "loss": loss})


if __name__ == "__main__":
    main()
    sys.stderr.flush()
    os._exit(0)  # the SDK's threads would wait for heartbeats
