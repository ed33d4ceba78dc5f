# SPDX-License-Identifier: Apache-2.0
"""The oracle's record of every container, and its judgement of every death. Wall clock: the journal's times compare."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

MARKS = Path("/run/churn")
# What orphand says of ids that it acts on: ENDING, ENDED, END_FAILED. Written out: the oracle shares no code with it.
ACTS = {
    "c5f2a6e1b8d54f0e9a7c3b1d2e4f6079": "ENDING",
    "c5f2a6e1b8d54f0e9a7c3b1d2e4f607a": "ENDED",
    "c5f2a6e1b8d54f0e9a7c3b1d2e4f607c": "END_FAILED",
}
ORPHANED = "c5f2a6e1b8d54f0e9a7c3b1d2e4f6077"
SUSPECTED = "c5f2a6e1b8d54f0e9a7c3b1d2e4f6075"


@dataclass
class Process:
    """An init, a shim or another process of a container that is watched."""

    pid: int
    role: str
    seen: float
    died: Optional[float] = None


@dataclass
class Entry:
    """One container: what the driver knows and did. Times are epoch seconds."""

    name: str
    role: str  # life | resident | victim | pod
    full_id: str = ""
    namespace: str = "moby"
    kind: str = ""  # a victim's: the kind of orphan
    processes: list[Process] = field(default_factory=list)
    intents: list[tuple[float, str]] = field(default_factory=list)  # what may end it, noted before it is asked for
    removing: Optional[float] = None  # its removal was asked for
    gone: Optional[float] = None  # Docker has said that it does not exist any more
    lost_from: Optional[float] = None  # a victim's: its recipe began
    lost: Optional[float] = None  # a victim's: its recipe was done
    ended: Optional[float] = None  # a victim's: the last of its processes died
    clean: Optional[float] = None  # a victim's: nothing was left
    netns: str = ""  # a victim's: the file that keeps its network namespace
    left: str = ""  # a victim's: what was left at the last look
    story: list[tuple[float, str]] = field(default_factory=list)
    auto_remove: bool = False

    def tell(self, what: str) -> None:
        self.story.append((time.time(), what))

    def intend(self, what: str) -> None:
        """Right before a call that may end it."""
        self.intents.append((time.time(), what))
        self.tell(what)

    @property
    def marks(self) -> list[str]:
        """What the container itself wrote before it exited: `exit`, `term@EPOCH`."""
        try:
            return (MARKS / self.name).read_text().split()
        except OSError:
            return []


@dataclass(frozen=True)
class Phase:
    """A time in which an engine's own doings may end containers."""

    begin: float
    end: float
    what: str


@dataclass(frozen=True)
class Suspicion:
    """A death or an act of orphand's for which nothing that the driver did is a reason."""

    name: str
    full_id: str
    when: float
    what: str
    act: str = ""  # orphand's own record, if it is one


class Book:
    """All entries. Thread-safe for what the driver's threads do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.entries: list[Entry] = []
        self.by_id: dict[str, Entry] = {}
        self.phases: list[Phase] = []
        self.docker_starts: list[Phase] = []
        self.void_creates = 0  # create was asked for, no clear answer came, and no such container was found
        self.unstarted: list[str] = []  # starts that Docker refused
        self.refused: list[str] = []  # creates that Docker refused: a mistake in the plan

    def open(self, name: str, role: str, kind: str = "") -> Entry:
        entry = Entry(name, role, kind=kind)
        with self._lock:
            self.entries.append(entry)
        return entry

    def identify(self, entry: Entry, full_id: str) -> None:
        entry.full_id = full_id
        entry.tell(f"id {full_id}")
        with self._lock:
            self.by_id[full_id] = entry

    def phase(self, begin: float, what: str) -> None:
        self.phases.append(Phase(begin, time.time(), what))

    def docker_start(self, begin: float, what: str) -> None:
        self.docker_starts.append(Phase(begin, time.time() + 1.0, what))

    # Judging

    def deaths(self, entry: Entry) -> list[Suspicion]:
        """The deaths of a container's inits for which there is no cause."""
        if entry.lost_from is not None:
            found = [p for p in entry.processes if p.died and p.died < entry.lost_from and p.role == "init"]
        else:
            found = [p for p in entry.processes if p.died and p.role in ("init", "child", "shim")]
        unexplained = [p for p in found if not self._cause(entry, p)]
        exits = entry.marks.count("exit")
        said = "a mark was written for" if exits else "there is no mark of"
        spared = sum(p.role == "init" for p in unexplained)
        if entry.role == "life" and spared <= exits:
            return []
        return [
            Suspicion(
                entry.name, entry.full_id, p.died or 0.0, f"{p.role} {p.pid} died; {said} {exits} exits by itself"
            )
            for p in unexplained
        ]

    def terms(self, entry: Entry) -> list[Suspicion]:
        """A TERM that the container noted while somebody wanted it, and nobody meant to send."""
        sent = [w for t, w in entry.intents if w in ("stop", "restart", "kill TERM")]
        got = [float(mark.partition("@")[2]) for mark in entry.marks if mark.startswith("term@")]
        bad = [t for t in got if self.managed(entry, t) and not any(p.begin - 1 <= t <= p.end for p in self.phases)]
        if sent or not bad:
            return []
        return [Suspicion(entry.name, entry.full_id, bad[0], "the container got a TERM that the driver never sent")]

    def _cause(self, entry: Entry, process: Process) -> str:
        died = process.died or 0.0
        for when, what in entry.intents:
            if when <= died and (process.seen <= when or what.startswith("rm")):
                return what
        # dockerd 20.10 removes running --rm containers at its start, live-restore or not (seen; daemon.go:restore)
        starts = self.docker_starts if entry.auto_remove else []
        for phase in (*self.phases, *starts):
            if phase.begin <= died <= phase.end:
                return phase.what
        return ""

    def act(self, record: dict[str, Any]) -> Optional[Suspicion]:
        """A journal record of orphand's: None, or why it is about a container that was managed."""
        act = ACTS.get(str(record.get("MESSAGE_ID", "")))
        full_id = str(record.get("ORPHAND_CONTAINER_ID", ""))
        when = int(record.get("__REALTIME_TIMESTAMP", 0)) / 1e6
        entry = self.by_id.get(full_id)
        if not act or not full_id:
            return None
        if entry is None:
            return Suspicion(
                "?", full_id, when, f"{act} of an id that the driver never got", str(record.get("MESSAGE"))
            )
        if not self.managed(entry, when):
            return None
        return Suspicion(entry.name, full_id, when, f"{act} of a managed container", str(record.get("MESSAGE")))

    def managed(self, entry: Entry, when: float) -> bool:
        """Whether somebody still wanted the container at that time."""
        if entry.lost_from is not None:
            return when < entry.lost_from
        ends = [t for t in (entry.removing, entry.gone) if t is not None]
        if entry.auto_remove:
            ends += [p.died for p in entry.processes if p.died is not None and p.role == "init"]
        return not ends or when < min(ends)

    def living(self) -> list[Entry]:
        with self._lock:
            return [e for e in self.entries if e.gone is None]

    def victims(self) -> list[Entry]:
        with self._lock:
            return [e for e in self.entries if e.lost is not None]
