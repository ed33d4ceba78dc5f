# SPDX-License-Identifier: Apache-2.0
"""The policy: which rule speaks, and everything that stands between an orphan and its kill."""

from __future__ import annotations

from dataclasses import replace
from typing import Optional

import pytest

from orphand import policy
from orphand.model import Action, Case, Identity, Init, Judgement, Kind, ProcessId, Sighting, Verdict
from orphand.policy import Brakes, Budget
from orphand.settings import Kill, Match, Policy, Rule, Window

FREE = Brakes(budget_left=5)
KILL = Policy(action=Action.KILL)


def case(
    verdict: Verdict = Verdict.ORPHAN, kind: Kind = Kind.LEAKED_SHIM, veto: str = "", number: int = 1, name: str = "web"
) -> Case:
    container_id = f"{number:064x}"
    init = Init(ProcessId(100 + number, 5), container_id, f"/docker/{container_id}")
    sighting = Sighting(container_id, "moby", "/run/c.sock", None, (init,), 0.0)
    suspect = verdict in (Verdict.ORPHAN, Verdict.PENDING)
    return Case(sighting, (), Judgement(verdict, "", kind if suspect else None, veto=veto), Identity(name=name))


def action(subject: Case, rules: Policy = KILL, brakes: Brakes = FREE) -> Action:
    return policy.decide(subject, rules, brakes).action


def test_the_default_is_log_and_a_kill_must_be_written() -> None:
    assert action(case(), Policy()) is Action.LOG
    assert action(case(), Policy(action=Action.ALERT)) is Action.ALERT
    assert action(case()) is Action.KILL


@pytest.mark.parametrize(
    ("brakes", "then"),
    [
        (replace(FREE, tripped="7 of 9 look orphaned"), Action.ALERT),
        (replace(FREE, hold="kills are on hold"), Action.LOG),
        (replace(FREE, budget_left=0), Action.ALERT),
        (replace(FREE, hold="kills are on hold", tripped="7 of 9"), Action.LOG),
    ],
    ids=["breaker", "hold", "budget", "hold-and-breaker"],
)
def test_brakes(brakes: Brakes, then: Action) -> None:
    decision = policy.decide(case(), KILL, brakes)
    assert decision.action is then
    assert "says kill, but" in decision.reason


def test_a_first_start_is_not_called_a_spent_budget() -> None:
    """It is over in a moment: nobody is woken for it, and the words say what is waited for."""
    budget = Budget(closed_until=50.0)
    brakes = Brakes(budget_closed=budget.closed(49.0), budget_left=budget.left(49.0, 10))
    decision = policy.decide(case(), KILL, brakes)
    assert decision.action is Action.LOG
    assert "which waits: within scan.settle of a start without a memory" in decision.reason
    assert not budget.closed(50.0)


def test_a_veto_is_at_most_an_alert() -> None:
    assert action(case(veto="its directory exists")) is Action.ALERT


def test_a_disowned_container_is_killed_only_by_a_rule_of_its_kind() -> None:
    disowned = case(kind=Kind.DISOWNED)
    assert action(disowned) is Action.ALERT
    assert action(disowned, replace(KILL, rules=(Rule(Match(name="web"), Action.KILL),))) is Action.ALERT
    assert action(disowned, replace(KILL, rules=(Rule(Match(kind=Kind.DISOWNED), Action.KILL),))) is Action.KILL


def test_the_first_rule_that_fits_wins() -> None:
    rules = (
        Rule(Match(name="db*"), Action.LOG),
        Rule(Match(name="w*", namespace="moby"), Action.ALERT, 300.0),
        Rule(Match(name="web"), Action.KILL),
    )
    assert policy.decide(case(), replace(KILL, rules=rules), FREE) == policy.Decision(Action.ALERT, "policy rule 2")
    assert policy.grace_for(case(), replace(KILL, rules=rules, jitter=0.0)) == 300.0
    assert policy.grace_for(case(name="x"), replace(KILL, rules=rules, jitter=0.0)) == 120.0


def test_an_empty_match_fits_nothing() -> None:
    assert not policy.matches(Match(), case())


def test_exemptions_spare_only_what_looks_orphaned() -> None:
    rules = replace(KILL, exempt=(Match(name="w?b"),))
    assert policy.exempted(case(), rules).verdict is Verdict.EXEMPT
    assert policy.exempted(case(name="x"), rules).verdict is Verdict.ORPHAN
    assert policy.exempted(case(Verdict.UNDECIDED), rules).verdict is Verdict.UNDECIDED


@pytest.mark.parametrize(
    ("suspects", "managed", "foreign", "tripped"),
    [
        (1, 3, 0, False),
        (1, 2, 0, True),
        (1, 0, 0, True),
        (3, 9, 0, False),
        (4, 90, 0, True),
        (1, 2, 9, True),
        (0, 5, 0, False),
    ],
)
def test_breaker(suspects: int, managed: int, foreign: int, tripped: bool) -> None:
    verdicts = [Verdict.PENDING] * suspects + [Verdict.MANAGED] * managed + [Verdict.FOREIGN] * foreign
    cases = [case(verdict, number=n) for n, verdict in enumerate(verdicts)]
    assert bool(policy.breaker(cases, Kill())) is tripped


def test_a_tripped_breaker_resets_only_when_the_cause_is_gone() -> None:
    assert policy.latch("", "4 of 5", []) == "4 of 5"
    assert policy.latch("4 of 5", "", [case(Verdict.UNDECIDED)]) == "4 of 5"
    assert policy.latch("4 of 5", "", [case(Verdict.MANAGED)]) == ""
    assert policy.latch("", "", [case(Verdict.UNDECIDED)]) == ""


def test_the_hourly_budget() -> None:
    budget = Budget()
    for moment in (0.0, 10.0, 20.0):
        budget = budget.spend(moment)
    assert [budget.left(now, 3) for now in (20.0, 3599.0, 3601.0, 3621.0)] == [0, 0, 1, 3]
    assert Budget(closed_until=50.0).left(49.0, 10) == 0
    assert Budget(closed_until=50.0).left(50.0, 10) == 10


WEEKDAYS = Window(frozenset(range(5)), 9 * 60, 17 * 60, "Mon-Fri 09:00-17:00")
NIGHT = Window(frozenset({5}), 22 * 60, 6 * 60, "Sat 22:00-06:00")


@pytest.mark.parametrize(
    ("weekday", "clock", "inside"),
    [
        (0, (9, 0), True),
        (0, (8, 59), False),
        (4, (16, 59), True),
        (4, (17, 0), False),
        (5, (12, 0), False),
        (5, (22, 0), True),
        (6, (5, 59), True),
        (6, (6, 0), False),
        (6, (22, 0), False),
    ],
)
def test_windows(weekday: int, clock: tuple[int, int], inside: bool) -> None:
    minute = clock[0] * 60 + clock[1]
    assert policy.inside((WEEKDAYS, NIGHT), weekday, minute) is inside
    then = action(case(), replace(KILL, windows=(WEEKDAYS, NIGHT)), replace(FREE, weekday=weekday, minute=minute))
    assert then is (Action.KILL if inside else Action.LOG)


def test_a_window_of_a_whole_day() -> None:
    whole = Window(frozenset({2}), 0, 0, "Wed 00:00-00:00")
    assert [policy.inside((whole,), day, 700) for day in (1, 2, 3)] == [False, True, False]


def test_jitter_differs_between_nodes_and_never_shortens_the_grace() -> None:
    graces = {policy.grace_for(case(), KILL, f"node{n}") for n in range(50)}
    assert len(graces) == 50
    assert all(120.0 <= grace <= 150.0 for grace in graces)
    assert policy.grace_for(case(), KILL, "node1") == policy.grace_for(case(), KILL, "node1")


@pytest.mark.parametrize("kind", [None, Kind.LEAKED_SHIM])
def test_kind_in_a_match(kind: Optional[Kind]) -> None:
    assert policy.matches(Match(kind=kind, name="web"), case())
    assert not policy.matches(Match(kind=Kind.SHIMLESS, name="web"), case())


UNTOLD = replace(case(), identity=Identity())


@pytest.mark.parametrize(
    ("match", "why"),
    [
        (Match(image="registry.example/agent*"), "its image"),
        (Match(name="agent", image="*"), "its image and name"),
        (Match(name="agent", namespace="moby"), "its name"),
        (Match(name="agent", kind=Kind.LEAKED_SHIM), "its name"),
        (Match(hostname="db*"), "its hostname"),
        (Match(name="agent", namespace="default"), ""),
        (Match(pod_namespace="kube-system"), ""),  # a pod's cgroup would have told that it is one's
    ],
)
def test_what_may_be_exempt_is_not_killed(match: Match, why: str) -> None:
    """An orphan of Docker's has lost its name and image with Docker's record; the exemption means it all the same."""
    decision = policy.decide(UNTOLD, replace(KILL, exempt=(match,)), FREE)
    assert decision.action is (Action.ALERT if why else Action.KILL)
    assert decision.reason.endswith(why)


def test_what_is_known_not_to_be_exempt_is_killed() -> None:
    known = replace(case(), identity=Identity(name="web", image="registry.example/web:1"))
    assert action(known, replace(KILL, exempt=(Match(image="registry.example/agent*"),))) is Action.KILL


def test_a_pod_that_only_its_cgroup_tells_may_be_any() -> None:
    pod = replace(case(), identity=Identity(name="n", image="i", hostname="h", pod="uid 1-2"))
    assert action(pod, replace(KILL, exempt=(Match(pod_namespace="kube-system"),))) is Action.ALERT
    assert action(pod, replace(KILL, exempt=(Match(pod="web-*"),))) is Action.ALERT


@pytest.mark.parametrize(
    ("rules", "then"),
    [
        ((Rule(Match(image="a*"), Action.ALERT),), Action.ALERT),
        ((Rule(Match(image="a*"), Action.LOG),), Action.ALERT),
        ((Rule(Match(image="a*"), Action.KILL),), Action.KILL),
        ((Rule(Match(image="a*"), grace=600.0),), Action.KILL),
        ((Rule(Match(namespace="moby"), Action.KILL), Rule(Match(image="a*"), Action.LOG)), Action.KILL),
    ],
    ids=["alert", "log", "kill", "grace-only", "after-the-one-that-fits"],
)
def test_a_rule_that_may_be_meant_for_it_keeps_later_ones_from_killing(rules: tuple[Rule, ...], then: Action) -> None:
    assert action(UNTOLD, replace(KILL, rules=rules)) is then


def test_of_the_graces_that_may_be_meant_for_it_the_longest_counts() -> None:
    rules = (Rule(Match(image="a*"), grace=600.0), Rule(Match(namespace="moby"), grace=90.0))
    assert policy.grace_for(UNTOLD, replace(KILL, jitter=0.0, rules=rules)) == 600.0
    known = replace(case(), identity=Identity(image="b"))
    assert policy.grace_for(known, replace(KILL, jitter=0.0, rules=rules)) == 90.0
