# SPDX-License-Identifier: Apache-2.0
"""From sightings and testimonies to verdicts. Pure: no I/O, no clock, no state of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Optional

from orphand.model import Claim, Generation, Judgement, Kind, Sighting, Testimony, Verdict

Key = tuple[str, ...]
Look = tuple[Sighting, tuple[Testimony, ...]]


@dataclass(frozen=True)
class History:
    """Since when each container has looked orphaned without a break, by its key."""

    since: Mapping[Key, float] = field(default_factory=dict)


def conclude(sighting: Sighting, testimonies: Sequence[Testimony]) -> Judgement:
    """What one look says of one container, before any grace: never ORPHAN, at most PENDING.

    The two kinds of answer are not treated alike. One authority that knows the container saves
    it. A denial counts only if it was asked for after the sighting, since the container may have
    been created in between, and only together with every other authority's.
    """
    if sighting.foreign:
        return Judgement(Verdict.FOREIGN, sighting.foreign)
    owners = [t.authority for t in testimonies if t.claim is Claim.KNOWN]
    if owners:
        return Judgement(Verdict.MANAGED, f"known to {' and '.join(owners)}")
    silent = [_silence(t, sighting.seen_at) for t in testimonies]
    if any(silent) or not testimonies:
        return Judgement(Verdict.UNDECIDED, "; ".join(filter(None, silent)) or "there is nobody to ask")
    denial = ", ".join(_denial(t) for t in testimonies)
    kind = _kind(sighting, testimonies)
    return Judgement(Verdict.PENDING, denial, kind=kind, veto=_veto(sighting, testimonies))


def _silence(testimony: Testimony, seen_at: float) -> str:
    if testimony.claim is Claim.UNAVAILABLE:
        return f"no answer from {testimony.authority}: {testimony.detail}"
    if testimony.asked_at < seen_at:
        return f"{testimony.authority} was asked before the sighting"
    return ""


def _denial(testimony: Testimony) -> str:
    detail = f" ({testimony.detail})" if testimony.detail else ""
    return f"{testimony.claim.value} {'by' if testimony.claim is Claim.DISOWNED else 'to'} {testimony.authority}{detail}"


def _kind(sighting: Sighting, testimonies: Sequence[Testimony]) -> Kind:
    if any(t.claim is Claim.DISOWNED for t in testimonies):
        return Kind.DISOWNED
    if sighting.shim is None:
        return Kind.SHIMLESS
    return Kind.LEAKED_SHIM if sighting.inits else Kind.CHILDLESS_SHIM


def _veto(sighting: Sighting, testimonies: Sequence[Testimony]) -> str:
    vetoes = [t.veto for t in testimonies if t.veto]
    if sighting.shim and sighting.shim.generation is Generation.OTHER:
        vetoes.append(f"what signals do to {sighting.shim.exe} is not known")
    if any(t.claim is Claim.DISOWNED for t in testimonies):
        vetoes.append("the engine has a record of it")
    return "; ".join(vetoes)


def ripen(judgement: Judgement, since: Optional[float], now: float, grace: float) -> Judgement:
    """Turn a container that looks orphaned into an ORPHAN once it has looked so for `grace` seconds.

    `since` is the time of the first look of an unbroken row, or None where this look is the first.
    """
    if judgement.verdict is not Verdict.PENDING:
        return judgement
    waited = 0.0 if since is None else now - since
    begun = now if since is None else since
    if since is None or waited < grace:
        return replace(judgement, since=begun, reason=f"{judgement.reason}; {waited:.0f} s of {grace:.0f} s grace")
    reason = f"{judgement.reason}; for {waited:.0f} s"
    return replace(judgement, verdict=Verdict.ORPHAN, since=begun, reason=reason)


def protect_siblings(judgements: Mapping[Key, tuple[Sighting, Judgement]]) -> dict[Key, Judgement]:
    """A shim that serves one container that isn't certainly orphaned is not to be signalled at all."""
    verdict_of = {(s.address, s.namespace, s.container_id): j.verdict for s, j in judgements.values()}
    protected = {}
    for key, (sighting, judgement) in judgements.items():
        spared = [
            other
            for other in sighting.siblings
            if verdict_of.get((sighting.address, sighting.namespace, other)) is not Verdict.ORPHAN
        ]
        if spared and judgement.kind:
            veto = f"its shim serves {', '.join(o[:12] for o in spared)} too"
            judgement = replace(judgement, veto="; ".join(filter(None, (judgement.veto, veto))))
        protected[key] = judgement
    return protected


def remember(history: History, judgements: Mapping[Key, Judgement], now: float) -> History:
    """The history after a look: any other verdict than PENDING or ORPHAN starts the grace anew."""
    since = {
        key: history.since.get(key, now)
        for key, judgement in judgements.items()
        if judgement.verdict in (Verdict.PENDING, Verdict.ORPHAN)
    }
    return History(since)
