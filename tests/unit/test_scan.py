# SPDX-License-Identifier: Apache-2.0
"""What a look passes on from the looker to the judge, on a node that is written down."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Optional

import pytest

from orphand import served, sightings
from orphand.authorities.bench import Roll
from orphand.errors import Denied
from orphand.model import Claim, Identity, Sighting, Survey, Testimony, Verdict
from orphand.proc import Proc
from orphand.scan import Scanner
from orphand.shims import Facts, gather
from orphand.sightings import Looker
from tests.fakeproc import FakeNode

A, B, C = "a" * 64, "b" * 64, "c" * 64


class Witness:
    """A bench that knows some ids and denies the rest."""

    def __init__(self, *known: str) -> None:
        self.known = known
        self.silent = False
        self.asked = 0
        self.quiet = True  # what a Docker's last list tells is still so

    def hear(
        self, sightings: Sequence[Sighting], everybody: bool = False, quiet_since: Optional[float] = None
    ) -> dict[tuple[str, ...], tuple[Testimony, ...]]:
        self.asked += 1
        if self.silent:
            return {s.key: (Testimony("docker", Claim.UNAVAILABLE, 0.0, "it hangs"),) for s in sightings}
        claims = {s.key: Claim.KNOWN if s.container_id in self.known else Claim.UNKNOWN for s in sightings}
        return {key: (Testimony("docker", claim, float("inf")),) for key, claim in claims.items()}

    def knows_still(self, roll: Roll, quiet_since: float) -> bool:
        return self.quiet and all(i in self.known for ids in roll.ids.values() for i in ids)


@pytest.fixture
def node(tmp_path: Path) -> FakeNode:
    return FakeNode(tmp_path)


def scanner(node: FakeNode, *known: str) -> Scanner:
    return Scanner(Looker(node.proc, node.disk), Witness(*known), lambda s: Identity())  # type: ignore[arg-type]


def shared_pid_namespace(node: FakeNode) -> None:
    """A, and B that was started with --pid=container:A."""
    node.v2_shim(50, A)
    node.init(51, 50, A, pidns=900)
    node.v2_shim(60, B)
    node.init(61, 60, B, pidns=900, nspids=[61, 9])
    node.record("/run/docker/runtime-runc", "moby", B, 61)


def test_who_shares_an_orphans_pid_namespace_is_a_veto_in_each_look(node: FakeNode) -> None:
    shared_pid_namespace(node)
    eyes = scanner(node, B)
    orphan, managed = sorted(eyes.look().cases, key=lambda c: c.sighting.container_id)
    assert (orphan.judgement.verdict, managed.judgement.verdict) == (Verdict.PENDING, Verdict.MANAGED)
    assert orphan.judgement.veto == f"container {B[:12]} lives in its pid namespace and would die with it"
    again = eyes.again(orphan)
    assert again is not None
    assert again.judgement.veto == orphan.judgement.veto


def test_an_orphan_in_a_managed_ones_pid_namespace_can_end(node: FakeNode) -> None:
    shared_pid_namespace(node)
    orphan = next(c for c in scanner(node, A).look().cases if c.sighting.container_id == B)
    assert (orphan.judgement.verdict, orphan.judgement.veto) == (Verdict.PENDING, "")


def quiet_node(node: FakeNode, *known: str) -> tuple[Scanner, Witness]:
    """One container, that was looked at; nothing has changed since."""
    node.v2_shim(50, A)
    node.init(51, 50, A)
    witness = Witness(*known)
    eyes = Scanner(Looker(node.proc, node.disk), witness, lambda s: Identity())  # type: ignore[arg-type]
    eyes.look(full=True)
    return eyes, witness


def test_where_nothing_has_changed_nobody_is_asked_again(node: FakeNode) -> None:
    eyes, witness = quiet_node(node, A)
    first = eyes.look(full=True)
    same = eyes.look(quiet_since=1.0)
    assert witness.asked == 2
    assert (same.cases, first.complete, same.complete) == (first.cases, True, False)
    assert same.seen_at > first.seen_at
    for asks in ({}, {"full": True, "quiet_since": 1.0}, {"everybody": True, "quiet_since": 1.0}):
        before = witness.asked
        eyes.look(**asks)  # type: ignore[arg-type]
        assert witness.asked == before + 1


@pytest.mark.parametrize("what", ["a process ended", "a shim came", "Docker's list is old", "again", "an error"])
def test_what_has_changed_is_asked_for(node: FakeNode, what: str) -> None:
    eyes, witness = quiet_node(node, A)
    verdicts = {A: Verdict.MANAGED}
    if what == "a process ended":
        node.end(51)
    elif what == "a shim came":
        node.v2_shim(60, B)
        verdicts[B] = Verdict.PENDING
    elif what == "again":  # what a second look at a suspect saw is not lost
        node.v2_shim(60, B)
        verdicts[B] = Verdict.PENDING
        (case,) = eyes.look().cases[:1]
        witness.asked = 1
        assert eyes.again(case)
        node.v2_shim(70, C)
        verdicts[C] = Verdict.PENDING
        assert eyes.again(case)
        witness.known = (A, B, C)
        verdicts = dict.fromkeys(verdicts, Verdict.MANAGED)
        witness.asked = 1
    elif what == "an error":
        with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:
            patch.setattr(witness, "hear", lambda *_: 1 // 0)
            node.v2_shim(60, B)
            eyes.look()
        verdicts[B] = Verdict.PENDING
    else:
        witness.quiet = False
    survey = eyes.look(quiet_since=1.0)
    assert witness.asked == 2
    assert {c.sighting.container_id: c.judgement.verdict for c in survey.cases} == verdicts


def test_what_is_undecided_is_asked_for_in_each_look(node: FakeNode) -> None:
    eyes, witness = quiet_node(node, A)
    witness.silent = True
    for _ in range(2):
        (case,) = eyes.look().cases
        assert case.judgement.verdict is Verdict.UNDECIDED
    witness.silent = False
    (case,) = eyes.look(quiet_since=1.0).cases
    assert case.judgement.verdict is Verdict.MANAGED


def test_a_suspect_is_asked_for_in_each_look(node: FakeNode) -> None:
    eyes, witness = quiet_node(node)
    for _ in range(2):
        (case,) = eyes.look(quiet_since=1.0).cases
        assert case.judgement.verdict is Verdict.PENDING
    assert witness.asked == 3


def test_a_member_that_came_since_is_one_of_what_a_suspects_shim_serves(node: FakeNode) -> None:
    """A look by part reads again only what changed; a suspect is read anew, so that nobody is overlooked."""
    node.v2_shim(50, A, namespace="pods")
    node.init(51, 50, A)
    eyes = scanner(node, B)
    assert [c.sighting.siblings for c in eyes.look(full=True).cases] == [()]
    node.init(52, 50, B)  # without a bundle that names the shim's socket
    assert [c.sighting.siblings for c in eyes.look().cases if c.sighting.container_id == A] == [(B,)]


# ---- what could not be read for a moment


def unread_once(monkeypatch: pytest.MonkeyPatch, pid: int, module: ModuleType = served) -> None:
    """The next reading of that process fails, as where no descriptor is free."""
    real, left = gather, [1]

    def failing(proc: Proc, asked: int) -> Facts:
        if asked == pid and left[0]:
            left[0] -= 1
            raise Denied("too many open files")
        return real(proc, asked)

    monkeypatch.setattr(module, "gather", failing)


def seen(survey: Survey) -> dict[str, tuple[int, ...]]:
    return {c.sighting.container_id: tuple(p.pid for p in c.sighting.processes) for c in survey.cases}


def host_pid_container(node: FakeNode, generation: str = "v2") -> None:
    """A with two processes below its shim, of which only runc's record tells the first."""
    getattr(node, f"{generation}_shim")(50, A)
    for pid in (51, 63):
        node.init(pid, 50, A, nspids=[pid], pidns=200, start=pid)


def test_a_member_of_a_pod_is_seen_as_soon_as_it_can_be_read(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    node.v2_shim(50, A, namespace="pods")
    node.init(51, 50, A)
    node.init(52, 50, B)
    eyes = scanner(node, A)
    unread_once(monkeypatch, 52)
    assert seen(eyes.look(full=True)) == {A: (50, 51)}
    assert seen(eyes.look()) == {A: (50, 51), B: (50, 52)}


def test_one_beside_another_that_ends_is_too(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    node.v2_shim(50, A, namespace="pods")
    for pid, container_id in ((51, A), (52, B), (53, C)):
        node.init(pid, 50, container_id)
    eyes = scanner(node, A)
    eyes.look(full=True)
    unread_once(monkeypatch, 52)
    node.end(53)
    eyes.look()
    assert set(seen(eyes.look())) == {A, B}


def test_what_lives_in_an_orphans_pid_namespace_is_a_veto_as_soon_as_it_can_be_read(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.v2_shim(50, A, namespace="pods")
    node.init(51, 50, A, pidns=900)
    node.init(52, 50, B, pidns=900, nspids=[52, 9])
    eyes = scanner(node, B)
    unread_once(monkeypatch, 52)
    (case,) = eyes.look(full=True).cases
    assert case.judgement.veto == "a child of its shim, process 52, could not be read"
    (case,) = (c for c in eyes.look().cases if c.sighting.container_id == A)
    assert case.judgement.veto == f"container {B[:12]} lives in its pid namespace and would die with it"
    again = eyes.again(case)
    assert again is not None
    assert "pid namespace" in again.judgement.veto


def test_an_orphan_whose_init_could_not_be_read_is_seen(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    host_pid_container(node)
    node.record("/run/docker/runtime-runc", "moby", A, 51, 51)
    eyes = scanner(node)
    unread_once(monkeypatch, 51)
    eyes.look(full=True)
    assert seen(eyes.look()) == {A: (50, 51)}


@pytest.mark.parametrize("looks", [0, 2])
@pytest.mark.parametrize("generation", ["v1", "v2"])
def test_an_orphan_that_loses_its_record_goes_on_to_be_seen(node: FakeNode, generation: str, looks: int) -> None:
    """Without the record another of its processes counts as the first: what was remembered is read anew."""
    host_pid_container(node, generation)
    node.record("/run/docker/runtime-runc", "moby", A, 63, 63)
    eyes = scanner(node)
    for _ in range(looks):
        eyes.look(full=True)
    assert seen(eyes.look(full=True)) == {A: (50, 63)}
    shutil.rmtree(node.disk_root / "run/docker/runtime-runc")
    eyes.look()
    assert set(seen(eyes.look())) == {A}


def test_a_suspect_that_could_not_be_read_again_is_looked_for(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """That look must not be taken for one that found everything settled."""
    for pid, container_id in ((50, A), (60, B)):
        node.v2_shim(pid, container_id)
        node.init(pid + 1, pid, container_id)
    eyes = scanner(node, A)
    eyes.look(full=True)
    unread_once(monkeypatch, 60, sightings)
    assert set(seen(eyes.look(quiet_since=1.0))) == {A}
    assert set(seen(eyes.look(quiet_since=1.0))) == {A, B}


def test_a_stray_that_loses_its_record_goes_on_to_be_seen(node: FakeNode) -> None:
    """The record named its namespace: without it, it is known by another name."""
    node.init(51, 1, A)
    node.record("/run/docker/runtime-runc", "moby", A, 51)
    eyes = scanner(node)
    (case,) = eyes.look(full=True).cases
    assert case.sighting.namespace == "moby"
    shutil.rmtree(node.disk_root / "run/docker/runtime-runc")
    eyes.look()
    (case,) = eyes.look().cases
    assert case.sighting.namespace == ""
