"""Writes cli.md and config.md beside it from the commands and the config models: `make docs`."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from theworld_train.cli.app import COMMANDS, PROGRAM, load_command
from theworld_train.cli.exit_codes import COMMON, with_exit_codes
from theworld_train.cli.schema import Kind
from theworld_train.config import config_json_schema

FOLDER = Path(__file__).parent
NOTE = "<!-- Made by `make docs` from the code: change the docstrings there, not this page. -->"

CLI_HEAD = """\
# Commands

`{program} COMMAND --help` prints what stands here. `{program} --install-completion` has the shell complete commands,
options, config files and names from then on; `--show-completion` prints the script instead.

Arguments that hold a `=` override keys of the config, whose reference is [config.md](config.md): `optimizer.lr=3e-4`,
`'data.eval=null'`, `'trainable={{world_projector: {{lr: 1e-3}}}}'`; the value is YAML. Where a key is given
twice the last one wins, and a section wins over those of its keys that were given before it.

Wrong input is refused before anything starts, with all problems at once: file, dotted key, what was expected, the
value, and the nearest name that there is. After an exit code of 2 the same command fails again. All commands have:

| exit code | means |
|---|---|
{codes}
"""

CONFIG_HEAD = """\
# Keys of the configs

`{program} validate FILE` checks a file, `{program} schema KIND` prints this as JSON Schema for editors. A
file may extend others, and `KEY=VALUE` on the command line wins over all of them. A key without a default is required.
"""


def pages() -> dict[Path, str]:
    """Returns the pages and what they hold."""
    return {FOLDER / "cli.md": cli_page(), FOLDER / "config.md": config_page()}


# -- commands -----------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """Returns the reference of all commands, in the order of the table of commands."""
    codes = "\n".join(f"| {code} | {meaning} |" for code, meaning in COMMON.items())
    parts = [NOTE, CLI_HEAD.format(program=PROGRAM, codes=codes)]
    parts.append("| command | does |\n|---|---|")
    parts[-1] += "".join(f"\n| [`{name}`](#{name}) | {_cell(entry.help)} |" for name, entry in COMMANDS.items())
    parts += [_command(name) for name in COMMANDS]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _command(name: str) -> str:
    module, _, attribute = COMMANDS[name].target.partition(":")
    text = with_exit_codes(inspect.getdoc(getattr(import_module(module), attribute)) or "")
    description, _, example = re.split(r"^(Examples?:)$", text, maxsplit=1, flags=re.MULTILINE)
    command = load_command(name)
    context = command.make_context(f"{PROGRAM} {name}", [], resilient_parsing=True)
    usage = command.get_usage(context).removeprefix("Usage:").strip()
    records = [parameter.get_help_record(context) for parameter in command.params]
    rows = [f"| `{_cell(_kind(first))}` | {_cell(help_text)} |" for first, help_text in filter(None, records)]
    table = "\n".join(["| argument or option | |", "|---|---|", *rows])
    described = f"```text\n{' '.join(usage.split())}\n```\n\n{description.strip()}"
    examples = f"```bash\n{inspect.cleandoc(example)}\n```"
    return "\n\n".join([f"## {name}", described, *([table] if rows else []), examples])


def _kind(record: str) -> str:
    """Returns a parameter with what it takes; that it may be repeated is for its help to say."""
    kind = re.sub(r"<list\[(\w+)\]>$", lambda match: f"<{match[1].lower()}>", record)
    return kind if record.startswith("-") else re.sub(r" <\w+>$", "", kind)


# -- configs ------------------------------------------------------------------------------------------------------


def config_page() -> str:
    """Returns the reference of all kinds of config, from their JSON Schemas."""
    parts = [NOTE, CONFIG_HEAD.format(program=PROGRAM)]
    for kind in Kind:
        parts += _Sections(kind.value, config_json_schema(kind.value)).written()
    return "\n\n".join(part.strip() for part in parts) + "\n"


class _Sections:
    """Tables of one kind of config: one for each section, in the order in which they are met; each once."""

    def __init__(self, kind: str, schema: dict[str, Any]) -> None:
        self.kind = kind
        self.schema = schema
        self.titles: dict[str, str] = {}
        self.waiting: list[tuple[str, str, dict[str, Any]]] = []

    def written(self) -> list[str]:
        parts = [f"## A {self.kind} config", self.schema["description"], self._table(self.schema, "")]
        while self.waiting:
            title, path, node = self.waiting.pop(0)
            parts += [f"### {title}", node.get("description", ""), self._table(node, path)]
        return [part for part in parts if part]

    def _table(self, node: dict[str, Any], prefix: str) -> str:
        rows = ["| key | value | default | |", "|---|---|---|---|"]
        dotted = f"{prefix}." if prefix else ""
        for key, stated in node["properties"].items():
            value = self._value(stated, f"{dotted}{key}")
            default = f"`{_cell(_yaml(stated['default']))}`" if "default" in stated else ""
            default = "" if "](#" in value and isinstance(stated.get("default"), dict) else default
            rows.append(f"| `{key}` | {value} | {default} | {_cell(self._describe(stated))} |")
        return "\n".join(rows)

    def _describe(self, node: dict[str, Any]) -> str:
        """Returns a key's description, or that of the section that it holds."""
        return str(node.get("description") or self._resolved(node).get("description", ""))

    def _resolved(self, node: dict[str, Any]) -> dict[str, Any]:
        name = str(node.get("$ref", "")).rpartition("/")[2]
        found: dict[str, Any] = self.schema["$defs"][name] if name else node
        return found

    def _value(self, node: dict[str, Any], path: str) -> str:
        """Says what a key takes; sections that it holds get a table of their own."""
        target = self._resolved(node)
        if "properties" in target:
            return self._link(target, path)
        if "anyOf" in target or "oneOf" in target:
            return ", ".join(dict.fromkeys(self._options(target, path)))
        if "enum" in target or "const" in target:
            return ", ".join(f"`{_yaml(value)}`" for value in target.get("enum", [target.get("const")]))
        if target.get("type") == "array":
            count = f"{len(target['prefixItems'])} times " if "prefixItems" in target else ""
            return f"list of {count}{self._items(target, path)}"
        if target.get("type") == "object":
            inner = target.get("additionalProperties") or next(iter(target.get("patternProperties", {}).values()), None)
            names = self._resolved(target.get("propertyNames", {})).get("enum", [])
            keys = f" of {', '.join(f'`{name}`' for name in names)}" if names else ""
            values = f" to {self._value(inner, f'{path}.NAME')}" if isinstance(inner, dict) else ""
            return f"mapping{keys}{values}"
        return _scalar(target)

    def _items(self, target: dict[str, Any], path: str) -> str:
        if "prefixItems" in target:
            each = [self._value(item, path) for item in target["prefixItems"]]
            return each[0] if len(set(each)) == 1 else " and ".join(each)
        return self._value(target["items"], f"{path}[]") if isinstance(target.get("items"), dict) else "anything"

    def _options(self, target: dict[str, Any], path: str) -> Iterator[str]:
        for option in target.get("anyOf", target.get("oneOf", ())):
            yield from self._value(option, path).split(", ") if "anyOf" in option else [self._value(option, path)]

    def _link(self, target: dict[str, Any], path: str) -> str:
        """Returns a link to a section's table, which is written where it is met first."""
        chosen = target["properties"].get("source", {}).get("const")
        title = f"{path}: {chosen}" if chosen else path
        if self.kind != Kind.RUN.value:
            title = f"{title} of a {self.kind}"
        if target["title"] not in self.titles:
            self.titles[target["title"]] = title
            self.waiting.append((title, path, target))
        known = self.titles[target["title"]]
        words = re.findall(r"\w+", target.get("pattern", ""))
        return ", ".join([*(f"`{word}`" for word in words), f"[{chosen or known}](#{anchor(known)})"])


def anchor(heading: str) -> str:
    """Returns what a link to a heading ends with, as GitHub makes it: lower case, without punctuation."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _scalar(node: dict[str, Any]) -> str:
    """Says what a number or text may be."""
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    kind = node.get("type")
    if kind not in words:
        return "`null`" if kind == "null" else "anything"
    bounds = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{sign} {node[key]:,}" for key, sign in bounds.items() if key in node]
    if "x-expected" in node:
        expected = str(node["x-expected"])
        return (
            expected.removeprefix("a ") if expected.startswith(f"a {words[kind]}") else f"{words[kind]} of {expected}"
        )
    return f"{words[kind]}{' ' if limits else ''}{' and '.join(limits)}"


def _yaml(value: object) -> str:
    """Writes a default as it would stand in a config."""
    return value if isinstance(value, str) and value else json.dumps(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path)
