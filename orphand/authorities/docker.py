# SPDX-License-Identifier: Apache-2.0
"""Docker as a witness: does it know this container or this plugin?

A yes is a yes. A no counts only in Docker's own words, for the full id, from an engine that is the
same process before and after, older than `settle`, and with no directory of the container left.
"""

from __future__ import annotations

import calendar
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional
from urllib.parse import quote, urlencode

from orphand.authorities import dockerd
from orphand.authorities.docker_api import Answer, Client, Silence
from orphand.authorities.dockerd import Engine
from orphand.model import Claim, Sighting, Testimony
from orphand.settings import Scan

FULL_ID = re.compile(r"[0-9a-f]{64}")
LIVE = frozenset({"running", "paused", "restarting"})
CALM = LIVE | {"removing"}  # states in which a list's yes is enough
# those only: a node may keep thousands that have exited, each of them a kilobyte in the list
LIST = "/containers/json?" + urlencode({"all": 1, "filters": json.dumps({"status": sorted(CALM)})})
SMALL, LARGE = 4 << 20, 64 << 20  # bytes: one container; a list of all
MAX_TIMEOUTS = 2  # one container with a stuck lock blocks only questions about itself; more means that the engine hangs
TOTAL = 2  # times the timeout: for all questions of one look together


LIST_AGE = 1.0  # seconds that a list's yes may be taken from: looks in quick succession cost the engine one list
FOLLOWED_AGE = 600.0  # the same where its events tell what changes: a container is not forgotten without one


def boot_clock() -> float:
    """Seconds since boot, suspend included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class Facts:
    """What the engine says of itself. It can't change while the process lives."""

    version: str
    data_root: str
    namespace: str
    plugin_namespace: str
    containerd: str = ""  # from Docker 27 on
    live_restore: bool = False


class Docker:
    """One dockerd as a witness. For one thread at a time; never raises."""

    def __init__(
        self, engine: Engine, scan: Scan, proc: Path = Path("/proc"), clock: Callable[[], float] = boot_clock
    ) -> None:
        self.engine = engine
        self._scan = scan
        self._proc = proc
        self._clock = clock
        self._client = self._new_client()
        self._facts: Optional[Facts] = None
        self._listed: Mapping[str, str] = {}
        self._listed_at = float("-inf")

    @property
    def name(self) -> str:
        """The authority's name in testimonies."""
        return self.engine.name

    @property
    def facts(self) -> Optional[Facts]:
        """What it said of itself, once it was asked."""
        return self._facts

    def meet(self, engine: Engine) -> None:
        """The engine as it was found in this look. Another process: forget what the one before it said."""
        before, self.engine = self.engine, engine
        if engine.process != before.process or engine.socket != before.socket:
            self.close()
            self._client = self._new_client()
            self._facts = None
            self._listed_at = float("-inf")

    def close(self) -> None:
        """Hang up."""
        self._client.close()

    def cut(self) -> None:
        """End a question that another thread is in."""
        self._client.cut()

    def learn(self) -> str:
        """Ask the engine about itself, if that isn't known. "" if it is known now, else why it isn't."""
        problem = self.engine.problem or self._absence()
        try:
            if not problem:
                self._learn(time.monotonic() + self._scan.timeout)
        except Silence as silence:
            return str(silence)
        return problem

    def ask(self, sightings: Sequence[Sighting], quiet_since: Optional[float] = None) -> dict[str, Testimony]:
        """Container id -> what Docker says of it as a container.

        `quiet_since` (boot clock): its events have been followed since then, and there was none. A list that is newer
        still tells what it knows; what isn't in there is asked for anew.
        """
        return self._hear(sightings, lambda by_id, until: self._ask_containers(by_id, until, quiet_since))

    def knows_still(self, ids: Sequence[str], quiet_since: float) -> bool:
        """Whether its last list tells a yes for each of these, none of which several claim. `quiet_since`: see ask."""
        return (
            self._is_listed(self._clock(), quiet_since)
            and len(set(ids)) == len(ids)
            and all(self._listed.get(container_id) in CALM for container_id in ids)
            and not (self.engine.problem or self._absence())
        )

    def ask_plugins(self, sightings: Sequence[Sighting]) -> dict[str, Testimony]:
        """Container id -> what Docker says of it as a managed plugin."""
        return self._hear(sightings, self._ask_plugins)

    def _hear(
        self,
        sightings: Sequence[Sighting],
        question: Callable[[Mapping[str, list[Sighting]], float], dict[str, Testimony]],
    ) -> dict[str, Testimony]:
        by_id: dict[str, list[Sighting]] = {}
        for sighting in sightings:
            by_id.setdefault(sighting.container_id, []).append(sighting)
        asked_at = self._clock()
        until = time.monotonic() + TOTAL * self._scan.timeout
        problem = self.engine.problem or self._absence()
        if problem:
            return self._silent(by_id, problem, asked_at)
        if self._client.is_cut:  # an earlier look gave up on it
            self._client = self._new_client()
        try:
            self._learn(until)
            answers = question(by_id, until)
        except Silence as silence:
            answers = self._silent(by_id, str(silence), asked_at)
        return self._doubt(answers, by_id)

    def _silent(self, ids: Iterable[str], why: str, asked_at: float) -> dict[str, Testimony]:
        return {i: Testimony(self.name, Claim.UNAVAILABLE, asked_at, why) for i in ids}

    def _new_client(self) -> Client:
        return Client(self.engine.socket, self._scan.timeout, self._absence)

    def _absence(self) -> str:
        return dockerd.absence(self.engine, self._proc)

    def _doubt(self, answers: dict[str, Testimony], by_id: Mapping[str, list[Sighting]]) -> dict[str, Testimony]:
        """A no of an engine that has just started, or isn't the one that was asked, is none."""
        absence = self._absence() or self._somebody_else()
        now = self._clock()
        for container_id, answer in answers.items():
            if answer.claim not in (Claim.UNKNOWN, Claim.DISOWNED):
                continue
            seen_at = min(s.seen_at for s in by_id[container_id])
            doubt = absence or self._youth(now, seen_at)
            if doubt:
                answers[container_id] = replace(answer, claim=Claim.UNAVAILABLE, detail=doubt, veto="")
        return answers

    def _somebody_else(self) -> str:
        """Who answered, if it wasn't the engine: PID 1 has called listen() where systemd opens the socket for it."""
        peer = self._client.peer
        if self.engine.process and peer in (self.engine.process.pid, 1):
            return ""
        return f"it was process {peer} that answered"

    def _youth(self, now: float, seen_at: float) -> str:
        started, settle = self.engine.started_at, self._scan.settle
        if now - started < settle or started > seen_at:
            return f"dockerd (re)started {now - started:.0f} s ago; its no is believed after {settle:.0f} s"
        return ""

    def _learn(self, until: float) -> None:
        if self._facts is None:
            answer = self._client.get("/info", LARGE, until)
            info = answer.json() if answer.status == 200 else None
            if not isinstance(info, dict) or not _is_dockers(answer):
                raise Silence(f"it answered {answer.status} when asked for its data-root")
            self._facts = read_info(info, self.engine)

    def _try_list(self, until: float, quiet_since: Optional[float]) -> str:
        """Why there is no list; "" if there is one. One container with a stuck lock may block it.

        Then each is asked for by itself, and only a yes counts.
        """
        try:
            self._list(until, quiet_since)
        except Silence as silence:
            if silence.fatal:
                raise
            self._listed, self._listed_at = {}, float("-inf")
            return f"asked for all containers: {silence}"
        return ""

    def _list(self, until: float, quiet_since: Optional[float]) -> None:
        """Refresh the list that a yes may be taken from. It is never evidence of a no."""
        now = self._clock()
        if self._is_listed(now, quiet_since):
            return
        answer = self._client.get(LIST, LARGE, until)
        entries = answer.json() if answer.status == 200 else None
        if not isinstance(entries, list):
            raise Silence(f"it answered {answer.status} when asked for its containers")
        self._listed = {
            e["Id"]: str(e.get("State")) for e in entries if isinstance(e, dict) and isinstance(e.get("Id"), str)
        }
        self._listed_at = now

    def _is_listed(self, now: float, quiet_since: Optional[float]) -> bool:
        """Whether the last list may still be taken a yes from."""
        quiet = quiet_since is not None and quiet_since < self._listed_at
        return now - self._listed_at < (FOLLOWED_AGE if quiet else LIST_AGE)

    def _ask_containers(
        self, by_id: Mapping[str, list[Sighting]], until: float, quiet_since: Optional[float]
    ) -> dict[str, Testimony]:
        sick = self._try_list(until, quiet_since)
        answers = {
            i: Testimony(self.name, Claim.KNOWN, self._listed_at)
            for i, sightings in by_id.items()
            if self._listed.get(i) in CALM and len(sightings) == 1
        }
        timeouts = 0
        for container_id, sightings in by_id.items():
            if container_id in answers:
                continue
            asked_at = self._clock()
            try:
                answer = self._inspect(container_id, sightings, asked_at, until)
                if sick and answer.claim is not Claim.KNOWN:
                    answer = Testimony(self.name, Claim.UNAVAILABLE, asked_at, sick)
                answers[container_id] = answer
            except Silence as silence:
                answers[container_id] = Testimony(self.name, Claim.UNAVAILABLE, asked_at, str(silence))
                timeouts += 1
                if silence.fatal or timeouts >= MAX_TIMEOUTS:
                    return {**self._silent(by_id, str(silence), asked_at), **answers}
        return answers

    def _inspect(self, container_id: str, sightings: Sequence[Sighting], asked_at: float, until: float) -> Testimony:
        if not FULL_ID.fullmatch(container_id):  # shorter text is matched as a name or a prefix
            raise Silence("Docker can't be asked for what isn't a full id")
        answer = self._client.get(f"/containers/{quote(container_id, safe='')}/json", SMALL, until)
        if answer.status == 200:
            return self._read_record(answer, container_id, sightings, asked_at)
        if not says_no_such_container(answer, container_id):
            raise Silence(f"it answered {answer.status}, but not Docker's own no")
        return self._no(container_id, asked_at, sightings, "containers")

    def _read_record(
        self, answer: Answer, container_id: str, sightings: Sequence[Sighting], asked_at: float
    ) -> Testimony:
        record = answer.json()
        state = record.get("State") if isinstance(record, dict) else None
        if not isinstance(state, dict) or record.get("Id") != container_id:
            raise Silence("it answered with another container")
        pid = state.get("Pid")
        contradiction = self._contradiction(state, sightings)
        claim = Claim.DISOWNED if contradiction else Claim.KNOWN
        return Testimony(self.name, claim, asked_at, contradiction, pid=pid if isinstance(pid, int) else 0)

    def _contradiction(self, state: Mapping[str, Any], sightings: Sequence[Sighting]) -> str:
        """Why the record can't be about the processes that were sighted; "" if it can.

        A container that is being started is `created` or `exited` while its shim and init are there
        already; one that is being deleted is `exited` while they are there still.
        """
        status = str(state.get("Status"))
        if status in CALM or any(state.get(key) is True for key in ("Running", "Paused", "Restarting")):
            return ""
        now, settle = self._clock(), self._scan.settle
        if any(now - p.start / dockerd.TICKS < settle for s in sightings for p in s.processes):
            return ""
        if 0 <= time.time() - _wall_clock(state.get("FinishedAt")) < settle:
            return ""
        alive = [p for s in sightings for p in s.processes if dockerd.process_id(p.pid, self._proc) == p]
        if not alive or state.get("Pid") in {p.pid for p in alive}:
            return ""
        return f"it says {status}, but pid {alive[-1].pid} lives"

    def _no(self, container_id: str, asked_at: float, sightings: Sequence[Sighting], kind: str) -> Testimony:
        facts = self._known_facts()
        ours = facts.namespace if kind == "containers" else facts.plugin_namespace
        others = {s.namespace for s in sightings if s.address} - {ours, ""}  # else every part is asked
        if others:
            raise Silence(f"its {kind} are in namespace {ours}, not in {', '.join(sorted(others))}")
        roots = dict.fromkeys((facts.data_root, self.engine.data_root))
        leftovers = [leftover(root, kind, container_id) for root in roots if root]
        veto = "; ".join(v for v, _ in leftovers if v)
        detail = "; ".join(d for _, d in leftovers if d)
        return Testimony(self.name, Claim.UNKNOWN, asked_at, detail, veto=veto)

    def _known_facts(self) -> Facts:
        if self._facts is None:
            raise Silence("its data-root is not known")
        return self._facts

    def _ask_plugins(self, by_id: Mapping[str, list[Sighting]], until: float) -> dict[str, Testimony]:
        asked_at = self._clock()
        answer = self._client.get("/plugins", LARGE, until)
        plugins = answer.json() if answer.status == 200 and _is_dockers(answer) else None
        if not isinstance(plugins, list) or not all(isinstance(p, dict) and p.get("Id") for p in plugins):
            raise Silence(f"it answered {answer.status} when asked for its plugins")
        ids = {p["Id"] for p in plugins}
        return {
            i: Testimony(self.name, Claim.KNOWN, asked_at) if i in ids else self._no(i, asked_at, s, "plugins")
            for i, s in by_id.items()
        }


def read_info(info: Mapping[str, Any], engine: Engine) -> Facts:
    """What /info tells, and where it is too old to tell (before 27.0), what dockerd's own rules make of it."""
    data_root = info.get("DockerRootDir")
    if not isinstance(data_root, str) or not data_root.startswith("/"):
        raise Silence("it does not name its data-root")
    version = str(info.get("ServerVersion"))
    namespace, plugin_namespace = engine.namespace, engine.plugin_namespace
    remapped = dockerd.REMAPPED.fullmatch(os.path.basename(data_root))
    if remapped and _major(version) >= 26:  # RemapContainerdNamespaces of moby 26.0
        namespace = _remap(namespace, "moby", remapped[0])
        plugin_namespace = _remap(plugin_namespace, "plugins.moby", remapped[0])
    containerd = info.get("Containerd")
    containerd = containerd if isinstance(containerd, dict) else {}
    namespaces = containerd.get("Namespaces")
    namespaces = namespaces if isinstance(namespaces, dict) else {}
    return Facts(
        version,
        data_root,
        str(namespaces.get("Containers") or namespace),
        str(namespaces.get("Plugins") or plugin_namespace),
        str(containerd.get("Address") or ""),
        info.get("LiveRestoreEnabled") is True,
    )


def _remap(namespace: str, default: str, suffix: str) -> str:
    return f"{namespace}-{suffix}" if namespace == default else namespace


def _major(version: str) -> int:
    head = version.split(".")[0]
    return int(head) if head.isdigit() else 0


def _is_dockers(answer: Answer) -> bool:
    kind = answer.headers.get("Content-Type", "").split(";")[0].strip()
    return answer.headers.get("Server", "").startswith("Docker/") and kind == "application/json"


def says_no_such_container(answer: Answer, container_id: str) -> bool:
    """Is this Docker's own no for the full id? A proxy's or a path's 404 isn't (api/server/httpstatus of moby)."""
    if answer.status != 404 or not _is_dockers(answer):
        return False
    try:
        body = json.loads(answer.body)
    except (ValueError, RecursionError):
        return False
    return isinstance(body, dict) and body == {"message": f"No such container: {container_id}"}


def leftover(data_root: str, kind: str, container_id: str) -> tuple[str, str]:
    """(veto, remark): does `<data-root>/<kind>/<id>` show an owner that may come back?

    With live-restore Docker forgets a container of another storage driver while it runs on; its
    directory stays. A directory with nothing but empty mount points is left by a removal that failed.
    """
    parent = os.path.join(data_root, kind)
    path = os.path.join(parent, container_id)
    try:
        os.lstat(path)
    except FileNotFoundError:
        return _missing(parent, kind)
    except OSError as error:
        return f"{path} can't be looked at: {error.strerror}", ""
    record = os.path.join(path, "config.v2.json" if kind == "containers" else "config.json")
    try:
        names = os.listdir(path)
    except OSError as error:
        return f"{path} can't be read: {error.strerror}", ""
    if os.path.lexists(record) or not set(names) <= {"mounts", "shm"}:
        return f"Docker has a directory of it: {path}", ""
    return "", f"{path} is left, without a record in it"


def _missing(parent: str, kind: str) -> tuple[str, str]:
    """Nothing there is a no only if the directory that would hold it is there (Docker makes it at its start)."""
    if kind == "plugins" or os.path.isdir(parent):
        return "", ""
    return f"{parent} is not there, so that Docker's records can't be looked at", ""


def _wall_clock(stamp: object) -> float:
    """Seconds since 1970 of Docker's RFC 3339 time (UTC); 0 for what isn't one."""
    try:
        return float(calendar.timegm(time.strptime(str(stamp)[:19], "%Y-%m-%dT%H:%M:%S")))
    except ValueError:
        return 0.0
