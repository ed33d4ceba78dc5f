# SPDX-License-Identifier: Apache-2.0
"""What the real containerd says, in health and in trouble, and how it is told to end a task."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from orphand.authorities.containerd import Containerd
from orphand.authorities.containerd_api import CallFailed, TaskStatus
from orphand.authorities.presence import Absent
from orphand.model import Claim, Init, ProcessId, Role, Sighting, Testimony
from orphand.settings import Scan

if TYPE_CHECKING:
    from tests.containerd.conftest import PrivateContainerd

AT_ONCE = Scan(settle=0.0, timeout=10.0)
HASTY = Scan(settle=0.0, timeout=1.0)


def ask(
    real: PrivateContainerd,
    container_id: str,
    role: Role = Role.OWNER,
    scan: Scan = AT_ONCE,
    namespace: str = "",
    running: bool = False,
) -> Testimony:
    inits = (Init(ProcessId(4711, 5), container_id, f"/{container_id}"),) if running else ()
    sighting = Sighting(container_id, real.namespace, real.address, None, inits, 0.0)
    return Containerd(real.address, scan).ask(namespace or real.namespace, [sighting], role)[container_id]


def gone(pid: int) -> bool:
    return not os.path.isdir(f"/proc/{pid}")


def wait_until(answer: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not answer():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_from_birth_to_oblivion(containerd: PrivateContainerd) -> None:
    pid = containerd.run("web")
    said = ask(containerd, "web")
    assert (said.claim, said.pid, said.detail) == (Claim.KNOWN, pid, "")
    containerd.ctr("tasks", "pause", "web")
    assert ask(containerd, "web").claim is Claim.KNOWN
    containerd.ctr("tasks", "resume", "web")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: ask(containerd, "web").detail == "task is stopped")
    assert ask(containerd, "web").claim is Claim.KNOWN
    containerd.ctr("tasks", "rm", "web")
    for role, claim in ((Role.OWNER, Claim.DISOWNED), (Role.KEEPER, Claim.UNKNOWN)):
        said = ask(containerd, "web", role, running=True)
        assert (said.claim, said.veto) == (claim, "containerd has a record of it")
    # without a process it is left for nobody: what an owner above denies can be deleted here
    for role, claim, veto in (
        (Role.OWNER, Claim.DISOWNED, "containerd has a record of it"),
        (Role.KEEPER, Claim.KNOWN, ""),
    ):
        said = ask(containerd, "web", role)
        assert (said.claim, said.veto, said.pid) == (claim, veto, 0)
    containerd.ctr("containers", "rm", "web")
    said = ask(containerd, "web")
    assert (said.claim, said.veto) == (Claim.UNKNOWN, "")


def test_another_namespace_gives_no_no(containerd: PrivateContainerd) -> None:
    containerd.run("web")
    said = ask(containerd, "web", namespace="no-such")
    assert (said.claim, said.detail) == (Claim.UNAVAILABLE, "it does not list the namespace no-such")


def test_a_shim_that_hangs_is_not_unknown(containerd: PrivateContainerd) -> None:
    containerd.run("web")
    with containerd.frozen(containerd.shim("web")):
        assert ask(containerd, "web").claim in (Claim.KNOWN, Claim.UNAVAILABLE)
    assert ask(containerd, "web").claim is Claim.KNOWN


def test_a_containerd_that_hangs_is_unavailable(containerd: PrivateContainerd) -> None:
    containerd.run("web")
    assert containerd.process
    with containerd.frozen(containerd.process.pid):
        said = ask(containerd, "gone", scan=HASTY)
        assert (said.claim, "DEADLINE_EXCEEDED" in said.detail) == (Claim.UNAVAILABLE, True)
    assert ask(containerd, "gone").claim is Claim.UNKNOWN


def test_a_crash_and_a_restart(containerd: PrivateContainerd) -> None:
    pid = containerd.run("web")
    witness = Containerd(containerd.address, AT_ONCE)
    sighting = Sighting("web", containerd.namespace, containerd.address, None, (), 0.0)

    def says() -> Testimony:
        return witness.ask(containerd.namespace, [sighting], Role.OWNER)["web"]

    assert says().claim is Claim.KNOWN
    containerd.stop()
    assert (says().claim, "nobody listens" in says().detail) == (Claim.UNAVAILABLE, True)
    with pytest.raises(Absent):
        witness.kill(containerd.namespace, "web", signal.SIGTERM)
    containerd.start()
    assert (says().claim, says().pid) == (Claim.KNOWN, pid)
    young = ask(containerd, "gone", scan=Scan(settle=3600.0))
    assert (young.claim, "believed after 3600 s" in young.detail) == (Claim.UNAVAILABLE, True)


def test_two_of_them_know_only_their_own(start: Callable[[], PrivateContainerd]) -> None:
    first, second = start(), start()
    pid = first.run("web")
    second.run("other")
    assert (ask(first, "web").claim, ask(first, "web").pid) == (Claim.KNOWN, pid)
    assert ask(second, "web").claim is Claim.UNKNOWN


def test_an_end_by_its_api_leaves_nothing(containerd: PrivateContainerd) -> None:
    pid = containerd.run("web")
    shim = containerd.shim("web")
    witness = Containerd(containerd.address, AT_ONCE)
    with pytest.raises(CallFailed):
        witness.delete_task(containerd.namespace, "web")  # it runs
    witness.kill(containerd.namespace, "web", signal.SIGKILL, every=True)
    wait_until(
        lambda: (task := witness.task(containerd.namespace, "web")) is not None and task.status is TaskStatus.STOPPED
    )
    witness.delete_task(containerd.namespace, "web")
    witness.delete_container(containerd.namespace, "web")
    wait_until(lambda: gone(pid) and gone(shim))
    assert witness.task(containerd.namespace, "web") is None
    assert not (containerd.place / "state/io.containerd.runtime.v2.task" / containerd.namespace / "web").exists()


def test_many_known_containers_cost_one_list(containerd: PrivateContainerd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known tasks are answered by the list; only absent ids are asked for one by one."""
    names = [f"web{n}" for n in range(20)]
    for name in names:
        containerd.run(name)
    calls: list[str] = []
    from orphand.authorities.containerd_api import Api

    real_call = Api._call

    def counted(self: Api, method: str, *args: object, **kwargs: object) -> object:
        calls.append(method.rpartition("/")[2])
        return real_call(self, method, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Api, "_call", counted)
    sightings = [Sighting(n, containerd.namespace, containerd.address, None, (), 0.0) for n in [*names, "gone"]]
    answers = Containerd(containerd.address, AT_ONCE).ask(containerd.namespace, sightings, Role.OWNER)
    assert [answers[n].claim for n in names] == [Claim.KNOWN] * 20
    assert answers["gone"].claim is Claim.UNKNOWN
    assert calls == ["List", "List", "Get", "Get"]
