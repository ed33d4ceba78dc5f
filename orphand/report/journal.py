# SPDX-License-Identifier: Apache-2.0
"""Records in the journal, with fields that scripts can match on; in plain lines where there is no journal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Callable, Optional, TextIO

from orphand.masking import MESSAGE_LIMIT, field_name, masked
from orphand.model import Case
from orphand.report.topics import Topic

IDENTIFIER = "orphand"
SOCKET = "/run/systemd/journal/socket"  # systemd-journald(8)
BYTES_LIMIT = 4050  # of one field: journalctl -o json shows null for 4096 and more unless it is told --all
INITS_LIMIT = 16

Send = Callable[[Sequence[str]], None]


class JournalReport:
    """A Report (topics.py) that writes to the journal, or else to stderr. Never raises.

    Without a journal's socket records become lines on stderr, with <N> for the level where stderr is the
    journal's stream (sd-daemon(3)). Somebody who runs the daemon on a terminal sees the lines there as well.
    """

    def __init__(self, send: Optional[Send] = None, stderr: Optional[TextIO] = None, socket: str = SOCKET) -> None:
        """`send` takes FIELD=value strings; without it systemd-python does it. `stderr` is sys.stderr by default."""
        self._send = send
        self._stderr = stderr if stderr is not None else sys.stderr
        self._socket = socket
        self._levels = _is_journal(self._stderr)

    def __call__(self, topic: Topic, message: str, case: Optional[Case] = None, **fields: str) -> None:
        """Write one record."""
        line = _bounded(message)
        sent = self._to_journal([f"MESSAGE={line}", *_fields(topic, case, fields.items())])
        if not sent or self._on_terminal():
            self._to_stderr(topic, line)

    def _to_journal(self, fields: Sequence[str]) -> bool:
        try:
            # sd_journal_sendv drops a record silently where the socket is missing (sd_journal_sendv(3))
            if self._send is None and not os.path.exists(self._socket):
                return False
            (self._send or _journal_sender())(fields)
        except Exception:  # noqa: BLE001 whatever it is: telling must never stop what is being told
            return False
        return True

    def _to_stderr(self, topic: Topic, line: str) -> None:
        try:
            self._stderr.write(f"<{topic.priority}>{line}\n" if self._levels else f"{line}\n")
            self._stderr.flush()
        except (OSError, ValueError):  # closed, full, or a pipe that nobody reads: there is no other place to tell
            return

    def _on_terminal(self) -> bool:
        try:
            return self._stderr.isatty()
        except ValueError:
            return False


def _journal_sender() -> Send:
    from systemd.journal import sendv

    def send(fields: Sequence[str]) -> None:
        sendv(*fields)

    return send


def _is_journal(stream: TextIO) -> bool:
    """Whether the stream goes to journald: $JOURNAL_STREAM is DEVICE:INODE of what it gave us (systemd.exec(5))."""
    try:
        info = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{info.st_dev}:{info.st_ino}"


def _fields(topic: Topic, case: Optional[Case], more: Iterable[tuple[str, str]]) -> list[str]:
    fields = [
        f"MESSAGE_ID={topic.message_id}",
        f"PRIORITY={topic.priority}",
        f"SYSLOG_IDENTIFIER={IDENTIFIER}",
    ]
    known = case_fields(case) if case is not None else {}
    extra = {f"ORPHAND_{name}": str(text) for key, text in more if (name := field_name(key))}
    for name, text in {**known, **extra}.items():
        if text:
            fields.append(f"{name[:64]}={_bounded(text)}")
    return fields


def _bounded(text: str) -> str:
    return masked(text, MESSAGE_LIMIT).encode()[:BYTES_LIMIT].decode(errors="ignore")


def case_fields(case: Case) -> dict[str, str]:
    """The ORPHAND_ fields of a record about this case; those that nothing is known for are empty."""
    sighting, judgement, who = case.sighting, case.judgement, case.identity
    return {
        "ORPHAND_CONTAINER_ID": sighting.container_id,
        "ORPHAND_NAMESPACE": sighting.namespace,
        "ORPHAND_ADDRESS": sighting.address,
        "ORPHAND_KIND": judgement.kind.value if judgement.kind else "",
        "ORPHAND_VERDICT": judgement.verdict.value,
        "ORPHAND_REASON": judgement.reason,
        "ORPHAND_VETO": judgement.veto,
        "ORPHAND_SHIM_PID": str(sighting.shim.process.pid) if sighting.shim else "",
        "ORPHAND_INIT_PID": " ".join(str(init.process.pid) for init in sighting.inits[:INITS_LIMIT]),
        "ORPHAND_NAME": who.name,
        "ORPHAND_IMAGE": who.image,
        "ORPHAND_POD": who.pod,
        "ORPHAND_POD_NAMESPACE": who.pod_namespace,
        "ORPHAND_HOSTNAME": who.hostname,
    }
