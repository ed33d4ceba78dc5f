# SPDX-License-Identifier: Apache-2.0
"""Single values of the configuration: from the text that the admin wrote to a number, path, URL or window.

Each raises UnusableError with what is wrong and how to mend it.
"""

from __future__ import annotations

import math
import re
import urllib.parse
from typing import Optional

from orphand.config_tree import Items, Node, Place, Scalar, describe
from orphand.masking import masked
from orphand.settings import Window

UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
PART = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)\s*([^\W\d_]+)\s*")
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
ALL_DAYS = frozenset(range(7))
SOCKET_PATH_LIMIT = 107  # bytes, sun_path of unix(7)
DURATION_HINT = "write it with a unit, as in 120s, 2m or 1h30m"
WINDOW_HINT = 'write it as in "Mon-Fri 09:00-17:00", "22:00-06:00" or "Sat,Sun"'


class UnusableError(Exception):
    """A value that can't be used; the text says what is wrong; how to mend it. `place`: of a part of the value."""

    def __init__(self, text: str, place: Optional[Place] = None) -> None:
        """`place` is None where the whole value is meant."""
        super().__init__(text)
        self.place = place


def text(node: Node) -> str:
    """Any single value as it was written: a name of digits only, or one that YAML takes for a yes, is a name."""
    if not isinstance(node, Scalar):
        raise UnusableError(f"is {describe(node)}; write one value")
    if node.kind == "null":
        raise UnusableError('is empty; write a value, "" for an empty one, or remove the key')
    return node.text


def boolean(node: Node) -> bool:
    """YAML's true and false, also yes, no, on, off."""
    if not isinstance(node, Scalar) or node.kind != "bool":
        raise UnusableError(f"{describe(node)} is neither true nor false; write true or false")
    return node.text.lower() in ("true", "yes", "on")


def whole(node: Node, largest: int) -> int:
    """A whole number from 0 to `largest`, written with digits only."""
    if isinstance(node, Scalar) and node.kind == "int" and re.fullmatch(r"-[0-9]+", node.text):
        raise UnusableError(f"{describe(node)} is negative; write a whole number from 0 to {largest}")
    if not isinstance(node, Scalar) or node.kind != "int" or not re.fullmatch(r"0|[1-9][0-9]{0,17}", node.text):
        raise UnusableError(f"{describe(node)} is not a whole number; write one from 0 to {largest}, digits only")
    if int(node.text) > largest:
        raise UnusableError(f"{describe(node)} is too large; write a whole number from 0 to {largest}")
    return int(node.text)


def share(node: Node) -> float:
    """A share as 25% or 0.25."""
    hint = "write it as 25% or 0.25"
    written = text(node).strip()
    if not re.fullmatch(r"-?[0-9]{1,9}(\.[0-9]{1,9})?\s*%?", written):
        raise UnusableError(f"{describe(node)} is not a share; {hint}")
    value = float(written[:-1]) / 100 if written.endswith("%") else float(written)
    if value < 0:
        raise UnusableError(f"{describe(node)} is negative; {hint}")
    if value > 1:
        raise UnusableError(f"{describe(node)} is more than the whole; {hint}")
    return value


def duration(node: Node, least: float, largest: float) -> float:
    """Seconds from `least` to `largest`, written with units, the larger unit first."""
    seconds = _seconds(text(node).strip(), node)
    if seconds < least:
        raise UnusableError(f"{describe(node)} is too short; write at least {written_duration(least)}")
    if seconds > largest:
        raise UnusableError(f"{describe(node)} is too long; write at most {written_duration(largest)}")
    return seconds


def _seconds(written: str, node: Node) -> float:
    if written == "0":
        return 0.0
    if re.fullmatch(r"[+-]?[0-9][0-9_]*(\.[0-9]*)?", written):
        if written.startswith("-"):
            raise UnusableError(f"{describe(node)} is negative; {DURATION_HINT}")
        raise UnusableError(f"{describe(node)} has no unit; {DURATION_HINT}")
    if written.startswith("-") and PART.match(written[1:]):
        raise UnusableError(f"{describe(node)} is negative; {DURATION_HINT}")
    total, last, position = 0.0, math.inf, 0
    while position < len(written):
        part = PART.match(written, position)
        if part is None:
            raise UnusableError(f"{describe(node)} is not a duration; {DURATION_HINT}")
        unit = UNITS.get(part[2])
        if unit is None:
            raise UnusableError(f'{describe(node)} has the unit "{masked(part[2], 20)}"; use ms, s, m, h or d')
        if unit >= last:
            raise UnusableError(f"{describe(node)} is not a duration; write the larger unit first, each once: 1h30m")
        total, last, position = total + float(part[1]) * unit, unit, part.end()
    if not written:
        raise UnusableError(f"{describe(node)} is not a duration; {DURATION_HINT}")
    return total


def written_duration(seconds: float) -> str:
    """Seconds as the admin would write them: 90 is 1m30s."""
    if seconds and seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    rest, pieces = int(seconds), []
    for unit in ("d", "h", "m", "s"):
        count, rest = divmod(rest, int(UNITS[unit]))
        if count:
            pieces.append(f"{count}{unit}")
    return "".join(pieces) or "0s"


def path(node: Node) -> str:
    """An absolute path."""
    written = text(node)
    if not written.startswith("/") or not written.isprintable():
        raise UnusableError(f"{describe(node)} is not an absolute path; write it from /")
    return written


def socket(node: Node) -> str:
    """The path of a unix socket, written as a path or as unix://PATH."""
    written = text(node)
    scheme, colon, rest = written.partition("://")
    if colon and scheme != "unix":
        raise UnusableError(
            f"{masked(scheme, 20)}:// is not supported; only engines of this node are watched: unix:///PATH"
        )
    found = rest if colon else written
    if not found.startswith("/") or not found.isprintable():
        raise UnusableError(f"{describe(node)} is not the path of a socket; write /run/… or unix:///run/…")
    if len(found.encode("utf-8", "surrogateescape")) > SOCKET_PATH_LIMIT:
        raise UnusableError(
            f"a socket's path of more than {SOCKET_PATH_LIMIT} bytes can't be connected to; write a shorter one"
        )
    return found


def command(node: Node) -> tuple[str, ...]:
    """A program with its arguments; no shell takes part."""
    hint = "write a list: [/usr/local/bin/page, --team, nodes]"
    if not isinstance(node, Items):
        raise UnusableError(f"is {kind_of(node)}, not a list; no shell reads it: {hint}")
    for number, item in enumerate(node.items):
        if not isinstance(item, Scalar) or item.kind == "null":
            raise UnusableError(f"word {number + 1} is {describe(item)}; write one value", item.place)
        if number == 0 and not item.text.startswith("/"):
            raise UnusableError(f"{describe(item)} is not an absolute path; write the program from /", item.place)
        if "\0" in item.text:
            raise UnusableError(f"word {number + 1} holds a NUL character; remove it", item.place)
    return tuple(text(item) for item in node.items)


def kind_of(node: Node) -> str:
    """What it is without what it says: one value, nothing, a list, a mapping."""
    return "one value" if isinstance(node, Scalar) and node.kind != "null" else describe(node)


def webhook(node: Node) -> str:
    """A URL of http or https. Never printed: it may hold a password or a token."""
    written = text(node)
    hint = "write https://HOST/PATH"
    if not written:
        return ""
    try:
        url = urllib.parse.urlsplit(written)
        port = url.port
    except ValueError:
        raise UnusableError(f"is not a URL; {hint}") from None
    if url.scheme not in ("http", "https"):
        scheme = f"{masked(url.scheme, 20)}:" if re.fullmatch(r"[a-z0-9+.-]+", url.scheme) else "no scheme"
        raise UnusableError(f"a URL with {scheme} is not supported; {hint}")
    if not url.hostname or not re.fullmatch(r"[A-Za-z0-9._:%-]+", url.hostname) or port == 0:
        raise UnusableError(f"the URL names no usable host and port; {hint}")
    if not re.fullmatch(r"[!-~]+", written):
        raise UnusableError("the URL holds a blank or a character that must be written as %XX; encode it")
    if url.fragment:
        raise UnusableError("the URL has a #fragment, which is never sent; remove it")
    return written


def window(node: Node) -> Window:
    """When kills may begin: days, hours, or both."""
    written = " ".join(text(node).split())
    try:
        return _window(written)
    except UnusableError as wrong:
        raise UnusableError(f"{wrong}; {WINDOW_HINT}") from None


def _window(written: str) -> Window:
    words = written.split(" ")
    if written and len(words) == 1:
        if written[0].isdigit():
            return Window(ALL_DAYS, *_hours(written), text=written)
        return Window(_days(written), 0, 24 * 60, text=written)
    if len(words) == 2:
        return Window(_days(words[0]), *_hours(words[1]), text=written)
    raise UnusableError(f"{masked(written, 60) or 'an empty string'} is not a window")


def _days(written: str) -> frozenset[int]:
    days: set[int] = set()
    for part in written.split(","):
        first, dash, last = part.partition("-")
        begin = _day(first)
        days.add(begin)
        if dash:
            end = _day(last)
            days.update((begin + step) % 7 for step in range((end - begin) % 7 + 1))
    return frozenset(days)


def _day(written: str) -> int:
    for number, name in enumerate(DAYS):
        if written.lower() == name.lower():
            return number
    raise UnusableError(f'"{masked(written, 20)}" is not a day (Mon, Tue, Wed, Thu, Fri, Sat, Sun)')


def _hours(written: str) -> tuple[int, int]:
    times = re.fullmatch(r"([0-9]{1,2}):([0-9]{2})-([0-9]{1,2}):([0-9]{2})", written)
    if times is None:
        raise UnusableError(f'"{masked(written, 20)}" is not a span of hours')
    begin, end = _minutes(times[1], times[2]), _minutes(times[3], times[4])
    if begin == 24 * 60:
        raise UnusableError("a window can't start at 24:00")
    if begin == end:
        raise UnusableError("start and end are the same")
    return begin, end


def _minutes(hours: str, minutes: str) -> int:
    value = int(hours) * 60 + int(minutes)
    if int(minutes) > 59 or value > 24 * 60:
        raise UnusableError(f'"{hours}:{minutes}" is not a time of day')
    return value


def pattern(node: Node) -> str:
    """A shell pattern (fnmatch)."""
    written = text(node)
    if len(written) > 512:
        raise UnusableError("is longer than 512 characters; shorten it with *")
    return written


def id_pattern(node: Node) -> str:
    """A shell pattern for whole ids; a short id without * would fit nothing."""
    written = pattern(node)
    if re.fullmatch(r"[0-9a-f]{12,63}", written):
        raise UnusableError(f"{written} is a short id and would fit no container; write {written}*")
    return written
