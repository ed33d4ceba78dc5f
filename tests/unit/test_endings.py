# SPDX-License-Identifier: Apache-2.0
"""Who belongs to a container and who only sits in its cgroup; and what is said of those that do not die.

A /proc of files: managed neighbours in a victim's cgroup, and processes in D state, can't be had on order.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from orphand import cgroupfs, cleanup
from orphand.endings import all_exited, company, container_children, dependent, exited
from orphand.estate import Estate
from orphand.model import Kind, ProcessId
from orphand.proc import Proc

ID = "4f" * 32
HOST, INSIDE, OTHERS = 1, 2, 3  # mount namespaces
SHIM, INIT = ProcessId(50, 50), ProcessId(60, 60)


class FakeProc(Proc):
    """A /proc of files. The start time of each process is its pid."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        (root / "1" / "task" / "1").mkdir(parents=True)
        (root / "1" / "task" / "1" / "children").write_text("")
        self.add(1, 0, HOST)

    def add(
        self,
        pid: int,
        ppid: int,
        mnt: int = INSIDE,
        state: str = "S",
        cgroup: str = f"/docker/{ID}",
        pidns: int = HOST,
        inner: str = "",
    ) -> ProcessId:
        place = self.root / str(pid)
        (place / "ns").mkdir(parents=True, exist_ok=True)
        fields = [state, str(ppid), *["0"] * 17, str(pid), "0", "0"]
        (place / "stat").write_text(f"{pid} (some) name) {' '.join(fields)}\n")
        (place / "ns" / "mnt").symlink_to(f"mnt:[{mnt}]")
        (place / "ns" / "pid").symlink_to(f"pid:[{pidns}]")
        (place / "status").write_text(f"Name:\tx\nUid:\t0\t0\t0\t0\nNSpid:\t{pid}{inner}\n")
        (place / "cgroup").write_text(f"0::{cgroup}\n")
        return ProcessId(pid, pid)

    def give_children(self, pid: int, *children: int) -> None:
        (self.root / str(pid) / "task" / str(pid)).mkdir(parents=True)
        (self.root / str(pid) / "task" / str(pid) / "children").write_text(" ".join(map(str, children)))


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeProc:
    monkeypatch.setattr(os, "getpid", lambda: 1 << 30)  # else one of the made-up pids may be our own
    fake = FakeProc(tmp_path / "proc")
    fake.add(SHIM.pid, 1, HOST)
    fake.add(INIT.pid, SHIM.pid)
    return fake


def estate(**changed: object) -> Estate:
    values: dict[str, object] = {"shim": SHIM, "inits": (INIT,), **changed}
    return Estate(ID, "moby", "", Kind.LEAKED_SHIM, "b", **values)  # type: ignore[arg-type]


def test_the_containers_own(proc: FakeProc) -> None:
    members = [
        INIT,
        proc.add(61, INIT.pid),  # a child of the init
        proc.add(62, 61),
        proc.add(63, SHIM.pid),  # docker exec
        proc.add(64, 1),  # has lost its parent
        proc.add(65, 66),  # runc init of an exec that is being started: its parent is runc, outside
    ]
    proc.add(66, SHIM.pid, HOST, cgroup="/system.slice/containerd.service")
    assert company(estate(), members, proc) == {}


def test_a_container_of_another_shim_is_not_its_own(proc: FakeProc) -> None:
    proc.add(70, 1, HOST)
    other = proc.add(71, 70, OTHERS)
    child = proc.add(72, 71, OTHERS)
    found = company(estate(), [INIT, other, child], proc)
    assert found == {other: "it descends from process 70", child: "it descends from process 70"}


def test_a_daemon_of_the_host_is_not_its_own(proc: FakeProc) -> None:
    daemon = proc.add(80, 1, HOST)
    shell = proc.add(81, INIT.pid, HOST)  # even below the init
    assert set(company(estate(), [daemon, shell], proc)) == {daemon, shell}


def test_of_a_shimless_one_a_subreaper_is_the_parent(proc: FakeProc) -> None:
    proc.add(90, 1, HOST)
    init = proc.add(91, 90)
    lost = proc.add(92, 90)
    assert company(estate(shim=None, inits=(init,)), [init, lost], proc) == {}


def test_who_has_gone_meanwhile_is_nobodys(proc: FakeProc) -> None:
    assert company(estate(), [ProcessId(999, 1)], proc) == {}


def test_a_long_line_of_descent_is_no_way_out(proc: FakeProc) -> None:
    chain = [proc.add(1000 + n, 999 + n if n else INIT.pid) for n in range(500)]
    assert company(estate(), [INIT, *reversed(chain)], proc) == {}


def test_ancestors_without_an_end_are_a_reason_to_spare(proc: FakeProc) -> None:
    proc.add(95, 96)
    looping = proc.add(96, 95)
    assert set(company(estate(), [looping], proc)) == {looping}


# ---- who would die too


def pid_namespace(proc: FakeProc, first: str = "\t1") -> Estate:
    init = proc.add(100, SHIM.pid, pidns=INSIDE, inner=first)
    proc.add(101, 100, pidns=INSIDE, inner="\t7")
    proc.add(102, SHIM.pid, pidns=INSIDE, inner="\t8", cgroup=f"/docker/{ID}/below")
    return estate(inits=(init,))


def test_a_pid_namespace_of_its_own_is_no_obstacle(proc: FakeProc) -> None:
    assert dependent(pid_namespace(proc), proc) == 0


def test_another_container_in_its_pid_namespace_would_die_too(proc: FakeProc) -> None:
    owned = pid_namespace(proc)
    proc.add(110, 70, OTHERS, pidns=INSIDE, inner="\t9", cgroup=f"/docker/{'a0' * 32}")
    assert dependent(owned, proc) == 110


def test_so_would_one_that_has_lost_its_parent_to_the_init(proc: FakeProc) -> None:
    owned = pid_namespace(proc)
    proc.add(110, 100, OTHERS, pidns=INSIDE, inner="\t9", cgroup=f"/docker/{'a0' * 32}")
    assert dependent(owned, proc) == 110


def test_a_guest_in_anothers_pid_namespace_can_go(proc: FakeProc) -> None:
    """It was started with --pid container:OTHER itself: it is not PID 1 there."""
    owned = pid_namespace(proc, first="\t30")
    proc.add(110, 70, OTHERS, pidns=INSIDE, inner="\t1", cgroup=f"/docker/{'a0' * 32}")
    assert dependent(owned, proc) == 0


def test_in_the_hosts_pid_namespace_nobody_depends_on_it(proc: FakeProc) -> None:
    assert dependent(estate(), proc) == 0


def test_without_a_cgroup_of_its_own_nobody_is_its_own(proc: FakeProc) -> None:
    init = proc.add(100, SHIM.pid, pidns=INSIDE, inner="\t1", cgroup="/")
    proc.add(110, 70, OTHERS, pidns=INSIDE, inner="\t9", cgroup="/")
    assert dependent(estate(inits=(init,)), proc) == 110


def test_a_shims_helpers_do_not_count_as_containers(proc: FakeProc) -> None:
    proc.add(51, SHIM.pid, HOST)  # a logger
    proc.add(52, SHIM.pid, INSIDE, state="Z")
    proc.give_children(SHIM.pid, 51, 52, 999)
    assert container_children(SHIM, proc) == []


def test_a_shims_living_container_counts(proc: FakeProc) -> None:
    proc.give_children(SHIM.pid, INIT.pid)
    assert container_children(SHIM, proc) == [INIT.pid]


# ---- the second look


@pytest.fixture
def directory(tmp_path: Path, proc: FakeProc, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "cgroup" / "docker" / ID
    place.mkdir(parents=True)
    (place / "cgroup.procs").write_text(f"{INIT.pid}\n")
    monkeypatch.setattr(
        cgroupfs, "hierarchies", lambda: (cgroupfs.Hierarchy(str(tmp_path / "cgroup"), "/", frozenset()),)
    )
    return place


def test_who_waits_for_a_dead_disk_is_said_with_what_to_do(proc: FakeProc, directory: Path) -> None:
    proc.add(97, 1, state="D")
    (proc.root / "97" / "wchan").write_text("nfs_wait_bit_killable")
    left = cleanup.leftovers(estate(inits=(ProcessId(97, 97),)), proc, cleaned=False)
    assert left[0].startswith("process 97 is in uninterruptible sleep (D, nfs_wait_bit_killable)")
    assert "kill -KILL" not in left[0]


def test_who_is_simply_still_there_is_said_too(proc: FakeProc, directory: Path) -> None:
    owned = estate(cgroups={str(directory): directory.stat().st_ino})
    left = cleanup.leftovers(owned, proc, cleaned=False)
    assert left == [f"process {INIT.pid} (S): kill -KILL {INIT.pid}", f"shim {SHIM.pid} (S): kill -KILL {SHIM.pid}"]


def test_nobody_is_told_to_kill_a_neighbour(proc: FakeProc, directory: Path) -> None:
    proc.add(70, 1, HOST)
    proc.add(71, 70, OTHERS)
    (directory / "cgroup.procs").write_text("71\n")
    owned = estate(shim=None, inits=(), cgroups={str(directory): directory.stat().st_ino})
    assert cleanup.living(owned, proc) == []
    (left,) = cleanup.leftovers(owned, proc, cleaned=True)
    assert left.startswith("its cgroups: process 71 is in its cgroup, but not its own")
    assert "kill" not in left
    steps: list[str] = []
    cleanup.clean(owned, proc, steps.append)
    assert directory.exists()
    assert len(steps) == 1
    assert steps[0].startswith("left its cgroups and runc's record: process 71 is in its cgroup, but not its own")


def test_a_process_that_left_the_cgroup_is_not_a_member(proc: FakeProc, directory: Path) -> None:
    """Its pid was listed, then reused by somebody elsewhere."""
    (proc.root / str(INIT.pid) / "cgroup").write_text("0::/system.slice/sshd.service\n")
    owned = estate(inits=(), cgroups={str(directory): directory.stat().st_ino})
    assert cleanup.cgroup_members(owned, proc) == {}


def test_a_new_cgroup_of_the_same_name_is_not_looked_at(proc: FakeProc, directory: Path) -> None:
    owned = estate(inits=(), cgroups={str(directory): directory.stat().st_ino + 1})
    assert cleanup.cgroup_members(owned, proc) == {}


# ---- waiting


@pytest.mark.parametrize("pidfd", [True, False])
def test_waiting_for_real_processes(pidfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not pidfd:
        monkeypatch.setattr(Proc, "open_pidfd", lambda self, process: None)
    real = Proc()

    async def wait() -> tuple[bool, bool]:
        with subprocess.Popen(["sleep", "600"]) as child:
            process = real.process(child.pid)
            patient = await exited(process, 0.1, real)
            child.kill()  # a zombie until the with ends: that counts as ended
            return patient, await all_exited([process, process], 60, real)

    assert asyncio.run(wait()) == (False, True)


def test_a_process_that_is_another_by_now_has_exited() -> None:
    with subprocess.Popen(["sleep", "600"]) as child:
        process = Proc().process(child.pid)
        assert asyncio.run(exited(ProcessId(process.pid, process.start - 1), 0.1, Proc()))
        child.kill()
