# SPDX-License-Identifier: Apache-2.0
"""Runs inside a host: look, ask everybody, end one container with the real parts, and print what happened as JSON.

The grace is the daemon's and is not waited out here; engines are believed at once, since a test has just started them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Optional

from orphand import cgroupfs, judge, proc
from orphand.authorities.bench import Bench
from orphand.estate import Estate
from orphand.identity import identify
from orphand.model import Case, Sighting, Verdict
from orphand.proc import now
from orphand.reaper import Reaper, plan
from orphand.report.topics import Topic
from orphand.scan import Scanner
from orphand.settings import Kill, Scan, Settings
from orphand.sightings import Looker

RECORD = Path("/run/end_one.json")  # what the daemon keeps in its state file


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("id")
    parser.add_argument("--term", type=float, default=3.0, help="term_timeout")
    parser.add_argument("--no-cleanup", action="store_true")
    parser.add_argument("--crash-at", default="", help="SIGKILL to ourselves when such a step is said")
    parser.add_argument("--resume", action="store_true", help="finish what a crash left")
    parser.add_argument("--known-at", default="", help="from that step on somebody knows the container")
    parser.add_argument("--settle", type=float, default=0.0)
    parser.add_argument("--before-again", default="", help="a command between the first answers and the second ones")
    parser.add_argument("--no-cgroup-kill", action="store_true", help="as before Linux 5.14")
    parser.add_argument("--no-pidfd", action="store_true", help="as before Linux 5.3")
    parser.add_argument("--shim", type=int, default=0, help="of several sightings of the id the one with this shim")
    parser.add_argument("--overrule", action="store_true", help="as if nobody had a veto: what would the end do?")
    args = parser.parse_args()
    if args.no_cgroup_kill:
        cgroupfs.kill = lambda directory: False  # type: ignore[assignment]
    if args.no_pidfd:
        proc.HAS_PIDFD = False  # type: ignore[misc]
    settings = Settings(kill=Kill(term_timeout=args.term, cleanup=not args.no_cleanup), scan=Scan(settle=args.settle))
    end = End(settings, args)
    json.dump(asyncio.run(end.resume() if args.resume else end.run()), sys.stdout)


class End:
    def __init__(self, settings: Settings, args: argparse.Namespace) -> None:
        self.args = args
        self.bench = Bench(settings)
        self.scanner = Scanner(Looker(), self.bench, identify)
        self.steps: list[str] = []
        self.known = False
        self.settings = settings

    def reaper(self) -> Reaper:
        return Reaper(self.settings.kill, self.bench.containerd, self.report, self.remember, self.forget)

    def report(self, topic: Topic, message: str, case: Optional[Case] = None, **fields: str) -> None:
        self.steps.append(message)
        self.known = self.known or bool(self.args.known_at and self.args.known_at in message)
        if self.args.crash_at and self.args.crash_at in message:
            os.kill(os.getpid(), signal.SIGKILL)

    def remember(self, estate: Estate) -> None:
        RECORD.write_text(json.dumps(estate.to_json()))

    def forget(self, estate: Estate) -> None:
        RECORD.unlink()

    async def again(self, case: Case) -> Optional[Case]:
        if self.args.before_again:
            subprocess.run(["bash", "-c", self.args.before_again], check=True, stdout=sys.stderr)
        fresh = self.scanner.again(case)
        return overruled(fresh) if fresh and self.args.overrule else fresh

    async def denied(self, estate: Estate) -> str:
        if self.known:
            return "the test knows it now"
        sighting = estate.sighting(now())
        judgement = judge.conclude(sighting, self.bench.hear([sighting])[sighting.key])
        return judgement.veto if judgement.verdict is Verdict.PENDING else judgement.reason

    def is_wanted(self, sighting: Sighting) -> bool:
        shim = sighting.shim.process.pid if sighting.shim else 0
        return sighting.container_id == self.args.id and self.args.shim in (0, shim)

    async def resume(self) -> dict[str, object]:
        estate = Estate.from_json(json.loads(RECORD.read_text()))
        outcome = await self.reaper().resume(estate, self.denied)
        return {**vars(outcome), "all_steps": self.steps, "remembered": RECORD.exists()}

    async def run(self) -> dict[str, object]:
        cases = [c for c in self.scanner.look(full=True).cases if self.is_wanted(c.sighting)]
        if len(cases) != 1:
            return {"cases": [repr(c) for c in cases]}
        case = cases[0]
        judgement = case.judgement
        said: dict[str, object] = {
            "verdict": judgement.verdict.value,
            "kind": judgement.kind.value if judgement.kind else "",
            "reason": judgement.reason,
            "veto": judgement.veto,
            "siblings": list(case.sighting.siblings),
            "plan": plan(case, self.settings.kill),
        }
        if judgement.verdict is Verdict.PENDING:  # the grace is the daemon's business
            case = replace(case, judgement=replace(judgement, verdict=Verdict.ORPHAN))
        if self.args.overrule:
            case = overruled(case)
        outcome = await self.reaper().end(case, self.again, self.denied)
        return {**said, **vars(outcome), "all_steps": self.steps, "remembered": RECORD.exists()}


def overruled(case: Case) -> Case:
    return replace(case, sighting=replace(case.sighting, veto=""), judgement=replace(case.judgement, veto=""))


if __name__ == "__main__":
    main()
