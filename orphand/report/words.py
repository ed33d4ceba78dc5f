# SPDX-License-Identifier: Apache-2.0
"""The sentences of the story, for somebody who is woken at three and does not know orphand. Pure.

Each says which container, why, what happens next and, where there is something to do, which command helps.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from orphand.masking import masked, quoted, short_id
from orphand.model import SUSPECTS, Action, Case, Claim, Decision, Outcome, Survey, Testimony, Verdict
from orphand.settings import Settings

REASON_LIMIT = 512
NAMED_LIMIT = 3  # suspects named in the status line
ORDER = (Verdict.ORPHAN, Verdict.PENDING, Verdict.UNDECIDED, Verdict.EXEMPT, Verdict.FOREIGN, Verdict.MANAGED)


def who(case: Case) -> str:
    """The container in a sentence: `web (ab12cd34ef56, image nginx:1.25)`, pods as namespace/pod/container."""
    identity = case.identity
    parts = [short_id(case.sighting.container_id)]
    if identity.image:
        parts.append(f"image {quoted(identity.image)}")
    name = _name(case)
    return f"{name} ({', '.join(parts)})" if name else f"container {', '.join(parts)}"


def _name(case: Case) -> str:
    identity = case.identity
    words = (identity.pod_namespace, identity.pod, identity.name) if identity.pod else (identity.name,)
    return "/".join(quoted(word) for word in words if word)


def evidence(case: Case) -> str:
    """Why: `leaked-shim, unknown to docker`."""
    kind = f"{case.judgement.kind.value}, " if case.judgement.kind else ""
    return kind + masked(case.judgement.reason, REASON_LIMIT)


def span(seconds: float) -> str:
    """A span of time as one reads it: 0.3 s, 120 s, 12 min, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 300:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def explain_hint(case: Case) -> str:
    """The command that shows the evidence; safe to paste, whatever a forged id holds."""
    return f"orphand explain {_argument(case)}"


def _reap_hint(case: Case) -> str:
    return f"orphand reap {_argument(case)} ends it"


def _argument(case: Case) -> str:
    container_id = case.sighting.container_id
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,75}", container_id):  # containerd's own rule, pkg/identifiers
        return short_id(container_id)
    return str(case.sighting.processes[0].pid) if case.sighting.processes else "ID"


def suspected(case: Case, grace: float, decision: Decision) -> str:
    """The first look that finds it orphaned. `decision`: what will be done when its grace is over."""
    then = {
        Action.KILL: "it will be ended",
        Action.ALERT: "it is an orphan for a person to see to",
        Action.LOG: f"it is an orphan, and nothing is done ({masked(decision.reason, REASON_LIMIT)})",
    }[decision.action]
    return (
        f"suspected orphan: {who(case)}: {evidence(case)}; "
        f"if every look agrees for {span(grace)}, {then} ({explain_hint(case)})"
    )


def orphaned(case: Case, decision: Decision) -> str:
    """The grace is over: the decision and what happens now."""
    by = masked(decision.reason, REASON_LIMIT)
    hint = explain_hint(case) if case.judgement.veto else _reap_hint(case)
    what = {
        Action.KILL: f"will be ended now ({by})",
        Action.ALERT: f"a person is to see to it, nothing is ended ({by}); {hint}",
        Action.LOG: f"nothing is done ({by}); {hint}",
    }[decision.action]
    return f"orphan: {who(case)}: {evidence(case)}; {what}"


def claim_words(testimony: Testimony) -> str:
    """One answer: `unknown`, `no answer (timed out)`."""
    word = {
        Claim.KNOWN: "knows it",
        Claim.DISOWNED: "disowns it",
        Claim.UNKNOWN: "does not know it",
        Claim.UNAVAILABLE: "no answer",
    }[testimony.claim]
    return f"{word} ({masked(testimony.detail)})" if testimony.detail else word


def ending(case: Case, step: str) -> str:
    """One step of an end."""
    return f"ending {who(case)}: {masked(step, REASON_LIMIT)}"


def ended(case: Case, outcome: Outcome, seconds: float) -> str:
    """It is over, and verified."""
    rest = f"; still to remove: {left(outcome)}" if outcome.left else ", and nothing else"
    return f"ended {who(case)} in {span(seconds)}: no process of it is left{rest}"


def left(outcome: Outcome) -> str:
    """What remains, in one line."""
    return "; ".join(masked(each, REASON_LIMIT) for each in outcome.left) or "nothing"


def end_refused(case: Case, outcome: Outcome) -> str:
    """The end did not begin, and why."""
    return (
        f"did not end {who(case)}: {masked(outcome.refused, REASON_LIMIT)}; no signal was sent ({explain_hint(case)})"
    )


def end_failed(case: Case, outcome: Outcome) -> str:
    """The end began and something is left."""
    return f"could not end {who(case)}: still there: {left(outcome)} ({explain_hint(case)})"


def cleared(case: Case, why: str) -> str:
    """A suspect that is none any more."""
    return f"no orphan any more: {who(case)}: {masked(why, REASON_LIMIT)}"


def undecided(case: Case, others: int = 0) -> str:
    """Somebody who had to be asked did not answer, for this container and `others` more."""
    reason = masked(case.judgement.reason, REASON_LIMIT)
    if others:
        return f"undecided: {others + 1} containers, {who(case)} among them: {reason}; nothing will be ended meanwhile"
    return f"undecided: {who(case)}: {reason}; it will not be ended meanwhile ({explain_hint(case)})"


def breaker_tripped(reason: str) -> str:
    """Too many orphans at once."""
    return (
        f"breaker open: {masked(reason, REASON_LIMIT)}: more likely an engine in trouble than so many orphans; "
        "nothing will be ended until that is over (orphand scan shows them, orphand reap ID ends one by hand)"
    )


def breaker_reset() -> str:
    """The breaker's cause is gone."""
    return "breaker closed: its cause is gone; orphans are ended again as the policy says"


def policy_line(settings: Settings) -> str:
    """The policy in a few words, for the records of start and reload."""
    policy = settings.policy
    parts = [f"policy {policy.action.value} after {span(policy.grace)}"]
    if policy.rules:
        killing = sum(rule.action is Action.KILL for rule in policy.rules)
        parts.append(f"{_count(len(policy.rules), 'rule')} ({killing} with kill)")
    if policy.exempt:
        parts.append(_count(len(policy.exempt), "exemption"))
    if policy.windows:
        parts.append("kills only " + ", ".join(masked(window.text) for window in policy.windows))
    return ", ".join(parts)


def started(version: str, settings: Settings, engines: Sequence[str]) -> str:
    """The first record."""
    found = ", ".join(masked(engine) for engine in engines) or "none found yet"
    return f"orphand {version} started: {policy_line(settings)}; engines: {found}"


def reloaded(settings: Settings) -> str:
    """A new configuration is in force."""
    return f"configuration reloaded: {policy_line(settings)}"


def config_refused(error: str, kept: bool) -> str:
    """A configuration that can't be used; `kept`: the one before stays in force."""
    lines = error.splitlines() or ["unknown error"]
    more = f" (and {len(lines) - 1} more; orphand check-config shows all)" if len(lines) > 1 else ""
    after = "the previous configuration stays in force" if kept else "orphand does not start"
    return f"configuration refused, {after}: {masked(lines[0], REASON_LIMIT)}{more}"


def status_line(survey: Survey, note: str = "") -> str:
    """One line for `systemctl status`: counts with their whole, and the suspects by name."""
    verdicts = Counter(case.judgement.verdict for case in survey.cases)
    parts = [f"{verdicts[v]} {v.value}{_named(survey, v)}" for v in ORDER if verdicts[v]]
    line = f"{_count(len(survey.cases), 'container')}: {', '.join(parts)}" if parts else "no containers"
    if survey.blind:
        line += f"; not seen: {'; '.join(masked(each) for each in survey.blind)}"
    return f"{line}; {masked(note)}" if note else line


def _named(survey: Survey, verdict: Verdict) -> str:
    if verdict not in SUSPECTS:
        return ""
    suspects = [case for case in survey.cases if case.judgement.verdict is verdict]
    names = [_name(case) or short_id(case.sighting.container_id) for case in suspects[:NAMED_LIMIT]]
    return f" ({', '.join(names)}{', …' if len(suspects) > NAMED_LIMIT else ''})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def stopped(ends: int) -> str:
    """The last record."""
    rest = f"; {_count(ends, 'end')} in progress, finished at the next start" if ends else ""
    return f"orphand stopped{rest}"


def resumed_end(case: Case, outcome: Outcome) -> str:
    """An end that was interrupted has been gone on with, or not."""
    subject = f"the interrupted end of {who(case)}"
    if outcome.refused:
        return f"{subject} is not gone on with: {masked(outcome.refused, REASON_LIMIT)}"
    if outcome.complete:
        return f"{subject} is finished: nothing of it is left"
    return f"{subject} could not be finished: still there: {left(outcome)}"


def ended_by_hand(case: Case, outcome: Outcome) -> str:
    """What `orphand reap` came to."""
    if outcome.refused:
        return end_refused(case, outcome)
    if outcome.complete:
        return f"ended {who(case)}: no process of it is left, and nothing else"
    return end_failed(case, outcome)
