# SPDX-License-Identifier: Apache-2.0
"""Gives itself the command line and the name of a shim, then sleeps: python3 fake_shim.py ARGV0 ARG...

Anybody can do this: a process may write its own memory, where the kernel reads the command line from.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time

PR_SET_NAME = 15


def main() -> None:
    wanted = os.environ.get("FAKE_ARGV")
    if wanted is None:  # once more, with arguments of exactly the length of the wanted ones
        wanted = "\0".join([*sys.argv[1:], ""])
        own = ["p", sys.argv[0], ""]
        own[-1] = "x" * (len(wanted) - len("\0".join([*own, ""])))
        os.execve(sys.executable, own, {"FAKE_ARGV": wanted.replace("\0", "\n")})
    forged = wanted.replace("\n", "\0").encode()
    with open("/proc/self/stat", "rb") as stat:
        start = int(stat.read().rpartition(b")")[2].split()[45])  # field 48 of proc(5), arg_start
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(start)
        memory.write(forged)
    name = os.path.basename(forged.split(b"\0")[0])
    ctypes.CDLL(None).prctl(PR_SET_NAME, name, 0, 0, 0)
    print(os.getpid(), flush=True)
    time.sleep(3600)


if __name__ == "__main__":
    main()
