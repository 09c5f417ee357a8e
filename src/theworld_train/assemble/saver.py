"""What a run saves: which components of its chain a checkpoint holds, and who writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from theworld_train.accounting.ledger import ParameterLedger
from theworld_train.assemble.inputs import Inputs
from theworld_train.assemble.model import LoadedModel
from theworld_train.config import dump_config
from theworld_train.config.components import Component
from theworld_train.config.schema import RunConfig
from theworld_train.model.adapters import ADAPTER_SUFFIX
from theworld_train.train.checkpoint import BackgroundWriter, CheckpointWriter, RunRecord, Snapshot, take_snapshot
from theworld_train.train.engine import Engine
from theworld_train.train.ledger import saved_names


class RunSaver:
    """Writes the checkpoints of a run; see `Saver`."""

    def __init__(self, config: RunConfig, inputs: Inputs, loaded: LoadedModel, ledger: ParameterLedger) -> None:
        """Args: config: of the run. inputs: with its processor. loaded: its model. ledger: its parameters."""
        trained = saved_names(config)
        # An adapter of a component that trains in full now has been merged into it.
        gone = {*trained, *(f"{name}{ADAPTER_SUFFIX}" for name in trained)}
        carried = {name: entry for name, entry in loaded.inheritance.components.items() if name not in gone}
        # No base holds a projector, so it is saved even where it has never trained.
        projector = Component.WORLD_PROJECTOR.value
        is_new = config.model.world.enabled and projector not in (*trained, *carried)
        self._record = RunRecord(
            run_name=config.name,
            config_yaml=dump_config(config),
            model=loaded.model,
            processor=inputs.processor,
            base=loaded.base,
            encoder=loaded.encoder,
            init_from=loaded.inheritance.origin,
            trained=trained,
            initialised=(projector,) if is_new else (),
            base_digests=loaded.digests,
            ledger=ledger.to_dict(),
        )
        self._writer = CheckpointWriter(Path(config.output_dir), config.checkpoint.keep_last, self._record, carried)
        self._background = BackgroundWriter(self._writer) if config.checkpoint.background else None

    def collect(self, engine: Engine, *, keep: bool) -> Snapshot:
        """See `Saver`."""
        record, copy = self._record, self._background is not None
        return take_snapshot(record.model, engine, (*record.trained, *record.initialised), keep=keep, copy=copy)

    def write(self, step: int, snapshot: Snapshot, rng: list[dict[str, Any]], gates: dict[str, Any]) -> None:
        """See `Saver`."""
        (self._background or self._writer).write(step, snapshot, rng, gates)

    def finish(self) -> None:
        """See `Saver`."""
        if self._background is not None:
            self._background.finish()

    def failure(self) -> Exception | None:
        """See `Saver`."""
        return None if self._background is None else self._background.failure()

    def close(self) -> None:
        """Waits until nothing is written any more: the directory is about to be another process's."""
        if self._background is not None:
            self._background.close()
