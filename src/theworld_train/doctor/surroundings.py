"""What runs need of the machine: GPUs, host, disks, shared memory, ports and the hub."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

from theworld_train.config.schema import RunConfig
from theworld_train.doctor.finding import Finding, gib
from theworld_train.doctor.machine import Machine, free_space

#: Where ranks of one machine meet unless told otherwise, as torchrun has it.
DEFAULT_PORT = 29500
#: A checkpoint holds an fp32 master and AdamW's two moments of each parameter that trains.
CHECKPOINT_BYTES_PER_PARAMETER = 12
#: What the two pretrained models take in the hub's cache, and what any disk should have left, in bytes.
MODELS_BYTES, LEAST_FREE = 15 * 2**30, 2**30
#: What data workers and NCCL share; docker gives a container 64 MiB.
LEAST_SHM = 2**30
LEAST_OPEN_FILES = 4096
NETWORK_TIMEOUT_S = 5.0
#: Variables that a launcher sets for its ranks. Left in a shell, they make a single process wait for others.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")


def check_gpus(machine: Machine, configs: Sequence[RunConfig]) -> list[Finding]:
    """Looks at the GPUs, and whether they compute in the precision of the configs."""
    findings = []
    for number, gpu in enumerate(machine.gpus):
        check = f"GPU {number}"
        text = f"{gpu.name}, {gib(gpu.memory)}, {gib(gpu.free)} free"
        if not gpu.bf16 and (not configs or any(config.precision != "fp32" for config in configs)):
            findings.append(Finding(check, "bad", f"{text}, no bf16", "precision=fp32, or a GPU from Ampere on"))
        elif gpu.free < 0.9 * gpu.memory:
            findings.append(Finding(check, "warn", text, "another process holds memory: nvidia-smi names it"))
        else:
            findings.append(Finding(check, "ok", f"{text}{', bf16' if gpu.bf16 else ''}"))
    if len({gpu.name for gpu in machine.gpus}) > 1:
        findings.append(Finding("GPUs", "warn", "are of several kinds", "all ranks wait for the slowest and smallest"))
    if not machine.gpus:
        findings.append(_no_gpu(machine, configs))
    wrong = [config.name for config in configs if config.model.attention == "flex"]
    if wrong and not machine.gpus:
        text = f"flex of {', '.join(wrong)} has no backward pass on a CPU"
        findings.append(Finding("model.attention", "bad", text, "model.attention=auto"))
    return findings


def _no_gpu(machine: Machine, configs: Sequence[RunConfig]) -> Finding:
    if machine.driver is not None and machine.torch_cuda is not None:
        hidden = machine.environment.get("CUDA_VISIBLE_DEVICES")
        cause = f"CUDA_VISIBLE_DEVICES is '{hidden}'" if hidden is not None else f"driver {machine.driver} is loaded"
        advice = "make them visible, or update the driver: torch's CUDA build needs one that is as new"
        return Finding("GPU", "bad", f"torch sees none, but {cause}", advice)
    if configs and all(config.precision == "fp32" for config in configs):
        return Finding("GPU", "ok", "none; these runs are for a CPU")
    return Finding("GPU", "warn", "none", "the tiny model trains on a CPU: theworld-train init DIR --tiny")


def check_host(machine: Machine, configs: Sequence[RunConfig]) -> list[Finding]:
    """Looks at cores, open files, shared memory, the compiler and what a launcher has left in the environment."""
    workers = max((config.data.num_workers for config in configs), default=0) * machine.ranks
    wanted = workers + machine.ranks
    cores = f"{machine.cores} cores, {gib(machine.memory)} of memory"
    few = workers > 0 and wanted > 2 * machine.cores
    advice = f"data.num_workers={max((machine.cores - 1) // machine.ranks, 1)}"
    text = f"{cores} for {machine.ranks} rank(s) with {workers} data worker(s)"
    findings = [Finding("host", "warn", text, advice) if few else Finding("host", "ok", cores)]
    findings += [_open_files(), _shared_memory(workers, machine.ranks), *_compiler(configs)]
    left = [name for name in LAUNCHER_VARIABLES if name in machine.environment]
    if left:
        text = f"{', '.join(left)} set in this shell: a run would wait for other ranks"
        findings.append(Finding("environment", "warn", text, f"unset {' '.join(left)}, unless a launcher has set them"))
    return findings


def _open_files() -> Finding:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < LEAST_OPEN_FILES:
        text = f"a process may open {soft:,}; data workers hand over each batch by a few"
        return Finding("open files", "warn", text, f"ulimit -n {min(65536, hard) if hard > 0 else 65536}")
    return Finding("open files", "ok", f"{soft:,}" if soft >= 0 else "no limit")


def _shared_memory(workers: int, ranks: int, path: Path = Path("/dev/shm")) -> Finding:
    if not path.is_dir():
        return Finding(str(path), "ok", "there is none; data workers use files")
    free, _ = free_space(path)
    if free < LEAST_SHM and (workers or ranks > 1):
        text = f"{gib(free)} free, which data workers and NCCL fill: bus errors"
        return Finding(str(path), "bad", text, "docker run --ipc=host or --shm-size=16g, or data.num_workers=0")
    if free < LEAST_SHM:
        return Finding(str(path), "warn", f"{gib(free)} free", "docker run --ipc=host or --shm-size=16g")
    return Finding(str(path), "ok", f"{gib(free)} free")


def _compiler(configs: Sequence[RunConfig]) -> list[Finding]:
    from theworld_train.model.kernels import find_compiler

    found = find_compiler()
    needed = [f"model.kernels compiled of {config.name}" for config in configs if config.model.kernels == "compiled"]
    needed += [
        f"runtime.offload of {config.name}, for DeepSpeed's CPU optimizer"
        for config in configs
        if config.runtime.offload != "none" and config.runtime.strategy in ("zero1", "zero2", "zero3")
    ]
    if found is not None:
        return [Finding("C++ compiler", "ok", found)]
    if needed:
        return [Finding("C++ compiler", "bad", f"none, needed by {', '.join(needed)}", "install g++, or set CXX")]
    return [Finding("C++ compiler", "ok", "none; model.kernels: compiled would need one")]


def check_disks(configs: Sequence[RunConfig]) -> list[Finding]:
    """Looks at the space where runs write, and in the hub's cache."""
    from huggingface_hub import constants

    findings = []
    for config in configs:
        needed = (config.expect_trainable or 0) * CHECKPOINT_BYTES_PER_PARAMETER * (config.checkpoint.keep_last + 1)
        findings.append(_disk(f"output_dir of {config.name}", Path(config.output_dir), max(needed, LEAST_FREE)))
    cache = Path(constants.HF_HUB_CACHE)
    findings.append(_disk("hub cache", cache, MODELS_BYTES if not cache.is_dir() else LEAST_FREE))
    return findings


def _disk(check: str, path: Path, needed: int) -> Finding:
    free, place = free_space(path)
    text = f"{path}: {gib(free)} free"
    if not os.access(place, os.W_OK):
        return Finding(check, "bad", f"{place} cannot be written to", "choose another directory, or change its owner")
    if free < needed:
        advice = "free some, choose another directory, or keep fewer checkpoints"
        return Finding(check, "warn", f"{text}, {gib(needed)} may be needed", advice)
    return Finding(check, "ok", text)


def check_port(machine: Machine) -> Finding:
    """Looks whether the port is free where ranks meet."""
    text = machine.environment.get("MASTER_PORT", str(DEFAULT_PORT))
    if not text.isdecimal() or not 0 < int(text) < 65536:
        return Finding("MASTER_PORT", "bad", f"is '{text}', expected a port", "unset MASTER_PORT")
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", int(text)))
        except OSError as error:
            advice = "another run? give runs of several machines another port: --rdzv-endpoint HOST:PORT"
            return Finding(f"port {text}", "warn", f"cannot be taken: {error.strerror}", advice)
    return Finding(f"port {text}", "ok", "free")


def check_hub(machine: Machine, configs: Sequence[RunConfig], *, network: bool) -> list[Finding]:
    """Looks whether what the configs read is here, at tokens by their presence, and at the network if asked to."""
    import huggingface_hub

    from theworld_train import hub

    lock = hub.read_lock(hub.LOCK_FILE)
    problems = {str(problem): problem for config in configs for problem in hub.ensure_local(config, lock)}
    findings = [
        Finding(problem.key or "models", "bad", f"{problem.value}: {problem.message}", problem.hint)
        for problem in problems.values()
    ]
    if configs and not findings:
        findings.append(Finding("models and data", "ok", "all that is read of the hub is here"))
    token = "a token is set" if huggingface_hub.get_token() else "no token; gated models such as Gemma need one"
    findings.append(Finding("hub token", "ok", token))
    online = [config.name for config in configs if config.tracking.wandb_mode == "online"]
    if online and "WANDB_API_KEY" not in machine.environment and not (Path.home() / ".netrc").is_file():
        text = f"no key, and {', '.join(online)} log online"
        findings.append(Finding("wandb key", "warn", text, "export WANDB_API_KEY, or tracking.wandb_mode=offline"))
    if machine.environment.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        findings.append(Finding("network", "ok", "HF_HUB_OFFLINE is set: fetch downloads nothing; training never does"))
    elif network:
        findings.append(_reach(machine.environment.get("HF_ENDPOINT", "https://huggingface.co")))
    else:
        findings.append(Finding("network", "ok", "not asked, training needs none; --network asks the hub"))
    return findings


def _reach(endpoint: str) -> Finding:
    """Asks the hub for a sign of life, in a thread: looking up a name knows no timeout of its own."""
    answers: list[str | None] = []

    def ask() -> None:
        import urllib3

        try:
            with urllib3.PoolManager(retries=False, timeout=NETWORK_TIMEOUT_S) as pool:
                pool.request("HEAD", endpoint)
            answers.append(None)
        except Exception as error:  # whatever keeps it from answering is the answer
            answers.append(type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * NETWORK_TIMEOUT_S)
    if answers == [None]:
        return Finding("network", "ok", f"{endpoint} answers")
    reason = answers[0] if answers else "no answer"
    advice = "fetch on a machine that reaches it and share the cache (HF_HOME); training itself needs no network"
    return Finding("network", "warn", f"{endpoint} is not reached: {reason}", advice)
