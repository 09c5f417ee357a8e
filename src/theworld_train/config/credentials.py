"""Keeps secrets out of configs, and out of the messages that say so.

A config is printed, copied into run directories, sent to trackers and committed; a secret in it is a secret no more.
What looks like one is therefore taken out before anything else sees the value, and the error names the key alone.
"""

from __future__ import annotations

import re

from theworld_train.config.errors import Problem
from theworld_train.config.reading import KeyPath, dotted

_HINT = "remove it: secrets come from the environment, such as HF_TOKEN or WANDB_API_KEY, never from a config"

#: Whole words of a key, so that `tokens`, `tokenizer` and `max_tokens` stay ordinary names.
_KEY_WORDS = re.compile(
    r"(?:^|[._-])(?:api[_-]?key|(?:access|secret|private)[_-]key|token|secret|password|passwd|passphrase|credentials?)(?:$|[._-])",
    re.IGNORECASE,
)

_VALUES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"  # GitHub
    r"|\bsk-[A-Za-z0-9_-]{20,}"  # OpenAI and others
    r"|\bAKIA[A-Z0-9]{16}\b"  # AWS
    r"|\bwandb_v1_\w{20,}"  # Weights & Biases; its older keys are 40 hexadecimal digits, as are commits
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|://[^/\s:@]+:[^/\s@]+@"  # a URL with a password in it
    r"|[?&](?:password|passwd|pwd|token|secret)=[^&\s]"  # a URL with one in its query
    r"|(?:^|[\s;])[A-Z0-9_]*(?:TOKEN|API_KEY|PASSWORD|SECRET)=\S"  # an environment variable that a command sets
    r"|--(?:(?:hf|hub|auth|access)[_-])?(?:token|api[_-]key|password)=\S"  # an argument of a command
)


def looks_secret(key: str | None, value: object) -> bool:
    """Says whether a key by its name, or a text by its form, is one that holds a secret."""
    return (key is not None and _KEY_WORDS.search(key) is not None) or (
        isinstance(value, str) and _VALUES.search(value) is not None
    )


def take_out_secrets(data: dict[str, object], source: str) -> tuple[dict[str, object], dict[KeyPath, Problem]]:
    """Removes every value that looks like a secret.

    Args:
        data: The data of one file, or of the command line.
        source: Where the data comes from.

    Returns:
        The data without those values, and a problem for each, by its key path.
    """
    found: dict[KeyPath, Problem] = {}
    cleaned = _cleaned(data, (), source, found)
    assert isinstance(cleaned, dict)
    return cleaned, found


def secret_problem(source: str, key: str) -> Problem:
    """Says that a key holds what looks like a secret, without its value, nor the key if that is one itself."""
    shown = "(hidden)" if looks_secret(None, key) else key
    return Problem("this looks like a secret; its value is not shown here", source=source, key=shown, hint=_HINT)


def _cleaned(value: object, path: KeyPath, source: str, found: dict[KeyPath, Problem]) -> object:
    if isinstance(value, dict):
        kept: dict[str, object] = {}
        for key, item in value.items():
            here = (*path, key)
            # `token: null` or a mapping under such a name holds no secret itself.
            by_name = looks_secret(key, None) and isinstance(item, str | int | float)
            if by_name or looks_secret(None, item) or looks_secret(None, key):
                found[here] = secret_problem(source, dotted(here))
            else:
                kept[key] = _cleaned(item, here, source, found)
        return kept
    if isinstance(value, list):
        return [_cleaned(item, (*path, index), source, found) for index, item in enumerate(value)]
    if looks_secret(None, value):
        # Reached for list items alone, whose place has to stay.
        found[path] = secret_problem(source, dotted(path))
        return None
    return value
