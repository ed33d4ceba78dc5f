# SPDX-License-Identifier: Apache-2.0
"""With no file descriptor left, nothing raises, nothing is lost silently, and no half configuration is taken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CODE = """
import io, json, os, sys, time
from pathlib import Path
from orphand import config, settings
from orphand.errors import ConfigError
from orphand.report.alerts import Alerts, Event
from orphand.report.journal import JournalReport
from orphand.report.topics import Topic

stderr, told = io.StringIO(), []
report = JournalReport(stderr=stderr)
held = []
try:
    while True:
        held.append(os.dup(2))
except OSError:
    pass

report(Topic.ORPHANED, "orphan: web")
hear = lambda topic, message, *_, **__: told.append(message)
alerts = Alerts(settings.Alerts(("/bin/true",), "http://127.0.0.1:1/", 5.0), hear, "node7")
sent = alerts.send(Event.BREAKER, "many")
alerts.close(60)
refusals = []
for _ in range(2):
    try:
        config.load([Path(sys.argv[1])])
    except ConfigError as error:
        refusals.append(str(error))
for each in held:
    os.close(each)
loaded = config.load([Path(sys.argv[1])]).policy.action.value
print(json.dumps([stderr.getvalue(), sent, sorted(alerts.sent), sorted(told), refusals, loaded]))
"""


def test_without_descriptors(tmp_path: Path) -> None:
    file = tmp_path / "orphand.yaml"
    file.write_text("policy: {action: alert}")
    argv = ["prlimit", "--nofile=64:64", sys.executable, "-c", CODE, str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    stderr, sent, kept, told, refusals, loaded = json.loads(done.stdout)
    assert stderr == "orphan: web\n"
    assert sent
    assert kept == [], "it goes out at the next start"
    assert len(told) >= 2
    assert all("not delivered" in each or "were not" in each for each in told)
    assert refusals == [f"{file}: can't be read (Too many open files); check the path and its permissions"] * 2
    assert loaded == "alert"
