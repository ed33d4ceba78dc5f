# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orphand import proc as proc_module
from orphand.errors import Denied, Gone
from orphand.model import ProcessId
from orphand.proc import Proc, age, boot_id, now, parse_cgroups, parse_stat
from tests.fakeproc import FakeNode

PROC = Proc()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(["sleep", "600"])
    yield child
    child.kill()
    child.wait()


def test_own_process_reads_as_it_is() -> None:
    pid = os.getpid()
    stat = PROC.stat(pid)
    assert (stat.pid, stat.ppid, stat.dead) == (pid, os.getppid(), False)
    assert PROC.exe(pid) == os.path.realpath(sys.executable)
    assert PROC.cwd(pid) == os.getcwd()
    assert PROC.uid(pid) == os.geteuid()
    assert PROC.namespace(pid, "mnt") == os.stat("/proc/self/ns/mnt").st_ino
    assert PROC.cmdline(pid)[0] == Path("/proc/self/cmdline").read_bytes().split(b"\0")[0].decode()
    assert f":{PROC.cgroup_of(pid)}" in Path("/proc/self/cgroup").read_text()


def test_clock_and_age_agree(sleeper: subprocess.Popen[bytes]) -> None:
    process = PROC.process(sleeper.pid)
    assert 0 <= age(process) < 60
    assert now() == pytest.approx(time.clock_gettime(time.CLOCK_BOOTTIME), abs=5)
    assert boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_children_are_found_with_and_without_the_kernels_file(sleeper: subprocess.Popen[bytes]) -> None:
    without = Proc()
    without._has_children = False  # a kernel without CONFIG_PROC_CHILDREN
    assert sleeper.pid in PROC.children(os.getpid())
    assert sleeper.pid in without.children(os.getpid())


@pytest.mark.parametrize("comm", [b"a) S 1 (", b"((", b")", b"x y z", b"\xff\x00\n", b""])
def test_stat_of_any_comm(comm: bytes) -> None:
    line = b"42 (" + comm + b") R 7 " + b"0 " * 17 + b"4711 0 0\n"
    stat = parse_stat(line)
    assert (stat.pid, stat.state, stat.ppid, stat.start) == (42, "R", 7, 4711)


@pytest.mark.parametrize("line", [b"", b"42", b"42 (x", b"42 (x) S", b"42 (x) S one " + b"0 " * 40])
def test_half_a_stat_line_is_gone(line: bytes) -> None:
    with pytest.raises(Gone):
        parse_stat(line)


def test_cgroups_in_the_order_of_asking() -> None:
    data = b"9:cpu,cpuacct:/docker/x\n1:name=systemd:/a:b\n0::/u (deleted)\nnonsense\n"
    assert [(c.controllers, c.path) for c in parse_cgroups(data)] == [
        ("name=systemd", "/a:b"),
        ("", "/u"),
        ("cpu,cpuacct", "/docker/x"),
    ]


def test_cgroup_of_prefers_a_hierarchy_where_it_is_not_in_the_root(tmp_path: Path) -> None:
    node = FakeNode(tmp_path)
    node.add(50, "x", ["x"], cgroups=["9:pids:/docker/x", "1:name=systemd:/", "0::/"])
    node.add(51, "x", ["x"], cgroups=["0::/"])
    assert node.proc.cgroup_of(50) == "/docker/x"
    assert node.proc.cgroup_of(51) == "/"


def test_command_line_that_is_too_long_is_not_cut() -> None:
    code = "print(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code, "x" * 50_000], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout
        child.stdout.readline()  # in the middle of exec(2) a command line reads as empty
        with pytest.raises(Denied, match="longer"):
            PROC.cmdline(child.pid)
    finally:
        child.communicate(b"\n")


def test_kernel_threads_and_empty_command_lines(tmp_path: Path) -> None:
    node = FakeNode(tmp_path)
    node.add(50, "kworker", [], exe="x")
    assert node.proc.cmdline(50) == ()


def test_ended_process_is_gone(sleeper: subprocess.Popen[bytes]) -> None:
    process = PROC.process(sleeper.pid)
    assert PROC.alive(process)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    assert not PROC.alive(process)
    assert PROC.stat(sleeper.pid).dead
    sleeper.wait()
    for read in (PROC.stat, PROC.cmdline, PROC.cgroups, PROC.children, PROC.uid, PROC.exe):
        with pytest.raises(Gone):
            read(process.pid)


def test_open_directory_never_shows_a_later_process(sleeper: subprocess.Popen[bytes]) -> None:
    with PROC.open(sleeper.pid) as held:
        held.stat()
        sleeper.kill()
        sleeper.wait()
        for read in (held.stat, held.status, held.cgroups, held.exe, held.cwd):
            with pytest.raises(Gone):
                read()


def test_denied_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, dir_fd: object, limit: object) -> bytes:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(proc_module, "_read_file", refuse)
    with pytest.raises(Denied):
        PROC.stat(os.getpid())


@pytest.mark.parametrize("pidfd", [True, False])
def test_signal_reaches_that_process(
    pidfd: bool, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proc_module, "HAS_PIDFD", pidfd and proc_module.HAS_PIDFD)
    PROC.send_signal(PROC.process(sleeper.pid), signal.SIGTERM)
    assert sleeper.wait(60) == -signal.SIGTERM


@pytest.mark.parametrize("pidfd", [True, False])
def test_another_process_with_that_pid_is_never_signalled(
    pidfd: bool, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proc_module, "HAS_PIDFD", pidfd and proc_module.HAS_PIDFD)
    process = PROC.process(sleeper.pid)
    with pytest.raises(Gone):
        PROC.send_signal(ProcessId(process.pid, process.start - 1), signal.SIGKILL)
    assert sleeper.poll() is None


def test_nothing_is_sent_to_many_or_to_init_or_to_us() -> None:
    for pid in (-1, 0, 1, os.getpid()):
        with pytest.raises(ValueError, match="never"):
            PROC.send_signal(ProcessId(pid, 0), signal.SIGKILL)


def test_pidfd_is_closed_where_the_process_is_another(sleeper: subprocess.Popen[bytes]) -> None:
    process = PROC.process(sleeper.pid)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Gone):
        PROC.open_pidfd(ProcessId(process.pid, process.start + 1))
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_descriptors_left_means_no_pidfd(sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(pid: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", full)
    assert PROC.open_pidfd(PROC.process(sleeper.pid)) is None


@pytest.mark.parametrize("limit", [10, 65_536, 200_000, 1 << 22])
def test_no_more_is_asked_for_at_once_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """os.read allocates what it is asked for: with megabytes in each look the heap grows for hours."""
    (tmp_path / "long").write_bytes(b"0123456789" * 15_000)
    asked: list[int] = []
    read = os.read
    monkeypatch.setattr(os, "read", lambda fd, size: asked.append(size) or read(fd, size))
    with (tmp_path / "long").open("rb") as file:
        assert proc_module.read_up_to(file.fileno(), limit) == (b"0123456789" * 15_000)[:limit]
    assert max(asked) <= 65_536
