# SPDX-License-Identifier: Apache-2.0
"""Ending one orphan: asked again, recorded, TERM, wait, KILL, its shim, cleaned up, looked at once more.

The only module that decides on signals; every one goes through proc.send_signal, which checks pid and start time.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Callable, Optional, TypeVar

from orphand import cgroupfs, cleanup
from orphand.authorities.containerd import RECORD, Containerd
from orphand.authorities.containerd_api import GARBAGE, NOT_FOUND, CallFailed, Task, TaskStatus
from orphand.endings import all_exited, container_children, dependent, exited, is_deaf
from orphand.errors import Denied, Gone, OrphandError, ProcError
from orphand.estate import Estate, survey
from orphand.model import SUSPECTS, Case, Generation, Kind, Outcome, ProcessId
from orphand.proc import Proc
from orphand.report.topics import Report, Topic
from orphand.settings import Kill

BY_ENGINE = frozenset({Kind.ENGINE_ORPHAN, Kind.DISOWNED})
DEAF_SECONDS = 1.0  # for an init that has no handler for TERM: it will not react
KILL_SECONDS = 15.0  # after SIGKILL; who is still there then is in uninterruptible sleep
SHIM_TERM_SECONDS = 8.0  # a v2 shim leaves after up to 5 s ("publisher not closed"); 1.2 to 1.5.9 ignore TERM
POLL_SECONDS = 0.05
FREEZE_SECONDS = 2.0
TIDY_SECONDS = 10.0  # for containerd to remove what it made, after the shim has gone
VANISH_SECONDS = 1.0  # for the rest of a pid namespace to go after its init
ENGINE_TRIES = 20  # of a delete: containerd refuses it until it has seen the exit
ENGINE_PAUSE_SECONDS = 0.25
DEADLINE = "DEADLINE_EXCEEDED"
NO_ANSWER = frozenset({DEADLINE, GARBAGE})
MAX_SAID = 20
ASK_TRIES = 3  # when an engine does not answer in the middle of an end
ASK_PAUSE_SECONDS = 2.0

Again = Callable[[Case], Awaitable[Optional[Case]]]
Ask = Callable[[Estate], Awaitable[str]]
T = TypeVar("T")


class _Stopped(OrphandError):
    """The end must not go on; the text says why."""


def objection(case: Case) -> str:
    """Why this case must not be ended, or ""."""
    judgement, sighting = case.judgement, case.sighting
    if judgement.verdict not in SUSPECTS or judgement.kind is None:
        return f"it is {judgement.verdict.value}: {judgement.reason}"
    if sighting.foreign or sighting.veto or judgement.veto:
        return sighting.foreign or sighting.veto or judgement.veto
    if sighting.shim and sighting.shim.generation is Generation.OTHER:
        return f"what signals do to {sighting.shim.exe} is not known"
    if any(p.pid <= 1 or p.pid == os.getpid() for p in sighting.processes):
        return "it names PID 1 or orphand itself"
    if not sighting.processes and judgement.kind not in BY_ENGINE:
        return "it has no process"
    if judgement.kind is Kind.DUPLICATE_SHIM and sighting.siblings:
        return f"its shim serves {', '.join(s[:12] for s in sighting.siblings)} too"
    return ""


def changed(case: Case, fresh: Optional[Case]) -> str:
    """Why nothing may be sent, now that it was looked at and asked for again; or ""."""
    if fresh is None:
        return "it is gone"
    if fresh.sighting.key != case.sighting.key:
        return "its processes are not the same any more"
    if fresh.judgement.kind is not case.judgement.kind:
        now = fresh.judgement.kind.value if fresh.judgement.kind else fresh.judgement.verdict.value
        return f"it is {now} now: {fresh.judgement.reason}"
    return objection(fresh)


def unfinished(outcome: Outcome) -> str:
    """Why an end that had begun did not go on, or "": what it was about to take away stays recorded, for `resume`."""
    return next((text for text in outcome.left[:1] if text.startswith("stopped: ")), "")


def plan(case: Case, kill: Kill) -> list[str]:
    """What ending the case would do, step by step; one sentence that says why not where it would be refused."""
    refusal = objection(case)
    if refusal:
        return [f"nothing: {refusal}"]
    sighting, kind = case.sighting, case.judgement.kind
    steps = ["look at it and ask for it again; stop if anything has changed or anybody knows it"]
    inits = ", ".join(str(i.process.pid) for i in sighting.inits)
    if kind in BY_ENGINE:
        steps += [
            f"containerd {sighting.address}: kill task {sighting.container_id[:12]} with TERM, "
            f"wait up to {kill.term_timeout:.0f} s, then KILL for all its processes",
            "containerd: delete the task (its shim ends), delete the container",
        ]
    elif kind is Kind.DUPLICATE_SHIM and sighting.shim:
        steps.append(
            f"KILL to shim {sighting.shim.process.pid}, which must not touch the socket of the one that is kept"
        )
        steps += [f"TERM to {inits}, wait up to {kill.term_timeout:.0f} s, then KILL"] if inits else []
    elif inits:
        steps.append(f"TERM to init {inits}, wait up to {kill.term_timeout:.0f} s")
        steps.append(f"KILL to what is left in its cgroup {sighting.inits[0].cgroup}")
    if sighting.shim and kind not in (*BY_ENGINE, Kind.DUPLICATE_SHIM):
        shared = ", ".join(s[:12] for s in sighting.siblings)
        steps.append(
            f"leave shim {sighting.shim.process.pid} alone: it serves {shared} too"
            if shared
            else f"TERM to shim {sighting.shim.process.pid}, wait up to {SHIM_TERM_SECONDS:.0f} s, then KILL"
        )
    if kill.cleanup and kind is not Kind.DUPLICATE_SHIM:
        steps.append(
            "remove its runc record, cgroups, mounts, bundle, socket and network namespace, as far as they are there"
        )
    return [*steps, "look again, and say what is left"]


def _others_would_die(estate: Estate, proc: Proc) -> str:
    """Why somebody who is not the container's could die with it, or "".

    Its own cgroup is no shelter for others: when its init exits, a shim may let runc kill whatever is in the cgroup and
    below (containerd runtime/v2/runc/task/service.go, ShouldKillAllOnExit), and so may containerd and `runc delete`.
    """
    pid = dependent(estate, proc)
    if pid:
        return f"process {pid}, which is not its own, lives in its pid namespace and would die with it"
    for process, why in sorted(cleanup.strangers(estate, proc).items()):
        return f"process {process.pid} is in its cgroup, but not its own ({why}), and could die with it"
    return ""


async def _still_denied(estate: Estate, denied: Ask) -> str:
    """What `denied` says, but that containerd's own record of an engine-orphan is no objection.

    A crash between the deletes of task and container leaves it; its owner was heard too, and doesn't know the id.
    """
    objection = await denied(estate)
    return "" if objection == RECORD and estate.kind is Kind.ENGINE_ORPHAN else objection


class Reaper:
    """Ends orphans, one `end` at a time each; a crash in between is finished by `resume`."""

    def __init__(
        self,
        kill: Kill,
        containerd: Callable[[str], Containerd],
        report: Report,
        remember: Callable[[Estate], None],
        forget: Callable[[Estate], None],
        proc: Optional[Proc] = None,
    ) -> None:
        """`remember` must have stored the estate when it returns; an OSError of its makes the end refused.

        `containerd` gives the engine behind an address. Each step is a record of Topic.ENDING; the
        outcome is the caller's to report.
        """
        self._kill = kill
        self._containerd = containerd
        self._report = report
        self._remember = remember
        self._forget = forget
        self._proc = proc or Proc()
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="reaper")

    async def end(self, case: Case, again: Again, denied: Ask) -> Outcome:
        """End one orphan, or refuse. Raises nothing for whatever the processes or engines do.

        `again` looks at the case anew and asks everybody; it is awaited right before the first signal. `denied`
        only asks, since by then part of the container is gone: "" if everybody who could know it was heard and
        nobody does, else why the end must stop. It is awaited before each later step that destroys something.
        Takes up to term_timeout and a minute. Cancelled or stopped, it leaves the estate recorded, for `resume`.
        """
        refusal = objection(case)
        kind = case.judgement.kind
        if refusal or kind is None:
            return Outcome(False, refused=refusal)
        try:
            estate = await self._blocking(lambda: survey(case.sighting, kind, self._proc))
            refusal = await self._blocking(lambda: _others_would_die(estate, self._proc))
        except (OSError, ProcError) as error:
            return Outcome(False, refused=f"what it owns can't be seen: {error}")
        if refusal:
            return Outcome(False, refused=refusal)
        fresh = await again(case)
        refusal = changed(case, fresh)
        if refusal or fresh is None:
            return Outcome(False, refused=refusal)
        estate = replace(estate, shim_shared=bool(fresh.sighting.siblings))
        try:
            self._remember(estate)
        except (OSError, OrphandError) as error:
            return Outcome(False, refused=f"it can't be recorded, so that a crash would leave it half ended: {error}")
        return await self._finish(estate, case, denied)

    async def resume(self, estate: Estate, denied: Ask) -> Outcome:
        """Finish an end that a crash of orphand's interrupted. The estate stays recorded if `denied` objects."""
        if estate.boot_id != self._proc.boot_id():
            self._forget(estate)
            return Outcome(True, steps=("the host was booted since: nothing of it is left",))
        if estate.kind is Kind.DUPLICATE_SHIM and estate.shim and self._proc.alive(estate.shim):
            self._forget(estate)
            return Outcome(False, refused="of two shims for one id it is judged anew which one to end")
        try:
            refusal = await self._blocking(lambda: _others_would_die(estate, self._proc))
            if not refusal and estate.kind is not Kind.DUPLICATE_SHIM:  # as in _no_objection
                refusal = await _still_denied(estate, denied)
        except ProcError as error:
            refusal = f"who would die with it can't be seen: {error}"
        if refusal:
            return Outcome(False, refused=refusal)
        return await self._finish(estate, None, denied)

    async def _finish(self, estate: Estate, case: Optional[Case], denied: Ask) -> Outcome:
        outcome = await self._carry_out(estate, case, denied)
        if not unfinished(outcome):
            self._forget(estate)
        return outcome

    async def _carry_out(self, estate: Estate, case: Optional[Case], denied: Ask) -> Outcome:
        steps: list[str] = []

        def say(text: str) -> None:
            steps.append(text)
            self._report(Topic.ENDING, f"{estate.container_id[:12]}: {text}", case)

        end = _End(estate, self._kill, self._proc, say, denied, self._threads)
        left: list[str] = []
        try:
            if estate.kind in BY_ENGINE:
                await end.by_engine(self._containerd(estate.address))
            else:
                await end.by_signals()
            if self._kill.cleanup and estate.kind is not Kind.DUPLICATE_SHIM:
                await end.clean()
        except (_Stopped, OSError, ProcError) as reason:
            left.append(f"stopped: {reason}")
            say(left[0])
        try:
            left += await self._blocking(lambda: cleanup.leftovers(estate, self._proc, self._kill.cleanup))
            for thing in await self._blocking(lambda: cleanup.others_things(estate, self._proc)):
                say(thing)
            alive = bool(await self._blocking(lambda: cleanup.anybody(estate, self._proc)))
        except (OSError, ProcError) as error:
            left.append(f"whether anything is left can't be seen: {error}")
            alive = True
        outcome = Outcome(not alive, steps=tuple(steps), left=tuple(left))
        return replace(outcome, ended=outcome.ended and not unfinished(outcome))

    async def _blocking(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


class _End:
    """One end as it goes along."""

    def __init__(
        self,
        estate: Estate,
        kill: Kill,
        proc: Proc,
        say: Callable[[str], None],
        denied: Ask,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._estate = estate
        self._kill = kill
        self._proc = proc
        self._say = say
        self._denied = denied
        self._threads = threads

    async def by_signals(self) -> None:
        """The init, then what is left in its cgroup, then the shim; never the shim first: the rest would live on."""
        if self._estate.kind is Kind.DUPLICATE_SHIM:
            await self._silence_shim()
        await self._end_init()
        await self._end_rest()
        if self._estate.shim_shared and self._estate.shim:
            self._say(f"left shim {self._estate.shim.pid} alone: it serves others too")
        elif self._estate.shim:
            await self._end_shim(self._estate.shim)
            await self._leave_to_containerd()

    async def _silence_shim(self) -> None:
        """KILL to the second shim of a managed id, before all else, since it speaks in the name of that id.

        Told to go (TERM), it would unlink its socket, which has the name of the other's by now: the next start of
        containerd would find nobody there, and kill the managed one (runtime/v2/runc/v2/service.go: RemoveSocket).
        Alive at its init's exit, it would report that as the exit of the id, which Docker since 23.0 believes whatever
        the pid (daemon/monitor.go).
        """
        shim = self._estate.shim
        if shim and self._send(shim, signal.SIGKILL):
            self._say(f"KILL to shim {shim.pid}, so that it says and unlinks nothing any more")
            await exited(shim, KILL_SECONDS, self._proc)

    async def _leave_to_containerd(self) -> None:
        """A containerd that was connected to the shim cleans up itself, in the bundle, which must not go meanwhile.

        It can be so without listing the task: seen of a container whose creation a crash of dockerd broke off.
        """
        end = self._proc.now() + VANISH_SECONDS
        while self._estate.bundle and os.path.isdir(self._estate.bundle) and self._proc.now() < end:
            await asyncio.sleep(POLL_SECONDS)

    async def by_engine(self, engine: Containerd) -> None:
        """Through containerd's API, which then cleans up itself; by signals what it does not manage to end."""
        estate = self._estate
        if estate.shim and not estate.shim_shared:
            self._wake([estate.shim])
        try:
            task = await self._own_task(engine)
            if task and task.status is not TaskStatus.STOPPED:
                await self._end_task(engine)
            if task is None and await self._blocking(lambda: bool(cleanup.living(estate, self._proc))):
                # it lists the task, but neither gives nor ends it (seen with 1.6: its database went, the shims stayed)
                self._say("containerd can be told nothing about it, since its record is lost: by signals")
                await self._end_init()
                await self._end_rest()
            await self._no_objection()
            if task:
                await self._delete_task(engine)
            await self._delete(engine.delete_container, "container")
        except OrphandError as failure:
            if isinstance(failure, _Stopped):
                raise
            raise _Stopped(
                f"containerd could not do it ({failure}); by hand: "
                f"ctr -n {estate.namespace} task rm -f {estate.container_id}"
            ) from failure
        patience = SHIM_TERM_SECONDS if task else 0.0
        if estate.doomed_shim and not await exited(estate.doomed_shim, patience, self._proc):
            await self._end_shim(estate.doomed_shim)
            await self._leave_to_containerd()

    async def clean(self) -> None:
        """Take away what it owned, if anything is left of it, and if nobody has begun to use its name again.

        Of a disowned one Docker has a record, and may start it again at any moment under the same names: there
        it is left to containerd, which made it.
        """
        if self._estate.kind is Kind.DISOWNED:
            end = self._proc.now() + TIDY_SECONDS
            while await self._blocking(lambda: cleanup.leftovers(self._estate, self._proc, True)):
                if self._proc.now() > end:
                    return
                await asyncio.sleep(POLL_SECONDS)
            return
        if not await self._blocking(lambda: cleanup.leftovers(self._estate, self._proc, cleaned=True)):
            return
        await self._no_objection()
        await self._blocking(lambda: cleanup.clean(self._estate, self._proc, self._say))

    async def _own_task(self, engine: Containerd) -> Optional[Task]:
        """containerd's task of that name, None if there is none. What containerd is told goes by name, so that one with
        another process stops the end: it was made since.
        """
        task = await self._blocking(lambda: engine.task(self._estate.namespace, self._estate.container_id))
        if task and task.status is not TaskStatus.STOPPED and task.pid not in {i.pid for i in self._estate.inits}:
            raise _Stopped(f"containerd's task is process {task.pid}, which was not sighted")
        return task

    async def _end_task(self, engine: Containerd) -> None:
        inits = self._estate.inits
        if not await self._signalled(engine, signal.SIGTERM):
            await self._no_objection()
            await self._end_init()
        elif not await self._term_worked(inits):
            await self._no_objection()
            await self._own_task(engine)
            if await self._signalled(engine, signal.SIGKILL):
                await all_exited(inits, KILL_SECONDS, self._proc)
        await self._end_rest()

    async def _signalled(self, engine: Containerd, number: signal.Signals) -> bool:
        """Whether containerd has signalled its task: the init with TERM, all of its processes with KILL."""
        name, every = self._estate.container_id, number == signal.SIGKILL
        try:
            await self._blocking(lambda: engine.kill(self._estate.namespace, name, number, every=every))
        except CallFailed as failure:
            if failure.code != NOT_FOUND:
                self._say(f"containerd could not signal it: {failure}")
            return False
        self._say(f"containerd: {'KILL to all processes of' if every else 'TERM to'} its task")
        return True

    async def _delete_task(self, engine: Containerd) -> None:
        """Through its shim where containerd is there, but can't: then containerd drops what it has of the task itself.

        runc needs the bundle to delete a container: once a cleaner of /run has taken it, no delete works any more.
        """
        try:
            await self._delete(engine.delete_task, "task")
        except CallFailed as failure:
            shim = self._estate.doomed_shim
            if self._estate.kind is not Kind.ENGINE_ORPHAN or shim is None or failure.code in NO_ANSWER:
                raise
            if await self._blocking(lambda: bool(cleanup.living(self._estate, self._proc))):
                raise
            self._say(f"containerd could not delete its task: {failure}")
            await self._end_shim(shim)  # which asks everybody again, containerd too
            await self._no_objection()
            await self._own_task(engine)
            await self._delete(engine.delete_task, "task")

    async def _delete(self, delete: Callable[[str, str], None], what: str) -> None:
        """containerd refuses to delete a task until it has seen the exit, with a code that varies by version."""
        for attempt in range(ENGINE_TRIES):
            try:
                await self._blocking(lambda: delete(self._estate.namespace, self._estate.container_id))
            except CallFailed as failure:
                if failure.code == NOT_FOUND:
                    return
                if attempt == ENGINE_TRIES - 1 or failure.code == DEADLINE:
                    raise
                await asyncio.sleep(ENGINE_PAUSE_SECONDS)
            else:
                self._say(f"containerd: deleted its {what}")
                return

    async def _end_init(self) -> None:
        inits = [i for i in self._estate.inits if self._proc.alive(i)]
        for init in inits:
            if self._send(init, signal.SIGTERM):
                self._say(f"TERM to init {init.pid}")
        if await self._term_worked(inits) and inits:
            self._say("its init has ended")

    async def _term_worked(self, inits: Sequence[ProcessId]) -> bool:
        """Let the inits react to TERM: frozen or stopped ones can't until they are woken."""
        deaf = [i for i in inits if is_deaf(i.pid)]
        self._wake(inits)
        for init in deaf:
            self._say(f"init {init.pid} has no handler for TERM: waiting {DEAF_SECONDS:.0f} s only")
        seconds = DEAF_SECONDS if len(deaf) == len(inits) else self._kill.term_timeout
        return await all_exited(inits, seconds, self._proc)

    def _wake(self, processes: Sequence[ProcessId]) -> None:
        for directory in self._directories():
            if cgroupfs.frozen(directory):
                cgroupfs.thaw(directory)
                self._say(f"thawed its cgroup {directory}")
        for process in processes:
            if self._state(process) == "T" and self._send(process, signal.SIGCONT):
                self._say(f"CONT to {process.pid}, which was stopped")

    def _state(self, process: ProcessId) -> str:
        try:
            return self._proc.stat(process.pid).state
        except ProcError:
            return ""

    def _directories(self) -> list[str]:
        return [d for d, inode in sorted(self._estate.cgroups.items()) if cgroupfs.inode(d) == inode]

    async def _end_rest(self) -> None:
        """KILL to what is left of the container, again until nothing is: a fork bomb makes new ones meanwhile."""
        if not await self._left_after(VANISH_SECONDS):
            return
        await self._no_objection()
        end = self._proc.now() + KILL_SECONDS
        said: set[str] = set()
        while await self._blocking(lambda: self._kill_rest(said)):
            if self._proc.now() > end:
                return  # the second look says who is left, and why
            await asyncio.sleep(POLL_SECONDS)
        self._say("no process of it is left")

    async def _left_after(self, seconds: float) -> bool:
        """Whether anything of the container is still there. The processes of a pid namespace die with its init."""
        end = self._proc.now() + seconds
        while await self._blocking(lambda: cleanup.living(self._estate, self._proc)):
            if self._proc.now() > end:
                return True
            await asyncio.sleep(POLL_SECONDS)
        return False

    def _kill_rest(self, said: set[str]) -> bool:
        """One round. Whether there was anybody to kill."""
        own = cleanup.living(self._estate, self._proc)
        strangers = cleanup.strangers(self._estate, self._proc)
        directories = self._directories()
        if strangers:
            pid, why = next((p.pid, why) for p, why in strangers.items())
            self._once(said, f"its cgroup is not killed as a whole, for the sake of process {pid}: {why}")
            self._kill_each(own, said)
        elif own and any(cgroupfs.kill(d) for d in directories):
            self._once(said, f"KILL to all in its cgroup: {len(own)} process{'' if len(own) == 1 else 'es'}")
        elif own:
            self._freeze(directories)
            self._kill_each(cleanup.living(self._estate, self._proc), said)
        if not strangers:
            for directory in directories:
                cgroupfs.thaw(directory)
        return bool(own)

    def _freeze(self, directories: Sequence[str]) -> None:
        """So that nobody forks between being listed and being killed. One in D state may keep it from freezing."""
        frozen = [d for d in directories if cgroupfs.freeze(d)]
        end = self._proc.now() + FREEZE_SECONDS
        while not all(cgroupfs.is_frozen(d) for d in frozen) and self._proc.now() < end:
            time.sleep(POLL_SECONDS)

    def _kill_each(self, processes: Sequence[ProcessId], said: set[str]) -> None:
        for process in processes:
            if self._send(process, signal.SIGKILL):
                self._once(said, f"KILL to {process.pid}")

    def _once(self, said: set[str], text: str) -> None:
        """Say it, but not again for each of ten thousand."""
        if text not in said and len(said) < MAX_SAID:
            said.add(text)
            self._say(text)

    async def _end_shim(self, shim: ProcessId) -> None:
        if not self._proc.alive(shim):
            return
        children = await self._blocking(lambda: container_children(shim, self._proc))
        if children:
            raise _Stopped(f"shim {shim.pid} still has the container process {children[0]}, so it gets no signal")
        await self._no_objection()
        if await self._blocking(lambda: bool(cleanup.strangers(self._estate, self._proc))):
            self._say("no TERM to its shim: one of v1 would kill all in its cgroup, where others are by now")
        elif await self._shim_left(shim):
            return
        if self._send(shim, signal.SIGKILL):
            self._say(f"KILL to shim {shim.pid}")
        await exited(shim, KILL_SECONDS, self._proc)

    async def _shim_left(self, shim: ProcessId) -> bool:
        if self._send(shim, signal.SIGTERM):
            self._say(f"TERM to shim {shim.pid}")
        self._wake([shim])
        if await exited(shim, SHIM_TERM_SECONDS, self._proc):
            self._say("its shim has ended")
            return True
        await self._no_objection()
        return False

    def _send(self, process: ProcessId, number: int) -> bool:
        try:
            self._proc.send_signal(process, number)
        except Gone:
            return False
        except (Denied, ValueError) as error:
            self._say(f"could not signal {process.pid}: {error}")
            return False
        return True

    async def _no_objection(self) -> None:
        """Go on only if still nobody knows it. An engine that does not answer is asked a few times.

        Of two shims for one id everybody knows the id, so there is nothing to ask that was not asked already.
        """
        if self._estate.kind is Kind.DUPLICATE_SHIM:
            return
        objection = ""
        for attempt in range(ASK_TRIES):
            if attempt:
                await asyncio.sleep(ASK_PAUSE_SECONDS)
            objection = await _still_denied(self._estate, self._denied)
            if not objection:
                return
        raise _Stopped(objection)

    async def _blocking(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
