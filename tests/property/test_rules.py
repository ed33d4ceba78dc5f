# SPDX-License-Identifier: Apache-2.0
"""The rules that keep a managed container safe, for every sequence of looks, answers and brakes.

A machine plays the node and its engines; an oracle of its own counts what was really answered.
Whenever judge and policy decide on a kill, the oracle must agree that every rule held.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings as profile
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from orphand import judge, policy
from orphand.model import (
    Action,
    Case,
    Claim,
    Generation,
    Identity,
    Init,
    Kind,
    ProcessId,
    Role,
    Shim,
    Sighting,
    Testimony,
    Verdict,
)
from orphand.settings import Kill, Match, Policy, Rule

GRACE = 60.0
MAX_GAP = 100.0
NUMBERS = range(6)
RULES = Policy(
    action=Action.KILL,
    grace=GRACE,
    jitter=0.0,
    exempt=(Match(name="exempt*"),),
    rules=(Rule(Match(name="logged"), Action.LOG),),
)
LIMITS = Kill(max_orphans=2, max_share=0.5, max_kills_per_hour=3)

answers = st.builds(
    Testimony,
    authority=st.sampled_from(["docker", "containerd", "another"]),
    claim=st.sampled_from(list(Claim)),
    asked_at=st.sampled_from([-1.0, 1.0]),  # before or after the sighting
    veto=st.sampled_from(["", "", "", "its directory exists"]),
    role=st.sampled_from(list(Role)),
    pid=st.sampled_from([0, 1000, 2000]),
)
NO = (Testimony("docker", Claim.UNKNOWN, 1.0),)


class Node(RuleBasedStateMachine):
    """Six containers, their witnesses and an admin."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.history = judge.History()
        self.budget = policy.Budget()
        self.tripped = ""
        self.hold = ""
        self.answers: dict[int, tuple[Testimony, ...]] = dict.fromkeys(NUMBERS, NO)
        self.generation = dict.fromkeys(NUMBERS, Generation.RUNC_V2)
        self.names = dict.fromkeys(NUMBERS, "web")
        self.restarts = dict.fromkeys(NUMBERS, 0)
        self.foreign = dict.fromkeys(NUMBERS, "")
        self.denied_since: dict[int, list[float]] = {n: [] for n in NUMBERS}
        self.kills: list[float] = []
        self.cases: list[Case] = []

    @rule(number=st.sampled_from(NUMBERS), given=st.lists(answers, max_size=3).map(tuple))
    def answer(self, number: int, given: tuple[Testimony, ...]) -> None:
        self.answers[number] = given

    @rule(numbers=st.sets(st.sampled_from(NUMBERS), min_size=4))
    def known(self, numbers: set[int]) -> None:
        for number in numbers:
            self.answers[number] = (Testimony("docker", Claim.KNOWN, 1.0),)

    @rule(number=st.sampled_from(NUMBERS))
    def lost(self, number: int) -> None:
        self.answers[number] = NO

    @rule(number=st.sampled_from(NUMBERS))
    def restarted(self, number: int) -> None:
        self.restarts[number] += 1
        self.denied_since[number] = []

    @rule(number=st.sampled_from(NUMBERS), name=st.sampled_from(["web", "exempt-1", "logged"]))
    def named(self, number: int, name: str) -> None:
        self.names[number] = name

    @rule(number=st.sampled_from(NUMBERS), generation=st.sampled_from(list(Generation)))
    def other_shim(self, number: int, generation: Generation) -> None:
        self.generation[number] = generation

    @rule(number=st.sampled_from(NUMBERS), why=st.sampled_from(["", "podman's"]))
    def foreigner(self, number: int, why: str) -> None:
        self.foreign[number] = why

    @rule(hold=st.sampled_from(["", "kills are on hold"]))
    def holds(self, hold: str) -> None:
        self.hold = hold

    @rule(seconds=st.sampled_from([1.0, 20.0, 30.0, 59.0, 200.0, 4000.0]))
    def look(self, seconds: float) -> None:
        gap, self.now = seconds, self.now + seconds
        looks = [(self._sighting(n), self._heard(n)) for n in NUMBERS]
        judgements = judge.protect_siblings(list(zip([s for s, _ in looks], judge.conclude_all(looks))))
        cases = [Case(s, t, j, Identity(name=self.names[n])) for n, (s, t), j in zip(NUMBERS, looks, judgements)]
        cases = [replace(c, judgement=policy.exempted(c, RULES)) for c in cases]
        self.history = judge.remember(self.history, {c.sighting.key: c.judgement for c in cases}, self.now, MAX_GAP)
        self.cases = [
            replace(c, judgement=judge.ripen(c.judgement, self.history.rows.get(c.sighting.key), self.now, GRACE))
            for c in cases
        ]
        self.tripped = policy.latch(self.tripped, policy.breaker(self.cases, LIMITS), self.cases)
        self._note_denials(gap)
        self._act()

    def _sighting(self, number: int) -> Sighting:
        pid, container_id = 1000 * (number + 1), f"{number:064x}"
        start = 5 + self.restarts[number]
        shim = Shim(ProcessId(pid + 1, start), self.generation[number], "/shim", "moby", container_id, "/s", "/b", 1)
        init = Init(ProcessId(pid, start), container_id, f"/docker/{container_id}")
        return Sighting(container_id, "moby", "/s", shim, (init,), self.now, foreign=self.foreign[number])

    def _heard(self, number: int) -> tuple[Testimony, ...]:
        return tuple(replace(t, asked_at=self.now + t.asked_at) for t in self.answers[number])

    def _denied(self, number: int) -> bool:
        """By the oracle's own reading of the rules, not by orphand's code."""
        given = self.answers[number]
        owners = [t for t in given if t.role is Role.OWNER]
        return (
            bool(owners)
            and all(t.claim in (Claim.UNKNOWN, Claim.DISOWNED) for t in owners)
            and all(t.claim is not Claim.UNAVAILABLE and t.asked_at > 0 for t in given)
            and not self.foreign[number]
            and not self.names[number].startswith("exempt")
        )

    def _note_denials(self, gap: float) -> None:
        for number in NUMBERS:
            if not self._denied(number):
                self.denied_since[number] = []
                continue
            if gap > MAX_GAP:
                self.denied_since[number] = []
            self.denied_since[number].append(self.now)

    def _act(self) -> None:
        for number, case in enumerate(self.cases):
            if case.judgement.verdict is not Verdict.ORPHAN:
                continue
            left = self.budget.left(self.now, LIMITS.max_kills_per_hour)
            decision = policy.decide(case, RULES, policy.Brakes(self.tripped, self.hold, budget_left=left))
            if decision.action is Action.KILL:
                self._check_kill(number, case)
                self.budget = self.budget.spend(self.now)
                self.kills.append(self.now)

    def _check_kill(self, number: int, case: Case) -> None:
        looks = self.denied_since[number]
        assert self._denied(number), "somebody did not deny it"
        assert looks, "not denied in this look"
        assert self.now - looks[0] >= GRACE, "not for the whole grace"
        assert len(looks) >= judge.MIN_LOOKS, "in too few looks"
        assert self.generation[number] is not Generation.OTHER, "its signals are not known"
        assert not any(t.veto for t in self.answers[number]), "metadata exists"
        assert self.names[number] == "web", "a rule says otherwise"
        assert not self.hold, "on hold"
        assert case.judgement.kind is not Kind.DISOWNED, "disowned without a rule for it"
        suspects = [n for n in NUMBERS if self.denied_since[n]]
        counted = [n for n in NUMBERS if not self.foreign[n]]
        assert len(suspects) <= LIMITS.max_orphans, "too many at once"
        assert len(suspects) <= LIMITS.max_share * len(counted), "too large a share"
        recent = [t for t in self.kills if self.now - t < 3600.0]
        assert len(recent) < LIMITS.max_kills_per_hour, "too many in an hour"

    @invariant()
    def a_known_one_is_managed(self) -> None:
        for case in self.cases:
            owners = [t for t in case.testimonies if t.role is Role.OWNER and t.claim is Claim.KNOWN]
            if owners and not case.sighting.foreign:
                assert case.judgement.verdict is Verdict.MANAGED


Node.TestCase.settings = profile(max_examples=150, stateful_step_count=40, deadline=None)
TestRules = Node.TestCase


def test_the_machine_does_reach_a_kill() -> None:
    """Else the assertions above would say nothing."""
    node = Node()
    node.known(set(NUMBERS) - {0})
    for _ in range(4):
        node.look(30.0)
    assert node.kills
