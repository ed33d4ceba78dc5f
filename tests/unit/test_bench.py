# SPDX-License-Identifier: Apache-2.0
"""The bench: who must be heard for which container, and that one who hangs delays nobody else's answer."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Optional

import pytest

from orphand.authorities import bench, docker, dockerd
from orphand.authorities.bench import Bench, Crew, EngineState, Roll
from orphand.authorities.docker import boot_clock
from orphand.authorities.dockerd import Engine, Stranger
from orphand.authorities.presence import Absent, Server
from orphand.model import Claim, Generation, Init, ProcessId, Role, Shim, Sighting, Testimony
from orphand.settings import ContainerdEngine, DockerEngine, Scan, Settings
from tests.unit.docker_server import ID, OTHER, DockerServer, docker_server, no_such_container, says

MOMENT = 60.0
SETTINGS = Settings(scan=Scan(settle=0.0, timeout=20.0))


class FakeContainerd:
    """A containerd that says what the test wants. The real one is in tests/engine."""

    asked: ClassVar[list[tuple[str, str, tuple[str, ...], Role]]] = []
    claim = Claim.UNKNOWN
    hang: Optional[threading.Event] = None

    def __init__(self, address: str, scan: Scan) -> None:
        self.address = address

    def ask(self, namespace: str, sightings: Sequence[Sighting], role: Role) -> dict[str, Testimony]:
        ids = tuple(s.container_id for s in sightings)
        self.asked.append((self.address, namespace, ids, role))
        if self.hang:
            self.hang.wait(MOMENT)
        return {i: Testimony(f"containerd {self.address}", self.claim, boot_clock(), role=role) for i in ids}


class UnseenServer:
    """Leaves out the search of all processes for who serves containerd, which is slow, where a test isn't about it."""

    def __init__(self, *_: Any) -> None: ...

    def look(self) -> None:
        raise Absent("not looked for")


class FoundEngines:
    """Stands for the search: the test's engines are this process, which isn't called dockerd."""

    strangers: tuple[Stranger, ...] = ()

    def __init__(self, *engines: Engine) -> None:
        self.engines = list(engines)
        self.thorough: list[bool] = []
        self.shims: Container[int] = ()

    def look(self, thorough: bool = True, shims: Container[int] = ()) -> list[Engine]:
        self.thorough.append(thorough)
        self.shims = shims
        return self.engines


@pytest.fixture(autouse=True)
def fake_containerd(monkeypatch: pytest.MonkeyPatch) -> type[FakeContainerd]:
    monkeypatch.setattr(FakeContainerd, "asked", [])
    monkeypatch.setattr("orphand.authorities.containerd.Containerd", FakeContainerd)
    monkeypatch.setattr(bench, "Server", UnseenServer)
    return FakeContainerd


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DockerServer]:
    with docker_server(tmp_path) as running:
        running.inspect(no_such_container())
        yield running


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    with listening(tmp_path / "containerd.sock") as path:
        yield path


@contextlib.contextmanager
def listening(path: Path) -> Iterator[str]:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        yield str(path)


def make(settings: Settings, *engines: Engine) -> Bench:
    made = Bench(settings)
    made._finder = FoundEngines(*engines)  # type: ignore[assignment]
    return made


def sighting(address: str, namespace: str = "moby", container_id: str = ID, foreign: str = "") -> Sighting:
    return Sighting(container_id, namespace, address, None, (), boot_clock(), foreign=foreign)


def heard(made: Bench, *sightings: Sighting) -> list[tuple[Testimony, ...]]:
    answers = made.hear(sightings)
    return [answers[s.key] for s in sightings]


def still(made: Bench, since: float, *sightings: Sighting) -> bool:
    return made.knows_still(Roll.of(sightings), since)


def summary(testimonies: Sequence[Testimony]) -> list[tuple[str, str]]:
    return [(t.role.value, t.claim.value) for t in testimonies]


def test_moby_is_asked_at_its_docker_and_at_its_containerd(server: DockerServer, address: str) -> None:
    made = make(SETTINGS, server.engine(containerd=address))
    (said,) = heard(made, sighting(address))
    assert summary(said) == [("owner", "unknown"), ("keeper", "unknown")]
    assert FakeContainerd.asked == [(address, "moby", (ID,), Role.KEEPER)]


def test_only_what_a_docker_listed_is_known_still(server: DockerServer, address: str, tmp_path: Path) -> None:
    server.answers[docker.LIST] = says("200 OK", [{"Id": ID, "State": "running"}])
    made = make(SETTINGS, server.engine(containerd=address))
    since = boot_clock() - 1.0
    known, foreign = sighting(address), sighting(address, "k8s.io", OTHER, foreign="another's")
    assert not still(made, since, known), "nobody was asked yet"
    heard(made, known)
    assert still(made, since, known, foreign)
    assert still(made, since)
    for other in (
        sighting(address, container_id=OTHER),
        sighting(address, "k8s.io"),
        sighting(address, "plugins.moby"),
        sighting(str(tmp_path / "second.sock")),
        sighting("", ""),
    ):
        assert not still(made, since, known, other)
    assert still(made, since, known)
    second = server.engine(containerd=address)
    made._finder.engines.append(replace(second, socket=str(tmp_path / "2.sock")))  # type: ignore[attr-defined]
    assert not still(made, since, known), "another engine has come"
    assert still(made, since, known)
    made._finder.engines.clear()  # type: ignore[attr-defined]
    assert not still(made, since, known), "it is gone"
    made._finder.engines.append(second)  # type: ignore[attr-defined]
    heard(made, known)
    assert still(made, since, known)
    made.reconfigure(SETTINGS)
    assert not still(made, since, known), "another configuration waits"


def test_shims_are_not_looked_at_as_engines(server: DockerServer, address: str) -> None:
    shim = Shim(ProcessId(4000000, 1), Generation.RUNC_V2, "/x", "moby", ID, address, "", 1)
    made = make(SETTINGS, server.engine(containerd=address))
    heard(made, replace(sighting(address), shim=shim), sighting(address, container_id=OTHER))
    assert made._finder.shims == {4000000}  # type: ignore[attr-defined]


def test_the_address_is_compared_as_a_socket(server: DockerServer, address: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    made = make(SETTINGS, server.engine(containerd=address))
    (said,) = heard(made, sighting(str(tmp_path / "link/containerd.sock")))
    assert summary(said) == [("owner", "unknown"), ("keeper", "unknown")]


def test_another_dockers_containers_are_not_asked_for_at_this_one(
    server: DockerServer, address: str, tmp_path: Path
) -> None:
    with listening(tmp_path / "second.sock") as second:
        made = make(SETTINGS, server.engine(containerd=address))
        (said,) = heard(made, sighting(second))
    assert [t.claim for t in said] == [Claim.UNAVAILABLE]
    assert (
        said[0].detail == f"no dockerd found that uses {second}: start it or name it under docker: in /etc/orphand.yaml"
    )
    assert not any(ID in path for path in server.asked)


def test_of_two_dockers_that_share_a_containerd_both_are_asked(
    server: DockerServer, address: str, tmp_path: Path
) -> None:
    (tmp_path / "second").mkdir()
    with docker_server(tmp_path / "second") as second:
        second.answers[docker.LIST] = says("200 OK", [{"Id": ID, "State": "running"}])
        made = make(SETTINGS, server.engine(containerd=address), second.engine(containerd=address))
        (said,) = heard(made, sighting(address))
    assert summary(said) == [("owner", "unknown"), ("owner", "known")]


def test_a_containerd_that_is_only_guessed_makes_no_no(server: DockerServer, address: str) -> None:
    (said,) = heard(
        make(SETTINGS, server.engine(containerd=address, doubt="it can't be seen which containerd dockerd uses")),
        sighting(address),
    )
    assert said[-1].claim is Claim.UNAVAILABLE
    assert "which containerd" in said[-1].detail


def test_a_guessed_containerd_is_confirmed_by_dockers_own_words(server: DockerServer, address: str) -> None:
    info = {"DockerRootDir": "/x", "ServerVersion": "28", "Containerd": {"Address": address}}
    server.answers["/info"] = says("200 OK", info)
    (said,) = heard(
        make(SETTINGS, server.engine(containerd="", doubt="it can't be seen which containerd dockerd uses")),
        sighting(address),
    )
    assert summary(said) == [("owner", "unknown"), ("keeper", "unknown")]


def test_a_docker_that_is_down_may_own_what_another_one_denies(server: DockerServer, address: str) -> None:
    """Two on one containerd: while one is stopped for an upgrade, its containers run on."""
    down = Engine("/run/second.sock", problem="nobody listens on /run/second.sock")
    for containerd, claim in (
        ("", Claim.UNAVAILABLE),
        (address, Claim.UNAVAILABLE),
        ("/run/other.sock", Claim.UNKNOWN),
    ):
        made = make(SETTINGS, server.engine(containerd=address), replace(down, containerd=containerd))
        (said,) = heard(made, sighting(address))
        assert said[-1].claim is claim


def test_a_docker_whose_socket_is_not_known_hides_no_other(server: DockerServer, address: str) -> None:
    odd = Engine(server.path, ProcessId(4711, 1), address, problem="dockerd (pid 4711) does not listen on it")
    for engines in ((odd, server.engine(containerd=address)), (server.engine(containerd=address), odd)):
        made = make(SETTINGS, *engines)
        (said,) = heard(made, sighting(address))
        assert [t.claim for t in said if t.authority == f"docker at {server.path}"] == [Claim.UNKNOWN]
        assert "pid 4711" in said[-1].detail
        assert said[-1].claim is Claim.UNAVAILABLE


def test_a_docker_that_has_gone_may_own_what_another_one_denies(
    server: DockerServer, address: str, tmp_path: Path
) -> None:
    (tmp_path / "second").mkdir()
    with docker_server(tmp_path / "second") as second:
        second.inspect(no_such_container())
        made = make(SETTINGS, server.engine(containerd=address), second.engine(containerd=address))
        (said,) = heard(made, sighting(address))
        assert {t.claim for t in said} == {Claim.UNKNOWN}
        gone = made._finder.engines.pop()  # type: ignore[attr-defined]
        (said,) = heard(made, sighting(address))
        assert said[-1].claim is Claim.UNAVAILABLE
        assert second.path in said[-1].detail
        made._finder.engines.append(gone)  # type: ignore[attr-defined]
        (said,) = heard(made, sighting(address))
        assert {t.claim for t in said} == {Claim.UNKNOWN}


@pytest.mark.parametrize("problem", ["dockerd (pid 4711) does not listen on /run/docker.sock", ""])
def test_a_dockerd_that_never_served_is_not_waited_for_for_ever(
    server: DockerServer, address: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as `dockerd --version` by hand in the moment of a look, or one whose socket another one has."""
    odd = Engine(server.path, ProcessId(4711, 1), address, problem=problem)
    made = make(SETTINGS, server.engine(containerd=address), odd)
    assert heard(made, sighting(address))[0][-1].claim is Claim.UNAVAILABLE
    made._finder.engines.pop()  # type: ignore[attr-defined]
    said = heard(made, sighting(address))[0][-1]
    assert (said.claim, said.detail.endswith("and is gone: waiting for it")) == (Claim.UNAVAILABLE, True)
    clock = time.monotonic
    monkeypatch.setattr(bench.time, "monotonic", lambda: clock() + bench.BRIEFLY)
    assert {t.claim for t in heard(made, sighting(address))[0]} == {Claim.UNKNOWN}


def test_a_docker_that_served_is_waited_for_although_it_failed_before_it_went(
    server: DockerServer, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "BRIEFLY", 0.0)
    second = Engine(str(tmp_path / "2.sock"), ProcessId(4711, 1), address)
    made = make(SETTINGS, server.engine(containerd=address), second)
    heard(made, sighting(address))
    made._finder.engines[1] = replace(second, problem="it does not listen")  # type: ignore[attr-defined]
    heard(made, sighting(address))
    made._finder.engines.pop()  # type: ignore[attr-defined]
    said = heard(made, sighting(address))[0][-1]
    assert said.detail.endswith("and is gone: restart orphand if it won't come back")


def test_a_dockerd_that_is_not_the_hosts_own_is_named(address: str) -> None:
    made = make(SETTINGS)
    made._finder.strangers = (Stranger(ProcessId(4711, 1), ()),)  # type: ignore[misc]
    (said,) = heard(made, sighting(address))
    assert "process 4711 is one, but not the host's own" in said[0].detail


def test_a_dockerd_in_a_container_that_has_the_hosts_containerd(server: DockerServer, address: str) -> None:
    made = make(SETTINGS, server.engine(containerd=address))
    me = dockerd.process_id(os.getpid())
    assert me
    made._finder.strangers = (Stranger(me, (address,)),)  # type: ignore[misc]
    (said,) = heard(made, sighting(address))
    assert said[-1].claim is Claim.UNAVAILABLE
    assert "in a container" in said[-1].detail
    made._finder.strangers = (Stranger(me, ("/run/none.sock",)),)  # type: ignore[misc]
    (said,) = heard(made, sighting(address))
    assert summary(said) == [("owner", "unknown"), ("keeper", "unknown")]


def test_while_something_looks_orphaned_all_of_proc_is_searched(
    server: DockerServer, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "THOROUGH_INTERVAL", 0.0)
    made = make(SETTINGS, server.engine(containerd=address))
    heard(made)
    heard(made)
    heard(made, sighting(address))
    heard(made, sighting(address))
    assert made._finder.thorough == [True, False, False, True]  # type: ignore[attr-defined]


def test_plugins(server: DockerServer, address: str) -> None:
    server.answers["/plugins"] = says("200 OK", [{"Id": ID}])
    made = make(SETTINGS, server.engine(containerd=address))
    (said,) = heard(made, sighting(address, "plugins.moby"))
    assert summary(said) == [("owner", "known")]
    (said,) = heard(made, sighting(address, "plugins.moby", OTHER))
    assert summary(said) == [("owner", "unknown"), ("keeper", "unknown")]
    assert FakeContainerd.asked == [(address, "plugins.moby", (OTHER,), Role.KEEPER)]


def test_the_keeper_of_a_known_container_is_asked_only_on_demand(server: DockerServer, address: str) -> None:
    server.answers[docker.LIST] = says("200 OK", [{"Id": ID, "State": "running"}])
    made = make(SETTINGS, server.engine(containerd=address))
    (said,) = heard(made, sighting(address))
    assert summary(said) == [("owner", "known")]
    assert FakeContainerd.asked == []
    (said,) = made.hear([sighting(address)], everybody=True).values()
    assert summary(said) == [("owner", "known"), ("keeper", "unknown")]


def test_of_two_that_claim_one_id_the_keeper_is_asked_too(server: DockerServer, address: str) -> None:
    record = {"Id": ID, "State": {"Status": "running", "Running": True, "Pid": 7}}
    server.answers[docker.LIST] = says("200 OK", [{"Id": ID, "State": "running"}])
    server.inspect(says("200 OK", record))
    twins = [replace(sighting(address), inits=(Init(ProcessId(pid, 1), ID, ""),)) for pid in (7, 8)]
    for said in heard(make(SETTINGS, server.engine(containerd=address)), *twins):
        assert summary(said) == [("owner", "known"), ("keeper", "unknown")]


def test_a_dockers_own_name_for_its_namespace(server: DockerServer, address: str) -> None:
    made = make(SETTINGS, server.engine(containerd=address, namespace="mine"))
    (said,) = heard(made, sighting(address, "mine"))
    assert summary(said) == [("owner", "unknown"), ("keeper", "unknown")]
    (said,) = heard(made, sighting(address, "moby"))
    assert [t.claim for t in said] == [Claim.UNAVAILABLE, Claim.UNAVAILABLE]
    assert "in namespace mine" in said[-1].detail


def test_a_docker_that_has_it_under_another_namespace_still_saves_it(server: DockerServer, address: str) -> None:
    server.answers[docker.LIST] = says("200 OK", [{"Id": ID, "State": "running"}])
    made = make(SETTINGS, server.engine(containerd=address, namespace="mine"))
    (said,) = heard(made, sighting(address, "moby"))
    assert Claim.KNOWN in {t.claim for t in said}


def test_kubernetes_is_asked_at_containerd_and_vetoed(address: str) -> None:
    (said,) = heard(make(SETTINGS), sighting(address, "k8s.io"))
    assert summary(said) == [("owner", "unknown")]
    assert "kubelet" in said[0].veto


def test_kubernetes_known(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeContainerd, "claim", Claim.KNOWN)
    (said,) = heard(make(SETTINGS), sighting(address, "k8s.io"))
    assert (said[0].claim, said[0].veto) == (Claim.KNOWN, "")


def test_any_other_namespace_is_containerds_own(server: DockerServer, address: str) -> None:
    made = make(SETTINGS, server.engine(containerd=address))
    (said,) = heard(made, sighting(address, "default"))
    assert summary(said) == [("owner", "unknown")]
    assert said[0].veto == ""
    assert not any(ID in path for path in server.asked)


@pytest.mark.parametrize("namespace", ["moby", "plugins.moby", "moby-1000.1000", "plugins.moby-1000.1000"])
def test_a_dockers_namespace_is_never_judged_without_a_docker(address: str, namespace: str) -> None:
    (said,) = heard(make(SETTINGS), sighting(address, namespace))
    assert [t.claim for t in said] == [Claim.UNAVAILABLE]
    assert FakeContainerd.asked == []


def test_a_stopped_docker_is_named(address: str) -> None:
    problem = dockerd.stopped("/run/docker.sock")
    (said,) = heard(make(SETTINGS, Engine("/run/docker.sock", problem=problem)), sighting(address))
    assert (said[0].claim, said[0].detail) == (Claim.UNAVAILABLE, problem)


def test_no_docker_here_by_configuration(address: str) -> None:
    (said,) = heard(make(replace(SETTINGS, docker=())), sighting(address))
    assert said[0].claim is Claim.UNAVAILABLE
    assert "name it under docker:" in said[0].detail


def test_a_containerd_that_is_not_configured_is_not_asked(address: str) -> None:
    settings = replace(SETTINGS, containerd=(ContainerdEngine("/other.sock"),))
    (said,) = heard(make(settings), sighting(address, "default"))
    assert said[0].claim is Claim.UNAVAILABLE
    assert "name it under containerd:" in said[0].detail
    assert FakeContainerd.asked == []


def test_a_configured_dockers_containerd_need_not_be_configured_too(server: DockerServer, address: str) -> None:
    settings = replace(SETTINGS, docker=(DockerEngine(server.path),), containerd=())
    (said,) = heard(make(settings, server.engine(containerd=address)), sighting(address))
    assert summary(said) == [("owner", "unknown"), ("keeper", "unknown")]


def test_what_is_foreign_is_not_asked_for(address: str) -> None:
    made = make(SETTINGS)
    assert heard(made, sighting(address, foreign="nested")) == [()]
    assert FakeContainerd.asked == []


def test_a_namespace_that_moved_with_a_new_docker(server: DockerServer, address: str) -> None:
    """The engine's own words count for more than its options."""
    info = {"DockerRootDir": "/x", "ServerVersion": "28", "Containerd": {"Namespaces": {"Containers": "moby-1.1"}}}
    server.answers["/info"] = says("200 OK", info)
    (said,) = heard(make(SETTINGS, server.engine(containerd=address)), sighting(address, "moby-1.1"))
    assert summary(said)[0] == ("owner", "unknown")


# -- shimless: nothing tells whose it is --------------------------------------------------------------------------


@pytest.fixture
def namespaces(monkeypatch: pytest.MonkeyPatch) -> dict[str, Optional[frozenset[str]]]:
    """What each containerd says its namespaces are."""
    said: dict[str, Optional[frozenset[str]]] = {}
    monkeypatch.setattr(Bench, "_lister", lambda self, address: lambda: said.get(address))
    return said


def test_everybody_must_deny_it(
    server: DockerServer, address: str, namespaces: dict[str, Optional[frozenset[str]]], tmp_path: Path
) -> None:
    server.answers["/plugins"] = says("200 OK", [])
    settings = replace(SETTINGS, containerd=(ContainerdEngine(address),))
    namespaces[address] = frozenset({"moby", "default", "k8s.io"})
    (said,) = heard(make(settings, server.engine(containerd=address)), sighting("", ""))
    assert [t.claim for t in said] == [Claim.UNKNOWN] * 5
    asked = {(namespace, role) for _, namespace, _, role in FakeContainerd.asked}
    assert asked == {("moby", Role.KEEPER), ("default", Role.OWNER), ("k8s.io", Role.OWNER)}
    assert [t.veto for t in said if "kubelet" in t.veto]


def test_one_whose_namespaces_are_not_known_makes_it_undecided(
    server: DockerServer, address: str, namespaces: dict[str, Optional[frozenset[str]]]
) -> None:
    settings = replace(SETTINGS, containerd=(ContainerdEngine(address),))
    (said,) = heard(make(settings, server.engine(containerd=address)), sighting("", ""))
    assert said[-1].claim is Claim.UNAVAILABLE
    assert address in said[-1].detail


def test_no_engine_at_all_makes_it_undecided() -> None:
    (said,) = heard(make(replace(SETTINGS, docker=(), containerd=())), sighting("", ""))
    assert [t.claim for t in said] == [Claim.UNAVAILABLE]


def test_a_stopped_engine_makes_it_undecided(address: str, namespaces: dict[str, Optional[frozenset[str]]]) -> None:
    namespaces[address] = frozenset()
    settings = replace(SETTINGS, containerd=(ContainerdEngine(address),))
    made = make(settings, Engine("/run/docker.sock", problem=dockerd.stopped("/run/docker.sock")))
    (said,) = heard(made, sighting("", ""))
    assert {t.claim for t in said} == {Claim.UNAVAILABLE}


# -- one deadline for all -----------------------------------------------------------------------------------------


def test_one_who_hangs_delays_nobody(server: DockerServer, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hang = threading.Event()
    monkeypatch.setattr(FakeContainerd, "hang", hang)
    settings = replace(SETTINGS, scan=Scan(settle=0.0, timeout=1.5))
    made = make(settings, server.engine(containerd=address))
    for _ in range(3):
        started = time.monotonic()
        (said,) = heard(made, sighting(address))
        assert time.monotonic() - started < MOMENT / 2
        assert summary(said) == [("owner", "unknown"), ("keeper", "unavailable")]
    assert len(FakeContainerd.asked) == 1  # a stuck thread isn't started twice
    hang.set()
    monkeypatch.setattr(FakeContainerd, "hang", None)
    wait_until(lambda: not made._crew.is_busy(address))
    (said,) = heard(made, sighting(address))
    assert summary(said) == [("owner", "unknown"), ("keeper", "unknown")]


def test_a_docker_that_hangs_is_cut_and_asked_again(server: DockerServer, address: str) -> None:
    server.answers["/version"] = lambda connection: connection.recv(1)
    settings = replace(SETTINGS, scan=Scan(settle=0.0, timeout=1.5))
    made = make(settings, server.engine(containerd=address))
    (said,) = heard(made, sighting(address))
    assert said[0].claim is Claim.UNAVAILABLE
    server.answers["/version"] = says("200 OK", {"ApiVersion": "1.41", "MinAPIVersion": "1.12"})
    wait_until(lambda: not made._crew.is_busy(server.path))
    (said,) = heard(made, sighting(address))
    assert said[0].claim is Claim.UNKNOWN


def test_two_threads_may_ask(server: DockerServer, address: str) -> None:
    made = make(SETTINGS, server.engine(containerd=address))
    said: list[Any] = []
    threads = [threading.Thread(target=lambda: said.append(heard(made, sighting(address)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(MOMENT)
    assert [summary(answers) for (answers,) in said] == [[("owner", "unknown"), ("keeper", "unknown")]] * 4


def test_a_job_that_fails_has_no_result_but_a_reason() -> None:
    crew = Crew()
    assert crew.run({"good": lambda: 1, "bad": lambda: 1 // 0}, time.monotonic() + MOMENT) == {"good": 1}
    assert crew.failure("bad").startswith("asking failed: ZeroDivisionError")
    assert crew.failure("good") == ""
    assert crew.run({"bad": lambda: 2}, time.monotonic() + MOMENT) == {"bad": 2}
    assert crew.failure("bad") == ""


def test_a_witness_that_fails_is_no_answer(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any) -> dict[str, Testimony]:
        raise MemoryError("no more")

    monkeypatch.setattr(FakeContainerd, "ask", ask)
    (said,) = heard(make(SETTINGS), sighting(address, "default"))
    assert (said[0].claim, said[0].detail) == (Claim.UNAVAILABLE, "asking failed: MemoryError: no more")


def test_late_results_are_dropped() -> None:
    gate, crew = threading.Event(), Crew()
    assert crew.run({"late": lambda: gate.wait(MOMENT)}, time.monotonic()) == {}
    assert crew.run({"late": lambda: "second"}, time.monotonic() + MOMENT) == {}
    gate.set()
    wait_until(lambda: not crew.is_busy("late"))
    assert crew.run({"late": lambda: "third"}, time.monotonic() + MOMENT) == {"late": "third"}


def wait_until(condition: Any) -> None:
    until = time.monotonic() + MOMENT
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


# -- what it tells ------------------------------------------------------------------------------------------------


def test_engines_ids_and_data_roots(
    server: DockerServer, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "Server", Server)
    server.answers[docker.LIST] = says("200 OK", [{"Id": OTHER, "State": "running"}])
    made = make(replace(SETTINGS, containerd=()), server.engine(containerd=address))
    heard(made, sighting(address, container_id=OTHER))
    me = dockerd.process_id(os.getpid())
    assert made.engines() == [EngineState("dockerd", server.path, me), EngineState("containerd", address, me)]
    assert made.data_roots() == (str(tmp_path / "docker"),)


def test_a_containerd_that_nobody_serves_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Server", Server)
    settings = replace(SETTINGS, containerd=(ContainerdEngine(str(tmp_path / "none")),))
    made = make(settings)
    heard(made)
    (state,) = made.engines()
    assert (state.process, bool(state.problem)) == (None, True)


def test_a_new_configuration(server: DockerServer, address: str) -> None:
    made = make(SETTINGS, server.engine(containerd=address))
    heard(made, sighting(address))
    made.reconfigure(replace(SETTINGS, docker=(), containerd=()))
    (said,) = heard(made, sighting(address))
    assert [t.claim for t in said] == [Claim.UNAVAILABLE]
    made.close()


def test_the_hand_is_not_the_object_that_is_asked(address: str) -> None:
    made = make(SETTINGS)
    heard(made, sighting(address, "default"))
    hand = made.containerd(address)
    assert hand is made.containerd(address)
    assert hand is not made._containerds[address]


def test_a_process_that_is_no_longer_the_engine_is_not_believed(server: DockerServer, address: str) -> None:
    (said,) = heard(make(SETTINGS, server.engine(containerd=address, process=ProcessId(2**30, 1))), sighting(address))
    assert said[0].claim is Claim.UNAVAILABLE


def test_names() -> None:
    assert bench.is_dockers("moby")
    assert not bench.is_dockers("mobydick")
    assert not bench.is_dockers("default")
