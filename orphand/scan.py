# SPDX-License-Identifier: Apache-2.0
"""One look at the node: sightings, then testimonies, then what they say together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Optional

from orphand import judge
from orphand.authorities.bench import Bench, Roll
from orphand.model import SUSPECTS, Case, Identity, Judgement, Sighting, Survey, Testimony, Verdict
from orphand.sightings import Looker

SETTLED = frozenset({Verdict.MANAGED, Verdict.FOREIGN})
Identify = Callable[[Sighting], Identity]


@dataclass(frozen=True)
class _Standing:
    """A look that found everything settled: it stays true while nothing changes."""

    survey: Survey
    changes: int  # the looker's
    roll: Roll


class Scanner:
    """Looks at processes first and asks the authorities second (rule 1). Blocks; every question has a deadline.

    One thread at a time: the looker remembers processes, and a witness that is busy with one question would
    count as silent for the next.
    """

    def __init__(self, looker: Looker, bench: Bench, identify: Identify) -> None:
        self._looker = looker
        self._bench = bench
        self._identify = identify
        self._one_at_a_time = threading.Lock()
        self._identities: dict[tuple[str, ...], Identity] = {}
        self._standing: Optional[_Standing] = None

    def look(self, full: bool = False, everybody: bool = False, quiet_since: Optional[float] = None) -> Survey:
        """Everything on the node. `full` sweeps /proc; `everybody` names managed containers too, not only suspects.

        `quiet_since` (boot clock): no trigger made this look, and Docker's events are followed and silent since then.
        Where nothing has changed on the node either, the last look is still true, and is given again.
        """
        with self._one_at_a_time:
            standing, self._standing = self._standing, None
            self._looker.read(full)
            if standing and not everybody and quiet_since is not None and self._holds(standing, quiet_since):
                self._standing = standing
                return replace(standing.survey, seen_at=self._looker.seen_at, complete=False)
            changes = self._looker.changes
            sightings = self._looker.sightings()
            cases = self._cases(sightings, sightings, everybody, quiet_since)
            self._forget_all_but(case.sighting.key for case in cases)
            seen_at = min((s.seen_at for s in sightings), default=self._looker.seen_at)
            survey = Survey(tuple(cases), seen_at, complete=full, blind=tuple(self._looker.blind))
            if len(cases) == len(sightings) and all(c.judgement.verdict in SETTLED for c in cases):
                self._standing = _Standing(survey, changes, Roll.of([c.sighting for c in cases]))
            return survey

    def _holds(self, standing: _Standing, quiet_since: float) -> bool:
        """Whether it is still true: all is as it was, and Docker knows all of what could be orphaned."""
        return self._looker.changes == standing.changes and self._bench.knows_still(standing.roll, quiet_since)

    def again(self, case: Case) -> Optional[Case]:
        """The same container now, with every answer new; None if it is gone or its processes are others.

        Its twins (other shims of the same id) and the other containers of its shim are asked for too,
        since the verdict hangs on them.
        """
        with self._one_at_a_time:
            for full in (False, True):
                sightings = self._looker.look(full)
                if any(s.key == case.sighting.key for s in sightings):
                    related = [s for s in sightings if _related(s, case.sighting)]
                    cases = self._cases(related, sightings, everybody=False)
                    return next((c for c in cases if c.sighting.key == case.sighting.key), None)
            return None

    def hear(self, sighting: Sighting) -> tuple[Testimony, ...]:
        """Only ask, about a container of which part may be gone by now."""
        with self._one_at_a_time:
            return self._bench.hear([sighting]).get(sighting.key, ())

    def _cases(
        self,
        sightings: Sequence[Sighting],
        seen: Sequence[Sighting],
        everybody: bool,
        quiet_since: Optional[float] = None,
    ) -> list[Case]:
        """The cases of some of what was `seen`."""
        heard = self._bench.hear(sightings, everybody, quiet_since)
        judgements = _judge(sightings, heard, seen)
        if any(j.verdict in SUSPECTS for j in judgements):
            sightings = self._seen_again(sightings, judgements)
            judgements = _judge(sightings, heard, seen)
        return [
            Case(s, heard.get(s.key, ()), j, self._identity(s) if everybody or j.verdict in SUSPECTS else Identity())
            for s, j in zip(sightings, judgements)
        ]

    def _seen_again(self, sightings: Sequence[Sighting], judgements: Sequence[Judgement]) -> list[Sighting]:
        """Without the suspects that ended while we asked, as a container does that is being removed.

        What vetoes a suspect, and what else its shim serves, is looked up anew: the looker remembers it for a while.
        """
        here = []
        for sighting, judgement in zip(sightings, judgements):
            if judgement.verdict not in SUSPECTS:
                here.append(sighting)
                continue
            fresh = self._looker.again(sighting)
            if fresh is not None:
                here.append(replace(sighting, veto=fresh.veto, metadata=fresh.metadata, siblings=fresh.siblings))
        return here

    def _identity(self, sighting: Sighting) -> Identity:
        if sighting.key not in self._identities:
            self._identities[sighting.key] = self._identify(sighting)
        return self._identities[sighting.key]

    def _forget_all_but(self, keys: Iterable[tuple[str, ...]]) -> None:
        kept = set(keys)
        self._identities = {k: v for k, v in self._identities.items() if k in kept}


def _judge(
    sightings: Sequence[Sighting], heard: Mapping[tuple[str, ...], tuple[Testimony, ...]], seen: Sequence[Sighting]
) -> list[Judgement]:
    concluded = judge.conclude_all([(s, heard.get(s.key, ())) for s in sightings])
    if SUSPECTS.isdisjoint(j.verdict for j in concluded):
        return concluded
    protected = judge.protect_siblings(list(zip(sightings, concluded)))
    return judge.protect_dependents(list(zip(sightings, protected)), seen)


def _related(other: Sighting, sighting: Sighting) -> bool:
    same_shim = sighting.shim is not None and other.shim == sighting.shim
    return same_shim or other.name == sighting.name
