"""Commands as the pages of the documentation write them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

#: What ends a command of ours inside of a line.
_ENDS = ("|", ">", "&&", ";", "\\")


def blocks(page: Path, *languages: str) -> list[str]:
    """Returns the fenced blocks of a page that are in some languages."""
    fence = rf"^(?: {{0,3}})```(?:{'|'.join(languages)})\n(.*?)^(?: {{0,3}})```"
    return re.findall(fence, page.read_text(), flags=re.MULTILINE | re.DOTALL)


def shell_lines(block: str) -> list[list[str]]:
    """Returns the words of each command line of a block, without comments; a backslash goes on in the next line."""
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    return [words for words in lines if words]


def our_commands(page: Path) -> list[list[str]]:
    """Returns the commands of ours in a page's shell blocks: the words after `theworld-train`."""
    found = []
    for words in (words for block in blocks(page, "sh", "bash") for words in shell_lines(block)):
        for start, word in enumerate(words):
            if word in ("theworld-train", "theworld_train") and start + 1 < len(words):
                rest = words[start + 1 :]
                ends = [place for place, part in enumerate(rest) if part in _ENDS]
                if rest[0].isalpha():  # not an option of the program itself, nor the image's name for docker
                    found.append(rest[: ends[0]] if ends else rest)
                break
    return found
