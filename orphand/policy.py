# SPDX-License-Identifier: Apache-2.0
"""From verdicts to decisions: rules, exemptions, breaker, budget, windows. Pure: no I/O, no clock."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Optional

from orphand.model import SUSPECTS, Action, Case, Decision, Judgement, Kind, Verdict
from orphand.settings import Kill, Match, Policy, Rule, Window

HOUR_SECONDS = 3600.0
DAY_MINUTES = 24 * 60
NO_MEMORY = "within scan.settle of a start without a memory none begins, since those of the last hour are not known"


@dataclass(frozen=True)
class Budget:
    """When kills were begun (boot clock), and until when there are to be none."""

    spent: tuple[float, ...] = ()
    closed_until: float = 0.0

    def closed(self, now: float) -> bool:
        """Is it too early to begin any, since nobody remembers those of the last hour?"""
        return now < self.closed_until

    def left(self, now: float, limit: int) -> int:
        """How many kills may still begin now."""
        if self.closed(now):
            return 0
        return max(0, limit - len([t for t in self.spent if now - t < HOUR_SECONDS]))

    def spend(self, now: float) -> Budget:
        """The budget after one more kill."""
        return replace(self, spent=(*(t for t in self.spent if now - t < HOUR_SECONDS), now))


@dataclass(frozen=True)
class Brakes:
    """What stands between an orphan and its kill, apart from the rules."""

    tripped: str = ""  # the breaker's reason
    hold: str = ""  # the admin's hold, in words
    budget_closed: bool = False  # for a moment, after a start without a memory
    budget_left: int = 0
    weekday: int = 0  # local time; 0 is Monday
    minute: int = 0  # after midnight, local time


def matches(match: Match, case: Case) -> bool:
    """Whether every field that the match names fits; a match that names none fits nothing."""
    return _fits(match, case, frozenset())


def _fits(match: Match, case: Case, anything: frozenset[str]) -> bool:
    wanted = {key: str(getattr(v, "value", v)) for key, v in vars(match).items() if v is not None}
    facts = {
        "kind": case.judgement.kind.value if case.judgement.kind else "",
        "namespace": case.sighting.namespace,
        "container_id": case.sighting.container_id,
        "name": case.identity.name,
        "image": case.identity.image,
        "pod": case.identity.pod,
        "pod_namespace": case.identity.pod_namespace,
        "hostname": case.identity.hostname,
    }
    return bool(wanted) and all(
        key in anything or fnmatch.fnmatchcase(facts[key], pattern) for key, pattern in wanted.items()
    )


def _untold(case: Case) -> frozenset[str]:
    """What the leftovers of the container don't tell. Docker's containers lose name and image with Docker's record."""
    identity = case.identity
    untold = {key for key in ("name", "image", "hostname") if not getattr(identity, key)}
    if identity.pod and not identity.pod_namespace:
        untold |= {"pod", "pod_namespace"}
    return frozenset(untold)


def _before(rule: Optional[Rule], policy: Policy) -> tuple[Rule, ...]:
    """The rules that come before the one that fits, or all of them."""
    return policy.rules[: policy.rules.index(rule)] if rule else policy.rules


def _unsure(case: Case, policy: Policy, rule: Optional[Rule]) -> str:
    """Which words of the admin's would spare it, if they fit; whether they do can't be told. "" if none."""
    untold = _untold(case)
    sparing = [(f"exempt rule {n}", match) for n, match in enumerate(policy.exempt, 1)]
    sparing += [
        (f"policy rule {n}", r.match)
        for n, r in enumerate(_before(rule, policy), 1)
        if (r.action or policy.action) is not Action.KILL
    ]
    for name, match in sparing:
        if _fits(match, case, untold):
            missing = sorted(key for key in untold if getattr(match, key) is not None)
            return f"{name} may be meant for it: nothing tells its {' and '.join(missing)}"
    return ""


def rule_for(case: Case, policy: Policy) -> tuple[Optional[Rule], str]:
    """The first rule that fits and its name, or None and the default's."""
    for number, rule in enumerate(policy.rules, 1):
        if matches(rule.match, case):
            return rule, f"policy rule {number}"
    return None, "default policy"


def grace_for(case: Case, policy: Policy, node: str = "") -> float:
    """Seconds for which it must look orphaned in every look: the rule's or the default's, and the node's jitter.

    Where it can't be told whether an earlier rule is meant for it, the longest of them.
    The jitter hangs on node and container, so that a fleet doesn't act in one second and no restart changes it.
    """
    rule, _ = rule_for(case, policy)
    untold = _untold(case)
    may_fit = [r for r in _before(rule, policy) if _fits(r.match, case, untold)]
    graces = [r.grace if r.grace is not None else policy.grace for r in may_fit]
    grace = max([rule.grace if rule and rule.grace is not None else policy.grace, *graces])
    return grace + policy.jitter * _fraction(f"{node}/{case.sighting.container_id}")


def _fraction(text: str) -> float:
    import hashlib  # brings OpenSSL, and is seldom needed

    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:4], "big") / 2**32


def exempted(case: Case, policy: Policy) -> Judgement:
    """The judgement, or EXEMPT where the admin says so of a container that looks orphaned."""
    if case.judgement.verdict in SUSPECTS:
        for number, match in enumerate(policy.exempt, 1):
            if matches(match, case):
                return replace(case.judgement, verdict=Verdict.EXEMPT, reason=f"exempt rule {number}")
    return case.judgement


def breaker(cases: Sequence[Case], kill: Kill) -> str:
    """Why nothing may be killed now, or "": many orphans at once are more likely an engine in trouble."""
    counted = [c for c in cases if c.judgement.verdict is not Verdict.FOREIGN]
    suspects = [c for c in counted if c.judgement.verdict in SUSPECTS]
    found = f"{len(suspects)} of {len(counted)} containers look orphaned at once, more than"
    if len(suspects) > kill.max_orphans:
        return f"{found} kill.max_orphans {kill.max_orphans}"
    if suspects and len(suspects) > kill.max_share * len(counted):
        return f"{found} kill.max_share {kill.max_share:.0%}"
    return ""


def latch(before: str, now: str, cases: Sequence[Case]) -> str:
    """The breaker after a look: once tripped it resets only when the cause is gone.

    Silence isn't that: suspects that became UNDECIDED because their engine went away keep it open.
    """
    if now or not before:
        return now
    return before if any(c.judgement.verdict is Verdict.UNDECIDED for c in cases) else ""


def inside(windows: Sequence[Window], weekday: int, minute: int) -> bool:
    """Whether kills may begin on this weekday (0 is Monday) at this minute after midnight."""
    return not windows or any(_within(w, weekday, minute) for w in windows)


def _within(window: Window, weekday: int, minute: int) -> bool:
    length = (window.end - window.start) % DAY_MINUTES or DAY_MINUTES
    today = weekday in window.days and 0 <= minute - window.start < length
    yesterday = (weekday - 1) % 7 in window.days and 0 <= minute + DAY_MINUTES - window.start < length
    return today or yesterday


def decide(case: Case, policy: Policy, brakes: Brakes) -> Decision:
    """What to do about one ORPHAN. A kill that can't be is an alert with the reason; one that must wait is logged."""
    rule, name = rule_for(case, policy)
    action = rule.action if rule and rule.action is not None else policy.action
    if action is not Action.KILL:
        return Decision(action, name)
    veto = case.judgement.veto or _needs_rule(case, rule) or _unsure(case, policy, rule)
    if veto:
        return Decision(Action.ALERT, f"{name} says kill, but {veto}")
    if brakes.hold:
        return Decision(Action.LOG, f"{name} says kill, but {brakes.hold}")
    if brakes.tripped:
        return Decision(Action.ALERT, f"{name} says kill, but {brakes.tripped}")
    if not inside(policy.windows, brakes.weekday, brakes.minute):
        return Decision(Action.LOG, f"{name} says kill, which waits for {' or '.join(w.text for w in policy.windows)}")
    if brakes.budget_closed:
        return Decision(Action.LOG, f"{name} says kill, which waits: {NO_MEMORY}")
    if brakes.budget_left <= 0:
        return Decision(Action.ALERT, f"{name} says kill, but kill.max_kills_per_hour is spent")
    return Decision(Action.KILL, name)


def _needs_rule(case: Case, rule: Optional[Rule]) -> str:
    """The engine has a record of a disowned container: its kill must be written for that kind by name."""
    if case.judgement.kind is not Kind.DISOWNED or (rule and rule.match.kind is Kind.DISOWNED):
        return ""
    return "a disowned container is killed only by a rule with kind: disowned"
