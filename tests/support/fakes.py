"""Defines the service in memory, and a tokenizer of single bytes: no Ray, no model, no files.

    service = FakeService()
    tc = service.create_training_client(TrainingConfig(model_ref="fake"))
    tc.forward_backward({"input_ids": [[1, 2, 3]]})
    tc.optim_step().result().step        # 1
    service.artifacts                    # the artifacts of save_state

`FakeService` and its clients are the real classes with every method that needs a cluster replaced,
so mypy checks their signatures against the real ones. Like the actor, a fake client runs its calls
in order. Unlike the actor, it runs them only when somebody waits, so a test knows exactly what is
still queued. The loss of a batch falls with each step and depends on nothing else; the loss of an
empty batch is NaN. Private runs keep a real ledger, with noise by the plainest accountant.

To act at a certain moment, such as pressing Ctrl-C in the middle of step 3, set `before_call`:

    service.before_call = lambda operation, step: press_ctrl_c() if step == 3 else None
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tg_tinker.client.future import FutureHandle
from tg_tinker.client.recovery import Recover
from tg_tinker.client.runs import Progress
from tg_tinker.client.service import ServiceClient
from tg_tinker.client.training import TrainingClient
from tg_tinker.config import AverageKind, TrainingConfig
from tg_tinker.data.batch import BatchData, check_bounds, normalize
from tg_tinker.errors import (
    DPBudgetExceededError,
    FutureCancelledError,
    InvalidRequestError,
    NotFoundError,
    TGTinkerError,
)
from tg_tinker.records.accounting import (
    filter_order,
    rdp_epsilon,
    smallest_sigma,
    subsampled_gaussian_rdp,
)
from tg_tinker.records.audit_log import AuditRow, verify
from tg_tinker.records.entries import VERSION, Entry
from tg_tinker.records.heads import AuditHead
from tg_tinker.records.ledger import Ledger
from tg_tinker.records.report import (
    DEFAULT_DATASET,
    UNIT,
    PrivacyInfo,
    PrivacyReport,
    dataset_of,
    describe_run,
)
from tg_tinker.records.sums import added, weight
from tg_tinker.storage.envelope import new_signing_key
from tg_tinker.types import (
    ArtifactInfo,
    DPMetrics,
    EncryptionInfo,
    ForwardBackwardResult,
    LoadStateResult,
    OptimStepResult,
    Sample,
    SampleResult,
    SaveStateResult,
    TrainingClientInfo,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WHEN = datetime(2025, 1, 2, 3, 4, tzinfo=UTC)

Result = TypeVar("Result")


def make_tokenizer(chat_template: str | None = CHATML, bos: bool = False) -> Any:
    """Returns a tokenizer with one token per byte, `<|im_start|>` (256) and `<|im_end|>` (257,
    end of text).

    Args:
        chat_template: the template of the tokenizer; None for that of a base model.
        bos: whether to put `<|im_start|>` before every text, as Llama's tokenizers do with theirs.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(s, special=True) for s in ("<|im_start|>", "<|im_end|>")])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 256)]
        )
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **roles)
    tokenizer.chat_template = chat_template
    return tokenizer


class FakeHandle(FutureHandle[Result]):
    """A call that runs when somebody waits for it."""

    def __init__(self, client: FakeTrainingClient, operation: str, work: Callable[[], Result]):
        self.operation = operation
        self.training_client_id = client.id
        self.future_id = f"{client.id}-{operation}"
        self.cancelled = False
        self._client = client
        self._work = work
        self._outcome: list[Result | TGTinkerError] = []

    def run(self) -> None:
        try:
            if self.cancelled:
                raise FutureCancelledError("the call was canceled before it changed anything")
            self._outcome.append(self._work())
        except TGTinkerError as error:
            self._outcome.append(error)

    def result(self, timeout: float | None = None) -> Result:
        self._client.run_until(self)
        outcome = self._outcome[0]
        if isinstance(outcome, TGTinkerError):
            raise outcome
        return outcome

    def done(self) -> bool:
        return bool(self._outcome)

    def cancel(self) -> bool:
        self.cancelled = not self.done()
        return self.cancelled


class FakeCalls:
    """The two calls behind the real `poisson_batches`; none of them is ever lost."""

    def __init__(self, client: FakeTrainingClient) -> None:
        self.reached = object()
        self._client = client

    def revive(self) -> None:
        """Does nothing, because there is no actor to recover."""

    def submit(self, operation: str, **arguments: Any) -> FakeHandle[Any]:
        if operation == "register_units":
            self._units = len({
                e.example_id or tuple(e.input_ids.tolist()) for e in arguments["examples"]
            })  # fmt: skip
            return self._client.call(operation, partial(self._client.register_units, self._units))
        return self._client.call(operation, partial(self._client.draw_units, self._units))


class FakeTrainingClient(TrainingClient):
    """A run whose only weights are its step.

    Attributes:
        trained, evaluated: the input ids of each `forward_backward` that ran, by its mode.
        sent: the handles of all calls, in order.
        most_queued: the largest number of optimizer steps that were waiting at once.
        closed: whether `close` was called.
    """

    def __init__(self, service: FakeService, run_id: str, config: TrainingConfig) -> None:
        self._service = service
        self._id = run_id
        self._config = config
        self._describe_privacy = self._account
        self._calls: Any = FakeCalls(self)
        self._training = True
        self._closed = False
        self.parked = False
        self._step = 0
        self._loss_off = 0.0
        self._queue: list[FakeHandle[Any]] = []
        self.tokenizer = make_tokenizer()
        self.trained: list[list[list[int]]] = []
        self.evaluated: list[list[list[int]]] = []
        self.sent: list[FakeHandle[Any]] = []
        self.most_queued = 0

    @property
    def step(self) -> int:
        return self._step

    def _account(self) -> PrivacyInfo:
        return describe_run(self._service.ledgers[dataset_of(self._config)][0], self._id)

    def info(self) -> TrainingClientInfo:
        status = "completed" if self._closed else "active"
        reason = "closed" if self._closed else "parked" if self.parked else ""
        ref = self._config.model_ref
        return TrainingClientInfo(self._id, status, self._step, 1, ref, WHEN, reason=reason)

    def forward_backward(
        self, batch: BatchData | Mapping[str, Any], batch_hash: str | None = None
    ) -> FutureHandle[ForwardBackwardResult]:
        training = self._training
        examples = normalize(batch, may_be_empty=training and self._config.private)
        if examples:
            check_bounds(examples, 258, 1024)
        rows = [example.input_ids.tolist() for example in examples]

        def work() -> ForwardBackwardResult:
            (self.trained if training else self.evaluated).append(rows)
            loss = self._service.loss_at(self._step) + self._loss_off if rows else math.nan
            return ForwardBackwardResult(loss, "sha256:", "sha256:", sum(map(len, rows)), 1.0)

        return self.call("forward_backward" if training else "evaluate", work)

    def optim_step(self, apply_dp_noise: bool = True) -> FutureHandle[OptimStepResult]:
        def work() -> OptimStepResult:
            metrics = self._charge() if self._config.private else None
            self._step += 1
            return OptimStepResult(1.0, 1e-3, self._step, metrics, 1.0)

        return self.call("optim_step", work)

    def _charge(self) -> DPMetrics:
        ledger, _ = self._service.ledgers[dataset_of(self._config)]
        before, account = ledger.epsilon, ledger.accounts[self._id]
        count, position = account.count + 1, ledger.position
        cost = weight(account.sigma) if ledger.counts_uses(account) else 0.0
        charge = {
            "type": "charge", "run": self._id, "epoch": 1, "charge": f"{self._id}-{count}",
            "count": count, "spent": added(ledger.spent, cost),
        }  # fmt: skip
        if account.contract == "poisson":
            draw = {"type": "draw", "run": self._id, "position": position, "units": "0" * 64}
            self._service.enter(dataset_of(self._config), draw)
            charge["position"] = position
        self._service.enter(dataset_of(self._config), charge)
        spent = ledger.epsilon - before
        return DPMetrics(True, spent, ledger.epsilon, ledger.delta, 1.0, 0.5, 1)

    def register_units(self, units: int) -> list[list[int]]:
        if units != (self._config.dp_config and self._config.dp_config.dataset_size):
            raise InvalidRequestError(f"the data set has {units} distinct units")
        return [[index] for index in range(units)]

    def draw_units(self, units: int) -> list[int]:
        if self._account().left == 0:
            raise DPBudgetExceededError("no step is left")
        return self._service.draw(self._step, units)

    def sample(
        self,
        prompts: str | list[str],
        max_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop_sequences: list[str] | None = None,
        num_completions: int = 1,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
    ) -> SampleResult:
        def work() -> SampleResult:
            answer = f"answer at step {self._step}"
            listed = [prompts] if isinstance(prompts, str) else prompts
            return SampleResult([Sample(p, answer, 5, "eos", 1.0) for p in listed], 5, 1.0)

        return self.call("sample", work).result()

    def save_state_async(
        self,
        include_optimizer: bool = True,
        metadata: dict[str, Any] | None = None,
        *,
        average: AverageKind | None = None,
    ) -> FutureHandle[SaveStateResult]:
        def work() -> SaveStateResult:
            artifact_id = f"art-{len(self._service.artifacts) + 1}"
            self._service.metadata[artifact_id] = metadata or {}
            self._service.artifacts[artifact_id] = ArtifactInfo(
                artifact_id, self._id, self._step, 2_500_000, include_optimizer, WHEN
            )
            sealed = EncryptionInfo("AES-256-GCM", "key-1", "file", 1)
            return SaveStateResult(artifact_id, 2_500_000, sealed, metadata or {}, WHEN)

        return self.call("save_state", work)

    def load_state(self, artifact_id: str) -> LoadStateResult:
        def work() -> LoadStateResult:
            saved = self._service.artifact(artifact_id)
            self._step = saved.step + self._service.steps_off_after_load
            self._loss_off = self._service.loss_off_after_load
            metadata = self._service.metadata.get(artifact_id, {})
            return LoadStateResult(artifact_id, self._step, metadata, WHEN)

        return self.call("load_state", work).result()

    def close(self) -> None:
        self._closed = True

    def run_until(self, last: FakeHandle[Any]) -> None:
        """Runs queued calls in order, up to and including this one."""
        while not last.done():
            self._service.before_call(self._queue[0].operation, self._step)
            self._queue.pop(0).run()

    @property
    def closed(self) -> bool:
        return self._closed

    def call(self, operation: str, work: Callable[[], Result]) -> FakeHandle[Result]:
        self._service.on_submit(operation, self._step)
        handle = FakeHandle(self, operation, work)
        self._queue.append(handle)
        self.sent.append(handle)
        if operation == "optim_step":
            waiting = sum(queued.operation == operation for queued in self._queue)
            self.most_queued = max(self.most_queued, waiting)
        return handle


class FakeService(ServiceClient):
    """A service that keeps runs and artifacts in dicts.

    Attributes:
        artifacts: by id, in order; `metadata` is what was saved with them.
        clients: all clients that were created or opened again, in order.
        audited: the rows of the audit log; `signing_key` signs its heads.
        ledgers: the ledger and its entries, by dataset.
        missing: the number of charges that an older database lost, by dataset.
        draw: (step, number of units) -> the indices of a Poisson sample.
        before_call: called with (operation, step) before each queued call runs; `evaluate` is a
            `forward_backward` in eval mode.
        on_submit: called with (operation, step) when a call is sent, before it is queued.
        on_create: called when a client is requested.
        steps_off_after_load: how far a defect shifts the step in `load_state`.
        loss_off_after_load: how far a defect shifts later losses in `load_state`.
    """

    def __init__(self) -> None:
        self.artifacts: dict[str, ArtifactInfo] = {}
        self.audited: list[AuditRow] = []
        self.signing_key = new_signing_key()
        self.metadata: dict[str, dict[str, Any]] = {}
        self.ledgers: dict[str, tuple[Ledger, list[Entry]]] = {}
        self.missing: dict[str, int] = {}
        self.draw: Callable[[int, int], list[int]] = lambda step, units: [
            unit for unit in range(units) if (unit + step) % 3 == 0
        ]
        self.clients: list[FakeTrainingClient] = []
        self.before_call: Callable[[str, int], object] = lambda operation, step: None
        self.on_submit: Callable[[str, int], object] = lambda operation, step: None
        self.on_create: Callable[[], object] = lambda: None
        self.steps_off_after_load = 0
        self.loss_off_after_load = 0.0
        self.closed = False
        self._ids = itertools.count(1)

    @staticmethod
    def loss_at(step: int) -> float:
        return 1.0 + 3.0 * 0.8**step

    def create_training_client(
        self, config: TrainingConfig, progress: Progress | None = None, recover: Recover = "auto"
    ) -> FakeTrainingClient:
        if progress is not None:
            progress("loading the model")
        self.on_create()
        client = FakeTrainingClient(self, f"run-{next(self._ids)}", config)
        if config.private:
            self._open_account(client.id, config)
        self.clients.append(client)
        return client

    def get_training_client(
        self,
        training_client_id: str,
        progress: Progress | None = None,
        recover: Recover = "auto",
    ) -> FakeTrainingClient:
        """Returns the run in the state of its last artifact, as if its actor were gone."""
        configs = {client.id: client.config for client in self.clients}
        if training_client_id not in configs:
            raise NotFoundError(f"there is no run {training_client_id}")
        client = FakeTrainingClient(self, training_client_id, configs[training_client_id])
        saved = [a for a in self.artifacts.values() if a.training_client_id == client.id]
        client._step = saved[-1].step
        self.clients.append(client)
        return client

    def _open_account(self, run: str, config: TrainingConfig) -> None:
        """Opens a ledger for a new dataset, in which the budget pays for `max_steps` steps."""
        dp, steps, dataset = config.dp_config, config.max_steps, dataset_of(config)
        assert dp
        assert dp.dataset_size
        assert dp.target_epsilon
        assert steps
        limit, delta = dp.target_epsilon, dp.target_delta
        order, rate = filter_order(limit, delta), config.batch_size / dp.dataset_size

        def epsilon(sigma: float, count: int) -> float:
            return rdp_epsilon(count * subsampled_gaussian_rdp(sigma, rate, order), order, delta)

        sigma = smallest_sigma(lambda sigma: epsilon(sigma, steps) <= limit)
        if dataset not in self.ledgers:
            self.ledgers[dataset] = Ledger(), []
            self.enter(dataset, {
                "type": "register", "version": VERSION, "dataset": dataset, "epsilon": limit,
                "delta": delta, "unit": dp.unit or UNIT, "order": order, "born": "",
            })  # fmt: skip
        facts = {"bound": dp.max_grad_norm, "batch": config.batch_size, "message": "as planned"}
        self.enter(dataset, {
            "type": "open", "run": run, "contract": dp.sampling, "sigma": sigma, "rate": rate,
            "accountant": "rdp", "limit": steps, "planned": steps, "facts": facts,
            "table": [[count, epsilon(sigma, count)] for count in range(1, steps + 1)],
        })  # fmt: skip

    def enter(self, dataset: str, body: Entry) -> None:
        """Appends to a ledger; the rules are the real ones."""
        ledger, entries = self.ledgers[dataset]
        entries.append(ledger.append(body))

    def privacy_report(self, dataset_id: str = DEFAULT_DATASET) -> PrivacyReport:
        if dataset_id not in self.ledgers:
            raise NotFoundError(f"dataset {dataset_id!r} has no ledger")
        return PrivacyReport(self.ledgers[dataset_id][1])

    def drop_draw(self, dataset_id: str = DEFAULT_DATASET) -> int:
        told = self.privacy_report(dataset_id).ledger.told
        if told is None:
            raise InvalidRequestError("no draw waits for its step")
        self.enter(dataset_id, {"type": "drop", "run": None, "position": told.position})
        return told.position

    def book_missing_charges(self, dataset_id: str = DEFAULT_DATASET) -> int:
        return self.missing.pop(dataset_id, 0)

    def list_training_clients(self) -> list[TrainingClientInfo]:
        return [client.info() for client in self.clients]

    def describe_training_client(self, training_client_id: str) -> TrainingClientInfo:
        return self._one(training_client_id).info()

    def park_training_client(self, training_client_id: str) -> None:
        self._one(training_client_id).parked = True

    def close_training_client(self, training_client_id: str) -> None:
        self._one(training_client_id).close()

    def _one(self, training_client_id: str) -> FakeTrainingClient:
        for client in self.clients:
            if client.id == training_client_id:
                return client
        raise NotFoundError(f"there is no run {training_client_id}")

    def list_artifacts(self, **conditions: Any) -> list[ArtifactInfo]:
        return list(self.artifacts.values())

    def artifact(self, artifact_id: str) -> ArtifactInfo:
        if artifact_id not in self.artifacts:
            raise NotFoundError(f"there is no artifact {artifact_id}")
        return self.artifacts[artifact_id]

    def get_artifact(self, artifact_id: str) -> ArtifactInfo:
        return self.artifact(artifact_id)

    def delete_artifact(self, artifact_id: str, *, lost: bool = False) -> None:
        del self.artifacts[self.artifact(artifact_id).artifact_id]

    def export_adapter(self, artifact_id: str, path: Any) -> Path:
        self.artifact(artifact_id)
        Path(path).mkdir()
        return Path(path)

    def audit_log(self, since: int = 0, limit: int = 1000) -> list[AuditRow]:
        return self.audited[since : since + limit]

    def verify_audit_log(self, head: AuditHead | None = None) -> AuditHead:
        return verify(self.audited, known=[head] if head else []).signed(self.signing_key)

    def close(self) -> None:
        self.closed = True
