# SPDX-License-Identifier: Apache-2.0
"""Finding dockerd: real processes that are called so, real sockets, and nobody is connected to."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from orphand.authorities import dockerd, listeners, peers
from orphand.authorities.dockerd import Engine, Finder, same_socket
from orphand.model import ProcessId
from orphand.settings import DockerEngine

# a stand-in for dockerd: listens on argv[1], is connected to argv[2] if that isn't "-"; "fork": has a child like it
STAND_IN = """
import os, socket, sys
listening = socket.socket(socket.AF_UNIX); listening.bind(sys.argv[1]); listening.listen()
if sys.argv[2] != "-":
    client = socket.socket(socket.AF_UNIX); client.connect(sys.argv[2]); client.recv(1)
if "fork" in sys.argv[3:] and not (child := os.fork()):
    os.read(0, 1)
    os._exit(0)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An executable that is called dockerd: /proc/PID/exe and comm say so."""
    path = tmp_path_factory.mktemp("bin") / "dockerd"
    shutil.copy(os.path.realpath(sys.executable), path)
    return path


@contextlib.contextmanager
def running(program: Path, listen: Path, connect: str = "-", options: Sequence[str] = ()) -> Iterator[ProcessId]:
    argv = [str(program), "-c", STAND_IN, str(listen), connect, *options]
    environment = {**os.environ, "PYTHONHOME": sys.base_prefix}
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    try:
        assert child.stdout and child.stdout.readline() == b"ready\n"
        process = dockerd.process_id(child.pid)
        assert process
        yield process
    finally:
        child.kill()
        child.communicate()


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        yield server


@contextlib.contextmanager
def accepting(path: Path) -> Iterator[None]:
    """A server that takes connections: before that the kernel doesn't tell whom the client is connected to."""
    accepted = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted.append(server.accept()[0])
                accepted[-1].sendall(b"x")

    with listening(path) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in accepted:
        connection.close()


def mine(engines: Sequence[Engine], process: ProcessId) -> Engine:
    return next(e for e in engines if e.process == process)


def finder(tmp_path: Path, *configured: DockerEngine) -> Finder:
    """Here the test's own namespaces are the host's: not everywhere may PID 1's be read."""
    return Finder(configured or None, config=str(tmp_path / "daemon.json"), host=os.getpid())


def test_its_socket_and_its_containerd_are_those_it_really_uses(program: Path, tmp_path: Path) -> None:
    api, containerd = tmp_path / "api.sock", tmp_path / "containerd.sock"
    options = ["-H", f"unix://{api}", "--containerd", "/somewhere/else.sock"]
    with accepting(containerd), running(program, api, str(containerd), options) as process:
        engine = mine(finder(tmp_path).look(), process)
        assert (engine.socket, engine.containerd, engine.proven) == (str(api), str(containerd), True)
        assert engine.problem == ""
        assert engine.started_at == process.start / dockerd.TICKS


def test_a_containerd_of_an_unusual_name_is_recognised_by_the_option(program: Path, tmp_path: Path) -> None:
    api, containerd = tmp_path / "docker.sock", tmp_path / "odd"
    with accepting(containerd), running(program, api, str(containerd), ["--containerd", str(containerd)]) as process:
        engine = mine(finder(tmp_path).look(), process)
        assert (engine.containerd, engine.proven) == (str(containerd), True)


def test_options_of_the_command_line(program: Path, tmp_path: Path) -> None:
    api = tmp_path / "docker.sock"
    options = ["--containerd=/x.sock", "--containerd-namespace", "a", "--containerd-plugins-namespace=b", "-g/data"]
    with running(program, api, "-", options) as process:
        engine = mine(finder(tmp_path).look(), process)
    assert (engine.containerd, engine.namespace, engine.plugin_namespace, engine.data_root) == (
        "/x.sock",
        "a",
        "b",
        "/data",
    )
    assert (engine.proven, engine.doubt) == (False, "")


def test_a_child_of_pid_1_that_is_a_shim_is_not_read(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(program, tmp_path / "docker.sock") as process:
        found = finder(tmp_path)
        fake = tmp_path / "proc/1/task/1"
        fake.mkdir(parents=True)
        (fake / "children").write_text(f"{process.pid} 2")
        monkeypatch.setattr(found, "_proc", tmp_path / "proc")
        assert list(found._likely(())) == [process.pid, 2]
        assert list(found._likely({process.pid})) == [2]
        monkeypatch.setattr(found, "_proc", Path("/proc"))
        assert process in [e.process for e in found.look(True, {process.pid})]
        assert process in [e.process for e in found.look(False, {process.pid})], "it is known"


def test_its_child_between_fork_and_exec_is_no_other_dockerd(program: Path, tmp_path: Path) -> None:
    with running(program, tmp_path / "docker.sock", options=["fork"]) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (fork,) = (dockerd.named(int(child), "dockerd") for child in children)
        found = [e.process for e in finder(tmp_path).look()]  # beside those of other tests
        assert fork and (process in found, fork in found) == (True, False)
        configured = finder(tmp_path, DockerEngine(str(tmp_path / "docker.sock"))).look()
        assert [e.process for e in configured] == [process]


def test_of_two_the_one_that_holds_the_configured_socket_is_meant(program: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.sock", tmp_path / "two.sock"
    with running(program, one) as first, running(program, two) as second:
        for path, process in ((one, first), (two, second)):
            (engine,) = finder(tmp_path, DockerEngine(str(path))).look()
            assert (engine.process, engine.problem) == (process, "")


def test_a_running_dockers_socket_is_not_that_of_a_stopped_one(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PID 1 holds it too, where docker.socket made it."""
    path = tmp_path / "docker.sock"
    monkeypatch.setattr(dockerd, "DEFAULT_SOCKETS", (str(path),))
    monkeypatch.setattr(Finder, "_held_by_init", lambda *_: True)
    with running(program, path) as process:
        assert mine(finder(tmp_path).look(), process).problem == ""
        assert None not in [e.process for e in finder(tmp_path).look()]


def test_a_containerd_that_nothing_tells_is_doubted(program: Path, tmp_path: Path) -> None:
    with running(program, tmp_path / "docker.sock") as process:
        assert "which containerd" in mine(finder(tmp_path).look(), process).doubt


@pytest.mark.parametrize(("config", "doubted"), [({"containerd-namespace": "new"}, True), ({"debug": True}, False)])
def test_a_configuration_that_was_changed_after_the_start_is_doubted(
    program: Path, tmp_path: Path, config: dict[str, object], doubted: bool
) -> None:
    with running(program, tmp_path / "docker.sock", "-", ["--containerd", "/x.sock"]) as process:
        file = tmp_path / "daemon.json"
        file.write_text(json.dumps(config))
        os.utime(file, (time.time() + 60, time.time() + 60))
        assert bool(mine(finder(tmp_path).look(), process).doubt) == doubted
        os.utime(file, (1, 1))
        assert mine(finder(tmp_path).look(), process).doubt == ""


def test_options_of_the_configuration_file(program: Path, tmp_path: Path) -> None:
    api = tmp_path / "api.sock"
    config = {
        "hosts": ["fd://", f"unix://{api}"],
        "containerd": "/x.sock",
        "containerd-namespace": "a",
        "data-root": "/d",
    }
    (tmp_path / "daemon.json").write_text(json.dumps(config))
    with running(program, api) as process:
        engine = mine(finder(tmp_path).look(), process)
    assert (engine.socket, engine.containerd, engine.namespace, engine.data_root) == (str(api), "/x.sock", "a", "/d")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"hosts": 3, "containerd": [], "data-root": {}}', "[" * 100000])
def test_a_configuration_file_that_is_none(program: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "daemon.json").write_text(content)
    with running(program, tmp_path / "docker.sock") as process:
        engine = mine(finder(tmp_path).look(), process)
    assert (engine.data_root, engine.namespace) == ("/var/lib/docker", "moby")


def test_one_without_a_socket_we_know_has_a_problem(program: Path, tmp_path: Path) -> None:
    with running(program, tmp_path / "odd") as process:
        assert "name its socket under docker:" in mine(finder(tmp_path).look(), process).problem


def test_configured(program: Path, tmp_path: Path) -> None:
    with running(program, tmp_path / "odd") as process:
        (tmp_path / "link").symlink_to(tmp_path / "odd")
        wanted = DockerEngine(str(tmp_path / "link"), "/c.sock", "/data")
        engine = finder(tmp_path, wanted).look()[0]
    assert (engine.process, engine.socket, engine.problem) == (process, wanted.socket, "")
    assert (engine.containerd, engine.data_root) == ("/c.sock", "/data")


def test_configured_with_another_containerd_than_it_uses(program: Path, tmp_path: Path) -> None:
    api, containerd = tmp_path / "docker.sock", tmp_path / "containerd.sock"
    with accepting(containerd), running(program, api, str(containerd)):
        engine = finder(tmp_path, DockerEngine(str(api), "/other.sock")).look()[0]
    assert "not to /other.sock as configured" in engine.problem


def test_configured_but_nobody_listens(tmp_path: Path) -> None:
    engine = finder(tmp_path, DockerEngine(str(tmp_path / "none"))).look()[0]
    assert (engine.process, engine.problem) == (None, f"nobody listens on {tmp_path / 'none'}")


def test_configured_but_another_program_listens(tmp_path: Path) -> None:
    with listening(tmp_path / "s"):
        engine = finder(tmp_path, DockerEngine(str(tmp_path / "s"))).look()[0]
    assert "not a dockerd" in engine.problem


def test_no_docker_configured(program: Path, tmp_path: Path) -> None:
    with running(program, tmp_path / "docker.sock"):
        assert Finder([]).look() == []


def test_a_new_process_behind_the_same_socket(program: Path, tmp_path: Path) -> None:
    looker = finder(tmp_path, DockerEngine(str(tmp_path / "docker.sock")))
    with running(program, tmp_path / "docker.sock") as first:
        assert looker.look()[0].process == first
    assert looker.look()[0].process is None
    os.unlink(tmp_path / "docker.sock")
    with running(program, tmp_path / "docker.sock") as second:
        assert looker.look()[0].process == second


def test_a_program_that_only_calls_itself_so_is_none(tmp_path: Path) -> None:
    script = "import sys; open('/proc/self/comm', 'w').write('dockerd'); print('ready', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout and child.stdout.readline() == b"ready\n"
    try:
        assert (Path("/proc") / str(child.pid) / "comm").read_text() == "dockerd\n"
        assert dockerd.named(child.pid, "dockerd") is None
    finally:
        child.communicate(b"\n")


def test_after_an_upgrade_replaced_the_file(program: Path, tmp_path: Path) -> None:
    copy = tmp_path / "dockerd"
    shutil.copy(program, copy)
    with running(copy, tmp_path / "docker.sock") as process:
        copy.unlink()
        assert mine(finder(tmp_path).look(), process).problem == ""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_another_users_is_none(program: Path, tmp_path: Path) -> None:
    script = "import os; os.setuid(65534); print('ready', flush=True); input()"
    environment = {**os.environ, "PYTHONHOME": sys.base_prefix}
    argv = [str(program), "-c", script]
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert child.stdout and child.stdout.readline() == b"ready\n"
    try:
        assert dockerd.named(child.pid, "dockerd") is not None
        assert not dockerd.is_hosts_own(child.pid, host=os.getpid())
    finally:
        child.communicate(b"\n")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root for a mount namespace")
def test_one_in_another_mount_namespace_is_a_stranger(program: Path, tmp_path: Path) -> None:
    given = str(tmp_path / "given.sock")
    argv = ["unshare", "--mount", str(program), "-c", "print('ready', flush=True); input()", "--containerd", given]
    environment = {**os.environ, "PYTHONHOME": sys.base_prefix}
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert child.stdout and child.stdout.readline() == b"ready\n"
    try:
        looker = finder(tmp_path)
        assert child.pid not in [e.process.pid for e in looker.look() if e.process]
        (stranger,) = (s for s in looker.strangers if s.process.pid == child.pid)
        with listening(tmp_path / "given.sock"), listening(tmp_path / "other.sock"):
            assert stranger.uses(given)
            assert not stranger.uses(str(tmp_path / "other.sock"))
        assert not stranger.uses(given + "-none")
    finally:
        child.communicate(b"\n")
    assert child.pid not in [s.process.pid for s in looker.strangers]


def test_the_tests_own_process_is_the_hosts_own() -> None:
    assert dockerd.is_hosts_own(os.getpid(), host=os.getpid()) == (os.getuid() == 0)


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["-H", "unix:///a"], "unix:///a"),
        (["-H=unix:///a"], "unix:///a"),
        (["-Hunix:///a"], "unix:///a"),
        (["--host", "unix:///a"], "unix:///a"),
        (["--host=unix:///a"], "unix:///a"),
        (["--debug", "-H"], None),
        ([], None),
    ],
)
def test_forms_of_a_flag(argv: list[str], value: str) -> None:
    assert dockerd._Options(argv, {}).hosts() == ([value] if value else [])


# -- sockets ------------------------------------------------------------------------------------------------------


def test_same_socket(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "var").symlink_to(tmp_path / "run")
    with listening(tmp_path / "run/s"), listening(tmp_path / "t"):
        assert same_socket(str(tmp_path / "run/s"), str(tmp_path / "var/s"))
        assert not same_socket(str(tmp_path / "run/s"), str(tmp_path / "t"))
        os.link(tmp_path / "t", tmp_path / "hard")
        assert same_socket(str(tmp_path / "t"), str(tmp_path / "hard"))
    assert same_socket(str(tmp_path / "run/none"), str(tmp_path / "var/none"))
    assert not same_socket(str(tmp_path / "run/none"), str(tmp_path / "run/s"))
    assert not same_socket("", "")


def test_connected_to(tmp_path: Path) -> None:
    with listening(tmp_path / "s") as server, socket.socket(socket.AF_UNIX) as client:
        assert not [b for b in peers.connected_to(os.getpid()) if b.is_file(str(tmp_path / "s"))]
        client.connect(str(tmp_path / "s"))
        accepted, _ = server.accept()
        (bound,) = (b for b in peers.connected_to(os.getpid()) if b.is_file(str(tmp_path / "s")))
        assert bound.path == str(tmp_path / "s")
        assert (bound.device, bound.inode) == (os.stat(bound.path).st_dev, os.stat(bound.path).st_ino & 0xFFFFFFFF)
        accepted.close()


def test_the_same_path_bound_anew_is_told_by_its_resolved_path(tmp_path: Path) -> None:
    """containerd was restarted: dockerd's old connection is to the old file, at the same place."""
    bound = peers.Bound(str(tmp_path / "s"), 1, 1)
    assert not bound.is_file(str(tmp_path / "s"))
    with listening(tmp_path / "s"):
        assert bound.is_file(str(tmp_path / "s"))


def test_an_abstract_socket_is_nobodys_file() -> None:
    name = f"\0orphand-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(name)
        server.listen()
        client.connect(name)
        accepted, _ = server.accept()
        assert not [b for b in peers.connected_to(os.getpid()) if "orphand-test" in b.path]
        accepted.close()


def test_the_listener_of_a_socket(tmp_path: Path) -> None:
    with listening(tmp_path / "s"):
        assert peers.listener(str(tmp_path / "s")) == (os.getpid(), os.getuid())
    with pytest.raises(OSError):
        peers.listener(str(tmp_path / "s"))


def test_of_two_servers_bound_to_one_path_the_later_is_meant(tmp_path: Path) -> None:
    with listening(tmp_path / "s") as first:
        os.unlink(tmp_path / "s")
        with listening(tmp_path / "s") as second:
            assert listeners.listening_inodes(str(tmp_path / "s")) == {os.fstat(second.fileno()).st_ino}
            assert os.fstat(first.fileno()).st_ino in {inode for inode, _ in listeners.listening()}


def test_without_sock_diag_the_path_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> Iterator[object]:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(peers, "_answers", refuse)
    (tmp_path / "link").symlink_to(tmp_path)
    with listening(tmp_path / "s") as server:
        assert listeners.listening_inodes(str(tmp_path / "link/s")) == {os.fstat(server.fileno()).st_ino}


def test_who_listens_is_seen_without_connecting(tmp_path: Path) -> None:
    me = dockerd.process_id(os.getpid())
    assert me
    with listening(tmp_path / "s") as server:
        inodes = listeners.listening_inodes(str(tmp_path / "s"))
        assert inodes == {os.fstat(server.fileno()).st_ino}
        assert listeners.holders(inodes, [me, ProcessId(1, 0)]) == [me]
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert listeners.listening_inodes(str(tmp_path / "s")) == frozenset()
    assert listeners.holders(frozenset(), [me]) == []
