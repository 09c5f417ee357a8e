"""Measures the data pipeline by itself: samples a second by source and workers, and what padding wastes by batching.

    python benchmarks/data.py [--samples 512]

The processor is that of a tiny Gemma 3, made on the spot; frames are fitted to 224 pixels. Prints tables, and writes a
record with hardware and versions into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from measuring import table, write_record
from PIL import Image

from theworld_train.config.sources import (
    ClipsSource,
    JsonlSource,
    LlavaSource,
    MovingDigitsSource,
    ParquetSource,
    SpatialRgptSource,
    WebDatasetSource,
)
from theworld_train.data import (
    Batching,
    Collator,
    Conversations,
    Source,
    TrainingOrder,
    measure_lengths,
    open_source,
    training_batches,
)
from theworld_train.data.moving_digits import WORDS
from theworld_train.model import TheWorldProcessor
from theworld_train.model.build import write_tiny

RESOLUTION, MAX_LENGTH, GLOBAL_BATCH, MICRO_BATCH = 224, 4096, 32, 4
WORKERS = (0, 1, 2)
BATCHINGS = ("padded", "grouped", "packed")


def write_conversations(directory: Path, samples: int) -> Path:
    """Writes samples with one photo-sized JPEG each and answers of 1 to 400 words, their logarithm drawn evenly."""
    draw = np.random.default_rng(0)
    words = [word for word in WORDS if word not in ("user", "model")]
    for number in range(32):
        coarse = draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((640, 480)).save(directory / f"{number}.jpg")
    path = directory / "conversations.jsonl"
    with path.open("w") as file:
        for index in range(samples):
            question = [{"type": "image", "path": f"{index % 32}.jpg"}, {"type": "text", "text": "Which digit is it?"}]
            answer = " ".join(draw.choice(words, int(400 ** draw.random())))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def write_other_formats(directory: Path, conversations: Path) -> dict[str, Source]:
    """Writes the same questions, answers and photos in the formats of others, and opens them."""
    rows = [json.loads(line) for line in conversations.read_text().splitlines()]
    answers = [row["messages"][1]["content"] for row in rows]
    names = [row["messages"][0]["content"][0]["path"] for row in rows]
    photos = {name: (directory / name).read_bytes() for name in set(names)}
    llava, regions, embedded = [], [], []
    for name, answer in zip(names, answers, strict=True):
        turns = [{"from": "human", "value": "<image>\nWhich digit is it?"}, {"from": "gpt", "value": answer}]
        llava.append({"image": name, "conversations": turns})
        asked = [{"from": "human", "value": "<image>\nWhich digit is <mask> <depth>?"}, turns[1]]
        regions.append({"filename": name, "conversations": asked, "bbox": [[100, 100, 500, 400]]})
        question = [{"type": "image", "text": None}, {"type": "text", "text": "Which digit is it?"}]
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        embedded.append({"messages": messages, "images": [{"bytes": photos[name], "path": None}]})
    (directory / "llava.json").write_text(json.dumps(llava))
    (directory / "regions.json").write_text(json.dumps(regions))
    datasets.Dataset.from_list(embedded).to_parquet(directory / "rows.parquet", batch_size=100)
    with tarfile.open(directory / "00000.tar", "w") as tar:
        for number, row in enumerate(llava):
            for suffix, data in (("jpg", photos[row["image"]]), ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"{number:09}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    for number in range(len(rows)):
        clip = directory / "clips" / str(number % 10) / str(number)
        clip.mkdir(parents=True)
        for frame in range(9):
            (clip / f"{frame}.jpg").hardlink_to(directory / f"{(number + frame) % 32}.jpg")
    path = {
        name: str(directory / name) for name in ("llava.json", "regions.json", "rows.parquet", "00000.tar", "clips")
    }
    return {
        "photos in LLaVA's JSON": open_source(LlavaSource(source="llava", path=path["llava.json"])),
        "photos with a region drawn": open_source(SpatialRgptSource(source="spatialrgpt", path=path["regions.json"])),
        "photos inside Parquet": open_source(ParquetSource(source="parquet", path=path["rows.parquet"])),
        "photos in a tar shard": open_source(
            WebDatasetSource(source="webdataset", path=path["00000.tar"], format="llava")
        ),
        "photos in a stream of Parquet": open_source(
            ParquetSource(source="parquet", path=path["rows.parquet"], streaming=True)
        ),
        "clips of 9 photos": open_source(ClipsSource(source="clips", path=path["clips"])),
    }


def walk(source: Source, collator: Collator, kind: str, workers: int, steps: int) -> tuple[float, int, int, int]:
    """Returns seconds, micro-batches, tokens and positions of some steps on one rank, the start of workers included."""
    started = time.perf_counter()
    lengths = None if kind == "padded" else measure_lengths(source, collator, range(len(source)), workers)
    groups = source.groups if isinstance(source, Conversations) else None
    order = TrainingOrder(len(source), 0, GLOBAL_BATCH, groups)
    batches = tokens = positions = 0
    for window in training_batches(
        source,
        collator,
        order,
        Batching(kind, collator.max_length, lengths),  # type: ignore[arg-type]
        rank=0,
        world_size=1,
        micro_batch_size=1 if kind == "packed" else MICRO_BATCH,
        start_step=0,
        num_steps=steps,
        num_workers=workers,
        pin_memory=False,
    ):
        for batch in window.micro_batches:
            batches, tokens = batches + 1, tokens + batch.num_tokens
            positions += batch.input_ids.numel()
    return time.perf_counter() - started, batches, tokens, positions


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=512)
    options = parser.parse_args()
    steps = options.samples // GLOBAL_BATCH
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        datasets.config.HF_DATASETS_CACHE = root / "cache"  # where the Parquet file is copied to
        write_tiny(root / "tiny", WORDS, torch.rand(2, 3, 5, 64, 64) * 2 - 1)
        processor = TheWorldProcessor.from_pretrained(str(root / "tiny" / "gemma"), world_resolution=RESOLUTION)
        collator = Collator(processor, MAX_LENGTH)
        path = write_conversations(root, options.samples)
        digits = MovingDigitsSource(source="moving_digits", split="train", samples=options.samples)
        sources = {
            "photos in JSONL": open_source(JsonlSource(source="jsonl", path=str(path))),
            **write_other_formats(root, path),
            "clips of the generator": open_source(digits),
        }
        speed: list[dict[str, Any]] = []
        for source, opened in sources.items():
            for workers in WORKERS:
                seconds, *_ = walk(opened, collator, "padded", workers, steps)
                speed.append({"source": source, "workers": workers, "samples_per_s": options.samples / seconds})
        waste: list[dict[str, Any]] = []
        for kind in BATCHINGS:
            seconds, batches, tokens, positions = walk(sources["photos in JSONL"], collator, kind, 2, steps)
            waste.append({"batching": kind, "micro_batches": batches, "positions": positions, "tokens": tokens})
        began = time.perf_counter()
        measure_lengths(sources["photos in JSONL"], collator, range(options.samples), 2)
        measured = options.samples / (time.perf_counter() - began)
    rows = [[row["source"], row["workers"], f"{row['samples_per_s']:,.0f}"] for row in speed]
    print(table(["source", "workers", "samples/s"], rows), "\n")
    rows = [
        [row["batching"], row["micro_batches"], f"{row['positions']:,}", f"{1 - row['tokens'] / row['positions']:.1%}"]
        for row in waste
    ]
    print(table(["batching", "micro-batches", "positions", "padding"], rows), "\n")
    print(f"lengths are measured at {measured:,.0f} samples/s by two workers")
    command = f"python benchmarks/data.py --samples {options.samples}"
    print(f"written to {write_record('data', command, speed=speed, padding=waste, lengths_per_s=measured)}")


if __name__ == "__main__":
    main()
