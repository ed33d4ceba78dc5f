# SPDX-License-Identifier: Apache-2.0
"""Docker as a witness: only its own clear no is a no, and everything takes a bounded time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import pytest

from orphand.authorities import docker, docker_api, dockerd
from orphand.authorities.docker import Docker
from orphand.authorities.docker_api import Silence, choose_version
from orphand.model import Claim, Init, ProcessId, Sighting, Testimony
from orphand.settings import Scan
from tests.unit.docker_server import (
    ID,
    OTHER,
    DockerServer,
    docker_server,
    http,
    no_such_container,
    record,
    says,
    sends,
)

HASTY = Scan(settle=0.0, timeout=0.4)  # for servers that never answer
SCAN = Scan(settle=0.0, timeout=60.0)
LONG_AGO = ProcessId(2**30, 1)  # a process that nobody has
MOMENT = 60.0  # seconds in which a test machine gets anything done


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DockerServer]:
    with docker_server(tmp_path) as running:
        yield running


def sighting(container_id: str = ID, namespace: str = "moby", *inits: ProcessId) -> Sighting:
    all_inits = tuple(Init(p, container_id, f"/docker/{container_id}") for p in inits)
    return Sighting(container_id, namespace, "/run/c.sock", None, all_inits, docker.boot_clock())


def ask(server: DockerServer, *sightings: Sighting, scan: Scan = SCAN, **engine: Any) -> dict[str, Testimony]:
    witness = Docker(server.engine(**engine), scan)
    started = time.monotonic()
    try:
        return witness.ask(sightings or [sighting()])
    finally:
        witness.close()
        assert time.monotonic() - started < docker.TOTAL * scan.timeout + MOMENT  # else it would hang for ever


def test_its_own_no_is_a_no(server: DockerServer) -> None:
    server.inspect(no_such_container())
    answer = ask(server)[ID]
    assert (answer.claim, answer.veto) == (Claim.UNKNOWN, "")


def test_it_is_asked_by_full_id_with_the_negotiated_version(server: DockerServer) -> None:
    server.inspect(no_such_container())
    ask(server)
    assert server.asked[0] == "/version"
    assert f"/v1.41/containers/{ID}/json" in server.asked


def test_the_question_is_dated_before_it_is_sent(server: DockerServer) -> None:
    arrived = []

    def answer(connection: socket.socket) -> None:
        arrived.append(docker.boot_clock())
        no_such_container()(connection)

    server.inspect(answer)
    assert ask(server)[ID].asked_at <= arrived[0]


def slowly(data: bytes) -> Any:
    """One byte at a time, each well within a read's timeout, until the other side hangs up."""

    def behaviour(connection: socket.socket) -> None:
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)

    return behaviour


def never(connection: socket.socket) -> None:
    connection.recv(1)


def resets(connection: socket.socket) -> None:
    connection.close()


def endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 404 Not Found\r\nServer: Docker/1\r\nContent-Type: application/json\r\n\r\n")
    while True:
        connection.sendall(b" " * 65536)


NO = {"message": f"No such container: {ID}"}
WHOLE = http("404 Not Found", json.dumps(NO).encode())
HALF = WHOLE[: -len(json.dumps(NO)) // 2]
LONGER = WHOLE.replace(b"Content-Length: ", b"Content-Length: 9")
GZIP = WHOLE.replace(b"Content-Length", b"Content-Encoding: gzip\r\nContent-Length")

NOT_A_NO = {
    "hangs before the answer": never,
    "hangs inside the headers": lambda c: (sends(WHOLE[:20])(c), never(c)),
    "hangs inside the body": lambda c: (sends(HALF)(c), never(c)),
    "half an answer": lambda c: (sends(HALF)(c), c.shutdown(socket.SHUT_RDWR)),
    "half an answer that is valid JSON": lambda c: (sends(LONGER)(c), c.shutdown(socket.SHUT_RDWR)),
    "one byte at a time": slowly(WHOLE + b" " * 10000),
    "one byte of a header at a time": slowly(b"HTTP/1.1 404 Not Found\r\n" + b"A: b\r\n" * 10000),
    "endless headers": lambda c: [c.sendall(b"HTTP/1.1 404 Not Found\r\n" + b"A: b\r\n" * 1000) for _ in iter(int, 1)],
    "an endless body": endless,
    "a reset": resets,
    "garbage": sends(os.urandom(4096)),
    "nothing but zeroes": sends(bytes(4096)),
    "no HTTP": sends(b"No such container: " + ID.encode() + b"\n"),
    "HTML": sends(http("404 Not Found", b"<html>No such container</html>", kind="text/html")),
    "Docker's words in HTML": sends(http("404 Not Found", json.dumps(NO).encode(), kind="text/html")),
    "a proxy's 404": says("404 Not Found", {"message": "not found"}),
    "a proxy that speaks JSON like Docker": no_such_container(server="nginx/1.22"),
    "no Server header": sends(WHOLE.replace(b"Server: Docker/20.10.24 (linux)\r\n", b"")),
    "the router's 404": says("404 Not Found", {"message": "page not found"}),
    "another container's no": no_such_container(OTHER),
    "a no for the short id": no_such_container(ID[:12]),
    "a no with more in it": says("404 Not Found", {**NO, "hint": "x"}),
    "a list": says("404 Not Found", [NO]),
    "JSON that is none": sends(http("404 Not Found", b'{"message": ')),
    "JSON as deep as the stack": sends(http("404 Not Found", b"[" * 100000)),
    "400": says("400 Bad Request", NO),
    "409": says("409 Conflict", NO),
    "500": says("500 Internal Server Error", NO),
    "503": says("503 Service Unavailable", NO),
    "a redirect": sends(b"HTTP/1.1 301 Moved\r\nLocation: /containers/json\r\nContent-Length: 0\r\n\r\n"),
    "a redirect to elsewhere": sends(
        b"HTTP/1.1 302 Moved\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    ),
    "another container's record": record(OTHER),
    "a record without an id": says("200 OK", {"State": {"Running": True}}),
    "a record without a state": says("200 OK", {"Id": ID}),
    "an empty 200": says("200 OK", {}),
    "204": sends(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "compressed": sends(GZIP),
    "too long": sends(http("404 Not Found", b'"' + b" " * (docker.SMALL + 1) + b'"')),
    "a length that lies": lambda c: (sends(WHOLE.replace(b"Length: ", b"Length: 99999999999999999999"))(c), never(c)),
    "broken chunks": sends(b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}"),
}


ENDLESS = frozenset(n for n in NOT_A_NO if n.startswith(("hangs", "one byte", "nothing but", "endless", "a length")))


def patience(name: str) -> Scan:
    return HASTY if name in ENDLESS else SCAN


@pytest.mark.parametrize("name", NOT_A_NO)
def test_whatever_else_it_says_is_not_a_no(server: DockerServer, name: str) -> None:
    server.inspect(NOT_A_NO[name])
    witness = Docker(server.engine(), SCAN)
    assert witness.learn() == ""
    witness._client._timeout = patience(name).timeout
    answer = witness.ask([sighting()])[ID]
    assert answer.claim is Claim.UNAVAILABLE
    assert 0 < len(answer.detail) < 400


@pytest.mark.parametrize("path", ["/version", "/info", docker.LIST])
@pytest.mark.parametrize("name", ["hangs before the answer", "one byte at a time", "garbage", "HTML", "500", "a reset"])
def test_no_step_before_it_may_fail(server: DockerServer, path: str, name: str) -> None:
    server.inspect(no_such_container())
    server.answers[path] = NOT_A_NO[name]
    assert ask(server, scan=patience(name))[ID].claim is Claim.UNAVAILABLE


def test_the_whole_time_is_bounded_however_many_are_asked(server: DockerServer) -> None:
    ids = [f"{n:064x}" for n in range(50)]
    for container_id in ids:
        server.inspect(never, container_id)
    answers = ask(server, *(sighting(i) for i in ids), scan=replace(SCAN, timeout=1.5))
    assert {a.claim for a in answers.values()} == {Claim.UNAVAILABLE}
    assert set(answers) == set(ids)
    assert sum("/containers/0" in path for path in server.asked) == docker.MAX_TIMEOUTS


def test_one_container_with_a_stuck_lock_does_not_silence_the_others(server: DockerServer) -> None:
    server.inspect(never)
    server.inspect(no_such_container(OTHER), OTHER)
    answers = ask(server, sighting(), sighting(OTHER), scan=replace(SCAN, timeout=1.5))
    assert [answers[ID].claim, answers[OTHER].claim] == [Claim.UNAVAILABLE, Claim.UNKNOWN]


def test_a_list_that_hangs_leaves_the_single_yes_but_no_no(server: DockerServer) -> None:
    server.answers[docker.LIST] = never
    server.inspect(record())
    server.inspect(no_such_container(OTHER), OTHER)
    answers = ask(server, sighting(), sighting(OTHER), scan=replace(SCAN, timeout=1.5))
    assert [answers[ID].claim, answers[OTHER].claim] == [Claim.KNOWN, Claim.UNAVAILABLE]


def test_a_list_that_fails_leaves_no_yes_of_an_earlier_one(
    server: DockerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker, "LIST_AGE", 0.0)
    server.answers[docker.LIST] = says("200 OK", [{"Id": ID, "State": "running"}])
    server.inspect(no_such_container())
    witness = Docker(server.engine(), SCAN)
    assert witness.ask([sighting()])[ID].claim is Claim.KNOWN
    server.answers[docker.LIST] = says("500 Internal Server Error", {})
    assert witness.ask([sighting()])[ID].claim is Claim.UNAVAILABLE


def test_nobody_there(tmp_path: Path, server: DockerServer) -> None:
    server.close()
    assert ask(server)[ID].claim is Claim.UNAVAILABLE
    os.unlink(server.path)
    assert ask(server)[ID].claim is Claim.UNAVAILABLE


def test_a_file_that_is_no_socket(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(Silence):
        docker_api.Client(str(path), MOMENT).get("/version", 100, versioned=False)


def test_a_full_backlog_is_not_waited_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "s"))
        deaf.listen(0)
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(str(tmp_path / "s"))
        with pytest.raises(Silence):
            docker_api.Client(str(tmp_path / "s"), 0.3).get("/version", 100, versioned=False)
        for client in waiting:
            client.close()


def test_a_connection_is_not_made_once_the_engine_has_ended(tmp_path: Path) -> None:
    """Where systemd holds the socket, connecting alone starts the engine again."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as held_by_systemd:
        held_by_systemd.bind(path)
        held_by_systemd.listen()
        held_by_systemd.setblocking(False)
        client = docker_api.Client(path, MOMENT, lambda: "dockerd (pid 7) has ended")
        for ask in (lambda: client.get("/info", 100), lambda: next(client.stream("/events"))):
            with pytest.raises(Silence, match="has ended") as told:
                ask()
            assert told.value.fatal
        with pytest.raises(BlockingIOError):
            held_by_systemd.accept()


def test_an_engine_that_ends_between_the_look_and_the_question_is_not_asked(
    server: DockerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    absences = iter(["", "dockerd (pid 7) has ended"])
    monkeypatch.setattr(dockerd, "absence", lambda *_: next(absences, ""))
    answer = ask(server)[ID]
    assert (answer.claim, answer.detail) == (Claim.UNAVAILABLE, "dockerd (pid 7) has ended")
    assert server.asked == []


def test_a_connection_that_fails_is_closed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the garbage is collected: an engine with a full backlog is tried again and again."""
    made: list[socket.socket] = []
    init = docker_api._BoundedSocket.__init__

    def remember(self: socket.socket, *arguments: Any) -> None:
        init(self, *arguments)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(docker_api._BoundedSocket, "__init__", remember)
    with pytest.raises(Silence):
        docker_api.Client(str(tmp_path / "absent"), MOMENT).get("/info", 100)
    assert [connection.fileno() for connection in made] == [-1]


def test_an_id_that_would_be_taken_as_a_name_is_not_sent(server: DockerServer) -> None:
    for odd in ("web", ID[:12], ID.upper(), "../../../etc", ID + "\n", f"{ID}/json?x="):
        assert ask(server, sighting(odd))[odd].claim is Claim.UNAVAILABLE
    assert [path for path in server.asked if "/containers/" in path and not path.endswith(docker.LIST)] == []


# -- a yes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["running", "paused", "restarting", "removing"])
def test_known_by_the_list_without_a_question_of_its_own(server: DockerServer, state: str) -> None:
    server.answers[docker.LIST] = says("200 OK", [{"Id": ID, "State": state}])
    assert ask(server)[ID].claim is Claim.KNOWN
    assert not any(ID in path for path in server.asked)


def test_two_shims_of_one_id_are_told_apart_by_the_pid_on_record(server: DockerServer) -> None:
    server.answers[docker.LIST] = says("200 OK", [{"Id": ID, "State": "running"}])
    server.inspect(record(Pid=4711))
    assert ask(server, sighting(), sighting())[ID].pid == 4711


@pytest.mark.parametrize(
    "state",
    [
        {"Status": "running", "Running": True, "Pid": 1},
        {"Status": "paused", "Running": True, "Paused": True, "Pid": 1},
        {"Status": "restarting", "Running": True, "Restarting": True},
        {"Status": "removing", "Running": False},
        {"Running": True},
    ],
)
def test_a_live_record_is_a_yes(server: DockerServer, state: dict[str, Any]) -> None:
    server.inspect(says("200 OK", {"Id": ID, "State": state}))
    assert ask(server, sighting(ID, "moby", LONG_AGO))[ID].claim is Claim.KNOWN


@pytest.fixture
def old_process() -> Iterator[ProcessId]:
    """A live process, which a clock that is set forward makes old."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = dockerd.process_id(child.pid)
    assert process
    yield process
    child.communicate(b"\n")


STOPPED = {"Running": False, "Pid": 0, "FinishedAt": "2020-01-01T00:00:00.123456789Z"}


def contradict(server: DockerServer, process: ProcessId, later: float, **state: Any) -> Testimony:
    server.inspect(says("200 OK", {"Id": ID, "State": {**STOPPED, **state}}))
    witness = Docker(server.engine(), replace(SCAN, settle=100.0), clock=lambda: docker.boot_clock() + later)
    return witness.ask([sighting(ID, "moby", process)])[ID]


@pytest.mark.parametrize("status", ["exited", "created", "dead"])
def test_disowned(server: DockerServer, old_process: ProcessId, status: str) -> None:
    answer = contradict(server, old_process, 1000.0, Status=status)
    assert answer.claim is Claim.DISOWNED
    assert status in answer.detail
    assert str(old_process.pid) in answer.detail


def test_a_container_that_is_being_started_is_not_disowned(server: DockerServer, old_process: ProcessId) -> None:
    assert contradict(server, old_process, 0.0, Status="created").claim is Claim.KNOWN


def test_a_container_that_exits_meanwhile_is_not_disowned(server: DockerServer) -> None:
    assert contradict(server, LONG_AGO, 1000.0, Status="exited").claim is Claim.KNOWN


def test_a_container_that_has_just_exited_is_not_disowned(server: DockerServer, old_process: ProcessId) -> None:
    now = time.strftime("%Y-%m-%dT%H:%M:%S.000000000Z", time.gmtime())
    assert contradict(server, old_process, 1000.0, Status="exited", FinishedAt=now).claim is Claim.KNOWN


def test_the_pid_on_record_is_not_disowned(server: DockerServer, old_process: ProcessId) -> None:
    assert contradict(server, old_process, 1000.0, Status="exited", Pid=old_process.pid).claim is Claim.KNOWN


# -- which engine -------------------------------------------------------------------------------------------------


def test_a_young_engine_is_not_believed(server: DockerServer) -> None:
    server.inspect(no_such_container())
    started = docker.boot_clock() - 5
    answer = ask(server, scan=replace(SCAN, settle=120.0), started_at=started)[ID]
    assert answer.claim is Claim.UNAVAILABLE
    assert answer.detail.startswith("dockerd (re)started 5 s ago")


def test_a_young_engines_yes_is_believed(server: DockerServer) -> None:
    server.inspect(record())
    assert ask(server, scan=replace(SCAN, settle=120.0), started_at=docker.boot_clock() - 5)[ID].claim is Claim.KNOWN


def test_an_engine_that_started_after_the_sighting_is_not_believed(server: DockerServer) -> None:
    server.inspect(no_such_container())
    before = sighting()
    assert ask(server, before, started_at=docker.boot_clock())[ID].claim is Claim.UNAVAILABLE


def test_an_engine_that_has_ended_is_not_asked(server: DockerServer) -> None:
    server.inspect(no_such_container())
    assert ask(server, process=LONG_AGO)[ID].claim is Claim.UNAVAILABLE
    assert server.asked == []


def test_an_engine_that_is_a_later_process_with_the_same_pid_is_not_asked(server: DockerServer) -> None:
    mine = dockerd.process_id(os.getpid())
    assert mine
    assert ask(server, process=ProcessId(mine.pid, mine.start - 1))[ID].claim is Claim.UNAVAILABLE
    assert server.asked == []


def test_a_process_that_does_not_hold_the_socket_is_not_asked(server: DockerServer, old_process: ProcessId) -> None:
    assert ask(server, process=old_process)[ID].claim is Claim.UNAVAILABLE
    assert server.asked == []


def test_an_engine_that_stops_listening_while_it_is_asked_is_not_believed(server: DockerServer) -> None:
    def answer(connection: socket.socket) -> None:
        server._socket.shutdown(socket.SHUT_RDWR)
        server._socket.close()
        no_such_container()(connection)

    server.inspect(answer)
    assert ask(server)[ID].claim is Claim.UNAVAILABLE


def test_another_process_behind_the_same_path_is_not_believed(server: DockerServer, tmp_path: Path) -> None:
    """The engine still holds the socket that it bound; a proxy has taken its place at the path since."""
    os.unlink(server.path)
    script = """
import socket, sys
server = socket.socket(socket.AF_UNIX); server.bind(sys.argv[1]); server.listen(); print("ready", flush=True)
while True:
    client = server.accept()[0]; client.recv(9999); client.sendall(sys.argv[2].encode()); client.close()
"""
    argv = [sys.executable, "-c", script, server.path, WHOLE.decode()]
    proxy = subprocess.Popen(argv, stdout=subprocess.PIPE)
    try:
        assert proxy.stdout and proxy.stdout.readline() == b"ready\n"
        assert ask(server)[ID].claim is Claim.UNAVAILABLE
        assert server.asked == []
        client = docker_api.Client(server.path, MOMENT)
        client.get("/version", 1000, versioned=False)
        assert client.peer == proxy.pid
    finally:
        proxy.kill()
        proxy.communicate()


def test_whoever_answers_must_be_the_engine(server: DockerServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As before, in the moment between looking who listens and connecting."""
    server.inspect(no_such_container())
    assert ask(server)[ID].claim is Claim.UNKNOWN
    monkeypatch.setattr(docker_api.peers, "peer_of", lambda _: (4711, 0))
    answer = ask(server)[ID]
    assert (answer.claim, answer.detail) == (Claim.UNAVAILABLE, "it was process 4711 that answered")
    monkeypatch.setattr(docker_api.peers, "peer_of", lambda _: (1, 0))
    assert ask(server)[ID].claim is Claim.UNKNOWN


def test_a_problem_is_passed_on_and_nobody_is_asked(server: DockerServer) -> None:
    answer = ask(server, problem=dockerd.stopped(server.path), process=None)[ID]
    assert (answer.claim, answer.detail) == (Claim.UNAVAILABLE, dockerd.stopped(server.path))
    assert server.asked == []


def test_a_new_process_is_asked_anew_about_itself(server: DockerServer) -> None:
    witness = Docker(server.engine(), SCAN)
    assert witness.learn() == ""
    witness.meet(server.engine(process=LONG_AGO))
    assert witness.facts is None


def test_the_no_for_another_namespace_is_none(server: DockerServer) -> None:
    server.inspect(no_such_container())
    info = {"DockerRootDir": "/x", "ServerVersion": "28.5.2", "Containerd": {"Namespaces": {"Containers": "moby-1.1"}}}
    server.answers["/info"] = says("200 OK", info)
    answer = ask(server)[ID]
    assert answer.claim is Claim.UNAVAILABLE
    assert "moby-1.1" in answer.detail


# -- the directory as a veto --------------------------------------------------------------------------------------


def directory(tmp_path: Path) -> Path:
    path = tmp_path / "docker/containers" / ID
    path.mkdir()
    return path


def test_a_directory_with_a_record_vetoes(server: DockerServer, tmp_path: Path) -> None:
    (directory(tmp_path) / "config.v2.json").write_text("{}")
    server.inspect(no_such_container())
    answer = ask(server)[ID]
    assert answer.claim is Claim.UNKNOWN
    assert ID in answer.veto


def test_a_directory_with_anything_else_vetoes(server: DockerServer, tmp_path: Path) -> None:
    (directory(tmp_path) / "hostconfig.json").write_text("{}")
    server.inspect(no_such_container())
    assert ask(server)[ID].veto


def test_a_directory_that_is_a_file_or_a_link_vetoes(server: DockerServer, tmp_path: Path) -> None:
    (tmp_path / "docker/containers" / ID).symlink_to("/nowhere")
    server.inspect(no_such_container())
    assert ask(server)[ID].veto


def test_leftover_mount_points_are_told_and_do_not_veto(server: DockerServer, tmp_path: Path) -> None:
    (directory(tmp_path) / "mounts").mkdir()
    server.inspect(no_such_container())
    answer = ask(server)[ID]
    assert answer.veto == ""
    assert "without a record" in answer.detail


def test_records_that_cannot_be_looked_at_veto(server: DockerServer, tmp_path: Path) -> None:
    (tmp_path / "docker/containers").rmdir()
    server.inspect(no_such_container())
    assert ask(server)[ID].veto


def test_the_configured_data_root_is_looked_at_too(server: DockerServer, tmp_path: Path) -> None:
    (tmp_path / "old/containers" / ID).mkdir(parents=True)
    (tmp_path / "old/containers" / ID / "config.v2.json").write_text("{}")
    server.inspect(no_such_container())
    assert ask(server, data_root=str(tmp_path / "old"))[ID].veto


# -- plugins ------------------------------------------------------------------------------------------------------


def ask_plugins(server: DockerServer, scan: Scan = SCAN) -> Testimony:
    return Docker(server.engine(), scan).ask_plugins([sighting(ID, "plugins.moby")])[ID]


def test_plugins(server: DockerServer) -> None:
    server.answers["/plugins"] = says("200 OK", [{"Id": ID, "Enabled": True}])
    assert ask_plugins(server).claim is Claim.KNOWN
    server.answers["/plugins"] = says("200 OK", [{"Id": OTHER}])
    assert ask_plugins(server).claim is Claim.UNKNOWN
    server.answers["/plugins"] = says("200 OK", [])
    assert ask_plugins(server).claim is Claim.UNKNOWN


@pytest.mark.parametrize(
    "behaviour",
    [
        says("404 Not Found", {"message": "page not found"}),
        says("500 Internal Server Error", []),
        says("200 OK", {}),
        says("200 OK", None),
        says("200 OK", [{"Name": "x"}]),
        says("200 OK", [], server="nginx"),
        never,
    ],
)
def test_a_list_of_plugins_that_is_none(server: DockerServer, behaviour: Any) -> None:
    server.answers["/plugins"] = behaviour
    assert ask_plugins(server, HASTY if behaviour is never else SCAN).claim is Claim.UNAVAILABLE


# -- parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("newest", "oldest", "known", "spoken"),
    [
        pytest.param("1.38", "1.12", "1.41", "1.38", id="18.06"),
        pytest.param("1.41", "1.12", "1.41", "1.41", id="20.10"),
        pytest.param("1.51", "1.24", "1.41", "1.41", id="28"),
        pytest.param("1.52", "1.44", "1.41", "1.44", id="29-takes-nothing-older"),
        pytest.param("1.9", "1.2", "1.41", "1.9", id="numbers-not-strings"),
    ],
)
def test_api_version(newest: str, oldest: Any, known: str, spoken: str) -> None:
    assert choose_version(newest, oldest, known) == spoken


@pytest.mark.parametrize("nonsense", [None, 1.41, "", "latest", "1", "1.2.3", ["1.41"]])
def test_api_version_that_is_none(nonsense: object) -> None:
    with pytest.raises(Silence):
        choose_version(nonsense, "1.12", "1.41")


@pytest.mark.parametrize(
    ("version", "root", "namespaces", "expected"),
    [
        ("20.10.24", "/var/lib/docker", None, ("moby", "plugins.moby")),
        ("25.0.17", "/var/lib/docker/1000.1000", None, ("moby", "plugins.moby")),
        ("26.1.5", "/var/lib/docker/1000.1000", None, ("moby-1000.1000", "plugins.moby-1000.1000")),
        ("28.5.2", "/var/lib/docker", {"Containers": "a", "Plugins": "b"}, ("a", "b")),
    ],
)
def test_namespaces(version: str, root: str, namespaces: Any, expected: tuple[str, str]) -> None:
    info = {"DockerRootDir": root, "ServerVersion": version, "Containerd": {"Namespaces": namespaces}}
    facts = docker.read_info(info, dockerd.Engine("/run/docker.sock"))
    assert (facts.namespace, facts.plugin_namespace) == expected


def test_a_question_that_is_cut_ends_at_once_and_the_next_is_answered(server: DockerServer) -> None:
    asked = threading.Event()

    def hang(connection: socket.socket) -> None:
        asked.set()
        never(connection)

    server.inspect(hang)
    witness = Docker(server.engine(), SCAN)
    answers: list[Testimony] = []
    thread = threading.Thread(target=lambda: answers.append(witness.ask([sighting()])[ID]))
    thread.start()
    assert asked.wait(MOMENT)
    witness.cut()
    thread.join(MOMENT / 2)
    assert [a.claim for a in answers] == [Claim.UNAVAILABLE]
    server.inspect(no_such_container())
    assert witness.ask([sighting()])[ID].claim is Claim.UNKNOWN


def listings(server: DockerServer) -> int:
    return sum("/containers/json" in path for path in server.asked)


def test_a_yes_is_taken_from_the_last_list_while_the_events_are_followed(server: DockerServer) -> None:
    server.answers[docker.LIST] = says("200 OK", [{"Id": ID, "State": "running"}])
    server.inspect(no_such_container(OTHER), OTHER)
    late = [0.0]
    followed_since = docker.boot_clock() - 1.0
    witness = Docker(server.engine(), SCAN, clock=lambda: docker.boot_clock() + late[0])
    try:
        assert witness.ask([sighting()], followed_since)[ID].claim is Claim.KNOWN
        late[0] = 60.0
        said = witness.ask([sighting(), sighting(OTHER)], followed_since)
        assert (said[ID].claim, said[OTHER].claim) == (Claim.KNOWN, Claim.UNKNOWN)
        assert listings(server) == 1
        late[0] = docker.FOLLOWED_AGE + 1.0
        witness.ask([sighting()], followed_since)
        assert listings(server) == 2
    finally:
        witness.close()


def test_what_the_last_list_still_tells(server: DockerServer) -> None:
    entries = [{"Id": ID, "State": "running"}, {"Id": OTHER, "State": "exited"}]
    server.answers[docker.LIST] = says("200 OK", entries)
    late = [0.0]
    since = docker.boot_clock() - 1.0
    witness = Docker(server.engine(), SCAN, clock=lambda: docker.boot_clock() + late[0])
    try:
        assert not witness.knows_still([ID], since), "there is no list yet"
        witness.ask([sighting()], since)
        late[0] = 60.0
        assert witness.knows_still([ID], since)
        assert witness.knows_still([], since)
        assert not witness.knows_still([ID, ID], since), "several claim it"
        assert not witness.knows_still([ID, OTHER], since)
        assert not witness.knows_still([ID], docker.boot_clock() + 30.0), "its events were lost since"
        late[0] = docker.FOLLOWED_AGE + 1.0
        assert not witness.knows_still([ID], since)
        late[0] = 60.0
        engine = server.engine()
        assert engine.process
        witness.engine = replace(engine, process=replace(engine.process, start=1))
        assert not witness.knows_still([ID], since), "its process has ended"
        witness.engine = replace(engine, socket="/run/nobody.sock")
        assert not witness.knows_still([ID], since), "nobody listens any more"
        witness.engine = replace(engine, problem="it listens no more")
        assert not witness.knows_still([ID], since)
    finally:
        witness.close()


@pytest.mark.parametrize("later", [None, 10.0])
def test_a_list_from_before_the_events_were_followed_is_made_anew(server: DockerServer, later: Optional[float]) -> None:
    """`later`: seconds after the first list at which its events began to be followed; None: they aren't."""
    server.answers[docker.LIST] = says("200 OK", [{"Id": ID, "State": "running"}])
    server.inspect(no_such_container())
    late = [0.0]
    witness = Docker(server.engine(), SCAN, clock=lambda: docker.boot_clock() + late[0])
    try:
        assert witness.ask([sighting()])[ID].claim is Claim.KNOWN
        server.answers[docker.LIST] = says("200 OK", [])
        late[0] = 60.0
        quiet_since = None if later is None else docker.boot_clock() + later
        assert witness.ask([sighting()], quiet_since)[ID].claim is Claim.UNKNOWN
    finally:
        witness.close()
