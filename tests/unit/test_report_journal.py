# SPDX-License-Identifier: Apache-2.0
"""Records: which fields they have, where they go, and that they are one record whatever is in them."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from orphand.model import (
    Case,
    Generation,
    Identity,
    Init,
    Judgement,
    Kind,
    ProcessId,
    Shim,
    Sighting,
    Verdict,
)
from orphand.report.journal import JournalReport
from orphand.report.topics import Topic

ID = "ab" * 32
SHIM = Shim(ProcessId(10, 5), Generation.RUNC_V2, "/s", "moby", ID, "/run/c.sock", "/b", 1)
CASE = Case(
    Sighting(
        ID, "moby", "/run/c.sock", SHIM, (Init(ProcessId(11, 6), ID, "/x"), Init(ProcessId(12, 6), ID, "/y")), 1.0
    ),
    (),
    Judgement(Verdict.ORPHAN, "unknown to docker; for 120 s", Kind.LEAKED_SHIM),
    Identity("web", "nginx:1", "web-1", "shop", "node7"),
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def fields_of(case: Case = CASE, message: str = "orphan", **more: str) -> dict[str, str]:
    sent: list[Sequence[str]] = []
    JournalReport(send=sent.append, stderr=io.StringIO())(Topic.ORPHANED, message, case, **more)
    [fields] = sent
    return dict(each.split("=", 1) for each in fields)


def test_a_record_has_every_field_that_scripts_match_on() -> None:
    assert fields_of(action="kill") == {
        "MESSAGE": "orphan",
        "MESSAGE_ID": Topic.ORPHANED.message_id,
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "orphand",
        "ORPHAND_CONTAINER_ID": ID,
        "ORPHAND_NAMESPACE": "moby",
        "ORPHAND_ADDRESS": "/run/c.sock",
        "ORPHAND_KIND": "leaked-shim",
        "ORPHAND_VERDICT": "orphan",
        "ORPHAND_REASON": "unknown to docker; for 120 s",
        "ORPHAND_SHIM_PID": "10",
        "ORPHAND_INIT_PID": "11 12",
        "ORPHAND_NAME": "web",
        "ORPHAND_IMAGE": "nginx:1",
        "ORPHAND_POD": "web-1",
        "ORPHAND_POD_NAMESPACE": "shop",
        "ORPHAND_HOSTNAME": "node7",
        "ORPHAND_ACTION": "kill",
    }


def test_what_is_not_known_is_left_out() -> None:
    case = Case(Sighting(ID, "", "", None, (), 1.0), (), Judgement(Verdict.UNDECIDED, ""))
    assert sorted(fields_of(case)) == [
        "MESSAGE", "MESSAGE_ID", "ORPHAND_CONTAINER_ID", "ORPHAND_VERDICT", "PRIORITY", "SYSLOG_IDENTIFIER"
    ]  # fmt: skip


def test_hostile_text_stays_one_bounded_field() -> None:
    evil = "x\nPRIORITY=0\nMESSAGE=fake\x1b[2J\udc80" + "y" * 100_000
    case = Case(Sighting(evil, evil, evil, None, (), 1.0), (), Judgement(Verdict.ORPHAN, evil), Identity(*[evil] * 7))
    fields = fields_of(case, evil, **{"a=b\nMESSAGE": evil})
    assert fields["PRIORITY"] == "4"
    for name, text in fields.items():
        assert text.isprintable()
        assert len(text) <= 4096
        assert name.replace("_", "").isalnum()
    assert fields["ORPHAND_A_B_MESSAGE"].startswith("x\\nPRIORITY=0")


def test_a_sender_that_fails_falls_back_to_a_line() -> None:
    def fail(fields: Sequence[str]) -> None:
        raise OSError("No space left on device")

    stderr = io.StringIO()
    JournalReport(send=fail, stderr=stderr)(Topic.ORPHANED, "orphan: web", CASE)
    assert stderr.getvalue() == "orphan: web\n"


def test_without_a_journal_there_are_lines(tmp_path: Path) -> None:
    stderr = io.StringIO()
    JournalReport(stderr=stderr, socket=str(tmp_path / "none"))(Topic.ORPHANED, "two\nlines", None)
    assert stderr.getvalue() == "two\\nlines\n"


def test_the_journals_stream_gets_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "stream", "w+") as stream:
        info = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{info.st_dev}:{info.st_ino}")
        JournalReport(stderr=stream, socket=str(tmp_path / "none"))(Topic.ORPHANED, "orphan: web", None)
        stream.seek(0)
        assert stream.read() == "<4>orphan: web\n"


def test_somebody_at_a_terminal_sees_what_goes_to_the_journal() -> None:
    terminal, sent = Terminal(), []
    JournalReport(send=sent.append, stderr=terminal)(Topic.ORPHANED, "orphan: web", None)
    assert len(sent) == 1
    assert terminal.getvalue() == "orphan: web\n"


def test_a_closed_stderr_is_survived(tmp_path: Path) -> None:
    stderr = io.StringIO()
    report = JournalReport(stderr=stderr, socket=str(tmp_path / "none"))
    stderr.close()
    report(Topic.ORPHANED, "orphan", CASE)


def test_topics_have_ids_of_their_own() -> None:
    ids = [topic.message_id for topic in Topic]
    assert len(set(ids)) == len(ids)
    assert all(len(each) == 32 and int(each, 16) for each in ids)
