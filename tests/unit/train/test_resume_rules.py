"""Which keys of a config may differ when a run is resumed: every one of them has a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from theworld_train.config import dump_config
from theworld_train.config.errors import ConfigError
from theworld_train.config.schema import RunConfig, TrainableComponent
from theworld_train.config.sources import SourceSection
from theworld_train.train.resume_rules import RULES, check_changes, rule_of

DIGITS = {"source": "moving_digits", "samples": 32}


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = field.annotation
        if name == "trainable":
            yield from keys(TrainableComponent, "trainable.world_projector.")
        elif prefix == "data." and name in ("train", "eval"):
            for source in get_args(SourceSection):
                yield from keys(source, f"data.{name}.")
        elif isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_key_has_a_rule():
    found = set(keys(RunConfig))
    assert {"training.max_steps", "data.train.path", "trainable.world_projector.lr", "seed"} <= found
    assert {rule_of(key) for key in found} == {"safe", "allowed", "forbidden"}


def test_no_rule_is_idle():
    found = {key.replace("world_projector", "*") for key in keys(RunConfig)}
    idle = [rule for rule in RULES if not any(key == rule or key.startswith(f"{rule}.") for key in found)]
    assert idle == []


@pytest.fixture
def change(run_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., None]:
    """Compares a config with the default one, which a checkpoint was written under."""
    (tmp_path / "step-3").mkdir()
    (tmp_path / "step-3" / "config.yaml").write_text(dump_config(run_config()))

    def check(*components: str, **sections: Any) -> None:
        check_changes(run_config(*components, **sections), tmp_path / "step-3")

    return check


def training(**values: Any) -> dict[str, Any]:
    return {"max_steps": 2, "global_batch_size": 4, "micro_batch_size": 4} | values


def test_what_does_not_matter_may_change(change: Callable[..., None]):
    change()
    change(
        name="other",
        tracking={"log_every_steps": 5},
        training=training(micro_batch_size=2),
        runtime={"strategy": "fsdp2"},
        checkpoint={"keep_last": 9},
    )


def test_new_length_needs_consent(change: Callable[..., None]):
    with pytest.raises(
        ConfigError, match=r"training.max_steps: was 2 up to step-3 and is 3 now.*allow_changed"
    ) as error:
        change(training=training(max_steps=3))
    assert len(error.value.problems) == 1
    change(training=training(max_steps=3), allow_changed=["training.max_steps"])


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"training": training(global_batch_size=8)}, "training.global_batch_size"),
        ({"data": {"train": DIGITS | {"split": "train", "samples": 33}, "num_workers": 0}}, "data.train.samples"),
    ],
)
def test_other_samples_are_refused_in_any_case(change: Callable[..., None], sections: dict[str, Any], key: str):
    with pytest.raises(ConfigError, match="put the value back") as error:
        change(**sections, allow_changed=[key])
    assert [problem.key for problem in error.value.problems] == [key]


def test_other_trainable_set_is_refused(change: Callable[..., None]):
    with pytest.raises(ConfigError, match=r"trainable\.vision_tower\.adapter: was 'absent'"):
        change("world_projector", "vision_tower")


def test_all_differences_are_told_at_once(change: Callable[..., None]):
    with pytest.raises(ConfigError) as error:
        change(seed=1, optimizer={"lr": 0.5}, precision="bf16")
    assert [problem.key for problem in error.value.problems] == ["optimizer.lr", "precision", "seed"]
