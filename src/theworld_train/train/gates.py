"""Gates: whether a run has come far enough to end before its last step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from theworld_train.config.errors import ConfigError, Problem, did_you_mean
from theworld_train.config.gates import Plateau, Threshold, reads_evaluation
from theworld_train.config.schema import TrainingSection

#: How a run ends that no gate has ended, whether `max_steps` or `epochs` has said how long it is.
ALL_STEPS = "max_steps"
#: The gates of a run config, in the order in which they are named when several hold: `stop_when` tells a pipeline more.
STOP = "stop_when.threshold"
PLATEAU = "advance_when.plateau"
ADVANCE = "advance_when.threshold"
BUDGETS = {"steps": "steps", "supervised_tokens": "supervised tokens", "tokens": "tokens"}


@dataclass(frozen=True)
class Ending:
    """Why a run ends.

    Attributes:
        by: `max_steps`, or the gate that holds, such as `advance_when.plateau`.
        reason: The same as a sentence, with the numbers.
    """

    by: str
    reason: str


class Gates:
    """Judges what a run has measured. All ranks give it the same numbers, and so it says the same on all of them."""

    def __init__(self, training: TrainingSection, state: Mapping[str, Any] | None = None) -> None:
        """Begins a run, or goes on with one.

        Args:
            training: Holds the gates.
            state: What `state` returned when the checkpoint was written that the run goes on from. A plateau that is
                another one now begins anew, and a gate that has held and has changed since is asked again.
        """
        known = dict(state or {})
        self.tokens: int = known.get("tokens", 0)
        self.supervised_tokens: int = known.get("supervised_tokens", 0)
        self._evaluated: int = known.get("evaluated", 0)
        self._advance = training.advance_when
        self._settings = training.model_dump(mode="json", include={"advance_when", "stop_when"})
        self._thresholds: dict[str, Threshold] = {
            name: gate
            for name, gate in ((STOP, training.stop_when.threshold), (ADVANCE, training.advance_when.threshold))
            if gate is not None
        }
        self._best: float | None = None
        self._best_step = self._waited = 0
        if self._advance.plateau is not None and known.get("plateau_of") == _kind(self._advance.plateau):
            self._best, self._best_step, self._waited = known["plateau"]
        held: dict[str, dict[str, Any]] = known.get("held", {})
        self._held = {name: entry["reason"] for name, entry in held.items() if entry["gate"] == self._gate(name)}

    # -- what is measured ---------------------------------------------------------------------------------------------

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that the gates read."""
        plateau = () if self._advance.plateau is None else (self._advance.plateau.metric,)
        return tuple(dict.fromkeys((*plateau, *(gate.metric for gate in self._thresholds.values()))))

    def misses_evaluation(self, step: int) -> bool:
        """Whether the gates have not seen an evaluation that was due at a step and that they read."""
        return self._evaluated < step and any(map(reads_evaluation, self.metrics))

    def count(self, step: int, *, tokens: int, supervised: int) -> None:
        """Counts an optimizer step.

        Args:
            step: Optimizer steps done.
            tokens: Tokens of the step on all ranks, padding not counted.
            supervised: Supervised ones among them.
        """
        self.tokens += tokens
        self.supervised_tokens += supervised
        done = {"steps": step, "supervised_tokens": self.supervised_tokens, "tokens": self.tokens}
        for name, words in BUDGETS.items():
            budget = getattr(self._advance, name)
            if budget is not None and done[name] >= budget:
                self._held.setdefault(
                    f"advance_when.{name}", f"{done[name]:,} {words} are done, of a budget of {budget:,}"
                )

    def observe(self, values: Mapping[str, float], step: int) -> None:
        """Takes in metrics of the gates, those of an optimizer step or of an evaluation.

        Args:
            values: The metrics by name; those of the other kind are not among them.
            step: Optimizer steps done.
        """
        if any(map(reads_evaluation, values)):
            self._evaluated = step
        for name, gate in self._thresholds.items():
            if gate.metric in values and (reason := _reached(gate, values[gate.metric], step)):
                self._held.setdefault(name, reason)
        plateau = self._advance.plateau
        if plateau is not None and plateau.metric in values:
            self._observe_plateau(plateau, values[plateau.metric], step)

    def refuse_unknown(self, measured: Mapping[str, float]) -> None:
        """Refuses gates that read what evaluations do not measure, such as the accuracy of a kind that no sample has.

        Args:
            measured: The metrics of an evaluation.

        Raises:
            ConfigError: Naming the nearest metric that there is.
        """
        unknown = [name for name in self.metrics if reads_evaluation(name) and name not in measured]
        if unknown:
            raise ConfigError(
                Problem(
                    "a gate reads a metric that no evaluation of this run measures",
                    key="training.advance_when, training.stop_when",
                    value=name,
                    hint=did_you_mean(name, sorted(measured)),
                )
                for name in unknown
            )

    def _observe_plateau(self, plateau: Plateau, value: float, step: int) -> None:
        if _improves(plateau, value, self._best):
            self._best, self._best_step, self._waited = value, step, 0
            return
        self._waited += 1
        if self._waited >= plateau.patience:
            than = "nothing" if self._best is None else f"{self._best:.6g} of step {self._best_step}"
            by = f" by more than {plateau.min_delta:g}" if plateau.min_delta else ""
            times = f"{self._waited} measurement{'s' * (self._waited > 1)}"
            self._held.setdefault(
                PLATEAU, f"{plateau.metric} has not improved on {than}{by} in {times}, to step {step}"
            )

    # -- what follows from it -----------------------------------------------------------------------------------------

    @property
    def ending(self) -> Ending | None:
        """Why the run ends now; None if it does not."""
        for name in (STOP, ADVANCE, PLATEAU, *(f"advance_when.{budget}" for budget in BUDGETS)):
            if name in self._held:
                return Ending(name, self._held[name])
        return None

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint has to hold of it, as JSON-ready values."""
        state: dict[str, Any] = {
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "evaluated": self._evaluated,
            "held": {name: {"gate": self._gate(name), "reason": reason} for name, reason in self._held.items()},
        }
        if self._advance.plateau is not None:
            state["plateau_of"] = _kind(self._advance.plateau)
            state["plateau"] = [self._best, self._best_step, self._waited]
        return state

    def _gate(self, name: str) -> object:
        """Returns a gate as JSON-ready values; None if there is none of that name."""
        section, _, gate = name.partition(".")
        return self._settings[section].get(gate)


def _kind(plateau: Plateau) -> dict[str, Any]:
    """Returns what a plateau's memory depends on; its patience may change."""
    return plateau.model_dump(mode="json", exclude={"patience"})


def _improves(plateau: Plateau, value: float, best: float | None) -> bool:
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value < best - plateau.min_delta if plateau.mode == "min" else value > best + plateau.min_delta


def _reached(gate: Threshold, value: float, step: int) -> str | None:
    if gate.at_least is not None and value >= gate.at_least:
        return f"{gate.metric} is {value:.6g} after step {step}, at least {gate.at_least:g}"
    if gate.at_most is not None and value <= gate.at_most:
        return f"{gate.metric} is {value:.6g} after step {step}, at most {gate.at_most:g}"
    return None
