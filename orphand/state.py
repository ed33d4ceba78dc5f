# SPDX-License-Identifier: Apache-2.0
"""What must not be forgotten over a restart: budget, alerts that were sent, the breaker, ends in progress, the hold.

Correctness needs none of it (after a restart every grace starts anew); it keeps orphand from doing a thing twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional, Union

from orphand.errors import OrphandError
from orphand.policy import Budget
from orphand.proc import read_up_to

RUNTIME_DIR = Path("/run/orphand")
STATE_DIR = Path("/var/lib/orphand")
MAX_BYTES = 4 << 20


class StateError(OrphandError):
    """A file of orphand's own can't be read or written."""


@dataclass(frozen=True)
class State:
    """See the module. `ends` are the estates of ends that were begun, as plain JSON, by their name."""

    boot_id: str
    budget: Budget = field(default_factory=Budget)
    alerted: frozenset[str] = frozenset()
    tripped: str = ""
    ends: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Hold:
    """An admin's order not to kill. `until` is wall clock (epoch seconds); None: until `orphand resume`."""

    reason: str = ""
    until: Optional[float] = None
    by: str = ""
    damaged: bool = False

    def words(self) -> str:
        """The hold as a clause: what it says and until when."""
        if self.damaged:
            return "the hold file can't be read: `orphand resume` clears it"
        end = (
            time.strftime("until %Y-%m-%d %H:%M", time.localtime(self.until))
            if self.until
            else "until `orphand resume`"
        )
        return f"kills are on hold {end}" + (f" ({self.reason})" if self.reason else "")


def load_state(path: Path, boot_id: str, now: float, settle: float) -> State:
    """The state of this boot. Missing, broken or another boot's: a new one, its budget closed for `settle` seconds."""
    try:
        return _parse(json.loads(_read(path)), boot_id)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return State(boot_id, Budget(closed_until=now + settle))


def _parse(data: Any, boot_id: str) -> State:
    if data["boot_id"] != boot_id:
        raise ValueError("another boot's")
    spent = tuple(float(t) for t in data["spent"])
    ends = {str(k): dict(v) for k, v in data["ends"].items()}
    budget = Budget(spent, float(data["closed_until"]))
    return State(boot_id, budget, frozenset(map(str, data["alerted"])), str(data["tripped"]), ends)


def save_state(path: Path, state: State) -> None:
    """Write it so that a crash leaves the old or the new one. Raises StateError."""
    write_json(
        path,
        {
            "boot_id": state.boot_id,
            "spent": list(state.budget.spent),
            "closed_until": state.budget.closed_until,
            "alerted": sorted(state.alerted),
            "tripped": state.tripped,
            "ends": dict(state.ends),
        },
    )


def with_end(state: State, name: str, estate: Optional[Mapping[str, Any]]) -> State:
    """The state with one end begun, or (None) finished."""
    ends = {k: v for k, v in state.ends.items() if k != name}
    return replace(state, ends=ends if estate is None else {**ends, name: estate})


def read_hold(directory: Path = STATE_DIR, now: Optional[float] = None) -> Optional[Hold]:
    """The hold that is in force, or None. One that can't be read holds: nobody knows for how long it was meant."""
    try:
        data = json.loads(_read(f"{directory}/hold.json"))
        until = None if data["until"] is None else float(data["until"])
        hold = Hold(str(data["reason"]), until, str(data["by"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return Hold(damaged=True)
    return None if hold.until is not None and hold.until <= (time.time() if now is None else now) else hold


def write_hold(hold: Optional[Hold], directory: Path = STATE_DIR) -> None:
    """Begin a hold, or (None) end it. Raises StateError."""
    path = directory / "hold.json"
    if hold is not None:
        write_json(path, {"reason": hold.reason, "until": hold.until, "by": hold.by})
        return
    try:
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from error


def write_json(path: Path, data: Any) -> None:
    """Write a file of orphand's own atomically (mode 0600, synced). Raises StateError."""
    directory, name = os.path.split(path)
    temporary = f"{directory}/.{name}.{os.getpid()}"  # no Path: it would intern its parts anew at each look
    try:
        os.makedirs(directory, mode=0o755, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(data, file, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise StateError(f"{path}: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """A file of orphand's own. Raises StateError with a sentence that says what is wrong."""
    try:
        return json.loads(_read(path))
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise StateError(f"{path} is damaged: {error}") from error


def _read(path: Union[str, Path]) -> bytes:
    """Whole, if it is a regular file of bearable size: these are under /run and /var/lib, and still not trusted."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a regular file")
        data = read_up_to(file.fileno(), MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError("too large")
    return data


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether the lock of the ends could be taken; held inside. One end at a time, the daemon's and by hand."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = True
        except BlockingIOError:
            taken = False
        yield taken
    finally:
        os.close(descriptor)
