# SPDX-License-Identifier: Apache-2.0
"""Runs inside the host: the lives, the chaos, the oracle's verdict. Its stdout is JSON lines: progress, the report."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

from tests.churn.book import ACTS, MARKS, ORPHANED, SUSPECTED, Book, Entry, Suspicion
from tests.churn.chaos import Chaos, configure, main_pid, shell, start_residents
from tests.churn.engine import Docker
from tests.churn.life import Living, Stuck, Tools
from tests.churn.plan import Life, Plan, make_plan
from tests.churn.watch import DOCKERDS_PROXY, Watcher, layer_mounts, residue, sandbox_files, strangers

STORY_LINES = 120
BOOK = Path("/var/log/churn.txt")


def emit(kind: str, **data: Any) -> None:
    sys.stdout.write(json.dumps({"kind": kind, **data}) + "\n")
    sys.stdout.flush()


class Run:
    """One run from the first resident to the last look."""

    def __init__(self, plan: Plan, workers: int, grace: float, settle: float, patience: float) -> None:
        """`patience`: seconds for the last orphans, beyond grace and settle."""
        self._plan, self._grace, self._settle, self._patience = plan, grace, settle, patience
        self._tools = Tools(Docker(), Book(), Watcher())
        self._book = self._tools.book
        self._chaos = Chaos(plan, self._tools, settle + grace + 5.0, lambda text: emit("note", text=text))
        self._free = threading.Semaphore(workers)
        self._threads: list[threading.Thread] = []
        self._stuck: list[str] = []
        self._crashed: list[str] = []
        self._begun = self._over = 0
        self._daemon: list[dict[str, float]] = []  # samples
        self._daemon_pids: list[int] = []
        self._strays: dict[str, dict[str, Any]] = {}
        self._finished = threading.Event()
        self._began = time.time()

    def __call__(self) -> dict[str, Any]:
        self._chaos.residents = start_residents(self._plan.residents, self._tools)
        self._chaos.start_pod()
        samplers = [
            threading.Thread(target=t, daemon=True) for t in (self._progress, self._sample, self._look_for_strays)
        ]
        for thread in samplers:
            thread.start()
        self._chaos.start()
        self._live_all()
        self._chaos.finish()
        lived = time.time()
        self._clean_lives()
        waited = self._wait_for_ends()
        self._finished.set()
        self._chaos.close()
        emit("note", text=f"all lives over; the last orphans took {waited:.0f} s more")
        return self._report(lived - self._began)

    # Lives

    def _live_all(self) -> None:
        for life in self._plan.lives:
            if not life.burst:
                self._free.acquire()
            self._begun += 1
            self._chaos.begun(self._begun)
            thread = threading.Thread(target=self._live, args=(life,), daemon=True)
            thread.start()
            self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        for thread in self._threads:
            thread.join()

    def _live(self, life: Life) -> None:
        entry = self._book.open(f"life{life.number}", "life")
        try:
            Living(life, entry, self._tools).live()
        except Stuck as error:
            self._stuck.append(str(error))
        except Exception as error:  # noqa: BLE001 a bug of the driver's must fail the run, not end a thread silently
            self._crashed.append(f"{entry.name}: {type(error).__name__}: {error}")
        finally:
            self._over += 1
            if not life.burst:
                self._free.release()

    def _clean_lives(self) -> None:
        for entry in self._book.living():
            if entry.role == "life" and entry.full_id:
                entry.tell("removed after the run")
                try:
                    Living(self._plan.lives[0], entry, self._tools).remove()
                except Stuck as error:
                    self._crashed.append(f"for ever: {error}")

    def _wait_for_ends(self) -> float:
        begin = time.time()
        limit = self._settle + self._grace + self._patience
        while time.time() - begin < limit:
            if all(e.clean for e in self._book.victims()) and not strangers(self._known() | set(self._spared_now())):
                break
            time.sleep(0.5)
        return time.time() - begin

    def _spared_now(self) -> dict[str, str]:
        return self._spared(journal("orphand"))

    def _known(self) -> set[str]:
        return {e.full_id for e in self._book.living() if e.lost is None}

    # Samples

    def _progress(self) -> None:
        while not self._finished.wait(10.0):
            victims = self._book.victims()
            emit(
                "progress",
                seconds=round(time.time() - self._began),
                begun=self._begun,
                over=self._over,
                lives=len(self._plan.lives),
                orphans=len(victims),
                ended=sum(e.ended is not None for e in victims),
                clean=sum(e.clean is not None for e in victims),
                stray=len(self._strays),
                rss=int(self._daemon[-1]["rss"]) if self._daemon else 0,
                doing=self._chaos.doing,
            )

    def _sample(self) -> None:
        while not self._finished.wait(2.0):
            pid = main_pid("orphand")
            if pid and pid not in self._daemon_pids:
                self._daemon_pids.append(pid)
            sample = daemon_sample(pid)
            if sample:
                self._daemon.append(sample)

    def _look_for_strays(self) -> None:
        """Ids that live although Docker has said that they don't exist: orphans that the engines made themselves."""
        while not self._finished.wait(3.0):
            now = time.time()
            settled = {e.full_id for e in self._book.entries if e.gone is None or now - e.gone < 4.0}
            seen = strangers(settled | {e.full_id for e in self._book.victims()})
            for full_id, what in seen.items():
                entry = self._book.by_id.get(full_id)
                if entry is None and self._just_created(now):
                    continue
                stray = self._strays.setdefault(
                    full_id, {"first": now, "what": what, "name": entry.name if entry else "?"}
                )
                stray["last"] = now

    def _just_created(self, now: float) -> bool:
        """Whether a create is under way, whose id its thread has not written down yet."""
        return any(not e.full_id and e.gone is None for e in self._book.living())

    def write_book(self, path: Path) -> None:
        """Every story, for whoever investigates a run."""
        with path.open("w") as file:
            for entry in self._book.entries:
                file.write(f"{entry.role} {entry.name} {entry.full_id} {entry.kind} marks={entry.marks}\n")
                told = [*entry.story, *((p.died, f"{p.role} {p.pid} died") for p in entry.processes if p.died)]
                for when, what in sorted(told):
                    file.write(
                        f"  {time.strftime('%H:%M:%S', time.localtime(when))}.{int(when % 1 * 1000):03d} {what}\n"
                    )

    # The verdict

    def _report(self, seconds: float) -> dict[str, Any]:
        records = journal("orphand")
        killed = [*self._bad_acts(records), *self._bad_deaths()]
        victims = self._book.victims()
        missed = [e for e in victims if e.ended is None]
        unclean = [e for e in victims if e.ended is not None and e.clean is None]
        living = strangers(self._known())
        spared = self._spared(records)
        unknown = {i: w for i, w in living.items() if i not in {*spared, *(e.full_id for e in victims)}}
        self._remove_residents(set(spared))
        rest, engines_own = self._sort_residue(residue(set(spared)), records)
        stories = {s.full_id: self._story(s.name, s.full_id) for s in killed[:5]}
        stories.update({e.full_id: self._story(e.name, e.full_id) for e in (*missed[:3], *unclean[:3])})
        stories.update({i: self._story("?", i) for i in list(unknown)[:3]})
        failures = [
            *self._crashed,
            *(f"the daemon was started {len(self._daemon_pids)} times" for _ in [0] if len(self._daemon_pids) != 1),
            *self._chaos.recipe_failures,
            *self._book.refused,
        ]
        return {
            "seed": self._plan.seed,
            "lives": len(self._plan.lives),
            "seconds": round(seconds, 1),
            "lives_per_second": round(len(self._plan.lives) / max(seconds, 1.0), 2),
            "residents": len(self._plan.residents) + len(self._chaos.pods),
            "disturbances": self._chaos.done,
            "managed_killed": [asdict(s) for s in killed],
            "orphans": len(victims),
            "orphans_by_kind": by_kind(victims),
            "orphans_ended": len(victims) - len(missed),
            "orphans_missed": [f"{e.kind} {e.full_id}" for e in missed],
            "seconds_to_end": spread(e.ended - e.lost for e in victims if e.ended and e.lost),
            "seconds_after_grace": spread(
                max(0.0, e.ended - e.lost - self._grace) for e in victims if e.ended and e.lost
            ),
            "seconds_to_clean": spread(e.clean - e.lost for e in victims if e.clean and e.lost),
            "orphans_unclean": [f"{e.kind} {e.full_id}: {e.left}" for e in unclean],
            "strays": [{"id": i, **s, "seconds": round(s["last"] - s["first"], 1)} for i, s in self._strays.items()],
            "unknown_living": unknown,
            "spared": spared,
            "residue": rest,
            "engines_own_leftovers": engines_own,
            "docker_layer_mounts": len(layer_mounts()),
            "sandbox_files": len(sandbox_files()),
            "false_suspects": self._false_suspects(records),
            "records": count_records(records),
            "stuck_lives": self._stuck,
            "void_creates": self._book.void_creates,
            "failures": failures,
            "unstarted": len(self._book.unstarted),
            "daemon": self._growth(),
            "stories": stories,
        }

    def _sort_residue(self, found: list[str], records: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
        """(what orphand should have removed, what engines left of containers that had no process any more).

        A crash in the middle of a create leaves runc's record or a cgroup without any process: no orphan that
        runs, nothing that orphand looks for. Of an id that it ended, or ever had to end, everything counts, apart from
        the proxies of a living dockerd: those are its own to end, and a container that comes may have the address.
        """
        ended = {str(r.get("ORPHAND_CONTAINER_ID")) for r in records if r.get("MESSAGE_ID") in ACTS}
        concerned = ended | self._long_strays() | {e.full_id for e in self._book.victims()}
        concerned |= {e.netns for e in self._book.victims() if e.netns}
        lifeless = ("cgroup ", "runc state ", "bundle ", "netns ")
        own = [f for f in found if f.startswith(lifeless) and not any(i in f for i in concerned)]
        own += [f for f in found if f.startswith(DOCKERDS_PROXY)]
        return [f for f in found if f not in own], own

    def _spared(self, records: list[dict[str, Any]]) -> dict[str, str]:
        """Ids that engines lost by themselves, which orphand told of and left to a person -> why.

        Such as a container that dockerd was creating when it was killed, of which containerd still has the record:
        metadata is a veto. Never an injected orphan.
        """
        injected = {e.full_id for e in self._book.victims()}
        told = [r for r in records if r.get("MESSAGE_ID") == ORPHANED and r.get("ORPHAND_VETO")]
        return {
            str(r["ORPHAND_CONTAINER_ID"]): str(r["ORPHAND_VETO"])
            for r in told
            if r["ORPHAND_CONTAINER_ID"] not in injected
        }

    def _long_strays(self) -> set[str]:
        return {i for i, s in self._strays.items() if s["last"] - s["first"] > self._grace}

    def _bad_acts(self, records: list[dict[str, Any]]) -> list[Suspicion]:
        found: dict[str, Suspicion] = {}
        for record in records:
            suspicion = self._book.act(record)
            if suspicion:
                found.setdefault(suspicion.full_id, suspicion)
        unknown = [i for i, s in found.items() if s.name == "?"]
        if len(unknown) <= self._book.void_creates:  # a create that broke, and what it left is ended: right so
            for full_id in unknown:
                del found[full_id]
        return list(found.values())

    def _bad_deaths(self) -> list[Suspicion]:
        return [s for e in self._book.entries for s in (*self._book.deaths(e), *self._book.terms(e))]

    def _false_suspects(self, records: list[dict[str, Any]]) -> list[str]:
        """Managed containers that looked orphaned for at least one look: not an error, but worth knowing."""
        found = []
        for record in records:
            entry = self._book.by_id.get(str(record.get("ORPHAND_CONTAINER_ID", "")))
            when = int(record.get("__REALTIME_TIMESTAMP", 0)) / 1e6
            if record.get("MESSAGE_ID") == SUSPECTED and entry and self._book.managed(entry, when):
                found.append(f"{entry.name} {record.get('ORPHAND_KIND')}: {record.get('ORPHAND_REASON')}")
        return found

    def _story(self, name: str, full_id: str) -> list[str]:
        entry = self._book.by_id.get(full_id)
        told = [(t, f"driver: {w}") for t, w in (entry.story if entry else [])]
        told += [(p.died, f"oracle: {p.role} {p.pid} died") for p in (entry.processes if entry else []) if p.died]
        if entry and entry.marks:
            told.append((time.time(), f"oracle: marks {entry.marks}"))
        needles = {full_id, *([name] if name != "?" else [])}
        for record in journal():
            text = str(record.get("MESSAGE", ""))
            if full_id in text or record.get("ORPHAND_CONTAINER_ID") in needles:
                when = int(record["__REALTIME_TIMESTAMP"]) / 1e6
                told.append((when, f"{record.get('SYSLOG_IDENTIFIER')}: {text[:400]}"))
        told += [(t, f"chaos: {w}") for t, w in ((p.begin, p.what) for p in self._book.phases)]
        told.sort()
        lines = [f"{time.strftime('%H:%M:%S', time.localtime(t))}.{int(t % 1 * 1000):03d} {w}" for t, w in told]
        return [f"{name} {full_id}", *lines[:STORY_LINES]]

    def _remove_residents(self, spared: set[str]) -> None:
        """The pods first: the shim of one that lost a member outlives it, and is orphand's to end then."""
        for pod in self._chaos.pods:
            ctr = f"ctr -n {pod.namespace}"
            shell(f"{ctr} tasks rm -f {pod.full_id} || :; {ctr} containers rm {pod.full_id} || :")
        living = {r.entry.full_id for r in self._chaos.residents}
        self._until_clean(living | spared)
        for resident in self._chaos.residents:
            resident.remove()
        self._until_clean(spared)

    def _until_clean(self, known: set[str]) -> None:
        end = time.time() + self._settle + self._grace + self._patience / 3
        while residue(known) and time.time() < end:
            time.sleep(0.5)

    def _growth(self) -> dict[str, Any]:
        """Memory in KiB: at the start, after the warm-up (a fifth of the run), at the end; each a median of samples.

        RSS has the pages of the journal's file in it, which grow with the file and are journald's as well; `private` is
        the daemon's own.
        """
        if len(self._daemon) < 10:
            return {"samples": len(self._daemon)}
        rss, private = ([s[kind] for s in self._daemon] for kind in ("rss", "private"))
        warm = len(rss) // 5
        span = max(3, len(rss) // 20)

        def moments(samples: list[float]) -> list[float]:
            return [statistics.median(x) for x in (samples[:3], samples[warm : warm + span], samples[-span:])]

        last = self._daemon[-1]
        return {
            "rss": moments(rss),
            "private": moments(private),
            "growth": moments(private)[2] - moments(private)[1],
            "rss_growth": moments(rss)[2] - moments(rss)[1],
            "rss_max": max(rss),
            "curve": [round(rss[i * (len(rss) - 1) // 20]) for i in range(21)],
            "threads": last["threads"],
            "descriptors": last["descriptors"],
            "cpu_seconds": round(last["cpu"] - self._daemon[0]["cpu"], 1),
            "seconds": round(last["time"] - self._daemon[0]["time"]),
        }


def daemon_sample(pid: int) -> Optional[dict[str, float]]:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return None
    return {
        "time": time.time(),
        "rss": float(fields["VmRSS"].split()[0]),
        "private": float(fields["RssAnon"].split()[0]),
        "threads": float(fields["Threads"]),
        "descriptors": descriptors,
        "cpu": (int(times[11]) + int(times[12])) / 100.0,
    }


def journal(unit: str = "") -> list[dict[str, Any]]:
    """Records of one unit, or of both engines and orphand."""
    units = [unit] if unit else ["orphand", "docker", "containerd"]
    argv = ["journalctl", "-o", "json", "--all", "-q", "--no-pager", *(f"-u{u}" for u in units)]
    shown = subprocess.run(argv, capture_output=True, timeout=600)
    return [json.loads(line) for line in shown.stdout.decode(errors="replace").splitlines()]


def count_records(records: list[dict[str, Any]]) -> dict[str, int]:
    """How often the daemon said what, by the first words."""
    counts: dict[str, int] = {}
    for record in records:
        name = ACTS.get(str(record.get("MESSAGE_ID")), "priority " + str(record.get("PRIORITY")))
        counts[name] = counts.get(name, 0) + 1
    return counts


def by_kind(victims: Iterable[Entry]) -> dict[str, dict[str, Any]]:
    kinds: dict[str, list[Entry]] = {}
    for entry in victims:
        kinds.setdefault(entry.kind, []).append(entry)
    return {
        kind: {
            "made": len(entries),
            "ended": sum(e.ended is not None for e in entries),
            "clean": sum(e.clean is not None for e in entries),
            "seconds": spread(e.ended - e.lost for e in entries if e.ended and e.lost),
        }
        for kind, entries in sorted(kinds.items())
    }


def spread(values: Iterable[float]) -> dict[str, float]:
    """p50, p99 and the largest."""
    sorted_values = sorted(values)
    if not sorted_values:
        return {}

    def at(share: float) -> float:
        return round(sorted_values[min(len(sorted_values) - 1, int(share * len(sorted_values)))], 1)

    return {"p50": at(0.5), "p99": at(0.99), "max": round(sorted_values[-1], 1)}


def prepare() -> None:
    """Engines that may be killed often, and the image."""
    for unit in ("docker", "containerd"):
        place = Path(f"/etc/systemd/system/{unit}.service.d/churn.conf")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("[Unit]\nStartLimitIntervalSec=0\n[Service]\nRestartSec=1\nStartLimitInterval=0\n")
    configure(live_restore=True)
    shutil.rmtree(MARKS, ignore_errors=True)
    MARKS.mkdir(parents=True)
    shell("systemctl daemon-reload; systemctl restart docker; img")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lives", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--cgroup", required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--grace", type=float, required=True)
    parser.add_argument("--settle", type=float, required=True)
    parser.add_argument("--patience", type=float, required=True)
    parser.add_argument("--prepare", action="store_true")
    a = parser.parse_args()
    if a.prepare:
        prepare()
        return 0
    run = Run(make_plan(a.seed, a.lives, a.every, a.cgroup), a.workers, a.grace, a.settle, a.patience)
    report = run()
    run.write_book(BOOK)
    emit("report", **report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
