# SPDX-License-Identifier: Apache-2.0
"""The daemon: triggers make looks, looks make verdicts, verdicts make decisions, and those are told and done.

One asyncio loop. What blocks (looking, asking) runs in a thread and has deadlines of its own; the watchdog is
fed only after a look really completed, so that systemd restarts a daemon that hangs.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from orphand import __version__, cleanup, config, judge, policy, proc
from orphand.authorities.bench import Bench
from orphand.errors import ConfigError
from orphand.estate import Estate
from orphand.identity import identify
from orphand.model import (
    SUSPECTS,
    Action,
    Case,
    Decision,
    Judgement,
    Outcome,
    Role,
    Sighting,
    Survey,
    Testimony,
    Verdict,
)
from orphand.notify import Notifier, watchdog_interval
from orphand.reaper import BY_ENGINE, Reaper, unfinished
from orphand.report import words
from orphand.report.alerts import Alerts, Event
from orphand.report.forms import survey_form
from orphand.report.story import Story, container_key
from orphand.report.topics import Report, Topic
from orphand.scan import Scanner
from orphand.sightings import Looker
from orphand.state import (
    RUNTIME_DIR,
    STATE_DIR,
    StateError,
    load_state,
    locked,
    read_hold,
    save_state,
    with_end,
    write_json,
)
from orphand.triggers.sources import Sources

EX_CONFIG = 78
STOP_DEADLINE = 1.0  # seconds that SIGTERM may take
SHORTEST_WAIT = 0.2  # seconds between two looks of a short grace


class Daemon:
    """See the module. `run` returns the exit status."""

    def __init__(
        self,
        report: Report,
        sources: Optional[Sequence[Path]] = None,
        runtime_dir: Path = RUNTIME_DIR,
        state_dir: Path = STATE_DIR,
    ) -> None:
        self._report = report
        self._config_sources = sources
        self._runtime_dir = runtime_dir
        self._status_file = runtime_dir / "status.json"
        self._state_file = runtime_dir / "state.json"
        self._state_dir = state_dir
        self._notify = Notifier()
        self._watchdog = watchdog_interval()
        self._node = socket.gethostname()
        self._history = judge.History()
        self._cases: dict[tuple[str, ...], Case] = {}
        self._seen: Optional[tuple[Case, ...]] = None  # the last look's, before the policy and the grace had their say
        self._ending: dict[tuple[str, ...], asyncio.Task[None]] = {}
        self._half_done: dict[str, str] = {}  # ends that were interrupted -> why they are not gone on with yet
        self._resuming: Optional[asyncio.Task[None]] = None
        self._hold_words = ""
        self._failed_looks = 0
        self._status = "looking for the first time"
        self._troubles: dict[str, str] = {}  # of orphand itself, by what is in trouble: each is told once
        self._config_trouble = ""
        self._started = False  # said so, with the engines that the first look found

    async def run(self) -> int:
        """From start to stop: 0 after SIGTERM, 78 for a configuration that can't be used."""
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._reload = asyncio.Event()
        self._turn = asyncio.Lock()  # of the ends: one at a time
        self._listen_to_signals()
        try:
            self._settings = config.load(self._config_sources)
        except ConfigError as error:
            self._report(Topic.CONFIG_REFUSED, words.config_refused(str(error), kept=False))
            self._notify.status("the configuration can't be used: see the journal, or `orphand check-config`")
            return EX_CONFIG
        self._set_up()
        self._half_done = dict.fromkeys(self._state.ends, "")
        self._go_on_with_ends()
        try:
            await self._look_until_stopped()
        finally:
            await self._shut_down()
        return 0

    def _listen_to_signals(self) -> None:
        self._loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        self._loop.add_signal_handler(signal.SIGINT, self._stop.set)
        self._loop.add_signal_handler(signal.SIGHUP, self._on_reload)
        self._loop.add_signal_handler(signal.SIGUSR1, self._on_wish)

    def _set_up(self) -> None:
        settings = self._settings
        self._state = load_state(self._state_file, proc.boot_id(), proc.now(), settings.scan.settle)
        self._bench = Bench(settings)
        self._looker = Looker()
        self._scanner = Scanner(self._looker, self._bench, lambda s: identify(s, self._bench.data_roots()))
        self._alerts = Alerts(settings.alerts, self._report, self._node, proc.boot_id(), self._state.alerted)
        self._story = Story(self._report)
        self._reaper = self._make_reaper()
        self._sources = Sources(settings, self._loop, self._report, self._bench.engines)
        self._sources.start()

    def _make_reaper(self) -> Reaper:
        return Reaper(self._settings.kill, self._bench.containerd, self._report, self._remember_end, self._forget_end)

    def _engine_names(self) -> list[str]:
        return [f"{engine.name} {engine.address}".strip() for engine in self._bench.engines()]

    # Looking

    async def _look_until_stopped(self) -> None:
        ready = False
        sweep_due = 0.0
        stopped = self._run(self._stop.wait())
        by_timer = False
        while not self._stop.is_set():
            full = proc.now() >= sweep_due
            quiet_since = self._sources.quiet_since() if by_timer and not full else None
            if await self._look(full, quiet_since) and full:
                sweep_due = proc.now() + self._settings.scan.sweep_interval
            self._go_on_with_ends()
            if not ready:
                self._notify.ready(self._status)
                ready = True
                _freeze()
            by_timer = await self._next(stopped)
            if self._reload.is_set():
                self._reload.clear()
                self._apply_new_config()

    async def _next(self, stopped: asyncio.Task[Any]) -> bool:
        """Until it is time for the next look: a trigger, a reload, the stop; or the timer, a grace that ends: True."""
        trigger = self._run(self._sources.triggered())
        reload = self._run(self._reload.wait())
        done, _ = await asyncio.wait(
            {trigger, reload, stopped}, timeout=self._wait(), return_when=asyncio.FIRST_COMPLETED
        )
        for task in {trigger, reload} - done:
            task.cancel()
        return not done

    async def _look(self, full: bool, quiet_since: Optional[float]) -> bool:
        """One look with all that follows; whether it completed. A look that fails is told and changes nothing."""
        try:
            survey = await asyncio.to_thread(self._scanner.look, full, quiet_since=quiet_since)
            if not self._started:
                self._report(Topic.STARTED, words.started(__version__, self._settings, self._engine_names()))
                self._started = True
            self._conclude(survey, proc.now())
        except Exception as error:  # noqa: BLE001 the next look may succeed; the record says what happened
            self._failed_looks += 1
            self._trouble("look", f"a look at the node failed: {type(error).__name__}: {error}")
            self._history = judge.History()
            return False
        self._troubles.pop("look", None)
        self._sources.update(self._bench.engines())
        self._notify.watchdog()
        return True

    def _conclude(self, survey: Survey, now: float) -> None:
        before = self._cases
        if survey.cases is not self._seen:  # else the last look still holds, in which all was settled
            self._judge(survey.cases, now)
        cases = tuple(self._cases.values())
        survey = replace(survey, cases=cases)
        self._watch_hold()
        self._watch_breaker(cases)
        self._story.look(survey, lambda case: self._intent(case, now), self._grace, now)
        decisions = {c.sighting.key: self._intent(c, now) for c in _orphans(cases)}
        for key, decision in decisions.items():
            self._act(self._cases[key], decision)
        self._clear_alerts(before)
        self._write_status(survey, decisions)

    def _judge(self, seen: tuple[Case, ...], now: float) -> None:
        """What the policy and the grace make of it."""
        exempted = [_judged(c, policy.exempted(c, self._settings.policy)) for c in seen]
        judgements = {c.sighting.key: c.judgement for c in exempted}
        self._history = judge.remember(self._history, judgements, now, self._settings.scan.max_gap)
        self._cases = {c.sighting.key: _judged(c, self._ripened(c, now)) for c in exempted}
        self._seen = seen

    def _ripened(self, case: Case, now: float) -> Judgement:
        row = self._history.rows.get(case.sighting.key)
        return judge.ripen(case.judgement, row, now, self._grace(case)) if row else case.judgement

    def _grace(self, case: Case) -> float:
        return policy.grace_for(case, self._settings.policy, self._node)

    def _wait(self) -> float:
        """Seconds until the next look: the timer's, or sooner where a grace ends, or for systemd's watchdog."""
        now = proc.now()
        waits = [self._settings.scan.interval]
        if self._watchdog:
            waits.append(self._watchdog / 3)
        for key, row in self._history.rows.items():
            case = self._cases.get(key)
            if case and case.judgement.verdict is Verdict.PENDING:
                left = row.since + self._grace(case) - now
                waits.append(left if row.looks >= judge.MIN_LOOKS - 1 else self._grace(case) / judge.MIN_LOOKS)
        return max(SHORTEST_WAIT, min(waits))

    # Deciding

    def _intent(self, case: Case, now: float) -> Decision:
        """What is done about it, for a pending one when its grace is over: an end that has begun goes on, whatever now
        stops further ones."""
        if case.sighting.key in self._ending:
            return Decision(Action.KILL, "its end is under way")
        pending = case.judgement.verdict is Verdict.PENDING
        return self._decide(case, now + self._grace(case) if pending else now)

    def _decide(self, case: Case, now: float) -> Decision:
        local = time.localtime()
        brakes = policy.Brakes(
            tripped=self._state.tripped,
            hold=self._hold_words,
            budget_closed=self._state.budget.closed(now),
            budget_left=self._state.budget.left(now, self._settings.kill.max_kills_per_hour),
            weekday=local.tm_wday,
            minute=local.tm_hour * 60 + local.tm_min,
        )
        return policy.decide(case, self._settings.policy, brakes)

    def _watch_hold(self) -> None:
        hold = read_hold(self._state_dir)
        hold_words = hold.words() if hold else ""
        if hold_words and not self._hold_words:
            self._report(Topic.HELD, f"{hold_words}: nothing will be ended; orphans are still found and logged")
        if self._hold_words and not hold_words:
            self._report(Topic.RESUMED, "the hold is over: orphans are ended again as the policy says")
        self._hold_words = hold_words

    def _watch_breaker(self, cases: Sequence[Case]) -> None:
        before = self._state.tripped
        tripped = policy.latch(before, policy.breaker(cases, self._settings.kill), cases)
        if tripped and not before:
            message = words.breaker_tripped(tripped)
            self._report(Topic.BREAKER_TRIPPED, message)
            if self._wants_alerts():
                self._alerts.send(Event.BREAKER, message)
        if before and not tripped:
            self._report(Topic.BREAKER_RESET, words.breaker_reset())
            self._alerts.send(Event.BREAKER_RESET, words.breaker_reset())
        if bool(before) != bool(tripped):
            self._save(replace(self._state, tripped=tripped))

    def _wants_alerts(self) -> bool:
        """Whether the policy does anything but log: else a breaker has nothing to hold back."""
        rules = self._settings.policy.rules
        return any(a not in (None, Action.LOG) for a in (self._settings.policy.action, *(r.action for r in rules)))

    def _act(self, case: Case, decision: Decision) -> None:
        if decision.action is Action.LOG:
            return
        if decision.action is Action.KILL:
            if case.sighting.key not in self._ending:
                self._ending[case.sighting.key] = self._run(self._end(case))
            return
        self._alerts.send(Event.ORPHAN, words.orphaned(case, decision), case, decision.action)
        self._save_alerted()

    def _clear_alerts(self, before: Mapping[tuple[str, ...], Case]) -> None:
        """Tell of each that was alerted and is no suspect any more; Alerts knows which were."""
        if self._alerts.any_open:
            self._clear_open_alerts(before)
        self._save_alerted()

    def _clear_open_alerts(self, before: Mapping[tuple[str, ...], Case]) -> None:
        here = {container_key(case.sighting): case for case in self._cases.values()}
        for key, case in before.items():
            now = here.get(container_key(case.sighting))
            if key in self._ending:
                continue
            if now is None:
                self._alerts.send(Event.CLEARED, words.cleared(case, "its processes are gone"), case)
            elif now.judgement.verdict not in (*SUSPECTS, Verdict.UNDECIDED):
                now = replace(now, identity=case.identity)  # only suspects are identified at each look
                self._alerts.send(Event.CLEARED, words.cleared(now, now.judgement.reason), now)

    # Ending

    async def _end(self, case: Case) -> None:
        what = f"end of {case.sighting.container_id}"
        try:
            async with self._turn:
                with locked(self._runtime_dir / "reap.lock") as free:
                    if free:  # else `orphand reap` is at work: the next look tries again
                        await self._end_locked(case)
                        self._troubles.pop(what, None)
        except Exception as error:  # noqa: BLE001 the orphan is found again by the next look
            self._trouble(what, f"an end failed: {type(error).__name__}: {error}", case)
        finally:
            self._ending.pop(case.sighting.key, None)

    async def _end_locked(self, case: Case) -> None:
        # it may have waited for its turn: what counts is what the last look says of it
        latest = self._cases.get(case.sighting.key)
        begun = proc.now()
        if latest is None or latest.judgement.verdict is not Verdict.ORPHAN:
            return
        case = latest
        if self._decide(case, begun).action is not Action.KILL:
            return
        before = self._state.budget
        if not self._save(replace(self._state, budget=before.spend(begun))):
            self._state = replace(self._state, budget=before)
            return
        outcome = await self._reaper.end(case, self._again, self._denied)
        if unfinished(outcome):  # an engine fell silent in the middle of it, or knows it again
            new = [name for name in self._state.ends if name not in self._half_done]
            self._half_done.update(dict.fromkeys(new, unfinished(outcome)))
        if outcome.refused:  # nothing was sent; one that is refused again and again must not spend it for all
            self._save(replace(self._state, budget=before))
        self._tell_outcome(case, outcome, proc.now() - begun)

    def _tell_outcome(self, case: Case, outcome: Outcome, seconds: float) -> None:
        # what is still there begins a grace anew: an end that fails is not tried at every look
        self._history = judge.History({k: r for k, r in self._history.rows.items() if k != case.sighting.key})
        if outcome.refused:
            self._report(Topic.END_REFUSED, words.end_refused(case, outcome), case)
            return
        self._story.forget(case.sighting)
        message = words.ended(case, outcome, seconds) if outcome.complete else words.end_failed(case, outcome)
        self._tell_end(case, outcome, message)

    def _tell_end(self, case: Case, outcome: Outcome, message: str) -> None:
        """A record of how far it came, and an alert unless nothing was sent."""
        topic, event = (Topic.ENDED, Event.ENDED) if outcome.complete else (Topic.END_FAILED, Event.END_FAILED)
        self._report(topic, message, case)
        if not outcome.refused:
            self._alerts.send(event, message, case, Action.KILL)
            self._save_alerted()

    async def _again(self, case: Case) -> Optional[Case]:
        """Right before a signal: the container now, and whether an admin's hold or exemption has come between."""
        fresh = await asyncio.to_thread(self._scanner.again, case)
        if fresh is None:
            return None
        fresh = replace(fresh, judgement=policy.exempted(fresh, self._settings.policy))
        hold = read_hold(self._state_dir)
        if hold:
            return replace(fresh, judgement=Judgement(Verdict.EXEMPT, hold.words(), fresh.judgement.kind))
        return fresh

    def _remember_end(self, estate: Estate) -> None:
        """Raises StateError: an end that a crash would leave half done must not begin."""
        state = with_end(self._state, estate.name, estate.to_json())
        save_state(self._state_file, state)
        self._state = state

    def _forget_end(self, estate: Estate) -> None:
        self._save(with_end(self._state, estate.name, None))

    def _go_on_with_ends(self) -> None:
        if self._half_done and (self._resuming is None or self._resuming.done()):
            self._resuming = self._run(self._resume_ends())

    async def _resume_ends(self) -> None:
        """Finish what a crash of orphand, or an engine that fell silent, left half done.

        Nothing is sent that anybody would miss: see Reaper.resume.
        """
        for name, before in list(self._half_done.items()):
            data = self._state.ends.get(name)
            try:
                now = await self._resume_end(name, data, before) if data else ""
            except Exception as error:  # noqa: BLE001 the next look tries again
                now = f"{type(error).__name__}: {error}"
                if now != before:
                    self._report(Topic.TROUBLE, f"the interrupted end of {name} failed: {now}")
            if now:
                self._half_done[name] = now
            else:
                del self._half_done[name]

    async def _resume_end(self, name: str, data: Mapping[str, Any], before: str) -> str:
        """Why it has to wait still, or "". `before`: why it had to until now.

        Where nothing had been ended yet, all is judged anew: grace, rules, breaker and budget are to be asked again.
        And after a refusal only what lies about is removed, which no look would find: what lives they see.
        """
        try:
            estate = Estate.from_json(data)
        except (KeyError, TypeError, ValueError) as error:
            self._report(Topic.TROUBLE, f"the record of the end of {name} is damaged ({error}): it is dropped")
            self._save(with_end(self._state, name, None))
            return ""
        with locked(self._runtime_dir / "reap.lock") as free:
            if not free:
                return before or "another end is under way"
            alive = await asyncio.to_thread(cleanup.anybody, estate, proc.Proc())
            begun = set(alive).isdisjoint(estate.inits or ([estate.shim] if estate.shim else []))
            if begun and before and alive:
                return before
            case = await asyncio.to_thread(self._case_of, estate)
            if not begun:
                self._save(with_end(self._state, name, None))
                message = f"the interrupted end of container {estate.container_id[:12]} had ended nothing yet"
                self._report(Topic.END_REFUSED, f"{message}: it is judged anew", case)
                return ""
            refused = self._unwanted(case)
            outcome = Outcome(False, refused=refused) if refused else await self._reaper.resume(estate, self._denied)
        waits = outcome.refused or unfinished(outcome)
        if not waits or waits != before:
            self._tell_end(case, outcome, words.resumed_end(case, outcome))
        return waits

    def _case_of(self, estate: Estate) -> Case:
        """The container of an interrupted end. Blocks: who it was is read from what is left of it."""
        sighting = estate.whole_sighting(proc.now())
        judgement = Judgement(Verdict.ORPHAN, "its end was interrupted", estate.kind)
        return Case(sighting, (), judgement, identify(sighting, self._bench.data_roots()))

    def _unwanted(self, case: Case) -> str:
        """Why a half-done end would not be begun today, or "": by the rules, which may have changed, and the breaker.

        Windows and the budget are for beginnings.
        """
        case = replace(case, judgement=policy.exempted(case, self._settings.policy))
        if case.judgement.verdict is Verdict.EXEMPT:
            return case.judgement.reason
        brakes = policy.Brakes(tripped=self._state.tripped, budget_left=1)
        decision = policy.decide(case, replace(self._settings.policy, windows=()), brakes)
        return "" if decision.action is Action.KILL else f"{decision.action.value}: {decision.reason}"

    async def _denied(self, estate: Estate) -> str:
        """Why the rest of a half-done end must not go on, or "": the same question as before a first signal."""
        if self._settings.policy.action is not Action.KILL and not any(
            r.action is Action.KILL for r in self._settings.policy.rules
        ):
            return "the policy does not kill any more"
        hold = read_hold(self._state_dir)
        if hold:
            return hold.words()
        sighting = estate.sighting(proc.now())
        judgement = judge.conclude(sighting, _without_own_record(estate, await self._hear(sighting)))
        return judgement.veto if judgement.verdict is Verdict.PENDING else judgement.reason

    async def _hear(self, sighting: Sighting) -> tuple[Testimony, ...]:
        return await asyncio.to_thread(self._scanner.hear, sighting)

    # Reload and stop

    def _on_reload(self) -> None:
        self._reload.set()

    def _on_wish(self) -> None:
        self._sources.fire("SIGUSR1")

    def _apply_new_config(self) -> None:
        self._notify.reloading()
        try:
            settings = config.load(self._config_sources)
        except ConfigError as error:
            self._report(Topic.CONFIG_REFUSED, words.config_refused(str(error), kept=True))
            self._config_trouble = "the new configuration has errors, the old one is kept: see `orphand check-config`"
            self._notify.ready(self._config_trouble)
            return
        self._config_trouble = ""
        self._settings = settings
        self._seen = None
        self._bench.reconfigure(settings)
        self._alerts.reconfigure(settings.alerts)
        self._sources.reconfigure(settings)
        self._reaper = self._make_reaper()
        self._report(Topic.RELOADED, words.reloaded(settings))
        self._notify.ready(self._status)

    async def _shut_down(self) -> None:
        self._notify.stopping()
        for task in list(self._ending.values()):
            task.cancel()
        self._sources.stop()
        self._alerts.close(STOP_DEADLINE / 2)
        self._bench.close()
        self._report(Topic.STOPPED, words.stopped(len(self._ending)))

    # Files and status

    def _save(self, state: Any) -> bool:
        """Keep the state, and say once when the file can't be written."""
        self._state = state
        try:
            save_state(self._state_file, state)
        except StateError as error:
            self._trouble("state", f"state is not saved, nothing is killed until it can be: {error}")
            return False
        self._troubles.pop("state", None)
        return True

    def _trouble(self, what: str, message: str, case: Optional[Case] = None) -> None:
        if self._troubles.get(what) != message:
            self._report(Topic.TROUBLE, message, case)
        self._troubles[what] = message

    def _save_alerted(self) -> None:
        if self._alerts.sent != self._state.alerted:
            self._save(replace(self._state, alerted=self._alerts.sent))

    def _write_status(self, survey: Survey, decisions: Mapping[tuple[str, ...], Decision]) -> None:
        note = self._config_trouble or (self._state.tripped and "breaker open") or self._hold_words
        self._status = words.status_line(survey, note)
        self._notify.status(self._status)
        data = survey_form(survey, decisions)
        data.update(
            status=self._status,
            version=__version__,
            looked_at=time.time(),
            breaker=self._state.tripped,
            hold=self._hold_words,
            failed_looks=self._failed_looks,
            kills_left=self._state.budget.left(proc.now(), self._settings.kill.max_kills_per_hour),
            ends_in_progress=len(self._ending),
            policy=self._settings.policy.action.value,
            sources=self._sources.state(),
        )
        try:
            write_json(self._status_file, data)
        except StateError as error:
            self._trouble("status", f"`orphand status` shows old news: {error}")
        else:
            self._troubles.pop("status", None)

    def _run(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return self._loop.create_task(work)


def _freeze() -> None:
    """What was loaded until now stays: the garbage collector need not look at it.

    A full collection waits until a quarter as many objects were added as there are (gcmodule.c): beside 40,000
    of loaded modules that is 10,000 in garbage. The second call makes it count without the frozen ones.
    """
    gc.collect()
    gc.freeze()
    gc.collect()


def _orphans(cases: Iterable[Case]) -> list[Case]:
    """The longest known first: ends come one at a time, and the hour's may not be enough for all."""
    found = (c for c in cases if c.judgement.verdict is Verdict.ORPHAN)
    return sorted(found, key=lambda c: c.judgement.since or 0.0)


def _judged(case: Case, judgement: Judgement) -> Case:
    return case if judgement is case.judgement else replace(case, judgement=judgement)


def _without_own_record(estate: Estate, testimonies: Sequence[Testimony]) -> tuple[Testimony, ...]:
    """containerd's record of an engine-orphan outlives its task by the moment between the two deletes of its end."""
    if estate.kind not in BY_ENGINE:
        return tuple(testimonies)
    return tuple(replace(t, veto="") if t.role is Role.KEEPER else t for t in testimonies)
