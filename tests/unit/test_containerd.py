# SPDX-License-Identifier: Apache-2.0
"""containerd as a witness: only its clear no is a no, whatever else it or something in its place says."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from orphand.authorities import containerd_api, peers
from orphand.authorities.containerd import Containerd, is_identifier
from orphand.authorities.containerd_api import CallFailed
from orphand.authorities.presence import Absent, Server, boottime
from orphand.model import Claim, Init, ProcessId, Role, Sighting, Testimony
from orphand.settings import Scan
from tests.unit.containerd_server import CONTAINER, GET, containerd_server, hang, named, repeated, task

NOW = Scan(settle=0.0, timeout=5.0)
HASTY = Scan(settle=0.0, timeout=0.5)


@pytest.fixture
def address(tmp_path: Path) -> str:
    return str(tmp_path / "c.sock")


def sighting(container_id: str) -> Sighting:
    return Sighting(container_id, "moby", "", None, (), 0.0)


def ask(
    address: str, container_id: str, role: Role = Role.KEEPER, scan: Scan = NOW, namespace: str = "moby"
) -> Testimony:
    answers = Containerd(address, scan).ask(namespace, [sighting(container_id)], role)
    assert set(answers) == {container_id}
    return answers[container_id]


def claims(testimony: Testimony) -> tuple[Claim, int]:
    return testimony.claim, testimony.pid


def test_a_listed_task_is_known_with_its_pid(address: str) -> None:
    with containerd_server(address) as asked:
        said = ask(address, "web")
    assert (claims(said), said.role, said.veto) == ((Claim.KNOWN, 4242), Role.KEEPER, "")
    assert {namespace for _, _, namespace in asked} == {"moby"}


def test_a_stopped_task_is_known_and_says_so(address: str) -> None:
    with containerd_server(address):
        said = ask(address, "done")
    assert (claims(said), said.detail) == ((Claim.KNOWN, 4242), "task is stopped")


def test_a_task_that_a_slow_shim_left_blank_is_known(address: str) -> None:
    with containerd_server(address):
        assert claims(ask(address, "slow")) == (Claim.KNOWN, 0)


def test_a_task_that_the_list_dropped_is_known_by_get(address: str) -> None:
    with containerd_server(address, get=repeated(task("lost", 77))):
        assert claims(ask(address, "lost")) == (Claim.KNOWN, 77)


def test_no_task_and_no_container_is_a_no(address: str) -> None:
    before = boottime()
    with containerd_server(address) as asked:
        said = ask(address, "gone", Role.OWNER)
    assert (said.claim, said.veto) == (Claim.UNKNOWN, "")
    assert said.asked_at >= before
    assert [method for method, _, _ in asked][-2:] == [GET, CONTAINER]


@pytest.mark.parametrize(("role", "claim"), [(Role.KEEPER, Claim.UNKNOWN), (Role.OWNER, Claim.DISOWNED)])
def test_a_record_without_a_task_is_a_veto(address: str, role: Role, claim: Claim) -> None:
    init = Init(ProcessId(4711, 5), "ghost", "/docker/ghost")
    with containerd_server(address, container=named("ghost")):
        answers = Containerd(address, NOW).ask("moby", [replace(sighting("ghost"), inits=(init,))], role)
    assert (answers["ghost"].claim, answers["ghost"].veto) == (claim, "containerd has a record of it")


def test_a_record_of_what_has_neither_task_nor_process_can_be_deleted(address: str) -> None:
    """Left by a dockerd that was killed while it created a container: denied by its owner, it is an engine-orphan."""
    with containerd_server(address, container=named("ghost")):
        said = ask(address, "ghost", Role.KEEPER)
        owners = ask(address, "ghost", Role.OWNER)
    assert (said.claim, said.veto, said.pid) == (Claim.KNOWN, "", 0)
    assert (owners.claim, owners.veto) == (Claim.DISOWNED, "containerd has a record of it")


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ],
)
@pytest.mark.parametrize("call", ["list", "get", "container", "namespaces"])
def test_no_other_code_is_a_no(address: str, call: str, code: grpc.StatusCode) -> None:
    with containerd_server(address, **{call: code}):
        said = ask(address, "gone")
    assert said.claim is Claim.UNAVAILABLE
    assert code.name in said.detail


@pytest.mark.parametrize("call", ["list", "namespaces"])
def test_not_found_of_anything_but_get_is_no_no(address: str, call: str) -> None:
    with containerd_server(address, **{call: grpc.StatusCode.NOT_FOUND}):
        assert ask(address, "gone").claim is Claim.UNAVAILABLE


@pytest.mark.parametrize("call", ["list", "get", "container", "namespaces"])
@pytest.mark.parametrize(
    "garbage", [b"\x0a\xff", b"<html>no</html>", b"\x0a\x02\x08", bytes(200), b"\x0a\x02\x12\x00\x07"]
)
def test_garbage_is_no_no(address: str, call: str, garbage: bytes) -> None:
    with containerd_server(address, **{call: garbage}):
        assert ask(address, "gone").claim is Claim.UNAVAILABLE


@pytest.mark.parametrize("reply", [b"", repeated(task("other")), repeated(task("gone"), task("other"))])
def test_another_tasks_answer_is_no_answer(address: str, reply: bytes) -> None:
    with containerd_server(address, get=reply):
        assert ask(address, "gone").claim is Claim.UNAVAILABLE


def test_another_containers_record_is_no_answer(address: str) -> None:
    with containerd_server(address, container=named("other")):
        assert ask(address, "gone").claim is Claim.UNAVAILABLE


def test_a_namespace_that_is_not_listed_gives_no_no(address: str) -> None:
    with containerd_server(address) as asked:
        said = ask(address, "gone", namespace="mobY")
    assert (said.claim, said.detail) == (Claim.UNAVAILABLE, "it does not list the namespace mobY")
    assert GET not in {method for method, _, _ in asked}


@pytest.mark.parametrize("name", ["-x", "a/b", "a b", "", "a" * 77, "a\n", "ä", "a..b"])
def test_what_can_be_no_id_is_never_sent(address: str, name: str) -> None:
    assert not is_identifier(name)
    with containerd_server(address) as asked:
        assert ask(address, name).claim is Claim.UNAVAILABLE
    assert GET not in {method for method, _, _ in asked}
    with containerd_server(address) as asked:
        assert ask(address, "web", namespace=name).claim is Claim.UNAVAILABLE
    assert not asked


@pytest.mark.parametrize("call", ["list", "get", "container", "namespaces"])
def test_a_silent_one_is_waited_for_a_bounded_time(address: str, call: str) -> None:
    released = threading.Event()
    try:
        with containerd_server(address, **{call: hang(released)}):
            said = ask(address, "gone", scan=HASTY)
            released.set()
    finally:
        released.set()
    assert said.claim is Claim.UNAVAILABLE
    assert "DEADLINE_EXCEEDED" in said.detail or said.detail == "it answers too slowly"  # on a loaded machine


def test_many_absent_ids_do_not_add_up_their_waits(address: str) -> None:
    """After one timeout's time no further id is asked for: the rest is undecided."""
    released = threading.Event()
    with containerd_server(address, get=hang(released)) as asked:
        answers = Containerd(address, HASTY).ask("moby", [sighting(f"id{n}") for n in range(50)], Role.KEEPER)
        released.set()
    assert {a.claim for a in answers.values()} == {Claim.UNAVAILABLE}
    assert [method for method, _, _ in asked].count(GET) < 5


@contextmanager
def raw_server(address: str, reply: bytes) -> Iterator[None]:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    stopping = threading.Event()

    def serve() -> None:
        while not stopping.is_set():
            try:
                client, _ = listening.accept()
            except OSError:
                return
            with client:
                try:
                    client.sendall(reply)
                    client.recv(4096) if reply else stopping.wait(30)
                except OSError:
                    continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 500 no\r\n\r\n", b"\x00" * 4096, b"<html>"])
def test_what_speaks_no_grpc_is_no_no(address: str, reply: bytes) -> None:
    with raw_server(address, reply):
        assert ask(address, "gone", scan=HASTY).claim is Claim.UNAVAILABLE


def test_nobody_is_connected_to_where_nobody_listens(address: str) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(address)
    assert "nobody listens" in ask(address, "gone").detail
    dead.close()
    assert "nobody listens" in ask(address, "gone").detail
    assert "is no socket" in ask(f"{address}x", "gone").detail
    with pytest.raises(Absent):
        Containerd(address, NOW).kill("moby", "gone", 9)


def test_a_young_server_is_not_believed(address: str) -> None:
    with containerd_server(address) as asked:
        said = ask(address, "web", scan=Scan(settle=1e9))
    assert said.claim is Claim.UNAVAILABLE
    assert "it started" in said.detail
    assert not asked


def test_a_server_that_was_replaced_while_it_was_asked_is_not_believed(address: str) -> None:
    """The same process can't restart itself here, so its socket is another one afterwards."""
    kept = []

    def replace_socket() -> bytes:
        Path(address).unlink()
        other = socket.socket(socket.AF_UNIX)
        other.bind(address)
        other.listen()
        kept.append(other)
        return repeated(task("web"))

    with containerd_server(address, list=replace_socket):
        said = ask(address, "web")
    kept[0].close()
    assert (said.claim, said.detail) == (Claim.UNAVAILABLE, "it was restarted while it was asked")


def test_without_grpc_nobody_is_asked(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(containerd_api.importlib, "import_module", missing)
    with raw_server(address, b""):
        said = ask(address, "web")
    assert said.claim is Claim.UNAVAILABLE
    assert "python3-grpcio is not installed" in said.detail
    assert importlib is containerd_api.importlib


def test_an_end_says_what_containerd_refused(address: str) -> None:
    with containerd_server(address), pytest.raises(CallFailed) as failure:
        Containerd(address, NOW).delete_task("moby", "web")
    assert failure.value.code == "UNIMPLEMENTED"


def test_the_server_is_found_once_and_then_remembered(address: str) -> None:
    server = Server(address)
    with containerd_server(address):
        first = server.look()
        assert server.look() == first
    with pytest.raises(Absent):
        server.look()


def test_two_paths_of_one_socket_are_one_server(address: str, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with containerd_server(address):
        assert Server(address).look() == Server(str(link / "c.sock")).look()


@pytest.mark.parametrize("name", ["c%2fd.sock", "c?.sock", "c#.sock", "c d.sock"])
def test_a_path_that_grpc_would_read_otherwise_is_not_asked(tmp_path: Path, name: str) -> None:
    with raw_server(str(tmp_path / name), b""):
        said = ask(str(tmp_path / name), "gone")
    assert (said.claim, "INVALID_ARGUMENT" in said.detail) == (Claim.UNAVAILABLE, True)


def test_a_socket_that_another_process_serves_is_not_believed(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old server that lost its path still holds what it bound there; the kernel says who takes connections."""
    with containerd_server(address):
        monkeypatch.setattr(peers, "listener", lambda path: (4711, 0))
        assert "process 4711 answers there" in ask(address, "gone").detail
        monkeypatch.setattr(peers, "listener", lambda path: (os.getpid(), 1000))
        assert "user 1000" in ask(address, "gone").detail


def test_a_server_that_was_succeeded_on_its_path_is_not_taken_for_its_successor(address: str) -> None:
    """The old one, a process of its own, holds its socket still; ours is bound to the path now."""
    script = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print(); input()"
    with subprocess.Popen(
        ["/usr/bin/python3", "-u", "-c", script, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as old:
        assert old.stdout
        old.stdout.readline()
        server = Server(address)
        assert server.look().process.pid == old.pid
        os.unlink(address)
        with containerd_server(address):
            assert server.look().process.pid == os.getpid()
            known = Containerd(address, NOW)
            known._server = server  # as it was remembered
            assert known.ask("moby", [sighting("web")], Role.KEEPER)["web"].pid == 4242
        old.kill()


def fake_proc(root: Path, address: str, *holders: int) -> Path:
    """A /proc in which these pids hold the listening socket of the address; the start time of each is its pid."""
    (root / "net").mkdir(parents=True)
    header = "Num       RefCount Protocol Flags    Type St Inode Path\n"
    (root / "net" / "unix").write_text(f"{header}0000000000000000: 00000002 00000000 00010000 0001 01 4711 {address}\n")
    for pid in holders:
        (root / str(pid) / "fd").mkdir(parents=True)
        (root / str(pid) / "fd" / "3").symlink_to("socket:[4711]")
        (root / str(pid) / "exe").symlink_to("/usr/bin/containerd")
        (root / str(pid) / "stat").write_text(f"{pid} (containerd) S 1 {' '.join(['0'] * 17)} {pid} 0\n")
    return root


def test_a_socket_that_pid_1_keeps_for_a_stopped_service_is_served_by_nobody(address: str, tmp_path: Path) -> None:
    with raw_server(address, b""), pytest.raises(Absent, match="only PID 1 holds it"):
        Server(address, fake_proc(tmp_path / "proc", address, 1)).look()


def test_a_child_between_fork_and_exec_is_not_the_server(address: str, tmp_path: Path) -> None:
    with raw_server(address, b""):
        assert Server(address, fake_proc(tmp_path / "proc", address, 900, 700, 1)).look().process.pid == 700


def test_a_socket_that_nobody_seems_to_hold_is_served_by_nobody(address: str, tmp_path: Path) -> None:
    with raw_server(address, b""), pytest.raises(Absent, match="no process holds it"):
        Server(address, fake_proc(tmp_path / "proc", address)).look()
