# SPDX-License-Identifier: Apache-2.0
"""From sightings and testimonies to verdicts. Pure: no I/O, no clock, no state of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Optional

from orphand.model import SUSPECTS, Claim, Generation, Init, Judgement, Kind, Role, Sighting, Testimony, Verdict

Key = tuple[str, ...]
Look = tuple[Sighting, tuple[Testimony, ...]]
MIN_LOOKS = 3  # a grace that saw fewer looks proves little: the node slept, or orphand did


@dataclass(frozen=True)
class Row:
    """An unbroken row of looks that found one container orphaned."""

    since: float
    last: float
    looks: int = 1
    disowned: bool = False  # the owner had a record of it


@dataclass(frozen=True)
class History:
    """The rows of looks of each container, by its key."""

    rows: Mapping[Key, Row] = field(default_factory=dict)


def conclude_all(looks: Sequence[Look]) -> list[Judgement]:
    """What one look says of all containers together: each by itself, then those that claim one id."""
    twins: dict[tuple[str, str, str], list[Sighting]] = defaultdict(list)
    for sighting, _ in looks:
        twins[sighting.name].append(sighting)
    return [_among(twins[sighting.name], sighting, testimonies) for sighting, testimonies in looks]


def _among(twins: Sequence[Sighting], sighting: Sighting, testimonies: Sequence[Testimony]) -> Judgement:
    alone = conclude(sighting, testimonies)
    if len(twins) == 1 or alone.verdict not in (Verdict.MANAGED, *SUSPECTS):
        return alone
    return _duplicate(twins, sighting, testimonies) or alone


def _duplicate(twins: Sequence[Sighting], sighting: Sighting, testimonies: Sequence[Testimony]) -> Optional[Judgement]:
    """Two shims claim one id: the one whose init every witness names is kept; without such a one nothing is said."""
    pids = {t.pid for t in testimonies}
    if len(pids) != 1 or 0 in pids or any(t.claim is not Claim.KNOWN for t in testimonies):
        return None
    (pid,) = pids
    owners = [t for t in twins if pid in {i.process.pid for i in t.inits}]
    if len(owners) != 1 or owners[0] is sighting or owners[0].shim is None:
        return None
    owner = owners[0].shim.process.pid
    reason = f"shim {owner} serves this id with the pid {pid} that every witness names"
    return Judgement(Verdict.PENDING, reason, Kind.DUPLICATE_SHIM, veto=_duplicate_veto(owners[0], sighting))


def _duplicate_veto(owner: Sighting, sighting: Sighting) -> str:
    if sighting.shim is None:
        return "its cgroup may be the newer container's"
    if sighting.owns_socket is not False or owner.owns_socket is not True:
        return "which of the shims holds the live socket is not certain"
    shared = {i.cgroup for i in sighting.inits} & {i.cgroup for i in owner.inits}
    vetoes = ["its processes share the other shim's cgroup"] if shared else []
    # Docker's metadata is no veto here: it is that of the one that is kept
    return "; ".join(filter(None, (sighting.veto, *vetoes, _signals_veto(sighting))))


def conclude(sighting: Sighting, testimonies: Sequence[Testimony]) -> Judgement:
    """What one look says of one container, before any grace: never ORPHAN, at most PENDING.

    The two kinds of answer are not treated alike. One owner that knows the container saves it.
    A denial counts only if it was asked for after the sighting, since the container may have
    been created in between, and only together with every other authority's answer.
    """
    if sighting.foreign:
        return Judgement(Verdict.FOREIGN, sighting.foreign)
    owners = [t for t in testimonies if t.role is Role.OWNER]
    knowing = [t.authority for t in owners if t.claim is Claim.KNOWN]
    if knowing:
        return Judgement(Verdict.MANAGED, f"known to {' and '.join(knowing)}")
    doubt = _doubt(sighting, testimonies)
    if doubt or not owners:
        return Judgement(Verdict.UNDECIDED, doubt or "there is nobody to ask")
    kind = _kind(sighting, testimonies)
    reason = ", ".join(_answer(t) for t in testimonies)
    return Judgement(Verdict.PENDING, reason, kind, veto=_veto(kind, sighting, testimonies))


def _doubt(sighting: Sighting, testimonies: Sequence[Testimony]) -> str:
    return "; ".join(filter(None, (_silence(t, sighting) for t in testimonies)))


def _silence(testimony: Testimony, sighting: Sighting) -> str:
    if testimony.claim is Claim.UNAVAILABLE:
        return f"no answer from {testimony.authority}: {testimony.detail}"
    if testimony.asked_at < sighting.seen_at:
        return f"{testimony.authority} was asked before the sighting"
    pids = {i.process.pid for i in sighting.inits}
    if testimony.claim is Claim.KNOWN and testimony.pid and pids and testimony.pid not in pids:
        return f"{testimony.authority} runs this id with pid {testimony.pid}, which is not among what was seen"
    return ""


def _answer(testimony: Testimony) -> str:
    detail = f" ({testimony.detail})" if testimony.detail else ""
    by = "by" if testimony.claim is Claim.DISOWNED else "to"
    return f"{testimony.claim.value} {by} {testimony.authority}{detail}"


def _kind(sighting: Sighting, testimonies: Sequence[Testimony]) -> Kind:
    if any(t.claim is Claim.DISOWNED for t in testimonies):
        return Kind.DISOWNED
    if any(t.claim is Claim.KNOWN for t in testimonies):
        return Kind.ENGINE_ORPHAN
    if sighting.shim is None:
        return Kind.SHIMLESS
    return Kind.LEAKED_SHIM if sighting.inits else Kind.CHILDLESS_SHIM


def _veto(kind: Kind, sighting: Sighting, testimonies: Sequence[Testimony]) -> str:
    """Metadata shows an owner who may come back. Of a disowned container the owner was heard: it has it on record as
    ended, and only a rule for that very kind ends it (policy.py)."""
    metadata = "" if kind is Kind.DISOWNED else sighting.metadata
    vetoes = (sighting.veto, metadata, *(t.veto for t in testimonies), _signals_veto(sighting))
    return "; ".join(dict.fromkeys(filter(None, vetoes)))


def _signals_veto(sighting: Sighting) -> str:
    if sighting.shim and sighting.shim.generation is Generation.OTHER:
        return f"what signals do to {sighting.shim.exe} is not known"
    return ""


def protect_siblings(looks: Sequence[tuple[Sighting, Judgement]]) -> list[Judgement]:
    """A shim that serves one container which does not look orphaned is not to be signalled at all.

    An orphan with an init of its own can still be ended alone; one that is nothing but the shim can't.
    """
    verdicts: dict[tuple[str, str, str], set[Verdict]] = defaultdict(set)
    for sighting, judgement in looks:
        verdicts[sighting.name].add(judgement.verdict)
    return [_with_veto(j, _sibling_veto(s, j, verdicts)) for s, j in looks]


def _sibling_veto(
    sighting: Sighting, judgement: Judgement, verdicts: Mapping[tuple[str, str, str], set[Verdict]]
) -> str:
    spared = [
        other
        for other in sighting.siblings
        if not verdicts.get((sighting.address, sighting.namespace, other), {Verdict.UNDECIDED}) <= SUSPECTS
    ]
    if not spared or judgement.verdict not in SUSPECTS or sighting.inits:
        return judgement.veto
    veto = f"its shim serves {', '.join(o[:12] for o in spared)} too"
    return "; ".join(filter(None, (judgement.veto, veto)))


def protect_dependents(looks: Sequence[tuple[Sighting, Judgement]], everybody: Sequence[Sighting]) -> list[Judgement]:
    """A container that another one lives and dies with is not to be ended before that one, whoever knows the two.

    With docker run --pid=container:X the other lives in X's pid namespace, all of which the kernel kills with X's
    init (pid_namespaces(7)). What hangs on its cgroup, the sightings say.
    """
    return [_with_veto(j, _dependent_veto(s, j, everybody)) for s, j in looks]


def _with_veto(judgement: Judgement, veto: str) -> Judgement:
    return judgement if veto == judgement.veto else replace(judgement, veto=veto)


def _dependent_veto(sighting: Sighting, judgement: Judgement, everybody: Sequence[Sighting]) -> str:
    if judgement.verdict not in SUSPECTS:
        return judgement.veto
    doomed = dict.fromkeys(
        other.container_id[:12]
        for other in everybody
        if (other.namespace, other.container_id) != (sighting.namespace, sighting.container_id)
        and any(_dies_with(mine, its, other.foreign) for mine in sighting.inits for its in other.inits)
    )
    veto = f"container {', '.join(doomed)} lives in its pid namespace and would die with it" if doomed else ""
    return "; ".join(filter(None, (judgement.veto, veto)))


def _dies_with(mine: Init, its: Init, foreign: str) -> bool:
    if foreign and mine.cgroup and its.cgroup.startswith(f"{mine.cgroup}/"):
        return False  # what runs inside it, as docker-in-docker does, is a part of it
    return mine.leads and mine.pid_namespace != 0 and mine.pid_namespace == its.pid_namespace


def ripen(judgement: Judgement, row: Optional[Row], now: float, grace: float) -> Judgement:
    """Turn a container that looks orphaned into an ORPHAN once it has looked so for `grace` seconds.

    `row` holds this look too; it is None for a container that doesn't look orphaned.
    """
    if judgement.verdict is not Verdict.PENDING or row is None:
        return judgement
    waited = now - row.since
    if waited < grace or row.looks < MIN_LOOKS:
        return replace(judgement, since=row.since)
    return replace(judgement, verdict=Verdict.ORPHAN, since=row.since)


def remember(history: History, judgements: Mapping[Key, Judgement], now: float, max_gap: float) -> History:
    """The history after a look at `now`.

    Any other verdict than PENDING or ORPHAN ends a row; so do `max_gap` seconds in which nobody looked. While its
    owner had a record, nobody gave a clear no: once the record has gone, the grace begins anew.
    """
    rows = {}
    for key, judgement in judgements.items():
        if judgement.verdict in SUSPECTS:
            row = history.rows.get(key)
            disowned = judgement.kind is Kind.DISOWNED
            unbroken = row is not None and now - row.last <= max_gap and row.disowned is disowned
            rows[key] = replace(row, last=now, looks=row.looks + 1) if row and unbroken else Row(now, now, 1, disowned)
    return History(rows)
