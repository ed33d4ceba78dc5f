# SPDX-License-Identifier: Apache-2.0
"""The bench of witnesses: who is asked for which container, all at once, with one deadline.

Which authority decides follows from the containerd that a shim names and the namespace in it; a
second engine on the same host is another authority. Whoever can't be found or doesn't answer in
time is UNAVAILABLE, so that its containers are undecided and nobody else's wait.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from orphand.authorities import dockerd
from orphand.authorities.docker import Docker, boot_clock
from orphand.authorities.dockerd import Engine, Finder, same_socket
from orphand.authorities.presence import Absent, Server
from orphand.model import Claim, ProcessId, Role, Sighting, Testimony
from orphand.settings import Settings

if TYPE_CHECKING:
    from orphand.authorities.containerd import Containerd

CONFIG = "/etc/orphand.yaml"
KUBERNETES = "k8s.io"
KUBERNETES_VETO = "the CRI and the kubelet are not asked yet"
CONTAINERS, PLUGINS = "containers", "plugins"  # what a Docker is asked about; a containerd is asked by namespace
DEADLINE = 2.0  # times scan.timeout: for everybody together
SLACK = 0.5  # seconds for the threads' own work
THOROUGH_INTERVAL = 30.0  # seconds between searches of all of /proc for a dockerd that nobody has found yet

BRIEFLY = 600.0  # seconds for which a dockerd that never served is remembered: it may be in a loop of crashes

DENIALS = frozenset({Claim.UNKNOWN, Claim.DISOWNED})

Answers = dict[str, Testimony]  # container id -> testimony


@dataclass(frozen=True)
class EngineState:
    """One engine as `orphand status` shows it, and as the engine trigger watches it."""

    name: str  # dockerd, containerd
    address: str
    process: Optional[ProcessId]
    problem: str = ""


@dataclass(frozen=True)
class _Met:
    """A Docker that was found, and until when (monotonic) it counts although it is gone."""

    containerd: str
    until: float


@dataclass(frozen=True)
class Question:
    """One witness, asked about one kind of thing."""

    witness: str
    part: str  # CONTAINERS, PLUGINS, or containerd's namespace
    role: Role = Role.OWNER


@dataclass(frozen=True)
class Route:
    """Who must be heard for one sighting; `problem`: somebody who should be, but can't be found."""

    questions: tuple[Question, ...] = ()
    problem: str = ""

    def owners_only(self) -> Route:
        """Without those who keep what an owner knows."""
        return replace(self, questions=tuple(q for q in self.questions if q.role is Role.OWNER))


@dataclass(frozen=True)
class Roll:
    """What of the sightings decides whom there is to ask: kept with a look, it saves the next one the reading."""

    ids: Mapping[tuple[str, str], tuple[str, ...]]  # (address, namespace) -> the containers
    shims: frozenset[int]  # their pids

    @classmethod
    def of(cls, sightings: Sequence[Sighting]) -> Roll:
        """Of those that are not foreign."""
        judged = [s for s in sightings if not s.foreign]
        ids: dict[tuple[str, str], list[str]] = {}
        for sighting in judged:
            ids.setdefault((sighting.address, sighting.namespace), []).append(sighting.container_id)
        shims = frozenset(s.shim.process.pid for s in judged if s.shim)
        return cls({way: tuple(named) for way, named in ids.items()}, shims)


class Bench:
    """All witnesses. `hear` may be called by several threads, and is done one after the other."""

    def __init__(self, settings: Settings, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._lock = threading.Lock()
        self._serving: tuple[EngineState, ...] = ()
        self._dockers: dict[str, Docker] = {}
        self._next_settings: Optional[Settings] = None
        self._quiet_since: Optional[float] = None
        self._begin(settings)

    def _begin(self, settings: Settings) -> None:
        """Everybody is looked for and asked anew."""
        self.close()
        self._settings = settings
        self._finder = Finder(settings.docker, self._proc)
        self._crew = Crew()
        self._dockers = {}
        self._containerds: dict[str, Containerd] = {}
        self._servers: dict[str, Server] = {}
        self._hands: dict[str, Containerd] = {}
        self._met: dict[str, _Met] = {}  # each Docker that was found, by its socket
        self._searched_at = float("-inf")
        self._denied = False  # did anybody say no in the last look?

    def reconfigure(self, settings: Settings) -> None:
        """Take a new configuration, with the next look."""
        self._next_settings = settings

    def close(self) -> None:
        """End every question to a Docker; a thread that waits for a containerd ends by its own deadline."""
        for docker in list(self._dockers.values()):
            docker.cut()

    def hear(
        self, sightings: Sequence[Sighting], everybody: bool = False, quiet_since: Optional[float] = None
    ) -> dict[tuple[str, ...], tuple[Testimony, ...]]:
        """Sighting.key -> what everybody says who could own it. Takes at most about twice scan.timeout.

        A keeper (containerd, of Docker's containers) is asked only for what no owner knows, since an owner's yes
        decides alone; of several that claim one id, and with `everybody`, for all. `quiet_since`: see Docker.ask.
        """
        with self._lock:
            settings, self._next_settings = self._next_settings, None
            if settings is not None:
                self._begin(settings)
            self._quiet_since = quiet_since
            return self._hear(sightings, everybody)

    def _hear(self, sightings: Sequence[Sighting], everybody: bool) -> dict[tuple[str, ...], tuple[Testimony, ...]]:
        until = time.monotonic() + self._patience + SLACK
        asked_at = boot_clock()
        judged = [s for s in sightings if not s.foreign]
        roll = Roll.of(judged)
        self._find(roll)
        namespaces = self._namespaces(judged, until)
        ways = {way: self._route(*way, namespaces) for way in roll.ids}
        routes = {s.key: ways[s.address, s.namespace] for s in judged}
        answers = self._ask(judged, routes, Role.OWNER, until)
        if not everybody:
            settled = {way: route.owners_only() for way, route in ways.items()}
            routes.update((s.key, settled[s.address, s.namespace]) for s in _settled(judged, routes, answers))
        answers.update(self._ask(judged, routes, Role.KEEPER, until))
        heard = {s.key: self._gather(s, routes[s.key], answers, asked_at) for s in judged}
        self._see_servers()
        self._denied = any(t.claim in DENIALS for said in heard.values() for t in said)
        return {**{s.key: () for s in sightings}, **heard}

    def knows_still(self, roll: Roll, quiet_since: float) -> bool:
        """Whether for all in it some Docker's last list still tells a yes, so that nobody need be asked.

        The engines are looked for as in `hear`; where they are others, it's no. `quiet_since`: see Docker.ask.
        """
        with self._lock:
            if self._next_settings is not None:
                return False
            before = self.engines()
            self._find(roll)
            self._see_servers()
            return self.engines() == before and all(self._is_known(*w, i, quiet_since) for w, i in roll.ids.items())

    def _is_known(self, address: str, namespace: str, ids: Sequence[str], quiet_since: float) -> bool:
        dockers = (d for d in self._dockers_of(address) if _part(d, namespace) == CONTAINERS)
        return any(docker.knows_still(ids, quiet_since) for docker in dockers)

    def data_roots(self) -> tuple[str, ...]:
        """Docker's data-roots."""
        return tuple(dict.fromkeys(d.facts.data_root if d.facts else d.engine.data_root for d in self._real_dockers()))

    def engines(self) -> list[EngineState]:
        """The engines of the last look: dockerd first."""
        found = [
            EngineState("dockerd", d.engine.socket, d.engine.process, d.engine.problem)
            for d in list(self._dockers.values())
        ]
        return [*found, *self._serving]

    def dockers(self) -> list[Engine]:
        """The Docker engines of the last look, for the events."""
        return [d.engine for d in list(self._dockers.values())]

    def containerd(self, address: str) -> Containerd:
        """The containerd at the address, to be told to end something: not the object that the look's threads use."""
        if address not in self._hands:
            self._hands[address] = self._new_containerd(address)
        return self._hands[address]

    def _new_containerd(self, address: str) -> Containerd:
        from orphand.authorities.containerd import Containerd

        return Containerd(address, self._settings.scan)

    def _real_dockers(self) -> list[Docker]:
        return [d for d in list(self._dockers.values()) if not d.engine.problem]

    def _see_servers(self) -> None:
        self._serving = tuple(self._state(address) for address in self._servers)

    def _state(self, address: str) -> EngineState:
        try:
            return EngineState("containerd", address, self._servers[address].look().process)
        except Absent as absent:
            return EngineState("containerd", address, None, str(absent))

    # -- finding ------------------------------------------------------------------------------------------------

    def _find(self, roll: Roll) -> None:
        """Look for the engines. All of /proc is searched at first, for containers of a Docker that wasn't found yet,
        and while anything looks orphaned: it may belong to a dockerd that has come since.
        """
        now = time.monotonic()
        homeless = any(is_dockers(namespace) and not self._dockers_of(address) for address, namespace in roll.ids)
        due = now - self._searched_at >= THOROUGH_INTERVAL
        thorough = due and (homeless or self._denied or self._searched_at == float("-inf"))
        if thorough:
            self._searched_at = now
        found = _by_socket(self._finder.look(thorough, roll.shims))
        for socket, docker in list(self._dockers.items()):
            if socket not in found and not self._crew.is_busy(socket):
                docker.close()
                del self._dockers[socket]
        for socket, engine in found.items():
            if socket not in self._dockers:
                self._dockers[socket] = Docker(engine, self._settings.scan, self._proc)
            elif not self._crew.is_busy(socket):
                self._dockers[socket].meet(engine)
        self._remember_dockers(now)
        self._find_containerds({address for address, _ in roll.ids})

    def _remember_dockers(self, now: float) -> None:
        """Each that serves, for good; what never served, such as `dockerd --validate` by hand, for a while."""
        for socket, docker in self._dockers.items():
            engine, known = docker.engine, self._met.get(socket)
            if engine.containerd and not (known and known.until == float("inf") and engine.problem):
                until = now + BRIEFLY if engine.problem else float("inf")
                self._met[socket] = _Met(engine.containerd, until)
        self._met = {socket: met for socket, met in self._met.items() if met.until > now}

    def _find_containerds(self, addresses: Iterable[str]) -> None:
        named = [c.address for c in self._settings.containerd or ()]
        default = [dockerd.SYSTEM_CONTAINERD] if self._settings.containerd is None else []
        engines = [d.engine.containerd for d in self._dockers.values()]
        shims = [address for address in sorted(addresses) if self._may_ask(address)]
        for address in filter(None, (*named, *engines, *default, *shims)):
            if not any(same_socket(address, known) for known in self._servers):
                self._servers[address] = Server(address, self._proc)

    def _may_ask(self, address: str) -> bool:
        """A containerd that is configured, a Docker's own, or, where none is configured, any that a shim names."""
        configured = self._settings.containerd
        return configured is None or any(
            same_socket(address, a)
            for a in (*(c.address for c in configured), *(d.engine.containerd for d in self._dockers.values()))
        )

    def _server_of(self, address: str) -> str:
        """The address under which this containerd is kept; "" if it must not be asked."""
        return next((known for known in self._servers if same_socket(address, known)), "")

    def _dockers_of(self, address: str) -> list[Docker]:
        return [d for d in self._dockers.values() if same_socket(address, self._containerd_of(d))]

    @staticmethod
    def _containerd_of(docker: Docker) -> str:
        """Its containerd: by its connection, else by its own words (Docker 27 on), else by its configuration."""
        if docker.engine.proven or docker.facts is None:
            return docker.engine.containerd
        return docker.facts.containerd or docker.engine.containerd

    # -- routing ------------------------------------------------------------------------------------------------

    def _namespaces(self, sightings: Sequence[Sighting], until: float) -> Mapping[str, frozenset[str]]:
        """containerd's address -> its namespaces, asked only where a sighting doesn't name its engine.

        Also lets each Docker that is new say what its namespaces are.
        """
        jobs: dict[str, Callable[[], Any]] = {s: d.learn for s, d in self._dockers.items() if d.facts is None}
        if any(not _is_named(s) for s in sightings):
            jobs.update({a: self._lister(a) for a in self._servers})
        said = self._crew.run(jobs, min(until, time.monotonic() + self._settings.scan.timeout + SLACK))
        return {a: n for a, n in said.items() if isinstance(n, frozenset)}

    def _lister(self, address: str) -> Callable[[], Optional[frozenset[str]]]:
        from orphand.authorities.containerd_api import Api, CallFailed, GrpcMissing

        server, timeout = self._servers[address], self._settings.scan.timeout

        def namespaces() -> Optional[frozenset[str]]:
            try:
                server.look()  # never connect to a socket that would wake a stopped service
                with Api(address, timeout) as api:
                    return frozenset(api.namespaces())
            except (Absent, CallFailed, GrpcMissing):
                return None

        return namespaces

    def _route(self, address: str, namespace: str, namespaces: Mapping[str, frozenset[str]]) -> Route:
        if not (address and namespace):
            return self._everybody(namespace, namespaces)
        keeper = self._server_of(address)
        dockers = self._dockers_of(address)
        owners = [Question(d.engine.socket, part) for d in dockers if (part := _part(d, namespace))]
        if owners:
            keepers = [Question(keeper, namespace, Role.KEEPER)] if keeper else []
            return Route((*owners, *keepers), self._doubt(address))
        if is_dockers(namespace):
            return self._no_docker(address, dockers)
        if not keeper:
            return Route(
                problem=f"the containerd at {address} is not configured: name it under containerd: in {CONFIG}"
            )
        return Route((Question(keeper, namespace),))

    def _doubt(self, address: str) -> str:
        """Why the Dockers that can be asked may not be all, or not the right ones, of this containerd."""
        strangers = [str(s.process.pid) for s in self._finder.strangers if s.uses(address, self._proc)]
        if strangers:
            return f"a dockerd in a container (pid {', '.join(strangers)}) may use {address} too, and can't be asked"
        for docker in self._dockers.values():
            engine, facts = docker.engine, docker.facts
            if engine.problem and (not engine.containerd or same_socket(address, engine.containerd)):
                return engine.problem
            if engine.doubt and not (facts and facts.containerd) and same_socket(address, engine.containerd):
                return f"{engine.doubt}: name it under docker: in {CONFIG}"
        for socket, met in self._met.items():
            if socket not in self._dockers and same_socket(address, met.containerd):
                wait = "restart orphand if it won't come back" if met.until == float("inf") else "waiting for it"
                return f"the dockerd at {socket} used {address} too, and is gone: {wait}"
        return ""

    def _no_docker(self, address: str, dockers: Sequence[Docker]) -> Route:
        """A namespace of Docker's, and no Docker whose it is. Those of the same containerd may still know it."""
        problems = [d.engine.problem for d in self._dockers.values() if d.engine.problem]
        if dockers:
            used = ", ".join(d.facts.namespace if d.facts else d.engine.namespace for d in dockers)
            problem = f"the dockerd that uses {address} has its containers in namespace {used}"
        elif problems:
            problem = "; ".join(problems)
        elif self._settings.docker == ():
            problem = f"no Docker is configured: name it under docker: in {CONFIG}"
        else:
            problem = f"no dockerd found that uses {address}: start it or name it under docker: in {CONFIG}"
            for stranger in self._finder.strangers:
                problem += f" (process {stranger.process.pid} is one, but not the host's own)"
        return Route(tuple(Question(d.engine.socket, CONTAINERS) for d in dockers), problem)

    def _everybody(self, namespace: str, namespaces: Mapping[str, frozenset[str]]) -> Route:
        """Its engine is not told: every engine must deny it, in its namespace or, where that isn't told, in all."""
        if not self._dockers and not self._servers:
            return Route(problem=f"no engine found: start it or name it under docker: or containerd: in {CONFIG}")
        questions = [
            Question(docker.engine.socket, part)
            for docker in self._dockers.values()
            for part in (CONTAINERS, PLUGINS)
            if namespace in ("", _namespace(docker, part))
        ]
        if is_dockers(namespace) and not questions:
            return Route(problem=f"no dockerd found that uses namespace {namespace}")
        for address in self._servers:
            parts = {n for d in self._dockers_of(address) for n in (_namespace(d, CONTAINERS), _namespace(d, PLUGINS))}
            questions += [
                Question(address, n, Role.KEEPER if n in parts else Role.OWNER)
                for n in sorted(namespaces.get(address, ()))
                if namespace in ("", n)
            ]
        silent = [address for address in self._servers if address not in namespaces]
        doubts = {self._doubt(address) for address in self._servers} - {""}
        if silent:
            doubts.add(f"the namespaces of {', '.join(silent)} are not known")
        return Route(tuple(questions), "; ".join(sorted(doubts)))

    @property
    def _patience(self) -> float:
        """Seconds that everybody together may take."""
        return DEADLINE * self._settings.scan.timeout

    # -- asking -------------------------------------------------------------------------------------------------

    def _ask(
        self, sightings: Sequence[Sighting], routes: Mapping[tuple[str, ...], Route], role: Role, until: float
    ) -> dict[Question, Answers]:
        """The answers of those who are asked in this role."""
        asked: dict[Question, list[Sighting]] = {}
        for sighting in sightings:
            for question in routes[sighting.key].questions:
                if question.role is role:
                    asked.setdefault(question, []).append(sighting)
        jobs = {w: self._job(w, {q: s for q, s in asked.items() if q.witness == w}) for w in {q.witness for q in asked}}
        said: dict[str, dict[Question, Answers]] = self._crew.run(jobs, until)
        for witness in jobs:
            if witness not in said and witness in self._dockers:
                self._dockers[witness].cut()
        return {question: answers for heard in said.values() for question, answers in heard.items()}

    def _job(self, witness: str, asked: Mapping[Question, Sequence[Sighting]]) -> Callable[[], dict[Question, Answers]]:
        docker = self._dockers.get(witness)
        if docker is not None:
            quiet_since = self._quiet_since
            ask = {CONTAINERS: lambda s: docker.ask(s, quiet_since), PLUGINS: docker.ask_plugins}
            return lambda: {q: ask[q.part](sightings) for q, sightings in asked.items()}
        if witness not in self._containerds:
            self._containerds[witness] = self._new_containerd(witness)
        containerd = self._containerds[witness]
        return lambda: {q: containerd.ask(q.part, sightings, q.role) for q, sightings in asked.items()}

    def _gather(
        self, sighting: Sighting, route: Route, answers: Mapping[Question, Answers], asked_at: float
    ) -> tuple[Testimony, ...]:
        said = [self._testimony(q, sighting, answers, asked_at) for q in route.questions]
        if route.problem or not said:
            problem = route.problem or "there is nobody to ask"
            said.append(Testimony("the engine", Claim.UNAVAILABLE, asked_at, problem))
        return tuple(said)

    def _testimony(
        self, question: Question, sighting: Sighting, answers: Mapping[Question, Answers], asked_at: float
    ) -> Testimony:
        answer = answers.get(question, {}).get(sighting.container_id)
        if answer is None:
            docker = self._dockers.get(question.witness)
            name = docker.name if docker else f"containerd {question.witness}"
            why = self._crew.failure(question.witness) or f"no answer within {self._patience:g} s"
            return Testimony(name, Claim.UNAVAILABLE, asked_at, why, role=question.role)
        if question.part == KUBERNETES and answer.claim in DENIALS:
            answer = replace(answer, veto="; ".join(filter(None, (answer.veto, KUBERNETES_VETO))))
        return answer if answer.role is question.role else replace(answer, role=question.role)


def _by_socket(engines: Sequence[Engine]) -> dict[str, Engine]:
    """Each under a name of its own: of a dockerd that can't be asked, the socket may be a mere default."""
    found: dict[str, Engine] = {}
    for engine in sorted(engines, key=lambda e: bool(e.problem)):
        if engine.socket in found and engine.process:
            problem = engine.problem or f"another dockerd has the socket {engine.socket}"
            engine = replace(engine, socket=f"{engine.socket} (pid {engine.process.pid})", problem=problem)
        found.setdefault(engine.socket, engine)
    return found


def is_dockers(namespace: str) -> bool:
    """Is this one of the namespaces that only a dockerd uses: moby, plugins.moby, or those of userns-remap?"""
    return namespace in ("moby", "plugins.moby") or namespace.startswith(("moby-", "plugins.moby-"))


def _is_named(sighting: Sighting) -> bool:
    return bool(sighting.address and sighting.namespace)


def _settled(
    sightings: Sequence[Sighting], routes: Mapping[tuple[str, ...], Route], answers: Mapping[Question, Answers]
) -> Iterator[Sighting]:
    """Those that an owner knows. Not of several that claim one id: which of them it is, every witness must say."""
    claims = Counter(s.container_id for s in sightings)
    for sighting in sightings:
        said = (answers.get(q, {}).get(sighting.container_id) for q in routes[sighting.key].questions)
        if claims[sighting.container_id] == 1 and any(a and a.claim is Claim.KNOWN for a in said):
            yield sighting


def _namespace(docker: Docker, part: str) -> str:
    source = docker.facts or docker.engine
    return source.namespace if part == CONTAINERS else source.plugin_namespace


def _part(docker: Docker, namespace: str) -> str:
    """What of this Docker the namespace holds; "" if nothing."""
    return next((part for part in (CONTAINERS, PLUGINS) if _namespace(docker, part) == namespace), "")


class Crew:
    """Runs one job for each name at a time, in threads that a hanging engine can't stop the daemon with."""

    def __init__(self) -> None:
        self._busy: dict[str, threading.Thread] = {}
        self._failures: dict[str, str] = {}

    def failure(self, name: str) -> str:
        """Why the last job of this name failed; "" if it didn't."""
        return self._failures.get(name, "")

    def is_busy(self, name: str) -> bool:
        """Does an earlier job of this name still run?"""
        thread = self._busy.get(name)
        return thread is not None and thread.is_alive()

    def run(self, jobs: Mapping[str, Callable[[], Any]], until: float) -> dict[str, Any]:
        """The results of those that ended before `until` (monotonic). A name that is busy isn't started again."""
        results: dict[str, Any] = {}
        started = [self._start(name, job, results) for name, job in jobs.items() if not self.is_busy(name)]
        for thread in started:
            thread.join(max(0.0, until - time.monotonic()))
        return dict(results)

    def _start(self, name: str, job: Callable[[], Any], results: dict[str, Any]) -> threading.Thread:
        def work() -> None:
            try:
                results[name] = job()
            except Exception as error:  # noqa: BLE001 one witness that can't be asked must not end the look
                self._failures[name] = f"asking failed: {type(error).__name__}: {error}"

        thread = threading.Thread(target=work, name=f"ask {name}", daemon=True)
        self._busy[name] = thread
        self._failures.pop(name, None)
        thread.start()
        return thread
