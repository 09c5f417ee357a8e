"""The local cache, looked at without the network: is everything here that a run, or a lock file, names?"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import huggingface_hub

from theworld_train.config.errors import Problem
from theworld_train.config.schema import RunConfig
from theworld_train.hub.lock import FETCH_HINT, Lock, is_commit, wanted
from theworld_train.hub.repositories import Repository, pinned, read_json, required_repositories, tiny_hint

_INFO = "dataset_info.json"


def ensure_local(
    config: RunConfig, lock: Lock, source: str | None = None, *, generating: bool = False
) -> list[Problem]:
    """Checks, without the network, that everything a run reads from the hub is here.

    Args:
        config: The run config.
        lock: The lock.
        source: The file that the config came from, for problems.
        generating: Whether its rollouts are to be generated, rather than read.

    Returns:
        A problem, with how to mend it, for everything that is neither a directory nor complete in the local cache.
    """
    problems: list[Problem] = []
    for use in required_repositories(config, source):
        if use.generates and not generating:
            continue
        if (wrong := use.name_problem()) is not None:
            problems.append(wrong)
        elif not use.is_directory:
            known = len(problems)
            commit = pinned(use, lock, problems)
            if len(problems) == known and (reason := missing(use, commit, lock)) is not None:
                hint = tiny_hint(use.id) if Path(use.id).parent.name.startswith("tiny") else None
                problems.append(use.problem(reason, f"{FETCH_HINT}{f'; {hint}' if hint else ''}"))
    return problems


def check_lock(lock: Lock, source: str | None = None) -> list[Problem]:
    """Checks, without the network, that everything in a lock is complete in the local cache.

    Args:
        lock: The lock.
        source: The file that it came from, for problems.
    """
    problems: list[Problem] = []
    for use, commit in _locked(lock, source):
        if (reason := missing(use, commit, lock)) is not None:
            problems.append(use.problem(reason, FETCH_HINT))
    return problems


def _locked(lock: Lock, source: str | None) -> Iterator[tuple[Repository, str]]:
    """Yields the repositories of a lock with their commits."""
    for name, model in lock.models.items():
        yield Repository("model", name, model.revision, "models", None, tuple(model.files), (), source), model.commit
    for name, data in lock.datasets.items():
        patterns = tuple(data.files)
        yield Repository("dataset", name, data.revision, "datasets", None, patterns, data.configs, source), data.commit


def missing(use: Repository, commit: str | None, lock: Lock) -> str | None:
    """Says what is missing of a repository in the local cache.

    Args:
        use: The repository.
        commit: Its commit; the one that the cache holds of the revision that the config states, if None.
        lock: Knows the sizes of files.

    Returns:
        What is missing, or None if nothing is.
    """
    if use.kind == "dataset":
        reasons = (_missing_dataset(use.id, commit, name) for name in use.configs)
        if (reason := next((reason for reason in reasons if reason is not None), None)) or not use.patterns:
            return reason
    folder = _snapshot(use, commit or wanted(use.revision))
    if isinstance(folder, str):
        return folder
    entry = lock.entry(use.kind, use.id)
    sizes = entry.files if entry is not None and entry.commit == folder.name else {}
    wrong = _wrong_files(folder, sizes)
    if wrong is not None or use.kind == "model":
        return wrong or _missing_weights(folder, use.patterns)
    return None if any(name.endswith(".parquet") for name in files(folder, use.patterns)) else f"no Parquet in {folder}"


def _snapshot(use: Repository, revision: str) -> Path | str:
    """Returns a repository's folder in the local cache, or why there is none."""
    what = f"commit {revision}" if is_commit(revision) else f"revision {revision!r}"
    try:
        folder = huggingface_hub.snapshot_download(
            use.id,
            repo_type=use.kind,
            revision=revision,
            allow_patterns=list(use.patterns) or None,
            local_files_only=True,
        )
    except (OSError, ValueError) as error:
        # Its subclass for a part that is missing is younger than the oldest release that is supported.
        partly = hasattr(error, "snapshot_path")
        return f"{what} is {'only partly' if partly else 'not'} in the local cache"
    return Path(folder)


def _wrong_files(folder: Path, sizes: dict[str, int]) -> str | None:
    """Names a file that is not there, or not of the size that the lock states."""
    for name, size in sizes.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing in {folder}"
        if found != size:
            return f"{name} has {found:,} bytes instead of {size:,}; delete {(folder / name).resolve()}"
    return None


def _missing_weights(folder: Path, patterns: Sequence[str]) -> str | None:
    """Says what weights are missing, by the indices of those that are split over several files."""
    found = sorted(files(folder, patterns))
    if patterns and not any(name.endswith(".safetensors") for name in found):
        return f"no safetensors weights in {folder}"
    for name in found:
        if name.endswith(".safetensors.index.json"):
            shards = set((read_json(folder / name) or {}).get("weight_map", {}).values())
            absent = sorted(shard for shard in shards if not (folder / name).with_name(shard).is_file())
            if absent:
                return f"{', '.join(absent[:3])} missing in {folder}"
    return None


def files(folder: Path, patterns: Sequence[str]) -> dict[str, int]:
    """Returns the sizes of a snapshot's files, by their paths in the repository."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: path.stat().st_size
        for name, path in paths.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def _missing_dataset(name: str, commit: str | None, config_name: str | None) -> str | None:
    """Says what is missing of a prepared dataset, or None if it is complete."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    *owner, short = name.split("/")
    root = Path(config.HF_DATASETS_CACHE) / "___".join([*owner, camelcase_to_snakecase(short)])
    folders = [path.parent for path in root.glob(f"{glob.escape(config_name or '') or '*'}/*/{commit or '*'}/{_INFO}")]
    if not folders:
        what = f"commit {commit}" if commit else "it"
        return f"{what} is not in the local cache{f' with configuration {config_name!r}' if config_name else ''}"
    absent = [_missing_shards(folder) for folder in folders]
    return None if None in absent else absent[0]


def _missing_shards(folder: Path) -> str | None:
    """Names shards of a prepared dataset that are not there; which there must be stands in its description."""
    from datasets.naming import filenames_for_dataset_split

    info = read_json(folder / _INFO) or {}
    for name, split in (info.get("splits") or {}).items():
        stem = split.get("dataset_name") or info.get("dataset_name")
        paths = filenames_for_dataset_split(str(folder), stem, name, "arrow", split.get("shard_lengths"))
        absent = [Path(path).name for path in paths if not Path(path).is_file()]
        if absent:
            return f"{', '.join(absent[:3])} missing in {folder}"
    return None
