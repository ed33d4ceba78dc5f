# SPDX-License-Identifier: Apache-2.0
"""From verdicts to decisions: rules, exemptions, breaker, budget. Pure: no I/O, no clock."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Optional

from orphand.config import Kill, Match, Policy, Rule
from orphand.model import Action, Case, Decision, Judgement, Verdict

HOUR_SECONDS = 3600.0


@dataclass(frozen=True)
class Budget:
    """When kills were begun (boot clock), and until when there are to be none."""

    spent: tuple[float, ...] = ()
    closed_until: float = 0.0

    def left(self, now: float, limit: int) -> int:
        """How many kills may still begin now."""
        if now < self.closed_until:
            return 0
        return max(0, limit - len([t for t in self.spent if now - t < HOUR_SECONDS]))

    def spend(self, now: float) -> Budget:
        """The budget after one more kill."""
        return replace(self, spent=(*(t for t in self.spent if now - t < HOUR_SECONDS), now))


def matches(match: Match, case: Case) -> bool:
    """Whether every field that the match names fits; a match that names none fits nothing."""
    wanted = _wanted(match)
    if not wanted:
        return False
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
    return all(fnmatch.fnmatchcase(facts[key], pattern) for key, pattern in wanted.items())


def _wanted(match: Match) -> dict[str, str]:
    return {key: str(getattr(value, "value", value)) for key, value in vars(match).items() if value is not None}


def rule_for(case: Case, policy: Policy) -> tuple[Optional[Rule], str]:
    """The first rule that fits and its name, or None and the default's."""
    for number, rule in enumerate(policy.rules, 1):
        if matches(rule.match, case):
            return rule, f"policy rule {number}"
    return None, "default policy"


def grace_for(case: Case, policy: Policy) -> float:
    """Seconds for which it must look orphaned in every look."""
    rule, _ = rule_for(case, policy)
    return rule.grace if rule and rule.grace is not None else policy.grace


def exempted(case: Case, policy: Policy) -> Judgement:
    """The judgement, or EXEMPT where the admin says so of a container that looks orphaned."""
    if case.judgement.verdict in (Verdict.PENDING, Verdict.ORPHAN):
        for number, match in enumerate(policy.exempt, 1):
            if matches(match, case):
                return replace(case.judgement, verdict=Verdict.EXEMPT, reason=f"exempt rule {number}")
    return case.judgement


def breaker(cases: Sequence[Case], kill: Kill) -> str:
    """Why nothing may be killed now, or "": many orphans at once are more likely an engine in trouble."""
    counted = [c for c in cases if c.judgement.verdict is not Verdict.FOREIGN]
    suspects = [c for c in counted if c.judgement.verdict in (Verdict.PENDING, Verdict.ORPHAN)]
    if len(suspects) > kill.max_orphans:
        return f"{len(suspects)} of {len(counted)} containers look orphaned at once, more than max_orphans {kill.max_orphans}"
    if suspects and len(suspects) > kill.max_share * len(counted):
        return (
            f"{len(suspects)} of {len(counted)} containers look orphaned at once, "
            f"more than max_share {kill.max_share:.0%}"
        )
    return ""


def decide(case: Case, policy: Policy, tripped: str, budget_left: int) -> Decision:
    """What to do about one ORPHAN. `tripped` is the breaker's reason, "" while it holds."""
    rule, name = rule_for(case, policy)
    action = rule.action if rule and rule.action is not None else policy.action
    if action is not Action.KILL:
        return Decision(action, name)
    if case.judgement.veto:
        return Decision(Action.ALERT, f"{name} says kill, but {case.judgement.veto}")
    if tripped:
        return Decision(Action.ALERT, f"{name} says kill, but {tripped}")
    if budget_left <= 0:
        return Decision(Action.ALERT, f"{name} says kill, but max_kills_per_hour is spent")
    return Decision(Action.KILL, name)
