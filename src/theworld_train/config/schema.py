"""The run config: frozen models whose fields, defaults and descriptions are the reference of every setting."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import ConfigDict, Field, field_validator, model_validator

from theworld_train.config.components import Component
from theworld_train.config.gates import AdvanceWhen, StopWhen, reads_answers, reads_evaluation
from theworld_train.config.section import (
    BelowOne,
    Fraction,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    Path,
    PositiveFloat,
    PositiveInt,
    Repository,
    Section,
    Seed,
)
from theworld_train.config.sources import (
    AS_GIVEN,
    FrameChoice,
    Source,
    TrainingData,
    WorldFrames,
    frames_of,
    frames_problem,
)


class WorldConfig(Section):
    """How the world path turns pixels into tokens."""

    enabled: bool = True
    """Whether the model has a world path at all; without it the model is plain Gemma 3."""
    encoder: Repository = "nvidia/Cosmos-Predict2-2B-Video2World"
    """Hub id or directory whose `vae` subfolder holds the video VAE."""
    encoder_revision: str | None = None
    """Hub revision (branch, tag or commit) of the encoder."""
    encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the world encoder runs while it is frozen; bfloat16 shifts the latents."""
    projection: Literal["linear", "mlp"] = "mlp"
    """`linear`: one Linear from latent features to the hidden size; `mlp`: Linear, GELU, Linear."""
    tokens: Literal["spatial", "channel"] = "spatial"
    """`spatial`: a token for each latent cell; `channel`: a token for each latent channel."""
    resolution: PositiveInt = 512
    """Side in pixels of the square that every frame is fitted to; a multiple of 8."""
    resize: Literal["pad", "crop", "stretch"] = "pad"
    """How frames that are not square are fitted."""
    max_world_steps: NonNegativeInt = 4
    """Largest distance from the present, in latent frames, that the temporal embedding covers."""
    pool: Literal[1, 2, 4] = 1
    """Average latents over squares of so many cells a side before projection: a `spatial` block has pool^2 times fewer
    tokens."""

    @model_validator(mode="after")
    def _check_resolution(self) -> WorldConfig:
        if self.resolution % 8:
            raise ValueError(
                f"resolution must be a multiple of 8, as the VAE compresses space by 8, got {self.resolution}"
            )
        if self.resolution // 8 % self.pool:
            raise ValueError(
                f"pool must divide the {self.resolution // 8} latent cells along a side of {self.resolution} pixels, "
                f"got {self.pool}"
            )
        return self


class ModelSection(Section):
    """Which weights the run starts from."""

    base: Repository = "google/gemma-3-4b-it"
    """Hub id or directory of a Gemma 3 checkpoint."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of the base."""
    attention: Literal["auto", "flex", "banded", "sdpa", "eager"] = "auto"
    """How the language model attends: `flex` (FlexAttention, on CUDA alone), `banded` (block by block of queries, over
    the keys that they can see), `sdpa` and `eager` (with masks over all pairs). `auto` is `banded`. All
    compute the same; backends that drop Gemma 3's image mask are not offered."""
    kernels: Literal["lean", "compiled", "liger", "plain"] = "lean"
    """`lean`: norms and gated activations that keep less for the backward pass; `compiled`: the same, each fused by
    torch.compile when it is first used, which needs a C compiler and half a minute; `liger`: the same, each a kernel of
    the package liger-kernel, on CUDA alone; `plain`: those of transformers."""
    last_layers: Literal["auto", "needed", "whole"] = "auto"
    """What the last layer without a window and the layers behind it compute: the positions that the loss depends on
    (`needed`), or all (`whole`). Loss and gradients are the same. `needed` takes attention in blocks and the chunked
    loss; `auto` is `needed` with these, and `whole` without."""
    world: WorldConfig = WorldConfig()
    """The world path."""


class TrainableComponent(Section):
    """How one component trains."""

    lr: PositiveFloat | None = None
    """Peak learning rate of this component; `optimizer.lr` if absent."""
    weight_decay: NonNegativeFloat | None = None
    """Weight decay of this component's matrices; `optimizer.weight_decay` if absent."""
    adapter: Literal["lora"] | None = None
    """Train a low-rank adapter beside the component's frozen linear layers (`language_model` or `vision_tower`)."""
    r: PositiveInt | None = None
    """Rank of the adapter; 16 if absent."""
    alpha: PositiveFloat | None = None
    """Scale of the adapter, divided by its rank; 32 if absent."""
    dropout: BelowOne | None = None
    """Dropout on the adapter's inputs; 0 if absent."""
    target_modules: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """Ends of the names of the linear layers that are adapted, such as q_proj; all of the component's if absent."""

    @model_validator(mode="after")
    def _check_adapter(self) -> TrainableComponent:
        idle = [name for name in ("r", "alpha", "dropout", "target_modules") if getattr(self, name) is not None]
        if idle and self.adapter is None:
            raise ValueError(f"{', '.join(idle)} describe an adapter: set adapter: lora too")
        return self


TooLong = Literal["trim-text", "drop", "error"]


class DataSection(Section):
    """What the model learns from and is measured on."""

    train: TrainingData
    """Training samples."""
    eval: Source | None = None
    """Held-out samples."""
    world: WorldFrames = AS_GIVEN
    """Which moments a world block holds."""
    max_sequence_length: PositiveInt | None = None
    """Tokens that a sample may have, image and world tokens included; if absent, the largest image or clip and 2,048
    more."""
    too_long: TooLong = "trim-text"
    """What happens to a longer sample: its end is cut, never inside an image or world block; another one takes its
    place; or the run ends."""
    max_bad_samples: NonNegativeInt | None = 1000
    """Different samples that may be unusable (a wrong row, unreadable, or too long) before the run ends; no limit if
    null."""
    exclude: tuple[Path, ...] = ()
    """Files whose lines name samples to leave out, `{"id": ...}` each, such as a run's `quarantine.jsonl`."""
    num_workers: NonNegativeInt = 2
    """Processes per rank that decode and tokenise."""
    encoded: Path | None = None
    """Directory that `theworld-train encode` fills with what frozen encoders make of images and clips. Training reads
    it and encodes what it does not hold, each picture alone; if absent, whole micro-batches are encoded."""

    @model_validator(mode="after")
    def _check_world(self) -> DataSection:
        problems = [
            frames_problem(self.train, self.world, "data.train"),
            frames_problem(self.eval, self.world, "data.eval"),
        ]
        if found := [problem for problem in problems if problem]:
            raise ValueError("; ".join(found))
        if self.world.frames == "rollout" and self.encoded is None:
            raise ValueError("world.frames: rollout reads what has been generated from data.encoded, which is not set")
        return self


OptimizerName = Literal["adamw", "adamw_8bit"]


class OptimizerSection(Section):
    """AdamW."""

    name: OptimizerName = "adamw"
    """`adamw`: fp32 moments; `adamw_8bit`: blockwise 8-bit moments, of bitsandbytes."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate of components that state none of their own."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of matrices; vectors (norms, biases) and embeddings of positions are never decayed."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: PositiveFloat = 1e-8
    """Term added to the denominator."""


class ScheduleSection(Section):
    """The learning rate over optimizer steps, as a factor of the peak."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after warmup; `wsd` is warmup, stable, decay."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warmup; the first step's rate is peak / warmup_steps."""
    min_lr_ratio: Fraction = 0.0
    """Rate at the end as a share of the peak (not for `constant`)."""
    decay_steps: PositiveInt | None = None
    """Length of the final decay of `wsd`; a tenth of the run if absent."""


CheckpointingMode = Literal["none", "full", "selective"]
BatchingKind = Literal["padded", "grouped", "packed"]


class GradientCheckpointing(Section):
    """What each tower recomputes in the backward pass; one word stands for the same in all of them."""

    model_config = ConfigDict(json_schema_extra={"type": ["object", "string"], "pattern": "^(none|full|selective)$"})

    language_model: CheckpointingMode = "full"
    """`none`: all activations are kept; `full`: those between layers, and the rest is computed again; `selective`: the
    outputs of matrix products, convolutions and fused attention too."""
    vision_tower: CheckpointingMode = "full"
    """The same for the vision tower, where it trains."""
    world_encoder: CheckpointingMode = "full"
    """The same for the world encoder, where it trains; it is recomputed as a whole."""

    @model_validator(mode="before")
    @classmethod
    def _spread_word(cls, value: object) -> object:
        if isinstance(value, dict | cls):
            return value
        if value in get_args(CheckpointingMode):
            return dict.fromkeys(cls.model_fields, value)
        renamed = {True: "; true is full now", False: "; false is none now"}
        raise ValueError(
            "expected none, full or selective, or a mapping of towers to them such as {vision_tower: none}"
            + (renamed[value] if isinstance(value, bool) else f", got {'null' if value is None else repr(value)}")
        )

    @classmethod
    def everywhere(cls, mode: CheckpointingMode) -> GradientCheckpointing:
        """Returns the same mode for all towers."""
        return cls(language_model=mode, vision_tower=mode, world_encoder=mode)

    @property
    def by_component(self) -> dict[Component, CheckpointingMode]:
        """The mode of each tower."""
        return {
            Component.LANGUAGE_MODEL: self.language_model,
            Component.VISION_TOWER: self.vision_tower,
            Component.WORLD_ENCODER: self.world_encoder,
        }


class TrainingSection(Section):
    """How long, how large and how the steps are."""

    max_steps: PositiveInt | None = None
    """Optimizer steps; exactly one of `max_steps` and `epochs` is set."""
    epochs: PositiveFloat | None = None
    """Passes over the training samples."""
    global_batch_size: PositiveInt = 8
    """Samples in an optimizer step, over all ranks and accumulated micro-batches."""
    micro_batch_size: PositiveInt = 1
    """Samples that one rank processes at once (rows, if they are packed); accumulation is derived and must divide."""
    batching: BatchingKind = "padded"
    """How the samples of an optimizer step share micro-batches: as they come (`padded`), by length (`grouped`), or
    several in a row of up to `data.max_sequence_length` tokens, none of which sees another (`packed`). Which samples a
    step learns from stays the same."""
    gradient_clip_norm: PositiveFloat | None = 1.0
    """Largest norm of the whole gradient; no limit if null."""
    gradient_checkpointing: GradientCheckpointing = GradientCheckpointing()
    """What is computed again in the backward pass instead of being kept: a word for all towers, or one for each."""
    activation_offload: bool = False
    """Keep what checkpointed layers start from in host memory until the backward pass needs it."""
    loss: Literal["chunked", "liger", "reference_4_56"] = "chunked"
    """`chunked`: logits at supervised positions alone, in chunks; `liger`: the same, with the head and the loss fused
    by the package liger-kernel while training, on CUDA alone; `reference_4_56`: as Gemma 3 in transformers 4.56,
    fp32 logits of all positions and a shifted copy of them, for comparison with other trainers."""
    loss_chunk_size: PositiveInt = 1024
    """Supervised positions whose logits are held at once."""
    max_skipped_steps: PositiveInt = 3
    """Steps in a row that may be skipped, as their gradient is not finite, before the run ends."""
    verify_freezing: bool = True
    """Check after the first step that frozen tensors are bit-identical and trainable ones have moved."""
    advance_when: AdvanceWhen = AdvanceWhen()
    """What ends the run before its last step; a pipeline goes on with its next stage."""
    stop_when: StopWhen = StopWhen()
    """When the model is good enough: the run ends, and a pipeline skips the stages that are left."""

    @model_validator(mode="after")
    def _check_length(self) -> TrainingSection:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("exactly one of max_steps and epochs must be set")
        steps = self.advance_when.steps
        if steps is not None and self.max_steps is not None and steps >= self.max_steps:
            raise ValueError(f"advance_when.steps: {steps} can never end a run of max_steps: {self.max_steps}")
        return self


AnswerMetricName = Literal["exact", "normalized", "choice", "numeric"]


class AnswerMetric(Section):
    """When a generated answer is correct; the name of a metric alone stands for it without options."""

    model_config = ConfigDict(
        json_schema_extra={"type": ["object", "string"], "pattern": f"^({'|'.join(get_args(AnswerMetricName))})$"}
    )

    metric: AnswerMetricName
    """`exact`: equal to the expected one but for white space around it; `normalized`: equal without case, punctuation,
    articles and spare white space, as in SQuAD; `choice`: names the expected one of `choices`, and no other; `numeric`:
    holds one number, and that is near enough to the expected one."""
    choices: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """What there is to choose from, such as [A, B, C, D] or [left, right]; `choice` needs it."""
    tolerance: NonNegativeFloat | None = None
    """Largest difference of a `numeric` answer; 0 if absent."""
    relative_tolerance: NonNegativeFloat | None = None
    """The same as a share of the expected number, such as 0.05; the larger of both counts."""

    @model_validator(mode="before")
    @classmethod
    def _spread_word(cls, value: object) -> object:
        if isinstance(value, dict) and isinstance(value.get("choices"), list):
            # What a validator has returned is no longer taken for JSON, where lists are tuples.
            return {**value, "choices": tuple(value["choices"])}
        return {"metric": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_options(self) -> AnswerMetric:
        if bool(self.choices) != (self.metric == "choice"):
            raise ValueError("choices are needed by the metric choice, and by it alone")
        if self.choices and len(set(self.choices)) < max(2, len(self.choices)):
            raise ValueError("choices have to be two at least, and different ones")
        if self.metric != "numeric" and (self.tolerance is not None or self.relative_tolerance is not None):
            raise ValueError("tolerance and relative_tolerance belong to the metric numeric")
        return self


class EvaluationSection(Section):
    """When and how the held-out split is measured."""

    every_steps: PositiveInt | None = None
    """Interval in optimizer steps; only at the end if absent."""
    max_samples: PositiveInt | None = None
    """Samples measured; all if absent."""
    micro_batch_size: PositiveInt | None = None
    """Samples that one rank measures at once; `training.micro_batch_size` if absent."""
    max_new_tokens: PositiveInt | None = None
    """Longest answer that is generated, greedily, in the place of each sample's last assistant turn; nothing is
    generated if absent, which takes less time."""
    metrics: dict[Annotated[str, Field(min_length=1)], AnswerMetric] = {}  # noqa: RUF012 (pydantic copies defaults)
    """Of a kind of question (`kind` of the rows), when a generated answer is correct; `exact` for other kinds."""
    keep_answers: NonNegativeInt = 8
    """Samples of each kind whose answers `evaluate --json` writes down."""

    @model_validator(mode="after")
    def _check_generation(self) -> EvaluationSection:
        if self.metrics and self.max_new_tokens is None:
            raise ValueError("metrics are for generated answers: set max_new_tokens too")
        return self


class CheckpointSection(Section):
    """When the run is saved."""

    every_steps: PositiveInt | None = None
    """Interval in optimizer steps; only at the end if absent."""
    keep_last: PositiveInt = 2
    """Checkpoints that stay; older ones are removed once a newer one is whole."""
    background: bool = False
    """Write while training goes on; the main rank holds a copy of what it saves in host memory meanwhile."""


Tracker = Literal["mlflow", "tensorboard", "trackio", "wandb"]


class TrackingSection(Section):
    """Where metrics go besides `metrics.jsonl`, which is always written."""

    trackers: tuple[Tracker, ...] = ()
    """Trackers besides the JSONL file. Without an address of their own in the environment, `mlflow` and `trackio` write
    into the run directory, as the others do."""
    project: Name = "theworld"
    """Project name for trackers that know one."""
    wandb_mode: Literal["online", "offline"] = "offline"
    """`offline` needs no account; the account's key comes from the environment, never from a config."""
    log_every_steps: PositiveInt = 1
    """Interval in optimizer steps."""


Strategy = Literal["ddp", "zero1", "zero2", "fsdp2", "zero3"]
Offload = Literal["none", "optimizer", "all"]
#: Strategies that can offload each, by how much they divide.
OFFLOADING: dict[Offload, tuple[Strategy, ...]] = {
    "none": ("ddp", "zero1", "zero2", "fsdp2", "zero3"),
    "optimizer": ("zero1", "zero2", "zero3"),
    "all": ("fsdp2", "zero3"),
}


class RuntimeSection(Section):
    """The process group."""

    strategy: Literal["auto", "ddp", "zero1", "zero2", "zero3", "fsdp2"] = "ddp"
    """What ranks divide among them: nothing (`ddp`), the optimizer state (`zero1`), gradients too (`zero2`), or weights
    too (`zero3`, `fsdp2`). `auto`: the first of them that fits by its plan, for `train` and `launch` to find. A single
    process holds everything, whatever is said here."""
    offload: Offload = "none"
    """What lives in host memory between uses: the optimizer's state (ZeRO), or weights too (zero3, fsdp2)."""
    hybrid: bool = False
    """Under fsdp2, shard within a node and replicate over nodes."""
    timeout_s: PositiveInt = 600
    """Seconds within which every rank has to move on (a micro-batch, its compilation included, or a batch of samples;
    loading may take 3 times as long, a save 10 times), or all ranks end with a report."""

    @model_validator(mode="after")
    def _check_strategy(self) -> RuntimeSection:
        if self.strategy != "auto" and self.strategy not in OFFLOADING[self.offload]:
            raise ValueError(f"offload: {self.offload} needs strategy {' or '.join(OFFLOADING[self.offload])}")
        if self.hybrid and self.strategy != "fsdp2":
            raise ValueError("hybrid sharding needs strategy fsdp2")
        return self


class RunConfig(Section):
    """Everything that defines one training run."""

    name: Name
    """Name of the run, also in trackers."""
    output_dir: Path
    """Directory of the run: config, metrics and checkpoints."""
    seed: Seed = 0
    """Seed of initial values and data order."""
    precision: Literal["bf16", "fp32", "bf16_pure"] = "bf16"
    """`bf16`: bf16 compute with fp32 masters of what trains; `fp32`: everything fp32; `bf16_pure`: weights, gradients
    and optimizer state in bf16 without masters, where small updates round away: for comparison with other trainers."""
    deterministic: bool = False
    """Refuse nondeterministic kernels; runs on the same hardware are then bit-identical."""
    model: ModelSection = ModelSection()
    """Which weights the run starts from."""
    trainable: dict[Component, TrainableComponent]
    """The components that train; everything else is frozen."""
    expect_trainable: PositiveInt | None = None
    """Number of parameters that must turn out trainable, or the run stops before its first step."""
    data: DataSection
    """What the model learns from and is measured on."""
    optimizer: OptimizerSection = OptimizerSection()
    """AdamW."""
    schedule: ScheduleSection = ScheduleSection()
    """The learning rate over optimizer steps."""
    training: TrainingSection
    """How long, how large and how the steps are."""
    evaluation: EvaluationSection = EvaluationSection()
    """When the held-out split is measured."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When the run is saved."""
    tracking: TrackingSection = TrackingSection()
    """Where metrics go."""
    runtime: RuntimeSection = RuntimeSection()
    """The process group."""
    init_from: Path | None = None
    """Checkpoint of an earlier stage: its weights, with a fresh optimizer."""
    resume: Path | None = None
    """`latest`, or a checkpoint of this run: continue exactly where it was."""
    allow_changed: tuple[str, ...] = ()
    """Dotted keys that may differ from those of the run that `resume` continues, such as `training.max_steps`."""

    @field_validator("trainable")
    @classmethod
    def _check_table(cls, table: dict[Component, TrainableComponent]) -> dict[Component, TrainableComponent]:
        if not table:
            raise ValueError("the trainable table is empty: name at least one component, such as world_projector")
        return table

    @model_validator(mode="after")
    def _check_run(self) -> RunConfig:
        if self.optimizer.name == "adamw_8bit" and self.runtime.strategy not in ("ddp", "auto"):
            raise ValueError("optimizer.name adamw_8bit needs runtime.strategy ddp: its states cannot be sharded")
        if not self.model.world.enabled:
            of_world = [c.value for c in self.trainable if c in (Component.WORLD_ENCODER, Component.WORLD_PROJECTOR)]
            if of_world:
                raise ValueError(f"{', '.join(of_world)} cannot train while model.world.enabled is false")
        adaptable = (Component.LANGUAGE_MODEL, Component.VISION_TOWER)
        for component, entry in self.trainable.items():
            if entry.adapter and component not in adaptable:
                raise ValueError(
                    f"{component.value} takes no adapter, only {' and '.join(adaptable)} do: train it whole"
                )
        if self.resume and self.init_from and self.resume != "latest":
            raise ValueError("resume continues a run, init_from starts one: set only one of them")
        return self

    @model_validator(mode="after")
    def _check_gates(self) -> RunConfig:
        advance, stop = self.training.advance_when, self.training.stop_when
        gates = {
            "advance_when.plateau": advance.plateau,
            "advance_when.threshold": advance.threshold,
            "stop_when.threshold": stop.threshold,
        }
        for name, gate in gates.items():
            if gate is None or not reads_evaluation(gate.metric):
                continue
            if self.data.eval is None:
                raise ValueError(f"training.{name} reads {gate.metric}, but there is no data.eval to measure it on")
            if reads_answers(gate.metric) and self.evaluation.max_new_tokens is None:
                raise ValueError(
                    f"training.{name} reads {gate.metric}, which is of generated answers: set evaluation.max_new_tokens"
                )
            # What holds at the end alone can still have later stages skipped, but cannot end this one.
            if self.evaluation.every_steps is None and name != "stop_when.threshold":
                raise ValueError(
                    f"training.{name} reads {gate.metric}, measured at the end alone: set evaluation.every_steps"
                )
        return self

    @model_validator(mode="after")
    def _check_world(self) -> RunConfig:
        most = self.model.world.max_world_steps
        for name, source in (("train", self.data.train), ("eval", self.data.eval)):
            steps = (frames_of(source, self.data.world) - 1) // 4
            if self.model.world.enabled and steps > most:
                stated = self.data.world.steps is not None
                what = f"data.world.steps is {steps}" if stated else f"data.{name} has clips of {1 + 4 * steps} frames"
                raise ValueError(
                    f"{what}, reaching {steps} latent frames from the present, but "
                    f"model.world.max_world_steps is {most}"
                )
        if self.data.world.frames == "rollout" and Component.WORLD_ENCODER in self.trainable:
            raise ValueError(
                "data.world.frames: rollout reads latents of a frozen world encoder, and world_encoder is in trainable"
            )
        return self

    @model_validator(mode="after")
    def _check_kernels(self) -> RunConfig:
        if self.deterministic and self.model.kernels in ("compiled", "liger"):
            raise ValueError("deterministic: true needs model.kernels: lean or plain; what a compiler makes may differ")
        if self.training.loss == "liger":
            if self.deterministic:
                raise ValueError("deterministic: true needs training.loss: chunked; what a compiler makes may differ")
            if self.runtime.strategy in ("fsdp2", "zero3"):
                raise ValueError(
                    "training.loss: liger needs the head's weight whole on every rank, and runtime.strategy: "
                    f"{self.runtime.strategy} divides it; use ddp, zero1 or zero2, or training.loss: chunked"
                )
        return self

    @model_validator(mode="after")
    def _check_last_layers(self) -> RunConfig:
        if self.model.last_layers == "needed":
            if self.model.attention in ("sdpa", "eager"):
                raise ValueError(
                    f"model.last_layers: needed takes model.attention: auto, banded or flex; got {self.model.attention}"
                )
            if self.training.loss == "reference_4_56":
                raise ValueError("model.last_layers: needed takes training.loss: chunked or liger; got reference_4_56")
        return self

    @model_validator(mode="after")
    def _check_packing(self) -> RunConfig:
        if self.training.batching == "packed":
            if self.model.attention in ("sdpa", "eager"):
                raise ValueError(
                    f"training.batching: packed needs model.attention: auto, banded or flex; {self.model.attention} "
                    "would let the samples of a row see each other"
                )
            if self.data.max_sequence_length is None:
                raise ValueError("training.batching: packed needs data.max_sequence_length, the length of a row")
            if self.training.loss == "reference_4_56":
                raise ValueError("training.loss: reference_4_56 knows one sample a row; set training.batching: padded")
        return self

    @model_validator(mode="after")
    def _check_checkpointing(self) -> RunConfig:
        modes = self.training.gradient_checkpointing.by_component
        if self.runtime.strategy == "zero3" and "selective" in modes.values():
            raise ValueError(
                "gradient_checkpointing: selective needs another strategy than zero3, which gathers weights inside of "
                "the layers that are computed again; fsdp2 shards as much"
            )
        passed = {Component.LANGUAGE_MODEL, *self.trainable}
        if self.training.activation_offload and all(modes[tower] == "none" for tower in modes if tower in passed):
            raise ValueError(
                "training.activation_offload moves what checkpointed layers start from, and "
                "training.gradient_checkpointing is none for all towers that a gradient passes"
            )
        return self


def able_strategies(config: RunConfig, offload: Offload) -> tuple[Strategy, ...]:
    """Returns the strategies that can run a config with something offloaded, by how much they divide."""
    able = OFFLOADING[offload]
    if config.optimizer.name == "adamw_8bit":
        able = tuple(name for name in able if name == "ddp")
    if "selective" in config.training.gradient_checkpointing.by_component.values():
        able = tuple(name for name in able if name != "zero3")
    if config.training.loss == "liger":
        able = tuple(name for name in able if name not in ("fsdp2", "zero3"))
    return able


Ablation = Literal[
    "as_trained",
    "world_masked",
    "untrained_projection",
    "world_disabled",
    "image_blanked",
    "frames_image",
    "frames_history",
    "frames_future",
    "frames_rollout",
    "frames_shuffled",
]
#: Ablations of a model, which any model with a world path can be measured with.
ABLATIONS: tuple[Ablation, ...] = (
    "as_trained",
    "world_masked",
    "untrained_projection",
    "world_disabled",
    "image_blanked",
)
#: Those of them that a model without a world path can be measured with.
WORLDLESS_ABLATIONS: tuple[Ablation, ...] = ("as_trained", "image_blanked")
#: Ablations of its frames, and the `data.world.frames` that each measures; shuffled frames are the run's own.
FRAME_ABLATIONS: dict[Ablation, FrameChoice | None] = {
    "frames_image": "image",
    "frames_history": "history",
    "frames_future": "future",
    "frames_rollout": "rollout",
    "frames_shuffled": None,
}
