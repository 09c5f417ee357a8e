"""What the hub's client raises, as problems that say how to mend them and hold no secret."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import replace

import huggingface_hub
from huggingface_hub import errors

from theworld_train.config.credentials import looks_secret
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.hub.lock import wanted
from theworld_train.hub.repositories import Repository

_TOKEN_HINT = "a token comes from HF_TOKEN or `hf auth login`, never from a config"


@contextlib.contextmanager
def explained(repository: Repository, problems: list[Problem]) -> Iterator[None]:
    """Turns whatever the hub's client raises into a problem; an exception that nobody expects stays one.

    Args:
        repository: What is being fetched.
        problems: Receives the problem.
    """
    try:
        yield
    except Exception as error:
        cause = next((found for link in _chain(error) if (found := _explain(repository, link))), None)
        if cause is not None:
            problems.append(repository.problem(*cause))
        elif isinstance(error, ConfigError):
            problems += [_without_secrets(problem) for problem in error.problems]
        elif isinstance(error, OSError | RuntimeError | ValueError) or _package(error) in (
            "datasets",
            "httpx",
            "httpx2",
        ):
            problems.append(repository.problem(f"cannot be fetched: {_text(error)}", "run the command again to go on"))
        else:
            raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _explain(repository: Repository, error: BaseException) -> tuple[str, str] | None:
    """Returns what an exception of the hub's client means and how to mend it, if it is a known one."""
    if isinstance(error, errors.GatedRepoError):
        return _explain_gate(repository)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {wanted(repository.revision)!r}", f"its revisions: {repository.url}/commits/main"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub shows no such {repository.kind}", f"check its name; if it is private, {_TOKEN_HINT}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the hub is switched off by HF_HUB_OFFLINE", "unset it while fetching"
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(error)
    if isinstance(error, ConnectionError | TimeoutError) or (
        _package(error) in ("httpx", "httpx2") and type(error).__name__.endswith(("Error", "Timeout"))
    ):
        hint = "check the network, a proxy (HTTPS_PROXY) or a mirror (HF_ENDPOINT)"
        return f"the hub cannot be reached ({type(error).__name__})", hint
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return f"the cache cannot be written: {error.strerror}", "free some space, or move the cache with HF_HOME"
    return None


def _explain_gate(repository: Repository) -> tuple[str, str]:
    if huggingface_hub.get_token() is None:
        hint = f"accept its licence at {repository.url}, then give a token: {_TOKEN_HINT}"
        return "its licence must be accepted, and no token says who asks", hint
    hint = (
        f"accept the licence at {repository.url} with the token's account; a fine-grained token must allow gated ones"
    )
    return "its licence must be accepted, and the token's account has not done so", hint


def _explain_status(error: errors.HfHubHTTPError) -> tuple[str, str]:
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return f"the hub refuses the token (status {status})", f"it may have expired; {_TOKEN_HINT}"
    return f"the hub answers with status {status}", "try again later"


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _without_secrets(problem: Problem) -> Problem:
    return replace(problem, message=_safe(problem.message))


def _text(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return _safe(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


def _safe(text: str) -> str:
    """Returns a text that others wrote, unless it holds a secret."""
    token = huggingface_hub.get_token()
    return (
        "(its text holds a secret and is not shown)" if looks_secret(None, text) or (token and token in text) else text
    )
