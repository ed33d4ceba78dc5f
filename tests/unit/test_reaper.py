# SPDX-License-Identifier: Apache-2.0
"""Everything that must keep a signal from being sent. The ends themselves: tests/engine/test_ends.py."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Optional

import pytest

from orphand import reaper
from orphand.authorities.containerd import RECORD
from orphand.authorities.containerd_api import CallFailed, Task, TaskStatus
from orphand.errors import Gone
from orphand.estate import Estate
from orphand.model import (
    Case,
    Generation,
    Init,
    Judgement,
    Kind,
    Outcome,
    ProcessId,
    Shim,
    Sighting,
    Verdict,
)
from orphand.proc import Proc
from orphand.reaper import Reaper, plan, unfinished
from orphand.report.topics import Topic
from orphand.settings import Kill
from orphand.state import StateError

ID = "4f" * 32
ADDRESS = "/run/containerd/containerd.sock"


class Recording(Proc):
    """The real /proc; signals are only written down."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[int, int]] = []

    def send_signal(self, process: ProcessId, number: int) -> None:
        self.sent.append((process.pid, number))


class Stage:
    """A reaper whose every contact with the outside is written down."""

    def __init__(self, cleanup: bool = False) -> None:
        self.proc = Recording()
        self.events: list[str] = []
        self.estates: list[Estate] = []
        self.full_disk = False
        self.reaper = Reaper(
            Kill(term_timeout=0.1, cleanup=cleanup), self.containerd, self.report, self.remember, self.forget, self.proc
        )

    def containerd(self, address: str) -> Any:
        raise AssertionError(f"containerd {address} was contacted")

    def report(self, topic: Topic, message: str, case: Optional[Case] = None, **fields: str) -> None:
        self.events.append(message)

    def remember(self, estate: Estate) -> None:
        if self.full_disk:
            raise StateError("No space left on device")
        self.events.append("remember")
        self.estates.append(estate)

    def forget(self, estate: Estate) -> None:
        self.events.append("forget")

    def end(self, case: Case, again: Optional[Case], denied: str = "") -> Outcome:
        async def look(_: Case) -> Optional[Case]:
            self.events.append("again")
            return again

        async def ask(_: Estate) -> str:
            self.events.append("denied?")
            return denied

        return asyncio.run(self.reaper.end(case, look, ask))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(reaper, "ASK_PAUSE_SECONDS", 0.0)
    return Stage()


@pytest.fixture
def sleeper() -> Iterator[ProcessId]:
    with subprocess.Popen(["sleep", "600"]) as child:
        yield Proc().process(child.pid)
        child.kill()


def orphan(process: ProcessId, **changed: Any) -> Case:
    shim = Shim(process, Generation.RUNC_V2, "/usr/bin/containerd-shim-runc-v2", "moby", ID, ADDRESS, "/nowhere", 1)
    sighting = Sighting(ID, "moby", ADDRESS, shim, (), 0.0)
    judgement = Judgement(Verdict.ORPHAN, "unknown to docker", Kind.CHILDLESS_SHIM)
    for name, value in changed.items():
        if hasattr(judgement, name):
            judgement = replace(judgement, **{name: value})
        else:
            sighting = replace(sighting, **{name: value})
    return Case(sighting, (), judgement)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        pytest.param({"verdict": Verdict.MANAGED}, "it is managed", id="managed"),
        pytest.param({"verdict": Verdict.UNDECIDED}, "it is undecided", id="undecided"),
        pytest.param({"verdict": Verdict.EXEMPT}, "it is exempt", id="exempt"),
        pytest.param({"verdict": Verdict.FOREIGN}, "it is foreign", id="foreign"),
        pytest.param({"kind": None}, "it is orphan", id="no-kind"),
        pytest.param({"veto": "a record"}, "a record", id="veto-of-the-judge"),
        pytest.param({"foreign": "nested"}, "nested", id="foreign-sighting"),
    ],
)
def test_what_is_no_free_orphan_is_refused_unasked(
    stage: Stage, sleeper: ProcessId, changed: dict[str, Any], why: str
) -> None:
    case = orphan(sleeper, **changed)
    outcome = stage.end(case, case)
    assert outcome.refused.startswith(why)
    assert not outcome.ended
    assert (stage.proc.sent, stage.events) == ([], [])
    assert plan(case, Kill())[0].startswith("nothing: ")


def test_a_sightings_own_veto_is_enough(stage: Stage, sleeper: ProcessId) -> None:
    case = orphan(sleeper)
    case = replace(case, sighting=replace(case.sighting, veto="its exe is odd"))
    assert stage.end(case, case).refused == "its exe is odd"
    assert stage.proc.sent == []


def test_a_shim_of_unknown_signals_is_refused(stage: Stage, sleeper: ProcessId) -> None:
    case = orphan(sleeper)
    assert case.sighting.shim
    kata = replace(case.sighting.shim, generation=Generation.OTHER, exe="/usr/bin/containerd-shim-kata-v2")
    case = replace(case, sighting=replace(case.sighting, shim=kata))
    assert "kata" in stage.end(case, case).refused
    assert stage.proc.sent == []


@pytest.mark.parametrize("pid", [0, 1, -1, pytest.param(os.getpid(), id="own")])
def test_pid_1_and_orphand_itself_are_refused(stage: Stage, pid: int) -> None:
    case = orphan(ProcessId(pid, 1))
    assert "PID 1 or orphand itself" in stage.end(case, case).refused
    assert stage.proc.sent == []


def test_a_sighting_without_a_process_is_refused(stage: Stage, sleeper: ProcessId) -> None:
    case = orphan(sleeper, shim=None)
    assert stage.end(case, case).refused == "it has no process"


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        pytest.param(
            {"verdict": Verdict.MANAGED, "kind": None, "reason": "known to docker"}, "it is managed now", id="known"
        ),
        pytest.param({"verdict": Verdict.MANAGED, "reason": "known"}, "it is managed: known", id="known-with-a-kind"),
        pytest.param({"verdict": Verdict.UNDECIDED, "kind": None}, "it is undecided now", id="an-engine-went-silent"),
        pytest.param({"kind": Kind.ENGINE_ORPHAN}, "it is engine-orphan now", id="another-kind"),
        pytest.param({"kind": Kind.LEAKED_SHIM}, "it is leaked-shim now", id="an-init-came"),
        pytest.param({"veto": "a record came"}, "a record came", id="new-veto"),
        pytest.param({"foreign": "nested"}, "nested", id="foreign-now"),
    ],
)
def test_what_changed_since_is_refused(stage: Stage, sleeper: ProcessId, changed: dict[str, Any], why: str) -> None:
    outcome = stage.end(orphan(sleeper), orphan(sleeper, **changed))
    assert outcome.refused.startswith(why)
    assert (stage.proc.sent, stage.events) == ([], ["again"])


def test_what_is_gone_is_refused(stage: Stage, sleeper: ProcessId) -> None:
    assert stage.end(orphan(sleeper), None).refused == "it is gone"
    assert (stage.proc.sent, stage.events) == ([], ["again"])


@pytest.mark.parametrize("what", ["shim", "init", "namespace", "start"])
def test_other_processes_of_the_same_id_are_refused(stage: Stage, sleeper: ProcessId, what: str) -> None:
    case = orphan(sleeper)
    sighting = case.sighting
    assert sighting.shim
    other = {
        "shim": replace(sighting, shim=replace(sighting.shim, process=ProcessId(sleeper.pid + 1, 5))),
        "init": replace(sighting, inits=(Init(ProcessId(77, 7), ID, f"/docker/{ID}"),)),
        "namespace": replace(sighting, namespace="moby2"),
        "start": replace(sighting, shim=replace(sighting.shim, process=ProcessId(sleeper.pid, sleeper.start + 1))),
    }[what]
    assert "not the same" in stage.end(case, replace(case, sighting=other)).refused
    assert stage.proc.sent == []


def test_what_cant_be_recorded_is_refused(stage: Stage, sleeper: ProcessId) -> None:
    """A full disk: after a crash nobody would know of the half-ended container."""
    stage.full_disk = True
    assert "No space left" in stage.end(orphan(sleeper), orphan(sleeper)).refused
    assert stage.proc.sent == []


def test_the_record_is_written_before_and_forgotten_after(stage: Stage, sleeper: ProcessId) -> None:
    stage.end(orphan(sleeper, siblings=("other",)), orphan(sleeper, siblings=("other",)))
    assert stage.events[:2] == ["again", "remember"]
    assert stage.events[-1] == "forget"


def test_what_stops_half_way_stays_recorded(stage: Stage, sleeper: ProcessId) -> None:
    """An engine fell silent, say: what no look would find, a bundle or a mount, is removed when it answers again."""
    outcome = stage.end(orphan(sleeper), orphan(sleeper), denied="no answer from docker")
    assert unfinished(outcome) == "stopped: no answer from docker"
    assert (outcome.ended, "remember" in stage.events, "forget" in stage.events) == (False, True, False)


def test_a_shim_that_serves_others_too_gets_no_signal(stage: Stage, sleeper: ProcessId) -> None:
    """Seen only by the second look: the first one knew of no sibling."""
    stage.end(orphan(sleeper), orphan(sleeper, siblings=("other",)))
    assert stage.proc.sent == []
    assert stage.estates[0].shim_shared


class ByName:
    """A containerd whose task of the name is another one's after the TERM: somebody has started it anew."""

    def __init__(self, *pids: int) -> None:
        self.pids = list(pids)
        self.told: list[str] = []

    def task(self, namespace: str, container_id: str) -> Task:
        return Task(container_id, self.pids.pop(0), TaskStatus.RUNNING)

    def kill(self, namespace: str, container_id: str, number: int, every: bool = False) -> None:
        self.told.append(signal.Signals(number).name)


def test_a_task_of_the_same_name_that_was_made_since_is_not_killed(stage: Stage, sleeper: ProcessId) -> None:
    engine = ByName(sleeper.pid, sleeper.pid + 1)
    stage.containerd = lambda address: engine  # type: ignore[method-assign]
    stage.reaper._containerd = stage.containerd
    case = orphan(sleeper, kind=Kind.ENGINE_ORPHAN, shim=None, inits=(Init(sleeper, ID, f"/docker/{ID}"),))
    outcome = stage.end(case, case)
    assert engine.told == ["SIGTERM"]
    assert outcome.left[0] == f"stopped: containerd's task is process {sleeper.pid + 1}, which was not sighted"


class Mute(ByName):
    """A containerd that has the task and can't signal it: its bundle is gone, or it falls silent."""

    def __init__(self, code: str, *pids: int) -> None:
        super().__init__(*pids)
        self.code = code

    def kill(self, namespace: str, container_id: str, number: int, every: bool = False) -> None:
        raise CallFailed("Kill", self.code, "unable to retrieve OCI runtime error")

    def delete_task(self, namespace: str, container_id: str) -> None:
        self.told.append("task deleted")

    def delete_container(self, namespace: str, container_id: str) -> None:
        self.told.append("container deleted")


@pytest.mark.parametrize("code", ["UNKNOWN", "DEADLINE_EXCEEDED", "NOT_FOUND"])
@pytest.mark.parametrize("objection", ["", "no answer from containerd"])
def test_what_containerd_cant_signal_gets_term_only_if_still_nobody_objects(
    stage: Stage, sleeper: ProcessId, code: str, objection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaper, "KILL_SECONDS", 0.1)  # its signals are only written down
    engine = Mute(code, sleeper.pid, sleeper.pid)
    stage.containerd = lambda address: engine  # type: ignore[method-assign]
    stage.reaper._containerd = stage.containerd
    case = orphan(sleeper, kind=Kind.ENGINE_ORPHAN, shim=None, inits=(Init(sleeper, ID, f"/docker/{ID}"),))
    outcome = stage.end(case, case, objection)
    assert (sleeper.pid, signal.SIGTERM) in stage.proc.sent or objection
    assert (stage.proc.sent, engine.told) == ([], []) or not objection
    assert unfinished(outcome).removeprefix("stopped: ") == objection or not objection


@pytest.fixture
def second() -> Iterator[ProcessId]:
    with subprocess.Popen(["sleep", "600"]) as child:
        yield Proc().process(child.pid)
        child.kill()


def duplicate(shim: ProcessId, init: ProcessId, **changed: Any) -> Case:
    inits = (Init(init, ID, f"/another/{ID}"),)
    return orphan(shim, kind=Kind.DUPLICATE_SHIM, inits=inits, **changed)


def test_the_second_shim_of_a_managed_id_dies_before_it_can_say_or_unlink_anything(
    sleeper: ProcessId, second: ProcessId
) -> None:
    stage = Stage()
    order: list[tuple[int, int]] = []

    def send(process: ProcessId, number: int) -> None:
        order.append((process.pid, number))
        Proc().send_signal(process, number)

    stage.proc.send_signal = send  # type: ignore[method-assign]
    case = duplicate(sleeper, second)
    assert stage.end(case, case, denied="known to docker").ended
    assert order == [(sleeper.pid, signal.SIGKILL), (second.pid, signal.SIGTERM)]
    assert plan(case, Kill())[1].startswith(f"KILL to shim {sleeper.pid}")


def test_a_second_shim_that_serves_others_too_is_refused(stage: Stage, sleeper: ProcessId, second: ProcessId) -> None:
    case = duplicate(sleeper, second, siblings=("other",))
    assert stage.end(case, case).refused == "its shim serves other too"
    assert stage.proc.sent == []


# ---- after a crash


def resume(stage: Stage, estate: Estate, denied: str) -> Outcome:
    async def ask(_: Estate) -> str:
        stage.events.append("denied?")
        return denied

    return asyncio.run(stage.reaper.resume(estate, ask))


def estate_of(process: ProcessId, **changed: Any) -> Estate:
    estate = Estate(ID, "moby", ADDRESS, Kind.LEAKED_SHIM, Proc().boot_id(), inits=(process,))
    return replace(estate, **changed)


def test_nothing_is_finished_of_another_boot(stage: Stage, sleeper: ProcessId) -> None:
    outcome = resume(stage, estate_of(sleeper, boot_id="another"), "")
    assert (outcome.ended, stage.proc.sent, stage.events) == (True, [], ["forget"])


def test_nothing_is_finished_that_somebody_knows(stage: Stage, sleeper: ProcessId) -> None:
    outcome = resume(stage, estate_of(sleeper), "known to docker")
    assert outcome.refused == "known to docker"
    assert (stage.proc.sent, stage.events) == ([], ["denied?"])  # and it stays recorded


def test_containerds_record_of_an_engine_orphan_is_no_objection(stage: Stage, sleeper: ProcessId) -> None:
    """A crash came between the deletes of its task and of its container."""
    assert resume(stage, estate_of(sleeper), RECORD).refused == RECORD
    with pytest.raises(AssertionError, match="was contacted"):
        resume(stage, estate_of(sleeper, kind=Kind.ENGINE_ORPHAN), RECORD)
    more = f"{RECORD}; and Docker's metadata is there"
    assert resume(stage, estate_of(sleeper, kind=Kind.ENGINE_ORPHAN), more).refused == more


def test_a_duplicate_is_judged_anew(stage: Stage, sleeper: ProcessId) -> None:
    outcome = resume(stage, estate_of(sleeper, shim=sleeper, inits=(), kind=Kind.DUPLICATE_SHIM), "")
    assert (bool(outcome.refused), stage.proc.sent) == (True, [])


def test_a_duplicate_whose_shim_is_dead_already_is_finished(sleeper: ProcessId) -> None:
    stage = Stage()
    stage.proc.send_signal = Proc().send_signal  # type: ignore[method-assign]
    dead = ProcessId(sleeper.pid, sleeper.start - 1)
    outcome = resume(stage, estate_of(sleeper, shim=dead, kind=Kind.DUPLICATE_SHIM), "known to docker")
    assert (outcome.ended, outcome.refused) == (True, "")
    assert not Proc().alive(sleeper)


def test_a_reused_pid_gets_no_signal_after_a_crash(sleeper: ProcessId) -> None:
    """The record's process has ended, and its pid belongs to somebody else now."""
    stage = Stage()
    real = Proc()
    stage.proc.send_signal = real.send_signal  # type: ignore[method-assign]
    outcome = resume(stage, estate_of(ProcessId(sleeper.pid, sleeper.start - 1)), "")
    assert outcome.ended
    assert real.alive(sleeper)
    with pytest.raises(Gone):
        real.send_signal(ProcessId(sleeper.pid, sleeper.start - 1), 0)


def test_a_cgroup_that_was_made_anew_is_somebody_elses(stage: Stage, sleeper: ProcessId) -> None:
    estate = estate_of(ProcessId(sleeper.pid, sleeper.start - 1), cgroups={"/sys/fs/cgroup/unified": 99999999})
    resume(stage, estate, "")
    assert stage.proc.sent == []
