# SPDX-License-Identifier: Apache-2.0
"""Real processes that pretend to be shims, and real sockets that two of them claim. Needs root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Callable

import pytest

from orphand.proc import Proc
from orphand.shims import gather, read_host, recognise
from orphand.sightings import Looker
from orphand.sockets import holds_live_socket

A = "f" * 64
NOBODY = 65534
ARGUMENTS = ["-namespace", "moby", "-id", A, "-address", "/run/containerd/containerd.sock"]
Start = Callable[..., "subprocess.Popen[bytes]"]

# sets its comm to its first argument, says that it is ready, and waits
PRETENDER = (
    "import ctypes, sys; ctypes.CDLL(None).prctl(15, sys.argv[1][:15].encode(), 0, 0, 0); print(flush=True); input()"
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: who is not root can't become nobody")


@pytest.fixture
def start() -> Iterator[Start]:
    children: list[subprocess.Popen[bytes]] = []

    def begin(argv: Sequence[str], executable: str = sys.executable, **how: object) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(argv, executable=executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **how)  # type: ignore[call-overload]
        children.append(child)
        assert child.stdout
        assert child.stdout.readline()
        return child

    yield begin
    for child in children:
        child.kill()
        child.communicate()


def sighted(pid: int) -> bool:
    return any(p.pid == pid for s in Looker().look(full=True) for p in s.processes)


@pytest.mark.parametrize("uid", [0, NOBODY])
@pytest.mark.parametrize("name", ["containerd-shim-runc-v2", "containerd-shim", "docker-containerd-shim"])
def test_argv_and_comm_make_no_shim(start: Start, uid: int, name: str) -> None:
    child = start([name, "-c", PRETENDER, name, *ARGUMENTS], user=uid)
    assert Proc().stat(child.pid).comm == name[:15]
    proc = Proc()
    found = recognise(gather(proc, child.pid), read_host(proc))
    assert found is not None
    assert found.shim is None
    assert not sighted(child.pid)


def test_copied_executable_of_an_unprivileged_user_makes_no_shim(start: Start, tmp_path: Path) -> None:
    """Name, argv and comm are right, and /proc/PID/exe ends like a shim's: the owner and the uid give it away."""
    copy = Path(shutil.copy("/bin/cat", tmp_path / "containerd-shim-runc-v2"))
    os.chown(copy, NOBODY, NOBODY)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.owner() == "root" and parent != Path("/"):
            os.chmod(parent, parent.stat().st_mode | 0o011)
    child = subprocess.Popen([str(copy)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, user=NOBODY)
    try:
        assert child.stdin
        assert child.stdout
        child.stdin.write(b"x\n")
        child.stdin.flush()
        child.stdout.readline()
        (Path(f"/proc/{child.pid}/comm")).read_text()
        assert not sighted(child.pid)
    finally:
        child.kill()
        child.communicate()


def test_executable_that_was_deleted_is_still_checked(tmp_path: Path, start: Start) -> None:
    name = "containerd-shim-runc-v2"
    copy = Path(shutil.copy(os.path.realpath(sys.executable), tmp_path / name))
    copy.chmod(0o777)
    child = start([name, "-c", PRETENDER, name], executable=str(copy), env={"PYTHONHOME": sys.prefix})
    copy.unlink()
    facts = gather(Proc(), child.pid)
    assert (os.path.basename(facts.exe), facts.exe_mode & 0o777) == (name, 0o777)


# --- the live socket ----------------------------------------------------------------------------------

LISTENER = (
    "import os, socket, sys; p = sys.argv[1]; os.path.exists(p) and os.unlink(p); s = socket.socket(socket.AF_UNIX); "
    "s.bind(p); s.listen(); print(flush=True); input()"
)


def test_of_two_listeners_at_one_path_the_later_is_reached(start: Start, tmp_path: Path) -> None:
    path = str(tmp_path / "shim.sock")
    proc = Proc()
    first = start([sys.executable, "-c", LISTENER, path])
    assert holds_live_socket(proc.process(first.pid), path) is True
    second = start([sys.executable, "-c", LISTENER, path])
    assert Path("/proc/net/unix").read_text().count(path) == 2
    assert holds_live_socket(proc.process(first.pid), path) is False
    assert holds_live_socket(proc.process(second.pid), path) is True
    second.kill()
    second.wait()
    assert holds_live_socket(proc.process(first.pid), path) is None  # nobody is reached there


def test_abstract_sockets_are_told_by_their_name(start: Start) -> None:
    name = f"orphand-test-{os.getpid()}"
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(chr(0) + sys.argv[1]); s.listen(); "
        "print(flush=True); input()"
    )
    holder, other = start([sys.executable, "-c", code, name]), start(["cat-like", "-c", "print(flush=True); input()"])
    proc = Proc()
    assert holds_live_socket(proc.process(holder.pid), f"@{name}") is True
    assert holds_live_socket(proc.process(other.pid), f"@{name}") is False
    assert holds_live_socket(proc.process(holder.pid), "@nobody-listens-here") is None


def test_without_sock_diag_names_tell_nothing(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> list[object]:
        raise OSError(93, "Protocol not supported")

    path = str(tmp_path / "shim.sock")
    first = Proc().process(start([sys.executable, "-c", LISTENER, path]).pid)
    assert holds_live_socket(first, path) is True
    monkeypatch.setattr("orphand.authorities.peers._answers", refuse)
    assert holds_live_socket(first, path) is None


# --- watching ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [100, 1, 0])
def test_watch_reports_each_end_once(start: Start, limit: int) -> None:
    from orphand.watch import Watch

    proc = Proc()
    children = [start(["x", "-c", "print(flush=True); input()"]) for _ in range(3)]
    processes = [proc.process(c.pid) for c in children]
    watch = Watch(proc, limit)
    for process in processes * 2:
        watch.add(process)
    assert watch.ended() == set()
    os.kill(children[0].pid, signal.SIGKILL)
    os.waitid(os.P_PID, children[0].pid, os.WEXITED | os.WNOWAIT)  # a zombie has ended
    assert watch.ended() == {processes[0]}
    assert watch.ended() == set()
    watch.drop(processes[1])
    for child in children[1:]:
        child.kill()
        child.wait()
    assert watch.ended() == {processes[2]}
    watch.add(processes[2])  # ended before it was added
    assert watch.ended() == {processes[2]}
    before = len(os.listdir("/proc/self/fd"))
    watch.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1
