"""The training loop: a page that reads aloud, and the small steps that it is made of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from harness.config.schema import RunFile
from harness.errors import AnomalyStop, StopRequested
from harness.heartbeat import mark, spent
from harness.log import say
from harness.resilience.agreement import Agreement, fail_together
from harness.resilience.signals import StopFlag
from harness.resilience.spikes import SpikeWatch
from harness.train.evaluate import Evaluation
from harness.train.schedule import Schedule

if TYPE_CHECKING:
    from harness.data.loader import GlobalBatch, TrainLoader
    from harness.engine.steps import StepResult
    from harness.engine.common import CommonEngine
    from harness.telemetry.recorder import Recorder
    from harness.train.saving import Saver


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint.

    Attributes:
        step: optimizer steps done.
        rows: rows consumed: the cursor.
        first_row: rows that were consumed before the order in force began; above 0 once appended data were accepted.
        trained_tokens: trained tokens so far.
        best_loss: lowest evaluation loss so far.
        best_step: its step.
        bad_evaluations: evaluations since the best.
    """

    step: int = 0
    rows: int = 0
    first_row: int = 0
    trained_tokens: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    bad_evaluations: int = 0

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {key: (None if value == math.inf else value) for key, value in asdict(self).items()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        """From JSON."""
        return cls(**{**state, "best_loss": math.inf if state["best_loss"] is None else state["best_loss"]})


@dataclass
class OpenStep:
    """A step whose sums are still on their way between the ranks."""

    step: int
    rows: int
    result: StepResult
    lr: float
    seconds: float
    data_wait_seconds: float
    positions: int
    first_row: int


@dataclass
class Trainer:
    """What the loop uses, built and handed over by the composition root."""

    run: RunFile
    engine: CommonEngine
    loader: TrainLoader
    schedule: Schedule
    total_steps: int
    rows_per_epoch: Callable[[], int | None]
    agreement: Agreement
    stop: StopFlag
    recorder: Recorder
    evaluate: Callable[[], Evaluation]
    answer: Callable[[], list[tuple[str, str]]]
    saver: Saver
    save_requested: Callable[[], bool]
    stop_requested: Callable[[], bool]
    quarantine: Callable[[int, int, int], str]
    note: Callable[..., None]
    progress: Progress

    def fit(self) -> Evaluation:
        """Train to the end.

        Returns:
            the evaluation of the last step.

        Raises:
            StopRequested: when a rank was asked to stop; after a save, if there was time for one.
        """
        last = None
        clock = time.perf_counter()
        mark("data")
        for batch in self.loader:
            lr = self.schedule.lr(self.progress.step + 1)
            result = self.engine.train_step(batch, step=self.progress.step + 1, lr=lr)
            mark("reduce")
            asked = self._settle()
            self._advance(batch, result)
            now = time.perf_counter()
            self._open(batch, result, lr=lr, seconds=now - clock - self._stood_s)
            clock, self._stood_s, unsaved = now, 0.0, ""
            at_end = self.progress.step >= self.total_steps
            if self._due(self.run.evaluation.every_steps) or at_end:
                asked |= self._settle()
                last = self._evaluate()
            over = at_end or self._out_of_patience()
            if asked or over or self._due(self.run.checkpoint.every_steps) or self._is_new_best(last):
                asked |= self._settle()
                mark("save")
                unsaved = self._save(last.metrics() if last and self._evaluated_now else {}, stop="stop" in asked, over=over)
                clock, self._stood_s = time.perf_counter(), 0.0
            if "stop" in asked:
                raise StopRequested(f"Stopped on request after step {self.progress.step}{unsaved}; start the same command again to go on.")
            if over:
                break
            clock = time.perf_counter() if self._evaluated_now else clock
            mark("data")
        assert last is not None, "a run has at least one step"
        return last

    def first_look(self) -> None:
        """Evaluate before the first step; it sets no record, for there is nothing to save."""
        self._record(self.evaluate())

    @property
    def _evaluated_now(self) -> bool:
        return self._evaluated_at == self.progress.step

    def __post_init__(self) -> None:
        self._watch = SpikeWatch(self.run.train.spike_zscore)

    _skipped: int = 0
    _is_running: bool = False
    _evaluated_at: int = -1
    _stood_s: float = 0.0
    _pending: OpenStep | None = None

    def _save(self, metrics: dict[str, float], *, stop: bool, over: bool) -> str:
        """Begin a checkpoint, or make the last one; returns why not, where a signal leaves no time for it."""
        self.saver.finish()
        if stop and (late := self.saver.no_time(self.stop.left_s(self.run.checkpoint.grace_seconds))):
            return f" {late}"
        self.saver.save(self.progress, metrics, last=stop or over)
        return ""

    def _advance(self, batch: GlobalBatch, result: StepResult) -> None:
        self.progress.step += 1
        self.progress.rows += batch.rows
        self.progress.trained_tokens += result.trained_tokens

    def _due(self, every: int | None) -> bool:
        return every is not None and self.progress.step % every == 0

    def _is_new_best(self, last: Evaluation | None) -> bool:
        return self.run.checkpoint.keep_best and last is not None and self._evaluated_now and self.progress.best_step == self.progress.step

    def _out_of_patience(self) -> bool:
        patience = self.run.evaluation.patience
        return patience is not None and self._evaluated_now and self.progress.bad_evaluations >= patience

    def _open(self, batch: GlobalBatch, result: StepResult, *, lr: float, seconds: float) -> None:
        """Offer this step's sums to the other ranks."""
        self.agreement.offer(
            result.loss_sum, result.aux_loss_sum, stop=bool(self.stop) or self.stop_requested(), save=self.save_requested(), failed=self.loader.error is not None,
            writing=self.saver.writing, busy_s=result.busy_s, window_s=result.window_s,
        )
        positions = batch.rows * self.run.data.sequence_length
        first = self.progress.rows - batch.rows
        self._pending = OpenStep(self.progress.step, self.progress.rows, result, lr, seconds, self.loader.wait_seconds, positions, first)

    def _settle(self) -> set[str]:
        """Collect the sums of the step before, record it, and say what the ranks agreed to do.

        Raises:
            Failure: on all ranks, when one of them had no rows for that step, before anything of it is recorded or saved.
            AnomalyStop: on all ranks, when its loss was a spike, or the last of too many that were not finite, and that is to stop the run.
        """
        agreed, step = self.agreement.collect(), self._pending
        self._pending = None
        if agreed is None or step is None:
            return set()
        if agreed.failed:
            self.saver.finish()
            fail_together(self.loader.error)
        if not agreed.writing:
            self._finish_save()
        metrics = {
            "train/loss": agreed.loss_sum / max(step.result.trained_tokens, 1),
            "train/tokens": step.result.trained_tokens,
            "optim/lr": step.lr,
            "optim/grad_norm": step.result.grad_norm,
            "optim/skipped": 0 if step.result.applied else 1,
            "speed/step_seconds": step.seconds,
            "speed/tokens_per_second": step.positions / max(step.seconds, 1e-9),
            "speed/data_wait_seconds": step.data_wait_seconds,
        }
        if rows := self.rows_per_epoch():
            metrics["train/epoch"] = step.rows / rows
        if agreed.aux_loss:
            metrics["train/aux_loss"] = agreed.aux_loss
        if agreed.idle_share is not None:
            metrics["speed/pipeline_idle_share"] = agreed.idle_share
        self.recorder.step(step.step, metrics, rows=step.rows)
        if not self._is_running:
            self._is_running = True
            self.note("running", step=step.step, phases=spent())
        self._judge(step, metrics["train/loss"])
        return {name for name in ("stop", "save") if getattr(agreed, name)}

    def _finish_save(self) -> None:
        """Commit a checkpoint that all ranks have written."""
        started = time.perf_counter()
        self.saver.finish()
        self._stood_s += time.perf_counter() - started

    def _judge(self, step: OpenStep, loss: float) -> None:
        """Say that a step stands out, keep its documents, and stop where that is asked for."""
        settings = self.run.train
        self._skipped = 0 if step.result.applied else self._skipped + 1
        if self._skipped >= settings.max_skipped_steps:
            self.saver.finish()
            raise AnomalyStop(f"The gradient was not finite in {self._skipped} steps in a row, up to step {step.step}; none of them was applied.")
        score = self._watch.judge(loss) if settings.spikes != "ignore" else None
        if score is None:
            return
        told = f"step {step.step}: the loss {loss:.4f} is {score:.0f} standard deviations above its recent past"
        place = self.quarantine(step.step, step.first_row, step.rows)
        self.note("anomaly", step=step.step, reason=told, loss=loss, zscore=round(score, 1))
        if settings.spikes == "stop":
            self.saver.finish()
            raise AnomalyStop(f"{told[0].upper()}{told[1:]}. Its documents are in {place}; the last checkpoint stands.")
        say(f"{told}; its documents are in {place}")

    def _evaluate(self) -> Evaluation:
        """Evaluate, answer the fixed prompts, and keep count of the best."""
        evaluation, step = self.evaluate(), self.progress.step
        self._evaluated_at = step
        self._record(evaluation)
        if evaluation.loss < self.progress.best_loss:
            self.progress.best_loss, self.progress.best_step, self.progress.bad_evaluations = evaluation.loss, step, 0
        else:
            self.progress.bad_evaluations += 1
        return evaluation

    def _record(self, evaluation: Evaluation) -> None:
        step = self.progress.step
        self.recorder.evaluation(step, evaluation.metrics(), rows=self.progress.rows)
        say(f"step {step}: evaluation loss {evaluation.loss:.4f}, perplexity {evaluation.perplexity:.2f}, "
            f"token accuracy {evaluation.token_accuracy:.1%} over {evaluation.tokens:,} tokens")
        if held_up := self.engine.balance():
            say(f"step {step}: {held_up}")
            self.note("imbalance", step=step, reason=held_up)
        if evaluation.by_set:
            say(f"step {step}: " + ", ".join(f"{name} {one.loss:.4f}" for name, one in evaluation.by_set.items()))
        for prompt, answer in self.answer():
            self.recorder.sample(step, prompt, answer)
