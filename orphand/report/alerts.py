# SPDX-License-Identifier: Apache-2.0
"""Alerts: one for each orphan and change of state, to a program and to a webhook.

Each way has a thread and a bounded queue of its own: a receiver that hangs delays neither a look nor
the other way. The document is described in docs/alerts.md.
"""

from __future__ import annotations

import heapq
import itertools
import json
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from typing import Any, Callable, Optional

from orphand import settings
from orphand.masking import MESSAGE_LIMIT, masked
from orphand.model import Action, Case
from orphand.report.delivery import Permanent, Undelivered, post, run
from orphand.report.story import container_key
from orphand.report.topics import Report, Topic

VERSION = 1  # of the document
QUEUE_LIMIT = 256  # alerts waiting, each way
RETRY_FOR = 600.0  # seconds from the first try to giving up
BACKOFF = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # seconds; the last one repeats
QUIET = 60.0  # seconds between two records about the same way's failures
LIST_LIMIT = 32

Deliver = Callable[[bytes], None]


class Event(str, Enum):
    """What an alert is about."""

    ORPHAN = "orphan"  # the grace is over; `action` says what is done
    ENDED = "ended"  # verified: no process of it is left
    END_FAILED = "end_failed"  # something is left, which a person must see to
    CLEARED = "cleared"  # an orphan that was alerted is none any more, or has gone
    BREAKER = "breaker"  # too many orphans at once: nothing is ended
    BREAKER_RESET = "breaker_reset"  # that is over


CLOSES = {  # an event that ends what others have opened, and whether it is told only if one of them was
    Event.ENDED: ((Event.ORPHAN, Event.END_FAILED), False),
    Event.CLEARED: ((Event.ORPHAN, Event.END_FAILED), True),
    Event.BREAKER_RESET: ((Event.BREAKER,), True),
}


@dataclass(frozen=True)
class Alert:
    """One document on its way."""

    key: str  # the event and whom it is about
    body: bytes


@dataclass(order=True)
class _Waiting:
    due: float
    number: int
    alert: Alert = field(compare=False)
    first_try: Optional[float] = field(compare=False, default=None)
    tries: int = field(compare=False, default=0)


class Alerts:
    """Sends what is new; remembers what is open, so that neither a look nor a restart sends it twice."""

    def __init__(
        self,
        options: settings.Alerts,
        report: Report,
        hostname: str,
        boot_id: str = "",
        sent: Iterable[str] = (),
    ) -> None:
        """`sent`: what an earlier run's `sent` was, of the same boot. Failures become records of ALERT_FAILED."""
        self._hostname = hostname
        self._boot_id = boot_id
        self._report = report
        self._open = set(sent)
        self._ways: dict[str, Way] = {}
        self.reconfigure(options)

    def reconfigure(self, options: settings.Alerts) -> None:
        """Send to these from now on, also what still waits; what is open stays so."""
        deliveries = _deliveries(options)
        for name in self._ways.keys() - deliveries.keys():
            self._ways.pop(name).finish()
        for name, deliver in deliveries.items():
            if name in self._ways:
                self._ways[name].deliver_by(deliver)
            else:
                self._ways[name] = Way(name, deliver, self._report)

    @property
    def sent(self) -> frozenset[str]:
        """What is open and was delivered, or will never be; to be kept over a restart, and given to the next Alerts."""
        return frozenset(self._open.difference(*(way.pending for way in self._ways.values())))

    @property
    def any_open(self) -> bool:
        """Whether there is anything that could be cleared."""
        return bool(self._open)

    def send(self, event: Event, message: str, case: Optional[Case] = None, action: Optional[Action] = None) -> bool:
        """Queue an alert, unless this one is open already. Returns at once; False if nothing was queued."""
        if not self._ways:
            return False
        subject = masked("/".join(container_key(case.sighting))) if case is not None else ""
        key = f"{event.value} {subject}".strip()
        closes, only_if_open = CLOSES.get(event, ((), False))
        opened = {f"{each.value} {subject}".strip() for each in closes} & self._open
        if key in self._open or (only_if_open and not opened):
            return False
        if closes:
            self._open -= opened
        else:
            self._open.add(key)
        body = json.dumps(self._document(event, message, case, action)).encode()
        for way in self._ways.values():
            way.put(Alert(key, body))
        return True

    def _document(self, event: Event, message: str, case: Optional[Case], action: Optional[Action]) -> dict[str, Any]:
        head = {
            "version": VERSION,
            "event": event.value,
            "host": masked(self._hostname),
            "boot_id": self._boot_id,
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "message": masked(message, MESSAGE_LIMIT),
        }
        if action is not None:
            head["action"] = action.value
        return {**head, **case_document(case)} if case is not None else head

    def close(self, deadline: float) -> None:
        """Try what waits once more, for at most `deadline` seconds in all; what is left is recorded as lost."""
        until = time.monotonic() + deadline
        for way in self._ways.values():
            way.finish()
        for way in self._ways.values():
            way.join(max(0.0, until - time.monotonic()))


def _deliveries(options: settings.Alerts) -> dict[str, Deliver]:
    deliveries: dict[str, Deliver] = {}
    if options.command:
        deliveries["alerts.command"] = lambda body: run(options.command, body, options.timeout)
    if options.webhook:
        deliveries["alerts.webhook"] = lambda body: post(options.webhook, body, options.timeout)
    return deliveries


def case_document(case: Case) -> dict[str, Any]:
    """A case as JSON's values; what is not known is empty. No environment, and no command: it may hold secrets."""
    sighting, judgement, who = case.sighting, case.judgement, case.identity
    return {
        "container": {
            "id": masked(sighting.container_id),
            "namespace": masked(sighting.namespace),
            "address": masked(sighting.address),
            "shim_pid": sighting.shim.process.pid if sighting.shim else None,
            "init_pids": [init.process.pid for init in sighting.inits[:LIST_LIMIT]],
        },
        "identity": {
            "name": masked(who.name),
            "image": masked(who.image),
            "pod": masked(who.pod),
            "pod_namespace": masked(who.pod_namespace),
            "hostname": masked(who.hostname),
            "started": masked(who.started),
            "ports": _texts(who.ports),
            "mounts": _texts(who.mounts),
        },
        "kind": judgement.kind.value if judgement.kind else None,
        "verdict": judgement.verdict.value,
        "reason": masked(judgement.reason, 1024),
        "veto": masked(judgement.veto, 1024),
        "testimonies": [
            {
                "authority": masked(t.authority),
                "role": t.role.value,
                "claim": t.claim.value,
                "detail": masked(t.detail),
            }
            for t in case.testimonies[:LIST_LIMIT]
        ],
    }


def _texts(texts: Sequence[str]) -> list[str]:
    return [masked(text) for text in texts[:LIST_LIMIT]]


class Way:
    """One way to the outside: a thread that delivers what is put, new alerts before those that failed."""

    def __init__(
        self,
        name: str,
        deliver: Deliver,
        report: Report,
        backoff: Sequence[float] = BACKOFF,
        retry_for: float = RETRY_FOR,
    ) -> None:
        """`deliver` raises Undelivered to be tried again, Permanent where that is of no use."""
        self._name = name
        self._deliver = deliver
        self._report = report
        self._backoff = backoff
        self._retry_for = retry_for
        self._waiting: list[_Waiting] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()  # of a lock that its holder may take again
        self._closing = False
        self._lost: set[str] = set()  # keys of what failed while closing
        self._busy: Optional[_Waiting] = None
        self._told_at = -QUIET
        self._untold = 0  # failures since the last record
        self._failure = ""  # the last one
        self._thread: Optional[threading.Thread] = None

    @property
    def pending(self) -> frozenset[str]:
        """The keys of what is neither delivered nor given up."""
        with self._changed:
            busy = [self._busy] if self._busy else []
            return frozenset(item.alert.key for item in (*self._waiting, *busy)) | self._lost

    def deliver_by(self, deliver: Deliver) -> None:
        """Another receiver, for what waits too."""
        self._deliver = deliver

    def put(self, alert: Alert) -> None:
        """Queue it; the oldest one gives way where the queue is full."""
        dropped = None
        with self._changed:
            if self._closing:
                return
            if len(self._waiting) >= QUEUE_LIMIT:
                dropped = min(self._waiting, key=lambda each: each.number)
                self._waiting.remove(dropped)
                heapq.heapify(self._waiting)
            heapq.heappush(self._waiting, _Waiting(time.monotonic(), next(self._numbers), alert))
            started = self._start()
            self._changed.notify()
        if dropped is not None:
            self._tell(f"{dropped.alert.key} dropped: more than {QUEUE_LIMIT} alerts wait")
        if not started:
            self._tell(f"{alert.key} has to wait: no thread can be started; the next alert tries again")

    def _start(self) -> bool:
        if self._thread is None:
            # A daemon thread: a receiver that hangs must not keep orphand from ending
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the kernel gives no more: TasksMax=, memory
                return False
            self._thread = thread
        return True

    def finish(self) -> None:
        """No more puts; what waits is tried once more."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def join(self, seconds: float) -> None:
        """Wait for the thread, then record what was not delivered."""
        if self._thread is None:
            return
        self._thread.join(seconds)
        with self._changed:
            lost = len(self.pending)
        if lost:
            self._record(f"{lost} alerts were not delivered before orphand stopped; they are sent at the next start")

    def _work(self) -> None:
        while True:
            item = self._next()
            if item is None:
                return
            self._try(item)
            with self._changed:
                self._busy = None

    def _next(self) -> Optional[_Waiting]:
        """The next one that is due, as busy; None when closing and nothing is left."""
        while True:
            self._tell_untold()
            with self._changed:
                if not self._waiting and self._closing:
                    return None
                pause = self._waiting[0].due - time.monotonic() if self._waiting else None
                if pause is not None and (pause <= 0 or self._closing):
                    self._busy = heapq.heappop(self._waiting)
                    return self._busy
                self._changed.wait(self._nap(pause))

    def _nap(self, pause: Optional[float]) -> Optional[float]:
        quiet = max(0.0, self._told_at + QUIET - time.monotonic()) if self._untold else None
        return min((each for each in (pause, quiet) if each is not None), default=None)

    def _try(self, item: _Waiting) -> None:
        item.first_try = time.monotonic() if item.first_try is None else item.first_try
        item.tries += 1
        try:
            self._deliver(item.alert.body)
        except Permanent as failure:
            self._tell(f"{item.alert.key} not delivered: {failure}; not tried again")
        except Undelivered as failure:
            self._again(item, item.first_try, failure)
        except Exception as failure:  # noqa: BLE001 no memory, no descriptors; the thread must live for later alerts
            self._again(item, item.first_try, failure)

    def _again(self, item: _Waiting, first_try: float, failure: Exception) -> None:
        due = time.monotonic() + self._backoff[min(item.tries, len(self._backoff)) - 1]
        if due - first_try > self._retry_for:
            self._tell(f"{item.alert.key} not delivered in {item.tries} tries: {_why(failure)}; given up")
            return
        with self._changed:
            item.due = due
            if self._closing:
                self._lost.add(item.alert.key)
            else:
                heapq.heappush(self._waiting, item)
        again = f"trying again for {self._retry_for / 60:.0f} min"
        self._tell(f"{item.alert.key} not delivered yet: {_why(failure)}; {again}")

    def _tell(self, text: str) -> None:
        with self._changed:
            self._untold += 1
            self._failure = text
        self._tell_untold()

    def _tell_untold(self) -> None:
        """At most one record in QUIET seconds, with the count of those that it stands for."""
        with self._changed:
            now = time.monotonic()
            if not self._untold or now - self._told_at < QUIET:
                return
            text, others = self._failure, self._untold - 1
            self._untold, self._told_at = 0, now
        self._record(f"{text} (and {others} more failures)" if others else text)

    def _record(self, text: str) -> None:
        self._report(Topic.ALERT_FAILED, f"{self._name}: {text}", None, way=self._name)


def _why(failure: Exception) -> str:
    return str(failure) if isinstance(failure, Undelivered) else f"{type(failure).__name__}: {failure}"
