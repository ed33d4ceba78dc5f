# SPDX-License-Identifier: Apache-2.0
"""Records in a real journal: one each, whole, whatever is in them."""

from __future__ import annotations

import json
from typing import Any, Callable

from orphand.report.topics import Topic

Told = Callable[[str], list[dict[str, Any]]]

CODE = """
from orphand.model import *
from orphand.report.journal import JournalReport
from orphand.report.topics import Topic
ID = "ab" * 32
shim = Shim(ProcessId(10, 5), Generation.RUNC_V2, "/s", "moby", ID, "/run/c.sock", "/b", 1)
sighting = Sighting(ID, "moby", "/run/c.sock", shim, (), 1.0)
case = Case(sighting, (), Judgement(Verdict.ORPHAN, "unknown", Kind.LEAKED_SHIM))
report = JournalReport()
"""


def ours(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record.get("SYSLOG_IDENTIFIER") == "orphand"]


def test_a_record_arrives_with_its_fields(journal_of: Told) -> None:
    [record] = ours(journal_of(CODE + 'report(Topic.ORPHANED, "orphan: web …", case, action="kill")'))
    assert {key: record[key] for key in record if not key.startswith("_")} == {
        "MESSAGE": "orphan: web …",
        "MESSAGE_ID": Topic.ORPHANED.message_id,
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "orphand",
        "ORPHAND_CONTAINER_ID": "ab" * 32,
        "ORPHAND_NAMESPACE": "moby",
        "ORPHAND_ADDRESS": "/run/c.sock",
        "ORPHAND_KIND": "leaked-shim",
        "ORPHAND_VERDICT": "orphan",
        "ORPHAND_REASON": "unknown",
        "ORPHAND_SHIM_PID": "10",
        "ORPHAND_ACTION": "kill",
    }
    assert record["_TRANSPORT"] == "journal"
    assert record["_UID"] == "0"


def test_hostile_content_stays_one_record(journal_of: Told) -> None:
    code = """
from dataclasses import replace
evil = "x\\nPRIORITY=0\\nMESSAGE=fake\\x00\\x1b[2J\\udc80\\u202e" + "網" * 1_000_000
hostile = replace(case, identity=Identity(*[evil] * 7), judgement=replace(case.judgement, reason=evil))
for _ in range(20):
    report(Topic.SUSPECTED, evil, hostile, note=evil)
report(Topic.ENDED, "the last one", case)
"""
    records = ours(journal_of(CODE + code))
    assert len(records) == 21
    assert records[-1]["MESSAGE"] == "the last one"
    for record in records[:-1]:
        assert record["PRIORITY"] == "4"
        assert record["MESSAGE"].startswith("x\\nPRIORITY=0\\nMESSAGE=fake\\x00\\x1b[2J\\udc80\\u202e網")
        assert 4000 < len(record["MESSAGE"].encode()) < 4096, "journalctl -o json shows no longer ones without --all"
        assert record["ORPHAND_NAME"].isprintable()


def test_without_a_journal_socket_the_line_is_on_stderr(journal_of: Told) -> None:
    """journald may be absent while orphand runs, as when it is restarted; nothing may be lost silently."""
    code = """
import io, os
os.rename("/run/systemd/journal/socket", "/run/systemd/journal/away")
stderr = io.StringIO()
JournalReport(stderr=stderr)(Topic.ORPHANED, "orphan: web", case)
os.rename("/run/systemd/journal/away", "/run/systemd/journal/socket")
report(Topic.ORPHANED, stderr.getvalue().strip() + " was on stderr")
"""
    assert [record["MESSAGE"] for record in ours(journal_of(CODE + code))] == ["orphan: web was on stderr"]


def test_without_descriptors_the_line_is_on_stderr_and_the_next_record_in_the_journal(journal_of: Told) -> None:
    code = """
import io, os, resource
import systemd.journal
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
held = []
try:
    while True:
        held.append(os.dup(2))
except OSError:
    pass
stderr = io.StringIO()
JournalReport(stderr=stderr)(Topic.ORPHANED, "orphan: web", case)
for each in held:
    os.close(each)
report(Topic.ORPHANED, stderr.getvalue().strip() + " was on stderr")
"""
    assert [record["MESSAGE"] for record in ours(journal_of(CODE + code))] == ["orphan: web was on stderr"]


def test_history_reads_the_records_back_and_only_roots(journal_of: Told) -> None:
    code = """
import json, os
from orphand.report import history
from systemd.journal import sendv
report(Topic.SUSPECTED, "suspected", case)
child = os.fork()
if child == 0:
    os.setgid(65534)
    os.setuid(65534)
    sendv("MESSAGE=forged", "MESSAGE_ID=" + Topic.ENDED.message_id, "SYSLOG_IDENTIFIER=orphand")
    os._exit(0)
os.waitpid(child, 0)
report(Topic.ENDED, "ended", case)
os.system("journalctl --sync")
read = list(history.read())
report(Topic.STARTED, json.dumps([(r["event"], r["message"], r["container_id"]) for r in read]))
"""
    last = ours(journal_of(CODE + code))[-1]["MESSAGE"]
    assert json.loads(last) == [["suspected", "suspected", "ab" * 32], ["ended", "ended", "ab" * 32]]
