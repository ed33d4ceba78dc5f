# SPDX-License-Identifier: Apache-2.0
"""The story: one record for each change of verdict, none for a look that finds nothing new."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Optional

from orphand.model import (
    Action,
    Case,
    Claim,
    Decision,
    Generation,
    Identity,
    Init,
    Judgement,
    Kind,
    ProcessId,
    Shim,
    Sighting,
    Survey,
    Testimony,
    Verdict,
)
from orphand.report.story import Story
from orphand.report.topics import Topic

ONE, TWO = "1" * 64, "2" * 64


def case(verdict: Verdict, container_id: str = ONE, kind: Kind = Kind.LEAKED_SHIM, shim: int = 10) -> Case:
    keeper = Shim(ProcessId(shim, 5), Generation.RUNC_V2, "/s", "moby", container_id, "/c", "/b", 1)
    inits = (Init(ProcessId(11, 6), container_id, "/x"),) if kind is not Kind.CHILDLESS_SHIM else ()
    sighting = Sighting(container_id, "moby", "/c", keeper if shim else None, inits, 1.0)
    claim = Claim.UNAVAILABLE if verdict is Verdict.UNDECIDED else Claim.UNKNOWN
    suspect = verdict in (Verdict.PENDING, Verdict.ORPHAN)
    return Case(
        sighting, (Testimony("docker", claim, 2.0),), Judgement(verdict, "because", kind=kind if suspect else None)
    )


@dataclass
class Listener:
    """A story and what it has told since it was last asked."""

    action: Action = Action.KILL
    told: list[tuple[Topic, Optional[Case], str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.story = Story(self._hear)
        self.now = 0.0

    def _hear(self, topic: Topic, message: str, case: Optional[Case] = None, **fields: str) -> None:
        self.told.append((topic, case, message))

    def look(self, *cases: Case, complete: bool = True, after: float = 30.0) -> list[Topic]:
        self.now += after
        survey = Survey(cases, self.now, complete)
        self.story.look(survey, lambda c: Decision(self.action, "rule"), lambda c: 120.0, self.now)
        told, self.told = self.told, []
        return [topic for topic, _, _ in told]


def test_each_verdict_is_told_once() -> None:
    node = Listener()
    pending, orphan = case(Verdict.PENDING), case(Verdict.ORPHAN)
    assert node.look(case(Verdict.MANAGED)) == []
    assert node.look(pending) == [Topic.SUSPECTED]
    assert [node.look(pending) for _ in range(5)] == [[]] * 5
    assert node.look(orphan) == [Topic.ORPHANED]
    assert [node.look(orphan) for _ in range(5)] == [[]] * 5
    assert node.look(case(Verdict.MANAGED)) == [Topic.CLEARED]
    assert node.look(case(Verdict.MANAGED)) == []
    assert node.look(pending) == [Topic.SUSPECTED]


def test_who_is_cleared_is_named_although_only_suspects_are_identified() -> None:
    node = Listener()
    node.look(replace(case(Verdict.PENDING), identity=Identity(name="web")))
    node.story.look(Survey((case(Verdict.MANAGED),), 1.0), lambda c: Decision(Action.LOG, ""), lambda c: 1.0, 1.0)
    [(topic, about, message)] = node.told
    assert topic is Topic.CLEARED
    assert about is not None
    assert about.identity.name == "web"
    assert message == "no orphan any more: web (111111111111): because"


def test_a_decision_that_changes_is_told_again() -> None:
    node = Listener(Action.ALERT)
    orphan = case(Verdict.ORPHAN)
    assert node.look(orphan) == [Topic.ORPHANED]
    node.action = Action.KILL
    assert node.look(orphan) == [Topic.ORPHANED]
    assert node.look(orphan) == []


def test_an_orphan_that_is_found_at_once_is_told_as_one() -> None:
    assert Listener().look(case(Verdict.ORPHAN)) == [Topic.ORPHANED]


def test_what_ends_by_itself_is_told_and_what_we_ended_is_not() -> None:
    node = Listener(Action.ALERT)
    node.look(case(Verdict.ORPHAN), case(Verdict.ORPHAN, TWO, shim=20))
    node.story.forget(case(Verdict.ORPHAN).sighting)
    assert node.look() == [Topic.CLEARED]
    assert node.look() == []


def test_looks_into_an_end_that_is_under_way_tell_nothing() -> None:
    """Its processes go one by one; what became of it is told by whoever ends it."""
    node = Listener(Action.KILL)
    assert node.look(case(Verdict.ORPHAN)) == [Topic.ORPHANED]
    assert node.look(case(Verdict.PENDING, kind=Kind.CHILDLESS_SHIM)) == []
    assert node.look() == []


def test_an_incomplete_look_is_no_proof_that_one_is_gone() -> None:
    node = Listener()
    assert node.look(case(Verdict.PENDING)) == [Topic.SUSPECTED]
    assert node.look(complete=False) == []
    assert node.look() == [Topic.CLEARED]


def test_an_incomplete_look_that_has_seen_it_before_is() -> None:
    node = Listener()
    assert node.look(case(Verdict.PENDING), complete=False) == [Topic.SUSPECTED]
    assert node.look(complete=False) == [Topic.CLEARED]


def test_an_orphan_whose_shim_dies_goes_on_as_another_kind() -> None:
    node = Listener()
    node.look(case(Verdict.PENDING))
    assert node.look(case(Verdict.PENDING, kind=Kind.SHIMLESS, shim=0)) == [Topic.SUSPECTED]
    assert node.look(case(Verdict.PENDING, kind=Kind.SHIMLESS, shim=0)) == []


def test_an_orphan_whose_init_dies_is_told_as_another_kind() -> None:
    node = Listener()
    node.look(case(Verdict.PENDING))
    childless = case(Verdict.PENDING, kind=Kind.CHILDLESS_SHIM)
    assert node.look(childless) == [Topic.SUSPECTED]
    assert node.look(childless) == []


def test_two_shims_of_one_container_have_each_a_story() -> None:
    node = Listener()
    first, second = case(Verdict.PENDING, shim=10), case(Verdict.PENDING, shim=20)
    assert node.look(first, second) == [Topic.SUSPECTED] * 2


def test_one_missed_answer_is_not_told() -> None:
    node = Listener()
    silent = case(Verdict.UNDECIDED)
    assert node.look(silent) == []
    assert node.look(case(Verdict.MANAGED)) == []
    assert node.look(silent) == []
    assert node.look(silent) == [Topic.UNDECIDED]
    assert node.look(silent) == []


def test_the_many_looks_that_an_engines_restart_causes_are_a_blip_too() -> None:
    node = Listener()
    silent = case(Verdict.UNDECIDED)
    assert [node.look(silent, after=1.0) for _ in range(25)] == [[]] * 25
    assert node.look(silent, after=20.0) == [Topic.UNDECIDED]


def test_all_containers_that_wait_for_one_authority_share_a_record() -> None:
    node = Listener()
    silent = [case(Verdict.UNDECIDED, f"{n:064x}", shim=n) for n in range(10, 110)]
    node.look(*silent)
    node.story.look(Survey(tuple(silent), 1.0), lambda c: Decision(Action.LOG, ""), lambda c: 1.0, node.now + 30)
    [(topic, about, message)] = node.told
    assert topic is Topic.UNDECIDED
    assert about is None
    assert "100 containers" in message


def test_another_silent_authority_is_another_record() -> None:
    node = Listener()
    docker = case(Verdict.UNDECIDED)
    both = replace(docker, testimonies=(*docker.testimonies, Testimony("containerd", Claim.UNAVAILABLE, 2.0)))
    node.look(docker)
    node.look(docker)
    assert node.look(both) == []
    assert node.look(both) == [Topic.UNDECIDED]


def test_after_a_silence_that_was_told_the_orphan_is_told_again() -> None:
    node = Listener()
    orphan, silent = case(Verdict.ORPHAN), case(Verdict.UNDECIDED)
    assert node.look(orphan) == [Topic.ORPHANED]
    assert node.look(silent) == []
    assert node.look(silent) == [Topic.UNDECIDED]
    assert node.look(case(Verdict.PENDING)) == []
    assert node.look(orphan) == [Topic.ORPHANED]


def test_an_exempt_or_foreign_container_clears_a_suspicion() -> None:
    for verdict in (Verdict.EXEMPT, Verdict.FOREIGN):
        node = Listener()
        node.look(case(Verdict.PENDING))
        assert node.look(case(verdict)) == [Topic.CLEARED]
