"""The training loop: a page that reads aloud, and the small steps that it is made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from harness.config.schema import RunFile
from harness.errors import AnomalyStop, StopRequested
from harness.heartbeat import mark, spent
from harness.log import say
from harness.resilience.agreement import Agreement, fail_together
from harness.resilience.hearing import Hearing, Interrupted
from harness.resilience.signals import StopFlag
from harness.resilience.spikes import SpikeWatch
from harness.train.evaluate import Evaluation
from harness.train.opened import OpenStep, Spike, Work
from harness.train.progress import Progress

if TYPE_CHECKING:
    from harness.data.loader import GlobalBatch
    from harness.train.course import Course
    from harness.engine.steps import StepResult
    from harness.engine.common import CommonEngine
    from harness.telemetry.recorder import Recorder
    from harness.train.saving import Saver
    from harness.train.trace import Tracer


@dataclass
class Trainer:
    """What the loop uses, built and handed over by the composition root; `is_evaluated` unless an evaluation that was due is to be made up for."""

    run: RunFile
    engine: CommonEngine
    course: Course
    rows_per_epoch: Callable[[], int | None]
    work: Work
    agreement: Agreement
    hearing: Hearing
    stop: StopFlag
    recorder: Recorder
    evaluate: Callable[[], Evaluation]
    answer: Callable[[], list[tuple[str, str]]]
    saver: Saver
    save_requested: Callable[[], bool]
    trace_requested: Callable[[], bool]
    tracer: Tracer
    go_back: Callable[[Progress, Course, OpenStep], tuple[Progress, Course]]
    quarantine: Callable[[Progress, int, int, int], str]
    note: Callable[..., None]
    progress: Progress
    is_evaluated: bool

    def fit(self) -> Evaluation:
        """Train to the end, through every rollback.

        Returns:
            the evaluation of the last step.

        Raises:
            StopRequested: when a rank was asked to stop; after a save, if there was time for one.
            AnomalyStop: when the numbers went wrong.
        """
        while True:
            try:
                return self._train()
            except Spike as spike:
                self._go_back(spike)

    def _train(self) -> Evaluation:
        if self.hearing.now():
            self._stop()
        ended = False if self.is_evaluated else self._boundary({"save"})
        self.is_evaluated = True
        self._restart_clock()
        batches = iter(self.course.loader)
        while not ended:
            mark("data")
            if self.course.loader.table.may_wait and not self.hearing.until_all(self.course.loader.is_there):
                self._stop()
            batch = next(batches)
            lr = self.course.schedule.lr(self.progress.step + 1)
            result = self.engine.train_step(batch, step=self.progress.step + 1, lr=lr)
            mark("reduce")
            asked = self._settle()
            self._advance(batch, result)
            now = time.perf_counter()
            self._open(batch, result, lr=lr, seconds=now - self._clock - self._stood_s)
            self._clock, self._stood_s = now, 0.0
            if self.tracer.after_step(self.progress.step):
                self._restart_clock()
            if not self._is_running:
                asked |= self._settle()
                self.saver.get_ready()
            ended = self._boundary(asked)
        assert self._last is not None, "a run ends with an evaluation"
        return self._last

    def _boundary(self, asked: set[str]) -> bool:
        """Evaluate, save and stop where that is due after a step; whether the run is over."""
        at_end = self.progress.step >= self.course.total_steps
        if self._due(self.run.evaluation.every_steps) or at_end:
            asked |= self._settle()
            if "stop" not in asked and not self._evaluate():
                asked.add("stop")
        ended = self._evaluated_now and (at_end or self._out_of_patience())
        if asked or ended or self._due(self.run.checkpoint.every_steps) or self._is_new_best():
            asked |= self._settle()
            if "stop" in asked and not ended:
                self._stop()
            self._save(last=ended)
        return ended

    def _save(self, *, last: bool) -> None:
        mark("save")
        self.saver.save(self.progress, self._last.metrics() if self._last and self._evaluated_now else {}, last=last)
        self._restart_clock()

    def _stop(self) -> NoReturn:
        """Leave nothing behind that is not saved, if there is time for it. All ranks are at the same place, after a whole step.

        Raises:
            StopRequested: always.
        """
        self._settle()
        self.saver.finish()
        late = ""
        if self.saver.stands != self.progress.step and not (late := self.saver.no_time(self.stop.left_s(self.run.checkpoint.grace_seconds))):
            self._save(last=True)
        done = f"after step {self.progress.step}" if self.progress.step else "before the first step"
        raise StopRequested(f"Stopped on request {f'{done} {late}'.strip()}; start the same command again to go on.")

    def _go_back(self, spike: Spike) -> None:
        """Take back a step, and all since the last checkpoint."""
        self.saver.finish()
        if self.progress.rollbacks >= self.run.train.max_rollbacks:
            raise AnomalyStop(f"{spike.told}. The run has rolled back {self.progress.rollbacks} times (train.max_rollbacks); the last checkpoint stands.")
        mark("load")
        self.progress, self.course = self.go_back(self.progress, self.course, spike.step)
        self._watch = SpikeWatch(self.run.train.spike_zscore, self.progress.past_losses)
        self._last, self._evaluated_at, self._skipped = None, -1, 0

    def _restart_clock(self) -> None:
        """What was done since the last step is no part of the next one."""
        self._clock, self._stood_s = time.perf_counter(), 0.0

    def first_look(self) -> None:
        """Evaluate before the first step; it sets no record, for there is nothing to save.

        Raises:
            StopRequested: when a rank was asked to stop.
        """
        try:
            self._record(self.evaluate(), self.answer())
        except Interrupted:
            self._stop()

    def last_look(self) -> Evaluation:
        """Evaluate a run that is over once more; what was recorded stands.

        Raises:
            StopRequested: when a rank was asked to stop.
        """
        try:
            evaluation = self.evaluate()
        except Interrupted:
            self._stop()
        self._tell(evaluation)
        return evaluation

    @property
    def _evaluated_now(self) -> bool:
        return self._evaluated_at == self.progress.step

    def __post_init__(self) -> None:
        self._watch = SpikeWatch(self.run.train.spike_zscore, self.progress.past_losses)

    _skipped: int = 0
    _is_running: bool = False
    _evaluated_at: int = -1
    _clock: float = 0.0
    _stood_s: float = 0.0
    _pending: OpenStep | None = None
    _last: Evaluation | None = None

    def _advance(self, batch: GlobalBatch, result: StepResult) -> None:
        self.progress.step += 1
        self.progress.rows = batch.end
        self.progress.trained_tokens += result.trained_tokens

    def _due(self, every: int | None) -> bool:
        return every is not None and self.progress.step % every == 0

    def _is_new_best(self) -> bool:
        return self.run.checkpoint.keep_best and self._evaluated_now and self.progress.best_step == self.progress.step

    def _out_of_patience(self) -> bool:
        patience = self.run.evaluation.patience
        return patience is not None and self._evaluated_now and self.progress.bad_evaluations >= patience

    def _open(self, batch: GlobalBatch, result: StepResult, *, lr: float, seconds: float) -> None:
        """Offer this step's sums to the other ranks."""
        self.agreement.offer(
            result.loss_sum, result.aux_loss_sum, stop=self.hearing.asked(), save=self.save_requested(),
            failed=self.course.loader.error is not None, writing=self.saver.writing, busy_s=result.busy_s, window_s=result.window_s,
            trace=self.trace_requested(),
        )
        positions = batch.rows * self.run.data.sequence_length
        loader = self.course.loader
        is_full = batch.rows == loader.global_rows
        progress, waited = self.progress, loader.wait_seconds
        self._pending = OpenStep(progress.step, progress.rows, result, lr, seconds, waited, positions, batch.first_position, is_full)

    def _settle(self) -> set[str]:
        """Collect the sums of the step before, record it, and say what the ranks agreed to do.

        Raises:
            Failure: on all ranks, when one of them had no rows for that step, before anything of it is recorded or saved.
            AnomalyStop: on all ranks, when its loss was a spike, or the last of too many that were not finite, and that is to stop the run.
            Spike: on all ranks, when it is to be taken back.
        """
        agreed, step = self.agreement.collect(), self._pending
        self._pending = None
        if agreed is None or step is None:
            return set()
        if agreed.failed:
            self.saver.finish()
            fail_together(self.course.loader.error)
        if not agreed.writing:
            self._finish_save()
        if agreed.trace:
            self.tracer.ask()
        metrics = step.metrics(agreed, self.rows_per_epoch(), self.work)
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
        """Say that a step stands out, keep its documents, and stop where that is asked for; the loss of a few rows always differs from that of many."""
        settings = self.run.train
        self._skipped = 0 if step.result.applied else self._skipped + 1
        if self._skipped >= settings.max_skipped_steps:
            self.saver.finish()
            raise AnomalyStop(f"The gradient was not finite in {self._skipped} steps in a row, up to step {step.step}; none of them was applied.")
        score = self._watch.judge(loss) if settings.spikes != "ignore" and step.is_full else None
        self.progress.past_losses = self._watch.past
        if score is None:
            return
        told = f"step {step.step}: the loss {loss:.4f} is {score:.0f} standard deviations above its recent past"
        place = self.quarantine(self.progress, step.step, step.first_row, step.rows)
        self.note("anomaly", step=step.step, reason=told, loss=loss, zscore=round(score, 1))
        if settings.spikes == "stop":
            self.saver.finish()
            raise AnomalyStop(f"{told[0].upper()}{told[1:]}. Its documents are in {place}; the last checkpoint stands.")
        say(f"{told}; its documents are in {place}")
        if settings.spikes == "rollback":
            raise Spike(step, f"{told[0].upper()}{told[1:]}")

    def _evaluate(self) -> bool:
        """Evaluate, answer the fixed prompts, and keep count of the best; False where a request to stop came first, and nothing is recorded."""
        try:
            evaluation, answers = self.evaluate(), self.answer()
        except Interrupted:
            say(f"step {self.progress.step}: the evaluation is left off on request; it is made up for when the run goes on")
            return False
        step = self.progress.step
        self._last, self._evaluated_at = evaluation, step
        self._record(evaluation, answers)
        if evaluation.loss < self.progress.best_loss:
            self.progress.best_loss, self.progress.best_step, self.progress.bad_evaluations = evaluation.loss, step, 0
        else:
            self.progress.bad_evaluations += 1
        self._restart_clock()
        return True

    def _record(self, evaluation: Evaluation, answers: list[tuple[str, str]]) -> None:
        step = self.progress.step
        self.recorder.evaluation(step, evaluation.metrics(), rows=self.progress.rows)
        self._tell(evaluation)
        if held_up := self.engine.balance():
            say(f"step {step}: {held_up}")
            self.note("imbalance", step=step, reason=held_up)
        for prompt, answer in answers:
            self.recorder.sample(step, prompt, answer)

    def _tell(self, evaluation: Evaluation) -> None:
        step = self.progress.step
        say(f"step {step}: evaluation loss {evaluation.loss:.4f}, perplexity {evaluation.perplexity:.2f}, "
            f"token accuracy {evaluation.token_accuracy:.1%} over {evaluation.tokens:,} tokens")
        if evaluation.by_set:
            say(f"step {step}: " + ", ".join(f"{name} {one.loss:.4f}" for name, one in evaluation.by_set.items()))
