"""What a run reads from the hub: its base, its world encoder and its datasets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from theworld_train.config.credentials import looks_secret
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.rollout import RolloutRules
from theworld_train.config.schema import RunConfig
from theworld_train.config.sources import STREAM_FILES, HubSource, leaf_sources
from theworld_train.hub.lock import Kind, Lock, pinned_revision

#: What a Gemma 3 checkpoint is loaded from. Formats that run code when they are opened are never downloaded.
BASE_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
#: Of the world encoder's repository only the VAE: neither the diffusion transformer nor the text encoder.
ENCODER_PATTERNS = ("vae/*.safetensors", "vae/*.json")

#: What a video generator is loaded from.
GENERATOR_PATTERNS = (
    "model_index.json",
    *ENCODER_PATTERNS,
    *(f"{part}/*.{kind}" for part in ("transformer", "text_encoder") for kind in ("safetensors", "json")),
    "scheduler/*.json",
    "tokenizer/*.json",
    "tokenizer/spiece.model",
)

_HUB_ID = re.compile(r"(?!.*(?:--|\.\.))(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Repository:
    """A repository or directory that a run reads.

    Attributes:
        kind: Whether it holds weights or a dataset.
        id: Hub id, or a directory.
        revision: Revision that the config states.
        key: Key of the config that names it.
        revision_key: Key of the config that states its revision; None if that is not the config's to say.
        patterns: Files that are needed of a model, or of a dataset that is streamed.
        configs: Configurations that are needed of a dataset that is copied.
        source: File that the config came from.
        generates: Whether it is a video generator, which `rollout` needs and training does not.
    """

    kind: Kind
    id: str
    revision: str | None
    key: str
    revision_key: str | None
    patterns: tuple[str, ...] = ()
    configs: tuple[str | None, ...] = ()
    source: str | None = None
    generates: bool = False

    @property
    def is_directory(self) -> bool:
        """Whether it is on this machine's disk rather than on the hub."""
        return Path(self.id).is_dir()

    @property
    def url(self) -> str:
        """Its page."""
        endpoint = "" if looks_secret(None, constants.ENDPOINT) else constants.ENDPOINT  # a mirror's, with a password
        return f"{endpoint}/{'datasets/' if self.kind == 'dataset' else ''}{self.id}"

    def problem(self, message: str, hint: str | None = None) -> Problem:
        """Returns a problem of the key that names it."""
        return Problem(message, source=self.source, key=self.key, value=self.id, hint=hint)

    def name_problem(self) -> Problem | None:
        """Returns a problem if it is neither a directory nor an id that the hub could know."""
        if self.is_directory:
            return None
        if len(self.id) <= 96 and _HUB_ID.fullmatch(self.id):
            return None
        return self.problem("neither a directory nor a hub id such as 'owner/name'", tiny_hint(self.id))


def required_repositories(config: RunConfig, source: str | None = None) -> list[Repository]:
    """Lists the repositories and directories that a run reads weights and datasets from; its generator's too.

    Args:
        config: The run config.
        source: The file that it came from, for problems.
    """
    return [
        replace(use, source=source) for use in (*_model_uses(config), *_generator_uses(config), *_dataset_uses(config))
    ]


def _model_uses(config: RunConfig) -> Iterator[Repository]:
    model, world = config.model, config.model.world
    base = Repository("model", model.base, model.revision, "model.base", "model.revision", BASE_PATTERNS)
    yield base
    record = read_json(Path(model.base) / "components.json")
    if record is not None:  # a run's checkpoint, which builds on the bases that it names
        for part, patterns in (("base", BASE_PATTERNS), ("encoder", ENCODER_PATTERNS)):
            if entry := record.get(part):
                yield Repository("model", entry["id"], entry["revision"], "model.base", None, patterns)
    elif world.enabled and (read_json(Path(model.base) / "config.json") or {}).get("model_type") != "theworld":
        key = "model.world.encoder"
        yield Repository("model", world.encoder, world.encoder_revision, key, f"{key}_revision", ENCODER_PATTERNS)


def _generator_uses(config: RunConfig) -> Iterator[Repository]:
    world, rules = config.data.world, config.data.world.rollout
    if world.frames == "rollout":
        yield _generator(rules)


def _generator(rules: RolloutRules) -> Repository:
    keys = "data.world.rollout.pipeline", "data.world.rollout.revision"
    return Repository("model", rules.pipeline, rules.revision, *keys, GENERATOR_PATTERNS, generates=True)


def _dataset_uses(config: RunConfig) -> Iterator[Repository]:
    leaves = leaf_sources(config.data.train, "data.train") | leaf_sources(config.data.eval, "data.eval")
    for key, data in leaves.items():
        if isinstance(data, HubSource):
            patterns, configs = (STREAM_FILES, ()) if data.streaming else ((), (data.config_name,))
            yield Repository("dataset", data.id, data.revision, f"{key}.id", f"{key}.revision", patterns, configs)


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns what a JSON file holds, or None if there is none or it is damaged, which its loader reports."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def tiny_hint(name: str) -> str | None:
    """Returns how to write the quickstart's tiny model, if a name looks like one of its two directories."""
    path = Path(name)
    if path.name not in ("gemma", "cosmos") or not path.parent.name:
        return None
    return f"if it is the quickstart's, write it: `theworld-train tiny {path.parent}`"


def pin_revisions(config: RunConfig, lock: Lock) -> RunConfig:
    """Returns a run's config with hub revisions replaced by commits, as far as config and lock know them.

    Args:
        config: The run config.
        lock: The lock.

    Raises:
        ConfigError: With every contradiction between config and lock.
    """
    values = config.model_dump(mode="json")
    problems: list[Problem] = []
    for use in required_repositories(config):
        if use.is_directory or use.revision_key is None:
            continue
        *parents, field = use.revision_key.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        section[field] = pinned(use, lock, problems) or use.revision
    if problems:
        raise ConfigError(problems)
    return RunConfig.model_validate_json(json.dumps(values))


def pin_rules(rules: RolloutRules, lock: Lock) -> RolloutRules:
    """Returns rules whose pipeline is pinned to a commit, as far as they or the lock know it.

    Raises:
        ConfigError: If they contradict each other.
    """
    use, problems = _generator(rules), list[Problem]()
    if use.is_directory:
        return rules
    commit = pinned(use, lock, problems)
    if problems:
        raise ConfigError(problems)
    return rules.model_copy(update={"revision": commit or use.revision})


def pinned(use: Repository, lock: Lock, problems: list[Problem]) -> str | None:
    """Returns the commit of a repository; a contradiction is added to the problems."""
    try:
        return pinned_revision(lock, use.id, use.revision, use.kind)
    except ConfigError as error:
        key = use.revision_key or use.key
        problems += [replace(problem, source=use.source, key=key) for problem in error.problems]
        return None
