"""Times a step and measures its memory under every strategy, on one process and on several, and prices the exchanges.

    python benchmarks/parallel.py [--processes 2] [--steps 4]

All rows take the same global batch of the same random model: one launch of a single process, and one of several, in
which the strategies come one after the other. On a CPU every process computes with one thread. Prints tables, and
writes a record with hardware and versions into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import RETURNING_MEMORY, high_water, random_model, reset_high_water, table, write_record

if TYPE_CHECKING:
    from torch import Tensor

    from theworld_train.config.schema import RunConfig
    from theworld_train.model.configuration import TheWorldConfig

STEP_HEADER = ("strategy", "processes", "step (s)", "ratio", "peak of a rank (MiB)", "ratio", "exchanges alone (s)")
COLLECTIVE_HEADER = ("collective", "payload (MiB)", "time (ms)", "GB/s", "share of a `ddp` step")
STRATEGIES = ("ddp", "zero1", "zero2", "fsdp2", "zero3")
MIB = 2**20
#: Steps before the ones that are measured: they make the optimizer's state and DeepSpeed's trace.
WARMUP_STEPS = 2
REPEATS = 5
#: Payloads of collectives in bytes, besides that of all gradients.
PAYLOADS = (MIB, 16 * MIB, 64 * MIB)
GLOBAL_BATCH, POSITIONS, RESOLUTION = 2, 128, 32

_TEXT = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4} | {
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 16_064,
    "sliding_window": 64,
}
_VISION = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4} | {
    "model_type": "siglip_vision_model",
    "image_size": 112,
    "patch_size": 14,
    "vision_use_head": False,
}
_TOKENS = {"mm_tokens_per_image": 16, "boi_token_index": 15_998, "eoi_token_index": 15_999, "image_token_index": 16_000}
_EVERYTHING = ("world_projector", "vision_tower", "multi_modal_projector", "language_model", "world_encoder")
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | RETURNING_MEMORY


# -- one launch -------------------------------------------------------------------------------------------------------


def describe(strategy: str) -> tuple[RunConfig, TheWorldConfig]:
    """Returns the run config and the architecture that every row takes."""
    from theworld_train.config import parse_run_config
    from theworld_train.model.configuration import TheWorldConfig
    from theworld_train.model.world_encoder import vae_config

    config = parse_run_config(
        {
            "name": "parallel",
            "output_dir": "unused",
            "precision": "fp32",
            "model": {"world": {"resolution": RESOLUTION}},
            "trainable": {component: {} for component in _EVERYTHING},
            "data": {
                "train": {"source": "moving_digits", "split": "train", "samples": 8, "frames": 1},
                "max_sequence_length": POSITIONS,
            },
            "training": {"max_steps": 1, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": 1},
            "runtime": {"strategy": strategy},
        }
    )
    architecture = TheWorldConfig(
        text_config=_TEXT,
        vision_config=_VISION,
        world_encoder_config=vae_config({"base_dim": 8}),
        world_resolution=RESOLUTION,
        **_TOKENS,
    )
    architecture._attn_implementation = "sdpa"
    return config, architecture


def measure_steps(strategy: str, steps: int) -> dict[str, Any]:
    """Takes steps on this rank; returns the median time of one and this rank's most memory."""
    import torch

    from theworld_train.assemble.model import build_stage, move
    from theworld_train.data import Window
    from theworld_train.plan.dry_run import sample_shape, synthetic_batch
    from theworld_train.train.freeze import apply_trainable
    from theworld_train.train.groups import build_optimizer
    from theworld_train.train.ledger import build_ledger, trainable_components
    from theworld_train.train.quarantine import Quarantine
    from theworld_train.train.runtime import Runtime
    from theworld_train.train.trainer import Trainer

    if strategy.startswith("zero"):
        import deepspeed  # noqa: F401 (its own memory is none of the step's)
    config, architecture = describe(strategy)
    runtime = Runtime(config)
    before = reset_high_water()
    model = random_model(architecture, torch.bfloat16)
    apply_trainable(model, trainable_components(config), config.precision)
    ledger = build_ledger(model, config)
    stage = build_stage(model, config)
    move(model, runtime.device)
    engine = runtime.engine(stage, lambda: build_optimizer(model, config), config)
    trainer = Trainer(
        config=config,
        ledger=ledger,
        runtime=runtime,
        stage=stage,
        engine=engine,
        max_steps=WARMUP_STEPS + steps,
        first_step=0,
        windows=lambda _start, _number: (_ for _ in ()),
        quarantine=Quarantine(),
    )
    stage.set_training_modes()
    batch = synthetic_batch(architecture, sample_shape(config, architecture), 1)
    batches = (batch,) * (GLOBAL_BATCH // runtime.world_size)
    times = []
    for step in range(WARMUP_STEPS + steps):
        if step == WARMUP_STEPS:
            runtime.reset_memory_peak()
        started = time.perf_counter()
        trainer.step(Window(step, batches, ()))
        times.append(time.perf_counter() - started)
    peak = runtime.memory_peak() if runtime.device.type == "cuda" else high_water() - before
    return {
        "step_s": statistics.median(times[WARMUP_STEPS:]),
        "fastest_s": min(times[WARMUP_STEPS:]),
        "peak_bytes": max(int(rank) for (rank,) in runtime.exchange([peak])),
        "parameters": ledger.total,
        "device": runtime.device_name,
    }


def measure_collectives(payloads: tuple[int, ...]) -> list[dict[str, Any]]:
    """Times each kind of collective over whole tensors of several sizes, in fp32."""
    import torch
    import torch.distributed as dist

    from theworld_train.train.runtime import Runtime

    config, _ = describe("ddp")
    rows: list[dict[str, Any]] = []
    runtime = Runtime(config)
    for payload in payloads:
        ranks = runtime.world_size
        part = torch.ones(payload // 4 // ranks, device=runtime.device)
        whole = torch.ones(len(part) * ranks, device=runtime.device)
        parts = list(whole.chunk(ranks))
        kinds: dict[str, Callable[[], object]] = {
            "all_reduce": lambda whole=whole: dist.all_reduce(whole),
            "all_gather": lambda parts=parts, part=part: dist.all_gather(parts, part),
            "reduce_scatter": lambda parts=parts, part=part: dist.reduce_scatter(part, parts),
        }
        for name, run in kinds.items():
            rows.append({"operation": name, "payload": payload, "seconds": _timed(run, whole)})
    return rows


def measure_rank(steps: int) -> dict[str, Any]:
    """Measures everything that this launch is for; all of it shares one process group."""
    processes = int(os.environ["WORLD_SIZE"])
    rows: list[dict[str, Any]] = []
    for strategy in STRATEGIES if processes > 1 else STRATEGIES[:1]:
        rows.append({"strategy": strategy, "processes": processes} | measure_steps(strategy, steps))
        if os.environ["RANK"] == "0":
            print(f"{strategy} on {processes}: {rows[-1]['step_s']:.3f} s", file=sys.stderr, flush=True)
    payloads = (*PAYLOADS, 4 * rows[0]["parameters"])
    return {"steps": rows, "collectives": measure_collectives(payloads) if processes > 1 else []}


def _timed(run: Callable[[], object], tensor: Tensor) -> float:
    import torch

    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        run()
        if tensor.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


# -- all of them ------------------------------------------------------------------------------------------------------


def launch(processes: int, steps: int) -> dict[str, Any]:
    """Runs this file on some ranks and returns what the first of them has written."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "out.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        subprocess.run(
            [*command, __file__, "--output", str(output), "--steps", str(steps)],
            env=os.environ | _ENVIRONMENT,
            check=True,
        )
        found: dict[str, Any] = json.loads(output.read_text())
        return found


def exchange_seconds(strategy: str, processes: int, parameters: int, priced: dict[str, float]) -> float:
    """Returns the time that a step's exchanges take by themselves: bytes by formula, times what a byte was measured at.

    Args:
        strategy: Of the run.
        processes: Ranks.
        parameters: All of which train.
        priced: Seconds for a byte of payload, by operation.
    """
    from theworld_train.accounting.collectives import Exchanged, collectives

    units = _TEXT["num_hidden_layers"] + _VISION["num_hidden_layers"] + 2
    exchanges = collectives(strategy, Exchanged(parameters, 0, units, 4), GLOBAL_BATCH // processes)
    return sum(exchange.payload * priced[exchange.operation] for exchange in exchanges)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", help="Used by the launches of this file itself.")
    options = parser.parse_args()
    if options.output:
        rows = measure_rank(options.steps)
        if os.environ["RANK"] == "0":
            Path(options.output).write_text(json.dumps(rows))
        return
    steps, collectives = measure_all(options.processes, options.steps)
    one, ddp = steps[0], next(row for row in steps[1:] if row["strategy"] == "ddp")
    print(table(STEP_HEADER, [step_cells(row, one) for row in steps]), "\n")
    print(table(COLLECTIVE_HEADER, [collective_cells(row, ddp["step_s"]) for row in collectives]), "\n")
    shape = {"global_batch": GLOBAL_BATCH, "positions": POSITIONS, "measured_steps": options.steps}
    command = f"python benchmarks/parallel.py --processes {options.processes} --steps {options.steps}"
    print("written to", write_record("parallel", command, shape=shape, steps=steps, collectives=collectives))


def measure_all(processes: int, steps: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measures every row: steps by strategy, the one of a single process first, and collectives."""
    one, several = launch(1, steps), launch(processes, steps)
    rows, collectives = [*one["steps"], *several["steps"]], several["collectives"]
    parameters = rows[0]["parameters"]
    priced = {row["operation"]: row["seconds"] / row["payload"] for row in collectives}  # the largest is the last
    for row in rows[1:]:
        row["exchange_s"] = exchange_seconds(row["strategy"], processes, parameters, priced)
    return rows, collectives


def step_cells(row: dict[str, Any], one: dict[str, Any]) -> list[str]:
    """Renders a strategy's row, in ratios to that of one process."""
    exchange = f"{row['exchange_s']:.3f} ({row['exchange_s'] / row['step_s']:.0%})" if "exchange_s" in row else ""
    return [
        f"`{row['strategy']}`",
        str(row["processes"]),
        f"{row['step_s']:.3f}",
        f"x{row['step_s'] / one['step_s']:.2f}",
        f"{row['peak_bytes'] / MIB:,.0f}",
        f"x{row['peak_bytes'] / one['peak_bytes']:.2f}",
        exchange,
    ]


def collective_cells(row: dict[str, Any], step_s: float) -> list[str]:
    """Renders a collective's row."""
    seconds, payload = row["seconds"], row["payload"]
    rate = f"{payload / seconds / 1e9:.2f}"
    return [row["operation"], f"{payload / MIB:,.0f}", f"{seconds * 1e3:.1f}", rate, f"{seconds / step_s:.1%}"]


if __name__ == "__main__":
    main()
