"""The projection stage of the quickstart starts calmly: on a fixed batch its loss never jumps, and it falls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from theworld_train.config.schema import RunConfig
from theworld_train.data import open_source

STEPS = 100


@pytest.mark.slow  # a minute and a half; `test_quickstart` trains every stage in the fast set
def test_projection_stage_on_a_probe_batch(
    quickstart_stage: Callable[..., RunConfig], assembled: Callable[[RunConfig], Any], tmp_path: Path
):
    parts = assembled(quickstart_stage("projection", tmp_path))
    stage = parts.stage
    source = parts.config.data.train.model_copy(update={"split": "eval", "samples": 16})
    samples = open_source(source)
    probe = parts.inputs.collator([samples[index] for index in range(len(samples))])
    features = stage.encode(probe)  # of encoders that are frozen

    @torch.no_grad()
    def measure() -> float:
        return float(stage(probe, features, 1).loss_sum) / probe.num_supervised

    losses = [measure()]
    rates = []
    for window in parts.windows(STEPS):
        rates += parts.trainer.step(window).rates.values()
        losses.append(measure())
    assert len(losses) == STEPS + 1
    peak, warmup = parts.config.trainable["world_projector"].lr, parts.config.schedule.warmup_steps
    assert rates[0] == peak / warmup
    assert max(rates) == peak
    worst = max(losses) / losses[0]
    print(f"probe: first {losses[0]:.3f}, largest {worst:.3f} x, step {STEPS} {losses[-1] / losses[0]:.3f} x")
    assert worst <= 1.1
    assert losses[-1] <= 0.9 * losses[0]
