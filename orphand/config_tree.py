# SPDX-License-Identifier: Apache-2.0
"""A YAML file as a tree that knows where each key and value stands. Refuses what a config has no need of.

Nothing is constructed: the loader stops at YAML's nodes, so no tag can make an object.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Union

from orphand.masking import masked

YAML_TAG = "tag:yaml.org,2002:"
SCALAR_TAGS = frozenset({"str", "int", "float", "bool", "null", "timestamp", "value"})
DEPTH_LIMIT = 20


@dataclass(frozen=True)
class Place:
    """Where something stands; line and column count from 1, 0 where the file as a whole is meant."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        """As compilers write it."""
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Scalar:
    """One value: the text as written, and what YAML takes it for (str, int, float, bool, null)."""

    place: Place
    text: str
    kind: str


@dataclass(frozen=True)
class Items:
    """A list."""

    place: Place
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Branch:
    """A mapping: from each key to where the key stands and its value."""

    place: Place
    entries: Mapping[str, tuple[Place, Node]] = field(default_factory=dict)


Node = Union[Scalar, Items, Branch]


@dataclass
class Problems:
    """All mistakes found so far, and the times that are one unless another key allows them."""

    found: list[tuple[Place, str]] = field(default_factory=list)
    short: list[tuple[Place, str, float, float]] = field(default_factory=list)  # with path, seconds and floor

    def add(self, place: Place, path: str, text: str) -> None:
        """One mistake: what is wrong; how to mend it."""
        self.found.append((place, f"{path}: {text}" if path else text))

    def lines(self, files: Sequence[str]) -> list[str]:
        """FILE:LINE:COLUMN: KEY: TEXT, in the order of the files and of what stands in them."""
        order = {file: number for number, file in enumerate(files)}
        ranked = sorted(self.found, key=lambda f: (order.get(f[0].file, -1), f[0].line, f[0].column))
        return [f"{place}: {text}" for place, text in ranked]


def parse(file: str, content: bytes, problems: Problems) -> Optional[Branch]:
    """The file's tree; None if it is empty or has no usable mapping at its root, which is then in `problems`."""
    try:
        import yaml  # only where there is a file: it costs 10 ms and 3 MB
    except (ImportError, OSError) as error:  # not installed; or, at a reload, no descriptors left to load it
        problems.add(Place(file), "", f"PyYAML can't be loaded ({masked(str(error), 80)}); install python3-yaml")
        return None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = _place_of(file, content[: error.start].decode("utf-8", "replace"))
        problems.add(place, "", f"byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8")
        return None
    try:
        root = yaml.compose(text, Loader=_loader())
        tree = _convert(root, file, "", 0, problems) if root is not None else None
    except yaml.reader.ReaderError as error:
        place = _place_of(file, text[: error.position])
        problems.add(place, "", f"character {masked(chr(error.character))} is not allowed in YAML; remove it")
        return None
    except yaml.MarkedYAMLError as error:
        _add_syntax(error, file, problems)
        return None
    except RecursionError:
        problems.add(Place(file, 1, 1), "", f"nested too deeply; {DEPTH_LIMIT} levels are the limit")
        return None
    except Exception as error:  # noqa: BLE001 PyYAML lets errors of its own escape: "\UFFFFFFFF" is an OverflowError
        problems.add(Place(file, 1, 1), "", f"not YAML ({masked(str(error), 80)}); check escapes and directives")
        return None
    return _root(tree, problems)


def _root(tree: Optional[Node], problems: Problems) -> Optional[Branch]:
    if tree is None or isinstance(tree, Branch):
        return tree
    if isinstance(tree, Scalar) and tree.kind == "null":
        return None
    problems.add(tree.place, "", f"the file holds {describe(tree)}, not keys with values; start with, say, policy:")
    return None


@functools.lru_cache(maxsize=1)
def _loader() -> Any:
    import yaml

    class Composer(yaml.SafeLoader):
        """Stops at an alias: a few of them can stand for billions of values, and no config needs one."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()  # type: ignore[no-untyped-call]
                problem = f"alias *{event.anchor} is not supported"
                raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
            return super().compose_node(parent, index)

    return Composer


HINTS = (  # part of PyYAML's words, ours, how to mend it
    ("'\\t' that cannot start any token", "a tab where a value or key begins", "indent with spaces"),
    (
        "mapping values are not allowed",
        "a colon that can't be here",
        "check the indentation and the line before, or put the value in quotes",
    ),
    ("alias *", "", "write the value out"),
    ("found undefined alias", "", "write the value out"),
    ("found duplicate anchor", "", "remove the anchors"),
    ("but found another document", "a second document (---)", "keep one document in a file"),
    ("could not find expected ':'", "a key without a colon", "write key: value"),
    ("while scanning a quoted scalar", "a quote that is never closed", "close it"),
    ("while parsing a flow", "a bracket or brace that is never closed, or a missing comma", "close it"),
)


def _add_syntax(error: Any, file: str, problems: Problems) -> None:
    mark = error.problem_mark or error.context_mark
    place = Place(file, mark.line + 1, mark.column + 1) if mark else Place(file, 1, 1)
    said = " ".join(filter(None, (error.context, error.problem)))
    for part, ours, mend in HINTS:
        if part in said:
            problems.add(place, "", f"{ours or masked(error.problem, 80)}; {mend}")
            return
    problems.add(place, "", f"not YAML ({masked(said, 160)}); check indentation, quotes and brackets")


def _place_of(file: str, before: str) -> Place:
    lines = before.split("\n")
    return Place(file, len(lines), len(lines[-1]) + 1)


def _convert(node: Any, file: str, path: str, depth: int, problems: Problems) -> Node:
    import yaml

    place = Place(file, node.start_mark.line + 1, node.start_mark.column + 1)
    if depth > DEPTH_LIMIT:
        raise RecursionError
    if isinstance(node, yaml.MappingNode):
        _refuse_tag(node, "map", place, path, problems)
        return Branch(place, _entries(node, file, path, depth, problems))
    if isinstance(node, yaml.SequenceNode):
        _refuse_tag(node, "seq", place, path, problems)
        items = (_convert(n, file, f"{path}[{i}]", depth + 1, problems) for i, n in enumerate(node.value))
        return Items(place, tuple(items))
    kind = node.tag[len(YAML_TAG) :] if node.tag.startswith(YAML_TAG) else node.tag
    if kind not in SCALAR_TAGS:
        _refuse_tag(node, "", place, path, problems)
    return Scalar(place, node.value, kind if kind in ("int", "float", "bool", "null") else "str")


def _refuse_tag(node: Any, expected: str, place: Place, path: str, problems: Problems) -> None:
    if node.tag != YAML_TAG + expected:
        tag = node.tag.replace(YAML_TAG, "!!")
        problems.add(place, path, f"tag {masked(tag, 80)} is not supported; remove it")


def _entries(node: Any, file: str, path: str, depth: int, problems: Problems) -> dict[str, tuple[Place, Node]]:
    import yaml

    entries: dict[str, tuple[Place, Node]] = {}
    for key_node, value_node in node.value:
        place = Place(file, key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        if not isinstance(key_node, yaml.ScalarNode):
            problems.add(place, path, "a list or mapping as a key; keys are plain words")
            continue
        name = masked(key_node.value, 80)
        inner = f"{path}.{name}" if path else name
        if key_node.tag == YAML_TAG + "merge":
            problems.add(place, path, "merge key << is not supported; write the keys out")
            continue
        if key_node.value in entries:
            first = entries[key_node.value][0]
            problems.add(place, inner, f"key is here twice, first in line {first.line}; keep one")
            continue
        entries[key_node.value] = (place, _convert(value_node, file, inner, depth + 1, problems))
    return entries


def merge(below: Branch, above: Branch) -> Branch:
    """Both, with `above` winning: mappings merge key by key, lists and single values replace."""
    entries = dict(below.entries)
    for key, (place, value) in above.entries.items():
        old = entries[key][1] if key in entries else None
        if isinstance(value, Branch) and isinstance(old, Branch):
            entries[key] = (place, merge(old, value))
        elif old is None or not _is_null(value) or not isinstance(old, Branch):
            entries[key] = (place, value)
    return Branch(above.place, entries)


def _is_null(node: Node) -> bool:
    return isinstance(node, Scalar) and node.kind == "null"


def describe(node: Node) -> str:
    """What it is, for a message: `a list`, `a mapping`, `nothing`, or the value."""
    if isinstance(node, Items):
        return "a list"
    if isinstance(node, Branch):
        return "a mapping"
    if node.kind == "null":
        return "nothing"
    return masked(node.text, 60) if node.text else "an empty string"
