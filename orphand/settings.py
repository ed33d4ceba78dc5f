# SPDX-License-Identifier: Apache-2.0
"""The configuration as frozen values, with the defaults. No I/O: config.py reads them from YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from orphand.model import Action, Kind

MIN_GRACE = 60.0  # seconds; less only with kill.allow_short_grace


@dataclass(frozen=True)
class Match:
    """What a rule applies to. Strings are shell patterns (fnmatch); None fits everything."""

    kind: Optional[Kind] = None
    namespace: Optional[str] = None
    container_id: Optional[str] = None
    name: Optional[str] = None
    image: Optional[str] = None
    pod: Optional[str] = None
    pod_namespace: Optional[str] = None
    hostname: Optional[str] = None


@dataclass(frozen=True)
class Rule:
    """What to do about the orphans that `match` fits. The first rule that fits wins."""

    match: Match
    action: Optional[Action] = None
    grace: Optional[float] = None


@dataclass(frozen=True)
class Window:
    """When kills may begin, in the node's local time. `days`: 0 is Monday. `start` and `end`: minutes after midnight.

    A window whose end is not after its start runs past midnight and belongs to the day it starts on.
    """

    days: frozenset[int]
    start: int
    end: int
    text: str = ""  # as the admin wrote it: "Mon-Fri 09:00-17:00"


@dataclass(frozen=True)
class Policy:
    """What happens to orphans."""

    action: Action = Action.LOG
    grace: float = 120.0
    rules: tuple[Rule, ...] = ()
    exempt: tuple[Match, ...] = ()
    windows: tuple[Window, ...] = ()  # none: always
    jitter: float = 30.0  # seconds, at most, added to each grace, different on each node


@dataclass(frozen=True)
class Kill:
    """How a kill is done, and what stops it."""

    term_timeout: float = 30.0
    max_orphans: int = 3
    max_share: float = 0.25
    max_kills_per_hour: int = 10
    cleanup: bool = True
    allow_short_grace: bool = False


@dataclass(frozen=True)
class DockerEngine:
    """One dockerd. `socket` is a path; `containerd` and `data_root` are asked or found where empty."""

    socket: str
    containerd: str = ""
    data_root: str = ""


@dataclass(frozen=True)
class ContainerdEngine:
    """One containerd, by the path of its gRPC socket."""

    address: str


@dataclass(frozen=True)
class Scan:
    """When to look, and how long to wait for answers (seconds)."""

    interval: float = 30.0
    sweep_interval: float = 600.0  # a full sweep of /proc
    settle: float = 120.0  # an engine younger than this is not believed
    timeout: float = 5.0  # of each call to an engine

    @property
    def max_gap(self) -> float:
        """Seconds without a look that break a row of them: three timers, and what engines may take to answer."""
        return 3 * self.interval + 4 * self.timeout


@dataclass(frozen=True)
class Alerts:
    """Where alerts go. Empty: nowhere."""

    command: tuple[str, ...] = ()
    webhook: str = ""
    timeout: float = 10.0


@dataclass(frozen=True)
class Journal:
    """Whether the journal is read for warnings of the engines."""

    enabled: bool = True


@dataclass(frozen=True)
class Settings:
    """The whole configuration."""

    policy: Policy = field(default_factory=Policy)
    kill: Kill = field(default_factory=Kill)
    scan: Scan = field(default_factory=Scan)
    docker: Optional[tuple[DockerEngine, ...]] = None  # None: auto-detect; empty: no Docker here
    containerd: Optional[tuple[ContainerdEngine, ...]] = None
    journal: Journal = field(default_factory=Journal)
    alerts: Alerts = field(default_factory=Alerts)
