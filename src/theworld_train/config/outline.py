"""What the schema says about a key: its neighbours, its choices and its type in plain words.

Everything is read from the JSON Schema that pydantic derives of a model, so that nothing describes the schema twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import cast

from pydantic import BaseModel

from theworld_train.config.components import COMPONENT_HINTS
from theworld_train.config.errors import did_you_mean, nearest
from theworld_train.config.reading import KeyPath, dotted

#: A node of a JSON Schema.
Node = dict[str, object]

#: Keys that users of other trainers reach for, and what to write here.
KEY_HINTS: dict[str, str] = {
    "batch_size": "set 'training.global_batch_size' (all ranks) and 'training.micro_batch_size' (one rank at once)",
    "per_device_train_batch_size": "the key is 'training.micro_batch_size'",
    "gradient_accumulation_steps": "it is derived: global_batch_size / (micro_batch_size x world size)",
    "learning_rate": "the key is 'optimizer.lr'",
    "num_epochs": "the key is 'training.epochs'",
    "num_train_epochs": "the key is 'training.epochs'",
    "max_grad_norm": "the key is 'training.gradient_clip_norm'",
    "warmup_ratio": "the key is 'schedule.warmup_steps', in optimizer steps",
    "bf16": "the key is 'precision'",
    "fp16": "the key is 'precision'",
    "dtype": "the key is 'precision'",
    "mixed_precision": "the key is 'precision'",
    "report_to": "the key is 'tracking.trackers'",
    "resume_from_checkpoint": "the key is 'resume'",
    "model_name_or_path": "the key is 'model.base'",
    "stage": "a stage is its 'trainable' table",
    "stages": "a file with stages is a pipeline, not a run config",
    "freeze": "what the 'trainable' table does not name is frozen",
    "lora": "components train in full; name them in the 'trainable' table",
}


class Outline:
    """The keys of one kind of config."""

    def __init__(self, model: type[BaseModel]) -> None:
        """Reads the outline off a model.

        Args:
            model: The model of the whole config, such as RunConfig.
        """
        self._root: Node = model.model_json_schema()
        self._definitions = _mapping(self._root.get("$defs"))

    def locate(self, loc: Sequence[str | int]) -> tuple[KeyPath, Node | None]:
        """Follows the location of a pydantic error.

        Args:
            loc: The location; inside a union it names the chosen variant, which is no key of the config.

        Returns:
            The key path without such names, and the schema of what is there (None if the schema knows no such key).
        """
        node: Node | None = self._root
        path: list[str | int] = []
        for part in loc:
            variants = self._variants(node) if node is not None else {}
            if part in variants:
                node = variants[str(part)]
                continue
            path.append(part)
            node = self._child(node, part) if node is not None else None
        return tuple(path), self._resolved(node) if node is not None else None

    def knows(self, path: Sequence[str]) -> bool:
        """Says whether a dotted key exists, in whichever variant of a union."""
        return any(True for _ in self._nodes_at(path))

    def suggest(self, loc: Sequence[str | int]) -> str | None:
        """Returns the hint for an unknown key.

        Args:
            loc: The location as pydantic gives it, so that of a union only the chosen variant counts, or a key path.

        Returns:
            The nearest known key, or what to write instead; None if nothing is near.
        """
        path, _ = self.locate(loc)
        if path[0] == "trainable" and len(path) > 1 and not self.knows([str(part) for part in path[:2]]):
            return self._suggest_component(str(path[1]))
        name = str(path[-1])
        section, parent = self.locate(loc[:-1])
        siblings = [child for child, _ in self._children(parent)] if parent is not None else []
        if "." in name:
            return "dotted keys are for the command line; in a file write nested mappings"
        near = nearest(name, siblings)
        if near:
            return f"did you mean '{dotted((*section, near))}'?"
        # If another variant of the union knows the key, looking elsewhere would only find the key itself.
        elsewhere = None if self.knows([str(part) for part in path]) else self._suggest_elsewhere(path, bool(siblings))
        return KEY_HINTS.get(name) or elsewhere or (did_you_mean(name, siblings) if siblings else None)

    def describe(self, node: Node) -> str:
        """Says in plain words what the schema expects at a node."""
        node, nullable = self._without_null(node)
        words = self._describe_plain(self._resolved(node))
        return f"{words}, or null" if nullable else words

    def choices(self, node: Node) -> list[str]:
        """Returns the names that a node accepts, or nothing if it accepts more than a few names."""
        node = self._resolved(self._without_null(node)[0])
        if "const" in node:
            return [str(node["const"])]
        return [str(choice) for choice in _items(node.get("enum"))]

    def kind(self, node: Node) -> str:
        """Returns the JSON type that a node expects: integer, number, boolean, string, array or object."""
        node = self._resolved(self._without_null(node)[0])
        return "object" if "oneOf" in node else str(node.get("type", ""))

    def discriminator(self, node: Node) -> tuple[str, list[str]]:
        """Returns the key that selects a union's variant, and its values."""
        node = self._resolved(self._without_null(node)[0])
        return str(_mapping(node["discriminator"])["propertyName"]), list(self._variants(node))

    @cached_property
    def known_keys(self) -> tuple[str, ...]:
        """Every dotted key, sections included."""
        return tuple(dict.fromkeys(dotted(path) for path in self._walk(self._root, ())))

    def _suggest_component(self, name: str) -> str | None:
        return COMPONENT_HINTS.get(name) or did_you_mean(name, self._names_under(("trainable",)))

    def _suggest_elsewhere(self, path: KeyPath, in_section: bool) -> str | None:
        """Looks for the key outside the section that it was put in: in another one, or in one that is misspelt."""
        near = None if in_section else nearest(dotted(path), self.known_keys)
        if near:
            return f"did you mean '{near}'?"
        namesakes = [key for key in self.known_keys if key.rpartition(".")[2] == path[-1]]
        depth = min((key.count(".") for key in namesakes), default=0)
        likely = [f"'{key}'" for key in namesakes if key.count(".") == depth]
        return f"did you mean {' or '.join(likely)}?" if 0 < len(likely) <= 3 else None

    def _resolved(self, node: Node) -> Node:
        while "$ref" in node:
            node = self._definition(str(node["$ref"]))
        return node

    def _definition(self, reference: str) -> Node:
        return _mapping(self._definitions[reference.rpartition("/")[2]])

    def _without_null(self, node: Node) -> tuple[Node, bool]:
        node = self._resolved(node)
        options = [_mapping(option) for option in _items(node.get("anyOf"))]
        if not options:
            return node, False
        real = [option for option in options if option.get("type") != "null"]
        assert len(real) == 1, "the schema has no union but those with null and those with a discriminator"
        return real[0], len(real) < len(options)

    def _variants(self, node: Node) -> dict[str, Node]:
        node = self._resolved(self._without_null(node)[0])
        if "oneOf" not in node:
            return {}
        mapping = _mapping(_mapping(node["discriminator"])["mapping"])
        tags = {reference: tag for tag, reference in mapping.items()}
        # The discriminator lists its tags by alphabet, the union in the schema's order.
        references = [str(_mapping(option)["$ref"]) for option in _items(node["oneOf"])]
        return {tags[reference]: self._definition(reference) for reference in references}

    def _child(self, node: Node, part: str | int) -> Node | None:
        node = self._resolved(self._without_null(node)[0])
        if isinstance(part, int):
            prefix = _items(node.get("prefixItems"))
            return _mapping(prefix[part]) if part < len(prefix) else _mapping(node.get("items")) or None
        properties = _mapping(node.get("properties"))
        if part in properties:
            return _mapping(properties[part])
        choices = self.choices(_mapping(node.get("propertyNames")))  # none where names are free
        if choices and part not in choices:
            return None
        patterns = _mapping(node.get("patternProperties"))
        for pattern, child in patterns.items():
            if re.search(pattern, part):
                return _mapping(child)
        return _mapping(node.get("additionalProperties")) or None

    def _children(self, node: Node) -> Iterator[tuple[str, Node]]:
        """Yields the named children of a node: of every variant, if it is a union."""
        for option in [*self._variants(node).values()] or [self._resolved(self._without_null(node)[0])]:
            for name, child in _mapping(option.get("properties")).items():
                yield name, _mapping(child)
            if "propertyNames" in option:
                for name in self.choices(_mapping(option["propertyNames"])):
                    yield name, _mapping(option["additionalProperties"])

    def _nodes_at(self, path: Sequence[str]) -> Iterator[Node]:
        nodes = [self._root]
        for part in path:
            options = [option for node in nodes for option in [*self._variants(node).values()] or [node]]
            nodes = [child for option in options if (child := self._child(option, part)) is not None]
        yield from nodes

    def _names_under(self, path: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(name for node in self._nodes_at(path) for name, _ in self._children(node)))

    def _walk(self, node: Node, path: KeyPath) -> Iterator[KeyPath]:
        for name, child in self._children(node):
            yield (*path, name)
            yield from self._walk(child, (*path, name))

    def _describe_plain(self, node: Node) -> str:
        names = self.choices(node)
        if len(names) == 1:
            return f"'{names[0]}'"
        if names:
            return "one of " + ", ".join(names)
        if "oneOf" in node:
            key, tags = self.discriminator(node)
            return f"a mapping whose '{key}' is one of {', '.join(tags)}"
        kind = node.get("type")
        if kind in ("integer", "number"):
            return _describe_number(node)
        if kind == "array":
            return self._describe_list(node)
        if kind == "object":
            return self._describe_object(node)
        if kind == "string":
            return str(node.get("x-expected", "text that is not empty" if node.get("minLength") else "text"))
        return {"boolean": "true or false"}.get(str(kind), "any value")

    def _describe_list(self, node: Node) -> str:
        prefix = _items(node.get("prefixItems"))
        if prefix:
            return f"a list of {len(prefix)} values, each {self.describe(_mapping(prefix[0]))}"
        least = "that is not empty, " if node.get("minItems") else ""
        return f"a list {least}of values, each {self.describe(_mapping(node.get('items')))}"

    def _describe_object(self, node: Node) -> str:
        if "propertyNames" in node:
            return f"a mapping whose keys are among {', '.join(self.choices(_mapping(node['propertyNames'])))}"
        properties = _mapping(node.get("properties"))
        return f"a mapping with keys such as {', '.join(list(properties)[:3])}" if properties else "a mapping"


@lru_cache
def outline_of(model: type[BaseModel]) -> Outline:
    """Returns the outline of a model, read once."""
    return Outline(model)


def _describe_number(node: Node) -> str:
    noun = "a whole number" if node["type"] == "integer" else "a number"
    if "minimum" in node and "maximum" in node:
        return f"{noun} from {node['minimum']} to {node['maximum']}"
    if "minimum" in node and "exclusiveMaximum" in node:
        return f"{noun} from {node['minimum']} to below {node['exclusiveMaximum']}"
    for key, sign in (("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<=")):
        if key in node:
            return f"{noun} {sign} {node[key]}"
    return noun


def _mapping(value: object) -> Node:
    """Narrows a part of a JSON Schema to a mapping; what is absent, or no mapping, counts as an empty one."""
    return cast(Node, value) if isinstance(value, dict) else {}


def _items(value: object) -> list[object]:
    return cast(list[object], value) if isinstance(value, list) else []
