# SPDX-License-Identifier: Apache-2.0
"""The engines' warnings in the journal as triggers.

A line says at most "look now": anybody may write one. So a flood is read at a bounded rate, then
skipped, and what is read is only searched for the few phrases that engines write about lost
containers.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any, Optional

from orphand.report.topics import Report, Topic

Fire = Callable[[str], None]

# who writes of engines: units of another name have the program's for an identifier, and only that is there where the
# sender has ended already. Not _COMM too: a match costs memory, in proportion to the file
MATCHES = (
    ("_SYSTEMD_UNIT", ("docker.service", "containerd.service", "snap.docker.dockerd.service")),
    ("SYSLOG_IDENTIFIER", ("dockerd", "containerd", "docker")),
)
# dockerd's words for an event of a container that it doesn't know: up to 17.10; 17.11 to 18.09; since 19.03
UNKNOWN = ("libcontainerd: unknown container", "unknown container", "could not find container")
# containerd's words for shims that may have been left (runtime/ and core/runtime/ of containerd 1.2 to 2.3)
LEFT = (
    "cleanup dead shim",
    "loading dead container",
    "loading container",
    "cleaning leaked shim process",
    "failed to clean up after killed shim",
    "failed to clean up after shim disconnected",
    "failed to shutdown shim",
    "failed to delete shim",
    "failed to delete dead shim",
    "failed to load shim",
    "failed to resolve runtime path",
    "failed to query shim pids",
)
ID = re.compile(r"[0-9a-f]{64}")
QUOTED = re.compile(r'\b(msg|error)="((?:[^"\\]|\\.)*)"')
APPEND, INVALIDATE = 1, 2  # SD_JOURNAL_APPEND; SD_JOURNAL_INVALIDATE: journal files came or went
ROOTS = ("/run/log/journal", "/var/log/journal")
MACHINE_ID = "/etc/machine-id"
FIELD_LIMIT = 8192  # bytes read of one field, characters looked at
BATCH = 500  # entries read before the loop gets its turn
RATE = 2000  # entries read in a second before the rest is skipped
RETRY = (1.0, 60.0)  # seconds between attempts to open a journal that isn't there, doubling
MAX_MACHINES = 100  # directories looked at below each of ROOTS
CHECK = 30.0  # seconds between looks whether another journal directory has come
# entries after which the journal is opened anew: libsystemd keeps all that it has read of the files mapped
# (mmap-cache.c: up to 64 windows of 8 MiB), which counts as this process's memory
RENEW = 200


class JournalWatch:
    """Follows the journal in the loop, from its end on."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fire: Fire,
        report: Report,
        open_reader: Optional[Callable[[], Any]] = None,
        roots: tuple[str, ...] = ROOTS,
    ) -> None:
        """`open_reader`: makes a reader that stands at the journal's end."""
        self._loop = loop
        self._fire = fire
        self._report = report
        self._open_reader = open_reader or Tail
        self._roots = roots
        self._reader: Any = None
        self._fd = -1
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._retry = RETRY[0]
        self._seen_roots: frozenset[tuple[str, int]] = frozenset()
        self._window = (0.0, 0)
        self._entries = 0  # read since the journal was opened
        self._lost = ""
        self._opened_before = False

    def start(self) -> None:
        """Open the journal, or try until there is one."""
        self._open()

    def stop(self) -> None:
        """Close it."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._close()

    def state(self) -> str:
        """How it is with it, for people."""
        return self._lost or "followed"

    def _later(self, name: str, delay: float, call: Callable[[], None]) -> None:
        if name in self._timers:
            self._timers[name].cancel()
        self._timers[name] = self._loop.call_later(delay, call)

    def _open(self) -> None:
        self._seen_roots = self._present_roots()
        self._later("check", CHECK, self._check)
        try:
            if not self._seen_roots:
                raise OSError("there is no journal")
            self._reader = self._open_reader()
            self._fd = self._reader.fileno()
            self._loop.add_reader(self._fd, self._on_change)
        except (OSError, ImportError, ValueError) as error:
            self._lose(f"{error}")
            return
        self._retry = RETRY[0]
        self._entries = 0
        if self._lost:
            self._report(Topic.SOURCE_BACK, "the journal is followed again")
        self._lost = ""
        if self._opened_before:
            self._fire("the journal was opened anew")
        self._opened_before = True

    def _close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
        self._fd = -1
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def _lose(self, why: str) -> None:
        """Tell it once, and try again later."""
        self._close()
        if not self._lost:
            self._report(Topic.SOURCE_LOST, f"the journal can't be followed: {why}; looking by events and the timer")
        self._lost = why
        self._later("open", self._retry, self._open)
        self._retry = min(self._retry * 2, RETRY[1])

    def _present_roots(self) -> frozenset[tuple[str, int]]:
        """The journal directories and those in them (one a machine), with the time of their last change.

        libsystemd doesn't notice a root that comes later, and may miss a machine's that goes and comes back. Not with
        their inodes: ext4 gives the same one again to a directory that is made right after a removal.
        """
        present = set()
        for root in self._roots:
            try:
                present.add((root, os.stat(root).st_ctime_ns))
                with os.scandir(root) as entries:
                    present |= {
                        (e.path, e.stat(follow_symlinks=False).st_ctime_ns) for e in islice(entries, MAX_MACHINES)
                    }
            except OSError:
                continue
        return frozenset(present)

    def _check(self) -> None:
        if self._reader is not None and (self._entries > RENEW or self._present_roots() != self._seen_roots):
            self._close()
            self._open()
        else:
            self._later("check", CHECK, self._check)

    def _on_change(self) -> None:
        """Something was written. journald tells so four times a second at most (its POST_CHANGE_TIMER_INTERVAL)."""
        self._loop.remove_reader(self._fd)
        self._read()

    def _read(self) -> None:
        if self._reader is None:
            return
        try:
            changed = self._reader.process() == INVALIDATE
            reason, pause = self._batch()
        except (OSError, ValueError) as error:  # a journal file that is damaged, or was removed under us
            self._lose(f"{error}")
            return
        if reason or changed:  # around a rotation libsystemd may skip entries
            self._fire(f"journal: {reason or 'its files changed'}")
        if pause is None:
            self._loop.add_reader(self._fd, self._on_change)
        else:
            self._later("read", pause, self._read)

    def _batch(self) -> tuple[str, Optional[float]]:
        """(what the first telling line says, seconds until the next read; None: when something is written)."""
        reason, entries = "", 0
        while entries < BATCH and (entry := self._reader.get_next()):
            entries += 1
            reason = reason or hint(entry.get("MESSAGE"))
        self._entries += entries
        if self._is_flood(entries):
            to_the_end(self._reader)
            return reason or f"more than {RATE} lines a second of the engines; the rest was skipped", 1.0
        return reason, 0.0 if entries == BATCH else None

    def _is_flood(self, entries: int) -> bool:
        begun, count = self._window
        now = self._loop.time()
        if now - begun > 1.0:
            begun, count = now, 0
        self._window = (begun, count + entries)
        return count + entries > RATE


class Tail:
    """A reader of the engines' lines in the files that journald writes to. Raises OSError where there is none.

    libsystemd looks for matches in every file that it has open, also in archived ones to which nothing is ever added:
    up to a megabyte of each becomes this process's memory. So one reader only waits. It has root's own files open, of
    which there are none or few, and is told of every change in the same directories. A second one reads.
    """

    def __init__(self) -> None:
        from systemd import journal

        with open(MACHINE_ID, encoding="ascii") as file:
            machine = file.read().strip()
        self._paths = [f"{root}/{machine}/system.journal" for root in ROOTS]
        self._waiting = journal.Reader(flags=journal.LOCAL_ONLY | journal.CURRENT_USER)
        self._written: dict[str, tuple[int, int]] = {}
        self._had = frozenset(self._files().values())  # what is in these was there before
        self._reader: Any = None
        try:
            self._open()
        except OSError:
            self.close()
            raise

    def fileno(self) -> int:
        """What is readable when something was written."""
        return int(self._waiting.fileno())

    def process(self) -> int:
        """Take note of what was written: INVALIDATE where journald writes to another file now, which is opened."""
        self._waiting.process()
        if self._files() == self._written:
            return APPEND
        try:
            self._open()
        except OSError:  # it is just being made: the next change tells, or the next look at the directories
            return APPEND
        return INVALIDATE

    def get_next(self) -> Mapping[str, Any]:
        """The next entry; {} if there is none."""
        return dict(self._reader.get_next()) if self._reader else {}

    def get_previous(self) -> Mapping[str, Any]:
        """The entry before; {} if there is none."""
        return dict(self._reader.get_previous()) if self._reader else {}

    def seek_tail(self) -> None:
        """Go to the end."""
        if self._reader:
            self._reader.seek_tail()

    def close(self) -> None:
        """Let go of all files."""
        self._waiting.close()
        self._close_reader()

    def _close_reader(self) -> None:
        reader, self._reader, self._written = self._reader, None, {}
        if reader is not None:
            reader.close()

    def _open(self) -> None:
        from systemd import journal

        self._close_reader()
        files = self._files()
        if not files:
            raise OSError("journald writes to no file")
        reader = journal.Reader(files=list(files))
        reader.data_threshold = FIELD_LIMIT
        for index, (field, values) in enumerate(MATCHES):
            if index:
                reader.add_disjunction()
            for value in values:
                reader.add_match(f"{field}={value}")
        if self._had.isdisjoint(files.values()):  # after a rotation all that is in the new file is new
            reader.seek_head()
        else:
            to_the_end(reader)
        self._reader, self._written, self._had = reader, files, frozenset(files.values())

    def _files(self) -> dict[str, tuple[int, int]]:
        """The files that are written to: path -> device and inode."""
        found = {}
        for path in self._paths:
            with suppress(OSError):
                file = os.stat(path)
                found[path] = (file.st_dev, file.st_ino)
        return found


def to_the_end(reader: Any) -> None:
    """Let the next read begin after the newest entry. seek_tail alone lets get_next begin anywhere (systemd#17662)."""
    reader.seek_tail()
    reader.get_previous()


def hint(message: object) -> str:
    """What an engine's line says of a lost container; "" if nothing. Takes whatever a MESSAGE field may be."""
    if isinstance(message, bytes):
        message = message.decode(errors="replace")
    if not isinstance(message, str):
        return ""
    text = message[:FIELD_LIMIT]
    said = _json_words(text) if text.startswith("{") else _logfmt_words(text)
    known = [phrase for phrase in UNKNOWN if phrase in said]
    left = [phrase for phrase in LEFT if said.startswith(phrase)]
    if not known and not left:
        return ""
    container_id = ID.search(text)
    what = "unknown container" if known else left[0]
    return f"{what} {container_id[0][:12]}" if container_id else what


def _json_words(text: str) -> str:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(record, dict):
        return ""
    return " ".join(str(record[key]) for key in ("msg", "error") if key in record)


def _logfmt_words(text: str) -> str:
    """The values of msg and error, message first; the whole text where it isn't logfmt."""
    values = dict(QUOTED.findall(text))
    if "msg" not in values:
        return "" if "msg=" in text else text
    return " ".join(values[key] for key in ("msg", "error") if key in values)
