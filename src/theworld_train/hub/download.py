"""Fetching: the one place that downloads models and datasets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import RunConfig
from theworld_train.config.sources import HubSource
from theworld_train.hub.cache import files, missing
from theworld_train.hub.failures import explained
from theworld_train.hub.lock import Kind, Lock, LockedDataset, LockedModel, is_commit, read_lock, wanted, write_lock
from theworld_train.hub.repositories import Repository, required_repositories

_TIMEOUT_S = 30.0


def fetch(
    configs: Iterable[tuple[str, RunConfig]],
    lock_path: str | os.PathLike[str],
    *,
    update: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> Lock:
    """Downloads what runs need into the local cache, and records the commits in the lock file.

    A repository that the lock holds at the revision that the configs ask for is fetched at the locked commit, so that
    every node gets the same; what is complete in the cache needs no network.

    Args:
        configs: Run configs, each with the file that it came from.
        lock_path: The lock file; entries of other repositories stay.
        update: Whether branches and tags are resolved anew.
        say: Takes a line for each repository.

    Returns:
        The lock as it was written.

    Raises:
        ConfigError: With the problems of all repositories. Nothing is downloaded unless all of them can be; what was
            downloaded before a transfer failed stays recorded.
    """
    lock = read_lock(lock_path)
    repositories, problems = _collect(configs)
    targets: list[tuple[Repository, _Target]] = []
    for repository in repositories:
        with explained(repository, problems):
            targets.append((repository, _resolve(repository, lock, update)))
    if problems:
        raise ConfigError(problems)
    for repository, target in targets:
        with explained(repository, problems):
            entry = _download(repository, target, lock)
            say(_line(repository, target, entry, lock))
            lock = _recorded(lock, repository.id, entry)
            write_lock(lock_path, lock)
    if problems:
        raise ConfigError(problems)
    return lock


@dataclass(frozen=True)
class _Target:
    """The commit to fetch; `moving` if the revision's name was resolved just now, `here` if nothing is missing."""

    commit: str
    moving: bool = False
    here: bool = False


def _collect(configs: Iterable[tuple[str, RunConfig]]) -> tuple[list[Repository], list[Problem]]:
    """Merges the uses of every hub repository, and checks names and directories."""
    merged: dict[tuple[Kind, str], Repository] = {}
    problems: dict[Problem, None] = {}  # stages share their bases, whose problems are then the same
    for source, config in configs:
        for use in required_repositories(config, source):
            first = merged.setdefault((use.kind, use.id), use)
            if (wrong := use.name_problem()) is not None:
                problems[wrong] = None
            elif not use.is_directory and wanted(first.revision) != wanted(use.revision):
                message = f"revision {wanted(use.revision)!r}, while {first.source} asks for {wanted(first.revision)!r}"
                hint = "a lock file holds one revision of each: fetch them with a --lock of their own"
                problems[use.problem(message, hint)] = None
            patterns = tuple(dict.fromkeys((*first.patterns, *use.patterns)))
            names = tuple(dict.fromkeys((*first.configs, *use.configs)))
            merged[use.kind, use.id] = replace(first, patterns=patterns, configs=names)
    known = [use for use in merged.values() if not use.is_directory and use.name_problem() is None]
    return known, list(problems)


def _resolve(repository: Repository, lock: Lock, update: bool) -> _Target:
    """Finds the commit to fetch, and makes sure that it can be."""
    entry = lock.entry(repository.kind, repository.id)
    pinned = repository.revision if is_commit(repository.revision) else None
    if pinned is None and entry is not None and not update and entry.revision == wanted(repository.revision):
        pinned = entry.commit
    if pinned is not None and missing(repository, pinned, lock) is None:
        return _Target(pinned, here=True)
    api = huggingface_hub.HfApi()
    revision = pinned or wanted(repository.revision)
    info = api.repo_info(repository.id, repo_type=repository.kind, revision=revision, timeout=_TIMEOUT_S)
    if getattr(info, "gated", False):
        api.auth_check(repository.id, repo_type=repository.kind)
    assert info.sha is not None
    return _Target(info.sha, moving=pinned is None)


def _download(repository: Repository, target: _Target, lock: Lock) -> LockedModel | LockedDataset:
    """Fetches a repository, or opens it in the cache, and returns what the lock is to say of it."""
    revision = wanted(repository.revision)
    if repository.kind == "dataset":
        commit = _download_dataset(repository, target)
        found = _download_files(repository, target, lock) if repository.patterns else None
        sizes = {} if found is None else files(found, repository.patterns)
        return LockedDataset(revision=revision, commit=commit, configs=repository.configs, files=sizes)
    path = _download_files(repository, target, lock)
    return LockedModel(revision=revision, commit=path.name, files=files(path, repository.patterns))


def _download_files(repository: Repository, target: _Target, lock: Lock) -> Path:
    """Fetches the files of a repository, or finds them in the cache, and returns their folder."""
    # By the revision's name, the cache learns what it stands for; its commit may be a newer one by now.
    folder = huggingface_hub.snapshot_download(
        repository.id,
        repo_type=repository.kind,
        revision=wanted(repository.revision) if target.moving else target.commit,
        allow_patterns=list(repository.patterns),
        local_files_only=target.here,
    )
    path = Path(folder)
    if (reason := missing(repository, path.name, lock)) is not None:
        raise ConfigError(repository.problem(reason, f"what it should hold: {repository.url}/tree/{path.name}"))
    return path


def _download_dataset(repository: Repository, target: _Target) -> str:
    from theworld_train.data.hub import fetch_dataset  # takes torch and datasets along

    if not target.here:
        for name in repository.configs:
            fetch_dataset(HubSource(source="hub", id=repository.id, revision=target.commit, config_name=name))
    return target.commit


def _recorded(lock: Lock, name: str, entry: LockedModel | LockedDataset) -> Lock:
    """Returns a lock with an entry added; what is known of the same commit from other configs stays."""
    if isinstance(entry, LockedModel):
        model = lock.models.get(name)
        if model is not None and model.commit == entry.commit:
            entry = entry.model_copy(update={"files": dict(sorted({**model.files, **entry.files}.items()))})
        return lock.model_copy(update={"models": {**lock.models, name: entry}})
    dataset = lock.datasets.get(name)
    if dataset is not None and dataset.commit == entry.commit:
        names = tuple(dict.fromkeys((*dataset.configs, *entry.configs)))
        sizes = dict(sorted({**dataset.files, **entry.files}.items()))
        entry = entry.model_copy(update={"configs": names, "files": sizes})
    return lock.model_copy(update={"datasets": {**lock.datasets, name: entry}})


def _line(repository: Repository, target: _Target, entry: LockedModel | LockedDataset, lock: Lock) -> str:
    old = lock.entry(repository.kind, repository.id)
    was = f" (the lock held {old.commit})" if old is not None and old.commit != entry.commit else ""
    state = "here already" if target.here else "fetched"
    size = f", {sum(entry.files.values()) / 1e9:,.2f} GB" if isinstance(entry, LockedModel) else ""
    return f"{repository.kind} {repository.id} {entry.revision}: {state} at commit {entry.commit}{was}{size}"
