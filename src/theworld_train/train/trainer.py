"""The trainer: optimizer steps from first to last, with metrics, evaluation and checkpoints on the way."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from theworld_train.accounting.ledger import ParameterLedger
from theworld_train.config.errors import ConfigError
from theworld_train.config.schema import RunConfig
from theworld_train.data import Dropped, EvaluationBatch, Window, accumulation_steps
from theworld_train.model.components import Input
from theworld_train.train.checkpoint import Saver, random_state
from theworld_train.train.engine import Engine
from theworld_train.train.evaluation import Decode, EvaluationResult, evaluate, summary_line
from theworld_train.train.freeze import FreezingCheck, refuse_violations
from theworld_train.train.gates import ALL_STEPS, Ending, Gates
from theworld_train.train.groups import has_stepped, set_rates
from theworld_train.train.guard import NumbersGuard
from theworld_train.train.ledger import check_wrapped
from theworld_train.train.loss import num_chunks
from theworld_train.train.metrics import WARM_UP_STEPS, MetricsFile, ProgressDisplay, Resources
from theworld_train.train.quarantine import Quarantine
from theworld_train.train.runtime import Runtime, take
from theworld_train.train.schedule import rate_factor
from theworld_train.train.stage import StageModule
from theworld_train.train.stopping import StoppedError, StopRequest
from theworld_train.train.trackers import Trackers

#: How many times longer than anything else a save may take, such as 100 minutes with a `timeout_s` of 10.
SAVE_PATIENCE = 10


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step has measured, over all ranks.

    Attributes:
        loss: Mean cross entropy per supervised token of the window, before the step.
        grad_norm: Norm of the whole gradient before clipping; if it is not finite, the step was skipped.
        grad_norms: The same by component.
        weight_norms: Norm of what trains after the step, by component.
        rates: Learning rate by component.
        supervised_tokens: Supervised tokens of the window.
        tokens: Tokens of the window, padding not counted.
        padding: Share of the positions computed that are padding.
        inputs: What the window held: text always, images, world blocks.
        clips_seen: Whether one of the world blocks had several frames.
        encoded_read: Share of the images and world blocks looked up in `data.encoded` that were there; None without.
        dropped: Samples of all ranks that others have replaced.
        trimmed: Samples whose end was cut off.
        shares: Of a mixture, the share of each part in what has been drawn so far.
    """

    loss: float
    grad_norm: float
    grad_norms: dict[str, float]
    weight_norms: dict[str, float]
    rates: dict[str, float]
    supervised_tokens: int
    tokens: int
    padding: float
    inputs: frozenset[Input]
    clips_seen: bool
    encoded_read: float | None
    dropped: tuple[Dropped, ...]
    trimmed: int
    shares: Mapping[str, float]

    @property
    def skipped(self) -> bool:
        """Whether weights and optimizer are as they were before the step."""
        return not math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class _Totals:
    """What the ranks hold of one window: sums over them, but for `longest` and `chunks`, which are maxima."""

    supervised: int
    tokens: int
    positions: int
    dropped: int
    trimmed: int
    looked_up: int
    read: int
    inputs: frozenset[Input]
    longest: int
    chunks: tuple[int, ...]


@dataclass(frozen=True)
class TrainingResult:
    """What a run has come to.

    Attributes:
        steps: Optimizer steps done.
        tokens: Tokens that the whole run has trained on, padding not counted.
        supervised_tokens: Supervised ones among them.
        ending: Why there are no more steps.
        evaluation: The last held-out measurement, if there is a held-out split.
        resources: What the steps of this process have taken; None if there were none.
    """

    steps: int
    tokens: int
    supervised_tokens: int
    ending: Ending
    evaluation: EvaluationResult | None
    resources: Resources | None


class Trainer:
    """Runs the optimizer steps of one stage."""

    def __init__(
        self,
        *,
        config: RunConfig,
        ledger: ParameterLedger,
        runtime: Runtime,
        stage: StageModule,
        engine: Engine,
        max_steps: int,
        first_step: int,
        windows: Callable[[int, int], Generator[Window, None, None]],
        quarantine: Quarantine,
        held_out: Callable[[], Generator[EvaluationBatch, None, None]] | None = None,
        decode: Decode | None = None,
        save: Saver | None = None,
        metrics: MetricsFile | None = None,
        trackers: Trackers | None = None,
        progress: ProgressDisplay | None = None,
        gates: Mapping[str, Any] | None = None,
    ) -> None:
        """Keeps the objects of a run.

        Args:
            config: The run config.
            ledger: What the model was counted as; the wrapped one has to agree.
            runtime: The process group.
            stage: The model, frozen and trainable parts set.
            engine: The stage, wrapped for the run's strategy, and its optimizer.
            max_steps: Optimizer steps of the whole run.
            first_step: Steps done already.
            windows: Given a first step and a number, this rank's share of the optimizer steps.
            quarantine: Takes in the samples that could not be used.
            held_out: This rank's share of the held-out batches, if there are any.
            decode: Turns generated tokens into text; needed if answers are generated.
            save: Writes checkpoints, if any are to be kept.
            metrics: The metrics file, on the main rank.
            trackers: What else the metrics go to, on the main rank.
            progress: The display, on the main rank.
            gates: What the run's gates had seen when the checkpoint was written that it goes on from.
        """
        self._config = config
        self._runtime = runtime
        self._stage = stage
        self._engine = engine
        check_wrapped(ledger, engine.wrapped, stage.model)
        self._max_steps = max_steps
        self._first_step = first_step
        self._windows = windows
        self._held_out = held_out
        self._decode = decode
        self._save = save
        self._quarantine = quarantine
        self._metrics = metrics
        self._trackers = trackers
        self._progress = progress
        self._stop = StopRequest()
        self._longest = self._most_supervised = 0
        self._guard = NumbersGuard(config.training.max_skipped_steps)
        self._gates = Gates(config.training, gates)
        self._evaluation: EvaluationResult | None = None
        self._evaluated = -1
        self._accumulation = accumulation_steps(
            config.training.global_batch_size, config.training.micro_batch_size, runtime.world_size
        )

    def run(self) -> TrainingResult:
        """Trains from the first step to the last, or until a gate ends the run between two steps.

        Raises:
            StoppedError: If a signal to any rank has ended it between two steps, once these are saved.
        """
        check = FreezingCheck(self._stage.model, self._engine.held) if self._config.training.verify_freezing else None
        done = saved = self._first_step
        times: list[float] = []
        waits: list[float] = []
        if self._metrics is not None:
            layout = {"ranks": self._runtime.world_size, "device": self._runtime.device_name}
            self._metrics.write("start", self._first_step, layout)
        self._runtime.reset_memory_peak()
        self._stage.set_training_modes()
        windows = self._windows(self._first_step, self._max_steps - self._first_step)
        with self._stop.listening(), closing(windows), _old_objects_left_alone():
            if self._misses_evaluation():
                self._evaluate(done)
            started = time.perf_counter()
            while done < self._max_steps and self._gates.ending is None:
                done += 1
                self._runtime.enter("loading samples", done)
                window, error = take(windows)
                waited = time.perf_counter() - started
                try:
                    failed = error if self._save is None else error or self._save.failure()
                    result = self.step(failed or window or AssertionError("the data have ended before the run"))
                except StoppedError as stopped:
                    self._save_what_is_done(stopped.step, saved)
                    raise
                if check is not None and not result.skipped:
                    self._agree(check, result, done)
                    check = check if check.pending else None
                seconds = time.perf_counter() - started
                times.append(seconds - waited)
                waits.append(waited)
                self._quarantine.take(result.dropped, done)
                self._report(done, result, seconds, waited, self._suspects(window, result))
                self._judge(done, result)
                # The checkpoint comes first: whatever happens in the evaluation, the steps are not lost.
                if self._quarantine.is_full or self._is_due(done, self._config.checkpoint.every_steps):
                    self._checkpoint(done)
                    saved = done
                self._quarantine.check()
                if self._is_due(done, self._config.evaluation.every_steps):
                    self._evaluate(done)
                started = time.perf_counter()
            self._save_what_is_done(done, saved)
            resources = self._resources(times, waits)
            if check is not None and self._first_step < done:
                self._say(f"never verified, since no sample has used it: {', '.join(check.pending)}")
            return self._result(done, resources)

    # -- one step ---------------------------------------------------------------------------------------------------

    def step(self, window: Window | Exception) -> StepResult:
        """Takes one optimizer step.

        The gradient is that of the loss summed over all supervised tokens of the window on all ranks, divided by their
        number: it does not depend on ranks, micro-batches or accumulation.

        Args:
            window: This rank's micro-batches, or why it has none.

        Raises:
            ConfigError: On every rank, if any rank has no window, or if none of them holds a supervised token.
            StoppedError: On every rank, if any rank has been told to stop; the step is not taken.
        """
        if isinstance(window, Window):
            self._runtime.enter("training", window.step + 1, _sample_ids(window))
        totals = self._totals(window)
        assert isinstance(window, Window)
        if not totals.supervised:
            raise ConfigError(f"step {window.step + 1} holds no supervised token on any rank; look at the data")
        rates = set_rates(self._engine.optimizer, rate_factor(self._config.schedule, window.step, self._max_steps))
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._runtime.device)
        for index, batch in enumerate(window.micro_batches):
            moved = batch.to(self._runtime.device)
            features = self._stage.encode(moved)
            with self._engine.accumulating(last=index == len(window.micro_batches) - 1):
                output = self._engine.wrapped(moved, features, totals.chunks[index])
                self._engine.backward(output.loss_sum / totals.supervised)
            loss_sum += output.loss_sum.detach()
            self._runtime.beat()
        gradients = self._engine.gradient_norms()
        norm = self._engine.step(self._config.training.gradient_clip_norm)
        weights = self._engine.weight_norms()
        measured = (self._runtime.sum_over_ranks(loss_sum), norm, *gradients.values(), *weights.values())
        loss, grad_norm, *norms = self._runtime.read(*measured)
        return StepResult(
            loss=loss / totals.supervised,
            grad_norm=grad_norm,
            grad_norms=dict(zip(gradients, norms[: len(gradients)], strict=True)),
            weight_norms=dict(zip(weights, norms[len(gradients) :], strict=True)),
            rates=rates,
            supervised_tokens=totals.supervised,
            tokens=totals.tokens,
            padding=1 - totals.tokens / totals.positions,
            inputs=totals.inputs,
            clips_seen=totals.longest > 1,
            encoded_read=totals.read / totals.looked_up if totals.looked_up else None,
            dropped=self._gather_dropped(window) if totals.dropped else (),
            trimmed=totals.trimmed,
            shares=window.shares,
        )

    def _totals(self, window: Window | Exception) -> _Totals:
        """Exchanges what the ranks have in a window, in one collective.

        Raises:
            Exception: This rank's own reason to have no window.
            ConfigError: If only another rank has one.
            StoppedError: If a rank has been told to stop.
        """
        batches = window.micro_batches if isinstance(window, Window) else ()
        # Packed windows have fewer micro-batches than others, equally many on all ranks.
        own = [batch.num_supervised for batch in batches] + [0] * (self._accumulation - len(batches))
        for batch, number in zip(batches, own, strict=False):
            rows, length = batch.input_ids.shape
            self._longest = max(self._longest, length)
            self._most_supervised = max(self._most_supervised, math.ceil(number / rows))
        ranks = self._runtime.exchange(
            [
                isinstance(window, Exception),
                self._stop.made,
                sum(own),
                sum(batch.num_tokens for batch in batches),
                sum(batch.input_ids.numel() for batch in batches),
                len(window.dropped) if isinstance(window, Window) else 0,
                window.trimmed if isinstance(window, Window) else 0,
                sum(len(batch.images_known) + len(batch.blocks_known) for batch in batches),
                sum(sum(batch.images_known) + sum(batch.blocks_known) for batch in batches),
                any(batch.num_images for batch in batches),
                max((max(batch.world_frame_counts, default=0) for batch in batches), default=0),
                *(num_chunks(number, self._stage.chunk_size) for number in own),
            ]
        )
        failed, stopped, supervised, tokens, positions, dropped, trimmed, *rest = zip(*ranks, strict=True)
        looked_up, read, images, longest, *chunks = rest
        if any(failed):
            self._runtime.raise_failures(window if isinstance(window, Exception) else None)
        assert isinstance(window, Window)
        if any(stopped):
            raise StoppedError(window.step)
        seen: dict[Input, bool] = {"text": True, "image": any(images), "world": any(longest)}
        return _Totals(
            supervised=int(sum(supervised)),
            tokens=int(sum(tokens)),
            positions=int(sum(positions)),
            dropped=int(sum(dropped)),
            trimmed=int(sum(trimmed)),
            looked_up=int(sum(looked_up)),
            read=int(sum(read)),
            inputs=frozenset(name for name, there in seen.items() if there),
            longest=int(max(longest)),
            chunks=tuple(int(max(numbers)) for numbers in chunks),
        )

    def _gather_dropped(self, window: Window) -> tuple[Dropped, ...]:
        return tuple(item for rank in self._runtime.gather(window.dropped) for item in rank)

    def _suspects(self, window: Window | None, result: StepResult) -> tuple[str, ...]:
        """Returns the ids of all ranks' samples if the step was skipped or its loss stands out, none otherwise."""
        spike = self._guard.is_spike(result.loss)
        if window is None or not (spike or result.skipped):
            return ()
        return tuple(sample_id for rank in self._runtime.gather(_sample_ids(window)) for sample_id in rank)

    # -- around the step --------------------------------------------------------------------------------------------

    def _misses_evaluation(self) -> bool:
        """Whether the checkpoint that the run goes on from was written before the evaluation of its step."""
        due = self._first_step > 0 and self._is_due(self._first_step, self._config.evaluation.every_steps)
        return due and self._gates.misses_evaluation(self._first_step)

    def _judge(self, done: int, result: StepResult) -> None:
        """Has the gates take in a step; one that was skipped has measured nothing."""
        self._gates.count(done, tokens=result.tokens, supervised=result.supervised_tokens)
        if not result.skipped:
            self._observe({"train/loss": result.loss, "train/grad_norm": result.grad_norm}, done)

    def _observe(self, measured: Mapping[str, float], done: int) -> None:
        """Has the gates take in what they read of several metrics: the main rank's values, on every rank."""
        read = [name for name in self._gates.metrics if name in measured]
        if read:
            values = self._runtime.exchange([measured[name] for name in read])[0]
            self._gates.observe(dict(zip(read, values, strict=True)), done)

    def _agree(self, check: FreezingCheck, result: StepResult, done: int) -> None:
        """Verifies freezing; ranks that hold parts of tensors put together what they have seen."""
        before = check.pending
        ranks = self._runtime.gather(check.compare(inputs=result.inputs, clips_seen=result.clips_seen))
        changed = frozenset[str]().union(*(rank.changed for rank in ranks))
        still = frozenset.intersection(*(rank.still for rank in ranks))
        refuse_violations(changed, [name for name in sorted(still) if not self._had_gradient(name)])
        if check.pending and (done == self._first_step + 1 or check.pending != before):
            self._say(f"not verified yet, since step {done} holds nothing for it: {', '.join(check.pending)}")

    def _had_gradient(self, name: str) -> bool:
        """Whether the optimizer has taken a gradient of a tensor, whose rate was too small to change any bit of it."""
        return has_stepped(self._engine.slots(self._stage.model.get_parameter(name)))

    def _is_due(self, done: int, interval: int | None) -> bool:
        return done == self._max_steps or (interval is not None and done % interval == 0)

    def _report(self, done: int, result: StepResult, seconds: float, waited: float, suspects: tuple[str, ...]) -> None:
        values: dict[str, float] = {
            "train/loss": result.loss,
            "train/grad_norm": result.grad_norm,
            "train/supervised_tokens": result.supervised_tokens,
            "train/tokens": result.tokens,
            "train/padding_share": result.padding,
            "train/trimmed": result.trimmed,
            "train/skipped": float(result.skipped),
            "time/tokens_per_s": result.tokens / max(seconds, 1e-9),
            "time/step_s": seconds,
            "time/data_wait_s": waited,
        } | {f"lr/{name}": rate for name, rate in result.rates.items()}
        values |= {f"train/grad_norm/{name}": norm for name, norm in result.grad_norms.items()}
        values |= {f"train/weight_norm/{name}": norm for name, norm in result.weight_norms.items()}
        values |= {f"data/share/{name}": share for name, share in result.shares.items()}
        if result.encoded_read is not None:
            values["data/encoded_read"] = result.encoded_read
        if self._metrics is not None:
            dropped = [vars(item) for item in result.dropped]
            row = {**values, "loss_hex": result.loss.hex(), "dropped": dropped}
            self._metrics.write("train", done, row | ({"suspects": suspects} if suspects else {}))
        for item in result.dropped:
            self._say(f"step {done} goes on without sample {item.sample_id}: {item.reason}")
        if suspects:
            what = "is skipped, as its gradient is not finite" if result.skipped else "has a loss that stands out"
            self._say(f"step {done} {what} (loss {result.loss:.4g}): {', '.join(suspects)}")
        if done % self._config.tracking.log_every_steps == 0:
            self._track(values, done)
        if self._progress is not None:
            speed = values["time/tokens_per_s"]
            self._progress.update(done, loss=result.loss, rate=max(result.rates.values()), tokens_per_s=speed)
        self._guard.count(skipped=result.skipped, step=done, sample_ids=suspects)

    def _resources(self, times: Sequence[float], waits: Sequence[float]) -> Resources | None:
        """Returns what the steps have taken, given their seconds and those of waiting for data; every rank calls it."""
        if not times:
            return None
        ranks = self._runtime.exchange([self._runtime.memory_peak(), self._longest, self._most_supervised])
        peak, longest, supervised = (int(max(values)) for values in zip(*ranks, strict=True))
        settled, waited = times[WARM_UP_STEPS:], sum(waits[WARM_UP_STEPS:])
        return Resources(
            peak_bytes=peak,
            step_s=statistics.median(settled) if settled else None,
            ranks=self._runtime.world_size,
            device=self._runtime.device_name,
            positions=longest,
            supervised=supervised,
            data_wait=waited / (sum(settled) + waited) if settled else None,
        )

    def _result(self, done: int, resources: Resources | None) -> TrainingResult:
        """Measures what the last step has left, unless that is done, and says why it was the last one."""
        if self._evaluated < done:
            self._evaluate(done)
        ending = self._gates.ending or Ending(ALL_STEPS, f"all {self._max_steps} steps are done")
        if ending.by != ALL_STEPS:
            self._say(f"ends after step {done} of {self._max_steps} by {ending.by}: {ending.reason}")
        tokens, supervised = self._gates.tokens, self._gates.supervised_tokens
        return TrainingResult(done, tokens, supervised, ending, self._evaluation, resources)

    def _evaluate(self, done: int) -> None:
        if self._held_out is None:
            return
        self._runtime.enter("evaluating", done)
        section = self._config.evaluation
        result = evaluate(self._stage, self._engine.wrapped, self._held_out(), self._runtime, section, self._decode)
        values = result.metrics()
        self._evaluation, self._evaluated = result, done
        self._gates.refuse_unknown(values)
        self._observe(values, done)
        if self._metrics is not None:
            counts = {kind: group.samples for kind, group in result.kinds.items()}
            if done == self._first_step:  # a process before this one may have measured it, and was killed then
                self._metrics.forget("eval", done)
            self._metrics.write("eval", done, {**values, "samples": counts})
        self._track(values, done)
        self._say(f"held out after step {done}: {summary_line(result)}")

    def _checkpoint(self, done: int) -> None:
        if self._save is None:
            return
        self._finish_saving(done)
        states = self._runtime.gather(random_state())
        snapshot = self._save.collect(self._engine, keep=self._runtime.is_main)
        with self._runtime.agreement():
            if self._runtime.is_main:
                self._save.write(done, snapshot, states, self._gates.state())

    def _save_what_is_done(self, done: int, saved: int) -> None:
        if done > saved:
            self._checkpoint(done)
        self._finish_saving(done)

    def _finish_saving(self, done: int) -> None:
        """Waits until the checkpoint before is written: one copy of what is saved is enough."""
        if self._save is not None:
            self._runtime.enter("saving", done, patience=SAVE_PATIENCE)
            with self._runtime.agreement():
                if self._runtime.is_main:
                    self._save.finish()

    def _track(self, values: Mapping[str, float], done: int) -> None:
        if self._trackers is not None:
            self._trackers.log(values, done)

    def _say(self, text: str) -> None:
        if self._progress is not None:
            self._progress.say(text)


@contextmanager
def _old_objects_left_alone() -> Generator[None]:
    """Spares what is there before the first step Python's search for cycles, which would halt a step in its midst."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _sample_ids(window: Window) -> tuple[str, ...]:
    return tuple(sample_id for batch in window.micro_batches for sample_id in batch.sample_ids)
