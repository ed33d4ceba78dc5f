# SPDX-License-Identifier: Apache-2.0
"""A pid that really belongs to another process by the time of the signal: made in a pid namespace of its own.

There /proc/sys/kernel/ns_last_pid says which pid the next process gets (clone(2)). The second process starts at
least one clock tick after the first one, as it must: within a tick (10 ms) pid and start time would be the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
from orphand import proc
from orphand.errors import Gone

pidfd, moment = sys.argv[1] == "pidfd", sys.argv[2]
proc.HAS_PIDFD = pidfd
LAST = Path("/proc/sys/kernel/ns_last_pid")
node = proc.Proc()
first = subprocess.Popen(["sleep", "99"])
sighted = node.process(first.pid)
others = []

def reuse():
    first.kill()
    first.wait()
    end = time.monotonic() + 2 / proc.TICKS
    while time.monotonic() < end:
        time.sleep(0.001)
    LAST.write_text(str(first.pid - 1))
    others.append(subprocess.Popen(["sleep", "98"]))
    assert others[0].pid == first.pid, "the pid was not given again"
    assert node.process(first.pid).start != sighted.start

if moment == "before":
    reuse()
elif pidfd:  # between opening the descriptor, with all checks done, and the signal through it
    send = signal.pidfd_send_signal
    def late(*arguments):
        reuse()
        send(*arguments)
    signal.pidfd_send_signal = late
try:
    node.send_signal(sighted, signal.SIGKILL)
    print("sent")
except Gone as gone:
    print("gone:", gone)
if moment == "before":
    assert not node.alive(sighted)
    try:
        assert node.open_pidfd(sighted) is None
    except Gone:
        pass
time.sleep(0.2)
print("other", "lives" if others[0].poll() is None else "died")
others[0].kill()
"""


@pytest.mark.parametrize(("how", "moment"), [("pidfd", "before"), ("kill", "before"), ("pidfd", "between")])
def test_a_pid_that_was_given_again_is_not_signalled(how: str, moment: str) -> None:
    """Without pidfds there is no "between" to be made: the check and kill(2) are two lines next to each other."""
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", PROGRAM, how, moment]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(unshare, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("gone:"), said
    assert said[1] == "other lives"
