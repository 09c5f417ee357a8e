"""What the exit codes of commands mean, as every command's help states them."""

from __future__ import annotations

import re

#: After Ctrl-C, as a shell has it: 128 + SIGINT.
INTERRUPTED = 130
INTERRUPTED_LINE = "interrupted"
#: Codes that every command may end with. A command that has more, or means more by one, says so in its docstring, in a
#: sentence that begins with `Exit codes:`.
COMMON = {0: "done", 1: "an error, with a traceback", 2: "wrong input", INTERRUPTED: "Ctrl-C"}

_SENTENCE = re.compile(r"\bExit codes:.*?(?=\.\s|\.?\Z|\n\n)", flags=re.DOTALL)
_EXAMPLE = re.compile(r"^Examples?:$", flags=re.MULTILINE)


def with_exit_codes(text: str) -> str:
    """Completes the exit codes that a command's docstring states by those that all commands have.

    Args:
        text: The docstring; without a sentence of its own, one is put before the example.

    Returns:
        The docstring, with a sentence such as `Exit codes: 0 done, 2 wrong input.`
    """
    found = _SENTENCE.search(text)
    stated = found[0] if found else "Exit codes:"
    lacking = [f"{code} {meaning}" for code, meaning in COMMON.items() if not re.search(rf"\b{code}\b", stated)]
    sentence = f"{stated}{', ' if found and lacking else ' ' if lacking else ''}{', '.join(lacking)}"
    if found:
        return text[: found.start()] + sentence + text[found.end() :]
    example = _EXAMPLE.search(text)
    place = example.start() if example else len(text)
    return f"{text[:place].rstrip()}\n\n{sentence}.\n\n{text[place:]}".rstrip()
