# SPDX-License-Identifier: Apache-2.0
"""When the daemon begins an end, and when it goes on with one. With real engines: tests/engine/test_daemon.py."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import pytest

from orphand import proc
from orphand.daemon import Daemon, _orphans
from orphand.estate import Estate
from orphand.model import (
    Action,
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
from orphand.policy import Budget
from orphand.report.alerts import Event
from orphand.report.story import Story, container_key
from orphand.report.topics import Topic
from orphand.settings import Match, Policy, Rule, Settings, Window
from orphand.state import Hold, State, write_hold

ID = "4f" * 32
KILL = Policy(action=Action.KILL)
ESTATE = Estate(ID, "moby", "/c.sock", Kind.LEAKED_SHIM, "b", inits=(ProcessId(4000000, 5),))


class NoEngines:
    def data_roots(self) -> tuple[str, ...]:
        return ()


class StandIn:
    """For the reaper, which has tests of its own: what it comes to is given."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.ends = 0

    async def end(self, case: Case, again: Any, denied: Any) -> Outcome:
        self.ends += 1
        return self.outcome

    async def resume(self, estate: Estate, denied: Any) -> Outcome:
        self.ends += 1
        return self.outcome


class NoAlerts:
    sent: frozenset[str] = frozenset()
    any_open = False

    def send(self, *_: Any) -> None:
        """Nobody is told."""


@pytest.fixture
def daemon(tmp_path: Path) -> Daemon:
    def report(topic: Topic, message: str, case: Optional[Case] = None, **fields: str) -> None:
        """Nothing is written."""

    made = Daemon(report, runtime_dir=tmp_path / "run", state_dir=tmp_path / "lib")
    made._settings = Settings(policy=KILL)
    made._state = State("b")
    made._bench = NoEngines()  # type: ignore[assignment]
    made._alerts = NoAlerts()  # type: ignore[assignment]
    made._story = Story(report)
    return made


def orphan() -> Case:
    sighting = Sighting(ID, "moby", "/c.sock", None, (Init(ProcessId(4000000, 5), ID, f"/docker/{ID}"),), 0.0)
    return Case(sighting, (), Judgement(Verdict.ORPHAN, "because", Kind.SHIMLESS))


def end(daemon: Daemon, outcome: Outcome, seen: Optional[Case] = None) -> int:
    """How many ends the reaper was told to begin."""
    reaper = StandIn(outcome)
    daemon._reaper = reaper  # type: ignore[assignment]
    case = orphan()
    daemon._cases = {case.sighting.key: seen or case}
    asyncio.run(daemon._end_locked(case))
    return reaper.ends


def test_an_end_that_was_begun_is_counted(daemon: Daemon) -> None:
    assert end(daemon, Outcome(True)) == 1
    assert daemon._state.budget.left(proc.now(), 10) == 9


def test_one_that_is_refused_spends_nothing(daemon: Daemon) -> None:
    """Else one that is refused after each grace would spend what is meant for all."""
    assert end(daemon, Outcome(False, refused="it is managed now")) == 1
    assert daemon._state.budget.left(proc.now(), 10) == 10


def test_one_that_stopped_half_way_is_gone_on_with_later(daemon: Daemon) -> None:
    daemon._state = State("b", ends={ESTATE.name: ESTATE.to_json()})  # as the reaper leaves it
    assert end(daemon, Outcome(False, left=("stopped: no answer from docker",))) == 1
    assert daemon._half_done == {ESTATE.name: "stopped: no answer from docker"}
    assert daemon._state.budget.left(proc.now(), 10) == 9


@pytest.mark.parametrize(
    "verdict", [Verdict.MANAGED, Verdict.UNDECIDED, Verdict.EXEMPT, Verdict.PENDING, Verdict.FOREIGN]
)
def test_what_waited_for_its_turn_is_what_the_last_look_says(daemon: Daemon, verdict: Verdict) -> None:
    later = replace(orphan(), judgement=Judgement(verdict, "now", Kind.SHIMLESS))
    assert end(daemon, Outcome(True), later) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"_hold_words": "kills are on hold"},
        {"_state": State("b", tripped="7 of 9")},
        {"_state": State("b", Budget(closed_until=float("inf")))},
        {"_settings": Settings(policy=Policy(action=Action.ALERT))},
        {"_settings": Settings(policy=replace(KILL, windows=(Window(frozenset(), 0, 1),)))},
    ],
    ids=["hold", "breaker", "budget", "policy", "window"],
)
def test_what_stops_kills_stops_one_that_waited_for_its_turn(daemon: Daemon, change: dict[str, Any]) -> None:
    for name, value in change.items():
        setattr(daemon, name, value)
    assert end(daemon, Outcome(True)) == 0


def test_the_longest_known_orphans_are_ended_first() -> None:
    """The hour's ends may not be enough for all."""

    def found(since: float) -> Case:
        return replace(orphan(), judgement=Judgement(Verdict.ORPHAN, "because", Kind.SHIMLESS, since=since))

    pending = replace(orphan(), judgement=Judgement(Verdict.PENDING, "because", Kind.SHIMLESS, since=1.0))
    late, early = found(9.0), found(2.0)
    assert _orphans([late, pending, early]) == [early, late]


def test_a_state_that_cant_be_saved_stops_it(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the directory should be")
    assert end(daemon, Outcome(True)) == 0


# ---- after a crash


@pytest.mark.parametrize(
    ("rules", "tripped", "why"),
    [
        (KILL, "", ""),
        (replace(KILL, windows=(Window(frozenset(), 0, 1),)), "", ""),  # windows are for beginnings
        (Policy(rules=(Rule(Match(namespace="moby"), Action.KILL),)), "", ""),
        (Policy(), "", "log: default policy"),
        (replace(KILL, rules=(Rule(Match(kind=Kind.LEAKED_SHIM), Action.ALERT),)), "", "alert: policy rule 1"),
        (Policy(rules=(Rule(Match(namespace="default"), Action.KILL),)), "", "log: default policy"),
        (replace(KILL, exempt=(Match(container_id="4f4f*"),)), "", "exempt rule 1"),
        (replace(KILL, exempt=(Match(image="agent*"),)), "", "alert: default policy says kill, but exempt rule 1 may"),
        (KILL, "7 of 9 look orphaned", "alert: default policy says kill, but 7 of 9 look orphaned"),
    ],
)
def test_what_would_not_be_begun_today_is_not_gone_on_with(
    daemon: Daemon, rules: Policy, tripped: str, why: str
) -> None:
    daemon._settings = Settings(policy=rules)
    daemon._state = State("b", tripped=tripped)
    unwanted = daemon._unwanted(daemon._case_of(ESTATE))
    assert unwanted.startswith(why)
    assert bool(unwanted) is bool(why)


@pytest.mark.parametrize(
    ("outcome", "topic", "event"),
    [
        (Outcome(True), Topic.ENDED, Event.ENDED),
        (Outcome(True, left=("shim 7",)), Topic.END_FAILED, Event.END_FAILED),
        (Outcome(False, refused="no answer"), Topic.END_FAILED, None),
        (Outcome(False, left=("stopped: no answer",)), Topic.END_FAILED, Event.END_FAILED),
    ],
)
def test_an_end_that_is_gone_on_with_is_told_as_any_other(
    daemon: Daemon, outcome: Outcome, topic: Topic, event: Optional[Event]
) -> None:
    """Whoever was told of the orphan, and `orphand history`, learn by its id and kind what became of it."""
    told, sent = [], []
    daemon._report = lambda topic, message, case=None, **_: told.append((topic, case))
    daemon._alerts.send = lambda event, message, case, action: sent.append((event, case))  # type: ignore[method-assign]
    daemon._reaper = StandIn(outcome)  # type: ignore[assignment]
    waits = outcome.refused or next((left for left in outcome.left if left.startswith("stopped: ")), "")
    assert asyncio.run(daemon._resume_end(ESTATE.name, ESTATE.to_json(), "")) == waits  # "": it is over
    if waits:  # tried again with each look, and told once
        assert asyncio.run(daemon._resume_end(ESTATE.name, ESTATE.to_json(), waits)) == waits
    assert [(t, c and (c.sighting.container_id, c.judgement.kind)) for t, c in told] == [(topic, (ID, ESTATE.kind))]
    assert [(e, c.sighting.container_id) for e, c in sent] == ([(event, ID)] if event else [])


def test_whoever_was_told_of_it_knows_it_again_after_a_restart(daemon: Daemon) -> None:
    """The alert that it is ended closes the one that told of it."""
    shim = Shim(ProcessId(4000001, 4), Generation.RUNC_V2, "/usr/bin/x", "moby", ID, "/c.sock", "/nowhere", 1)
    live = replace(orphan().sighting, shim=shim)
    assert container_key(daemon._case_of(replace(ESTATE, shim=shim.process)).sighting) == container_key(live)
    assert container_key(daemon._case_of(ESTATE).sighting) == container_key(orphan().sighting)


def test_a_pending_one_is_told_what_will_be_done_when_its_grace_is_over(daemon: Daemon) -> None:
    case = replace(orphan(), judgement=Judgement(Verdict.PENDING, "because", Kind.SHIMLESS))
    daemon._state = State("b", Budget(closed_until=proc.now() + 60.0))
    assert daemon._intent(orphan(), proc.now()).action is Action.LOG
    assert daemon._intent(case, proc.now()).action is Action.KILL


def test_a_hold_stops_an_end_that_has_begun(daemon: Daemon, tmp_path: Path) -> None:
    write_hold(Hold("upgrade"), tmp_path / "lib")
    assert "upgrade" in asyncio.run(daemon._denied(ESTATE))


def test_a_policy_that_does_not_kill_any_more_stops_it_too(daemon: Daemon) -> None:
    daemon._settings = Settings(policy=Policy())
    assert asyncio.run(daemon._denied(ESTATE)) == "the policy does not kill any more"


@pytest.mark.parametrize("now", ["gone", "managed", "undecided"])
def test_an_alert_is_cleared_once_it_is_no_suspect_any_more(daemon: Daemon, now: str) -> None:
    told: list[Event] = []

    class Open:
        sent: frozenset[str] = frozenset({"orphan"})
        any_open = True

        def send(self, event: Event, *_: Any) -> None:
            told.append(event)

    daemon._alerts = Open()  # type: ignore[assignment]
    before = orphan()
    verdict = Verdict.MANAGED if now == "managed" else Verdict.UNDECIDED
    after = replace(before, judgement=Judgement(verdict, "known to docker"))
    daemon._cases = {} if now == "gone" else {after.sighting.key: after}
    daemon._clear_alerts({before.sighting.key: before})
    assert told == ([] if now == "undecided" else [Event.CLEARED])
