# SPDX-License-Identifier: Apache-2.0
"""A stand-in for orphand that kills managed containers, silently and with a record in turn: it tests the oracle.

It must never run but in a throw-away host; the churn test starts it there in orphand's place (--saboteur).
"""

from __future__ import annotations

import os
import random
import signal
import time
from typing import NoReturn

from systemd import journal  # type: ignore[attr-defined]
from tests.churn.engine import Away, Docker
from tests.churn.watch import init_pid

ENDED = "c5f2a6e1b8d54f0e9a7c3b1d2e4f607a"


def main() -> NoReturn:
    docker, dice, loud = Docker(), random.Random(1), False
    while True:
        time.sleep(1.5)
        try:
            _, running = docker.call("GET", "/containers/json", timeout=5)
        except Away:
            continue
        if not running:
            continue
        full_id = dice.choice(running)["Id"]
        pid = init_pid(full_id)
        if pid:
            os.kill(pid, signal.SIGKILL)
            if loud:
                journal.send("ended a container", MESSAGE_ID=ENDED, ORPHAND_CONTAINER_ID=full_id)
            loud = not loud


if __name__ == "__main__":
    main()
