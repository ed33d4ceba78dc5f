# SPDX-License-Identifier: Apache-2.0
"""What --json and status.json hold: plain values, the same names as in the journal's ORPHAND_ fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Optional

from orphand.model import Case, Decision, Kind, Outcome, Survey, Verdict


def case_form(case: Case, decision: Optional[Decision] = None) -> dict[str, Any]:
    """One container, with everything that is known of it."""
    sighting, judgement = case.sighting, case.judgement
    form: dict[str, Any] = {
        "container_id": sighting.container_id,
        "namespace": sighting.namespace,
        "address": sighting.address,
        "verdict": judgement.verdict.value,
        "kind": judgement.kind.value if judgement.kind else None,
        "reason": judgement.reason,
        "veto": judgement.veto or None,
        "since": judgement.since,
        "shim": asdict(sighting.shim) if sighting.shim else None,
        "inits": [asdict(init) for init in sighting.inits],
        "siblings": list(sighting.siblings),
        "identity": {k: v for k, v in asdict(case.identity).items() if v},
        "testimonies": [{k: v for k, v in asdict(t).items() if v not in ("", 0)} for t in case.testimonies],
    }
    if decision:
        form["decision"] = {"action": decision.action.value, "reason": decision.reason}
    return form


def survey_form(survey: Survey, decisions: Mapping[tuple[str, ...], Decision]) -> dict[str, Any]:
    """A whole look: a count for each verdict, and each container that is not simply managed."""
    counts = {v.value: 0 for v in Verdict}
    for case in survey.cases:
        counts[case.judgement.verdict.value] += 1
    notable = [c for c in survey.cases if c.judgement.verdict is not Verdict.MANAGED]
    return {
        "counts": counts,
        "containers": [case_form(c, decisions.get(c.sighting.key)) for c in notable],
        "blind": list(survey.blind),
    }


Found = tuple[Any, ...]


def found_key(case: Case) -> Found:
    """What the daemon's word of a container is known again by: its name, its processes, the kind of orphan."""
    return (*case.sighting.name, case.judgement.kind, frozenset((p.pid, p.start) for p in case.sighting.processes))


def orphans_since(status: Mapping[str, Any]) -> dict[Found, float]:
    """found_key -> since when (boot clock) the daemon finds it orphaned, by its status file.

    A single look can't tell a grace that is over: the daemon's looks, one after the other, can.
    Raises LookupError, TypeError, ValueError, OverflowError for what is no such file.
    """
    found = {}
    for form in status["containers"]:
        if form["verdict"] == Verdict.ORPHAN.value:
            told = [*([form["shim"]] if form["shim"] else []), *form["inits"]]
            processes = frozenset((t["process"]["pid"], t["process"]["start"]) for t in told)
            kind = Kind(form["kind"])
            found[form["address"], form["namespace"], form["container_id"], kind, processes] = float(form["since"])
    return found


def outcome_form(outcome: Outcome) -> dict[str, Any]:
    """What an end came to."""
    return {
        "ended": outcome.ended,
        "refused": outcome.refused or None,
        "steps": list(outcome.steps),
        "left": list(outcome.left),
    }
