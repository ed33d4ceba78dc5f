# SPDX-License-Identifier: Apache-2.0
"""What has been told: one record for each change of verdict, none for a look that finds nothing new."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Callable, Optional

from orphand.model import SUSPECTS, Action, Case, Claim, Decision, Kind, Sighting, Survey, Verdict
from orphand.report import words
from orphand.report.topics import Report, Topic

UNDECIDED_LOOKS = 2  # an engine that misses one question is a blip,
UNDECIDED_SECONDS = 30.0  # and so is one that restarts, however many looks its events cause meanwhile

Key = tuple[str, ...]
Silence = tuple[str, ...]  # the authorities that did not answer


@dataclass(frozen=True)
class _Told:
    """What was last told about one container that was a suspect."""

    case: Case
    kind: Optional[Kind]
    action: Optional[Action] = None  # of its ORPHANED record; None: only SUSPECTED
    by_part: bool = False  # an incomplete look has seen it, so one that doesn't see it means something


def container_key(sighting: Sighting) -> Key:
    """The same container through all that its processes go through: its name, and the shim or else the first init."""
    first = sighting.processes[0] if sighting.processes else None
    return (*sighting.name, f"{first.pid}:{first.start}" if first else "")


class Story:
    """Turns looks into records. Holds only what was told; a restart tells anew what is still so."""

    def __init__(self, report: Report) -> None:
        """`report` gets the records."""
        self._report = report
        self._told: dict[Key, _Told] = {}
        self._silent: dict[Silence, tuple[int, float]] = {}  # looks in a row, and when the first was
        self._undecided: set[Silence] = set()  # told

    def look(
        self, survey: Survey, decide: Callable[[Case], Decision], grace: Callable[[Case], float], now: float
    ) -> None:
        """Tell what has changed. `decide` and `grace` (seconds) are asked for suspects only; `now`: boot clock."""
        if self._told or any(case.judgement.verdict in SUSPECTS for case in survey.cases):
            for case in survey.cases:
                self._tell(case, decide, grace, survey.complete)
            self._tell_gone(survey)
        self._tell_silence(survey.cases, now)

    def forget(self, sighting: Sighting) -> None:
        """It was ended, and whoever ended it has told so: that it is gone is no news."""
        self._told.pop(container_key(sighting), None)

    def _tell(
        self, case: Case, decide: Callable[[Case], Decision], grace: Callable[[Case], float], complete: bool
    ) -> None:
        key = container_key(case.sighting)
        told = self._told.get(key)
        verdict, kind = case.judgement.verdict, case.judgement.kind
        if verdict in SUSPECTS:
            decision = decide(case)
            # Under an end the kind changes too, as init and shim go one by one: that is no news
            if told is None or (told.kind is not kind and told.action is not Action.KILL):
                told = _Told(case, kind)
                if verdict is Verdict.PENDING:
                    self._report(Topic.SUSPECTED, words.suspected(case, grace(case), decision), case)
            if verdict is Verdict.ORPHAN and told.action is not decision.action:
                self._report(Topic.ORPHANED, words.orphaned(case, decision), case, action=decision.action.value)
                told = replace(told, action=decision.action)
            self._told[key] = replace(told, case=case, by_part=told.by_part or not complete)
        elif told is not None and verdict is not Verdict.UNDECIDED:
            del self._told[key]
            about = replace(case, identity=told.case.identity)  # only suspects are identified at each look
            self._report(Topic.CLEARED, words.cleared(about, case.judgement.reason), about)

    def _tell_gone(self, survey: Survey) -> None:
        here = {container_key(case.sighting) for case in survey.cases}
        suspects = {case.sighting.name for case in survey.cases if case.judgement.verdict in SUSPECTS}
        for key, told in list(self._told.items()):
            if key in here or not (survey.complete or told.by_part):
                continue
            del self._told[key]
            # Where its shim has died, the container goes on as a suspect of another kind, which was just told;
            # and of what is to be ended, whoever ends it tells the outcome
            if told.case.sighting.name not in suspects and told.action is not Action.KILL:
                self._report(Topic.CLEARED, words.cleared(told.case, "its processes ended by themselves"), told.case)

    def _tell_silence(self, cases: Iterable[Case], now: float) -> None:
        silent: dict[Silence, list[Case]] = {}
        for case in cases:
            if case.judgement.verdict is Verdict.UNDECIDED:
                silent.setdefault(_silence(case), []).append(case)
        before = self._silent
        self._silent = {who: (before[who][0] + 1, before[who][1]) if who in before else (1, now) for who in silent}
        self._undecided &= silent.keys()
        for who, waiting in silent.items():
            looks, since = self._silent[who]
            if who not in self._undecided and looks >= UNDECIDED_LOOKS and now - since >= UNDECIDED_SECONDS:
                self._undecided.add(who)
                first, others = waiting[0], len(waiting) - 1
                self._report(Topic.UNDECIDED, words.undecided(first, others), None if others else first)
                self._reopen(waiting)

    def _reopen(self, cases: Iterable[Case]) -> None:
        """Who has read that nothing will be ended meanwhile is told again when an orphan's turn comes."""
        for key in {container_key(case.sighting) for case in cases} & self._told.keys():
            self._told[key] = replace(self._told[key], action=None)


def _silence(case: Case) -> Silence:
    """Who did not answer: one record for all containers that wait for the same ones."""
    return tuple(sorted({t.authority for t in case.testimonies if t.claim is Claim.UNAVAILABLE}))
