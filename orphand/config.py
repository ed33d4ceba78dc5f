# SPDX-License-Identifier: Apache-2.0
"""The configuration: /etc/orphand.yaml and /etc/orphand.d/*.yaml to Settings, or all mistakes at once.

The keys are the fields of settings.py. Later files win: mappings merge, lists and single values replace.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, Optional

from orphand import config_values as values
from orphand.config_tree import Branch, Items, Node, Place, Problems, Scalar, describe, merge, parse
from orphand.config_values import UnusableError
from orphand.errors import ConfigError
from orphand.masking import masked
from orphand.model import Action, Kind
from orphand.settings import (
    MIN_GRACE,
    Alerts,
    ContainerdEngine,
    DockerEngine,
    Journal,
    Kill,
    Match,
    Policy,
    Rule,
    Scan,
    Settings,
)

DEFAULT_FILE = Path("/etc/orphand.yaml")
DEFAULT_DIR = Path("/etc/orphand.d")
FILE_LIMIT = 1 << 20  # bytes
PROBLEM_LIMIT = 50
MIN_SETTLE = 30.0  # seconds, where something is killed; less only with kill.allow_short_grace
HOUR = 3600.0
DAY = 24 * HOUR

Reader = Callable[[Node, str, Problems], Any]
BAD = object()  # what a reader returns after it added a problem


def load(paths: Optional[Sequence[Path]] = None) -> Settings:
    """The settings from these files, or from the default places, where nothing at all means the defaults.

    Raises ConfigError with every mistake of every file, one a line.
    """
    problems = Problems()
    if paths is None:
        paths = default_paths(DEFAULT_FILE, DEFAULT_DIR, problems)
    root = Branch(Place(_name(DEFAULT_FILE)))
    for path in paths:
        content = _content(path, problems)
        tree = parse(_name(path), content, problems) if content else None
        root = merge(root, tree) if tree else root
    settings = _settings(root, problems)
    if problems.found:
        raise ConfigError("\n".join(_bounded(problems.lines([_name(path) for path in paths]))))
    return settings


def _name(path: Path) -> str:
    return masked(os.fspath(path), 1024)


def _bounded(lines: Sequence[str]) -> list[str]:
    if len(lines) <= PROBLEM_LIMIT:
        return list(lines)
    return [*lines[:PROBLEM_LIMIT], f"and {len(lines) - PROBLEM_LIMIT} more mistakes"]


def default_paths(file: Path, directory: Path, problems: Problems) -> list[Path]:
    """The file, if there is one, then the directory's *.yaml in the order of their names."""
    paths = [file] if os.path.lexists(file) else []
    try:
        names = sorted(entry.name for entry in os.scandir(directory) if not entry.name.startswith("."))
        info = os.stat(directory)
    except FileNotFoundError:
        return paths
    except OSError as error:
        problems.add(Place(_name(directory)), "", f"can't be read ({error.strerror}); make it a readable directory")
        return paths
    _refuse_writers(info, directory, problems)
    for name in names:
        if name.endswith(".yml"):
            place = Place(_name(directory / name))
            problems.add(place, "", f"would not be read; name it {masked(name[:-4])}.yaml, or move it away")
    return paths + [directory / name for name in names if name.endswith(".yaml")]


def _content(path: Path, problems: Problems) -> bytes:
    place = Place(_name(path))
    if os.path.islink(path):  # for the message; O_NOFOLLOW is what refuses it
        problems.add(place, "", "is a symbolic link; put the file itself here")
        return b""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "its name can't be used"
        problems.add(place, "", f"can't be read ({reason}); check the path and its permissions")
        return b""
    try:
        return _checked(descriptor, path, problems)
    finally:
        os.close(descriptor)


def _checked(descriptor: int, path: Path, problems: Problems) -> bytes:
    place = Place(_name(path))
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
        problems.add(place, "", "is not a regular file; put a YAML file here")
        return b""
    _refuse_writers(info, path, problems)
    try:
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(FILE_LIMIT + 1)
    except OSError as error:
        problems.add(place, "", f"can't be read ({error.strerror}); check the disk")
        return b""
    if len(content) > FILE_LIMIT:
        problems.add(place, "", "is larger than 1 MiB; is it the right file?")
        return b""
    return content


def _refuse_writers(info: os.stat_result, path: Path, problems: Problems) -> None:
    """Who may write the configuration decides what is killed."""
    place = Place(_name(path))
    if info.st_uid not in (0, os.geteuid()):
        problems.add(place, "", f"belongs to uid {info.st_uid}, who could change what is ended; chown root it")
    elif info.st_mode & stat.S_IWOTH:
        problems.add(place, "", "can be written by everybody, who could change what is ended; chmod o-w it")


def section(make: Callable[..., Any], readers: Mapping[str, Reader], needs: Sequence[str] = ()) -> Reader:
    """Reads a mapping with these keys into make(**values).

    Keys that are not there keep their defaults; so do bad ones, so that the mistakes elsewhere are found too.
    """

    def read(node: Node, path: str, problems: Problems) -> Any:
        if isinstance(node, Scalar) and node.kind == "null" and not needs:
            return make()
        if not isinstance(node, Branch):
            # Not the value itself: it may be a URL with a password
            problems.add(node.place, path, f"is {values.kind_of(node)}; write keys below it: {', '.join(readers)}")
            return BAD
        found: dict[str, Any] = {}
        for key, (place, below) in node.entries.items():
            inner = f"{path}.{masked(key, 80)}" if path else masked(key, 80)
            if key in readers:
                found[key] = readers[key](below, inner, problems)
            else:
                problems.add(place, inner, f"unknown key; {_suggestion(key, readers)}")
        for key in needs:
            if key not in node.entries:
                problems.add(node.place, path, f"{key} is missing; write {key}: …")
        sound = {key: item for key, item in found.items() if item is not BAD}
        return make(**sound) if sound.keys() >= set(needs) else BAD

    return read


def _suggestion(key: str, readers: Mapping[str, Reader]) -> str:
    near = difflib.get_close_matches(key.lower().replace("-", "_")[:80], readers, 1, 0.6)
    if near:
        return f"did you mean {near[0]}?"
    homes = [name for name, keys in SECTIONS.items() if key in keys and keys is not readers]
    if homes:
        return f"it belongs below {homes[0]}"
    return f"known here: {', '.join(readers)}"


def value(read_value: Callable[..., Any], *limits: float) -> Reader:
    """Reads one value by a function of config_values."""

    def read(node: Node, path: str, problems: Problems) -> Any:
        try:
            return read_value(node, *limits)
        except UnusableError as wrong:
            problems.add(wrong.place or node.place, path, str(wrong))
            return BAD

    return read


def floored(floor: float, largest: float) -> Reader:
    """Reads a duration that may be below `floor` only where another key allows it, which is known in the end."""

    def read(node: Node, path: str, problems: Problems) -> Any:
        seconds = value(values.duration, 0.0, largest)(node, path, problems)
        if seconds is not BAD and seconds < floor:
            problems.short.append((node.place, path, seconds, floor))
        return seconds

    return read


def choice(values_: type[Any]) -> Reader:
    """Reads one word of an enum."""

    def read(node: Node, path: str, problems: Problems) -> Any:
        words = [member.value for member in values_]
        written = node.text if isinstance(node, Scalar) and node.kind == "str" else ""
        if written in words:
            return values_(written)
        near = difflib.get_close_matches(written.lower()[:80], words, 1, 0.6)
        hint = f"did you mean {near[0]}?" if near else f"write one of {', '.join(words)}"
        problems.add(node.place, path, f"{describe(node)} is not known; {hint}")
        return BAD

    return read


def listed(reader: Reader, what: str) -> Reader:
    """Reads a list into a tuple."""

    def read(node: Node, path: str, problems: Problems) -> Any:
        if not isinstance(node, Items):
            problems.add(
                node.place, path, f"is {describe(node)}, not a list; write a list of {what}, each after a dash"
            )
            return BAD
        found = [reader(item, f"{path}[{number}]", problems) for number, item in enumerate(node.items)]
        return tuple(item for item in found if item is not BAD)

    return read


def _match(node: Node, path: str, problems: Problems) -> Any:
    if (isinstance(node, Branch) and not node.entries) or (isinstance(node, Scalar) and node.kind == "null"):
        problems.add(node.place, path, f"is empty and would fit nothing; name at least one of {', '.join(MATCH)}")
        return BAD
    return section(Match, MATCH)(node, path, problems)


def _rule(node: Node, path: str, problems: Problems) -> Any:
    rule = section(Rule, RULE, needs=("match",))(node, path, problems)
    if isinstance(node, Branch) and node.entries.keys() == {"match"}:
        problems.add(node.place, path, "changes nothing; set action or grace")
    return rule


def engines(make: Callable[..., Any], readers: Mapping[str, Reader], where: str) -> Reader:
    """Reads `auto`, `false`, one mapping or a list of them into None, () or a tuple of engines."""
    one = section(make, readers, needs=(where,))

    def read(node: Node, path: str, problems: Problems) -> Any:
        if isinstance(node, Scalar) and (node.kind == "null" or node.text == "auto"):
            return None
        if isinstance(node, Scalar) and node.kind == "bool" and not values.boolean(node):
            return ()
        if isinstance(node, Scalar):
            hint = f"write auto, false, or a mapping: {{{where}: /run/…}}"
            problems.add(node.place, path, f"is {describe(node)}; {hint}")
            return BAD
        if isinstance(node, Branch):
            engine = one(node, path, problems)
            return BAD if engine is BAD else (engine,)
        found = listed(one, "mappings")(node, path, problems)
        if found is not BAD and len({getattr(engine, where) for engine in found}) < len(found):
            problems.add(node.place, path, f"two entries have the same {where}; keep one")
        return found

    return read


MATCH: dict[str, Reader] = {
    "kind": choice(Kind),
    "namespace": value(values.pattern),
    "container_id": value(values.id_pattern),
    "name": value(values.pattern),
    "image": value(values.pattern),
    "pod": value(values.pattern),
    "pod_namespace": value(values.pattern),
    "hostname": value(values.pattern),
}
RULE: dict[str, Reader] = {
    "match": _match,
    "action": choice(Action),
    "grace": floored(MIN_GRACE, 7 * DAY),
}
SECTIONS: dict[str, dict[str, Reader]] = {
    "policy": {
        "action": choice(Action),
        "grace": floored(MIN_GRACE, 7 * DAY),
        "rules": listed(_rule, "rules"),
        "exempt": listed(_match, "matches"),
        "windows": listed(value(values.window), "windows"),
        "jitter": value(values.duration, 0.0, HOUR),
    },
    "kill": {
        "term_timeout": value(values.duration, 0.0, HOUR),
        "max_orphans": value(values.whole, 10_000),
        "max_share": value(values.share),
        "max_kills_per_hour": value(values.whole, 10_000),
        "cleanup": value(values.boolean),
        "allow_short_grace": value(values.boolean),
    },
    "scan": {
        "interval": value(values.duration, 0.1, DAY),
        "sweep_interval": value(values.duration, 1.0, DAY),
        "settle": floored(MIN_SETTLE, DAY),
        "timeout": value(values.duration, 0.1, 60.0),
    },
    "docker": {"socket": value(values.socket), "containerd": value(values.socket), "data_root": value(values.path)},
    "containerd": {"address": value(values.socket)},
    "journal": {"enabled": value(values.boolean)},
    "alerts": {
        "command": value(values.command),
        "webhook": value(values.webhook),
        "timeout": value(values.duration, 0.1, 300.0),
    },
}
ROOT: dict[str, Reader] = {
    "policy": section(Policy, SECTIONS["policy"]),
    "kill": section(Kill, SECTIONS["kill"]),
    "scan": section(Scan, SECTIONS["scan"]),
    "docker": engines(DockerEngine, SECTIONS["docker"], "socket"),
    "containerd": engines(ContainerdEngine, SECTIONS["containerd"], "address"),
    "journal": section(Journal, SECTIONS["journal"]),
    "alerts": section(Alerts, SECTIONS["alerts"]),
}


def _settings(root: Branch, problems: Problems) -> Settings:
    settings: Settings = section(Settings, ROOT)(root, "", problems)
    kills = Action.KILL in (settings.policy.action, *(rule.action for rule in settings.policy.rules))
    for place, path, seconds, floor in problems.short:
        if settings.kill.allow_short_grace or (path == "scan.settle" and not kills):
            continue
        mend = f"write at least {floor:.0f}s, or for tests kill: {{allow_short_grace: true}}"
        problems.add(place, path, f"{values.written_duration(seconds)} is too short to be safe; {mend}")
    return settings
