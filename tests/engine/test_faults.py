# SPDX-License-Identifier: Apache-2.0
"""Faults below a real daemon on real engines. What may be wrong with the engines' answers is in tests/unit."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from orphand.report.topics import Topic
from tests.engine.helpers import (
    HOOK,
    NOTHING,
    RECEIVER,
    Watch,
    config,
    drop_in,
    lives,
    main_pid,
    moment,
    monotonic,
)
from tests.host.guest import ENVIRONMENT, OPT, Host

# ---- engines


@pytest.mark.parametrize("engine", ["docker", "containerd"])
def test_an_engine_that_falls_silent_in_the_grace_makes_it_begin_anew(v2_host: Host, engine: str) -> None:
    victim = v2_host.sh("run2 victim")
    watch = Watch(v2_host)
    v2_host.start_daemon(config(grace="8s", scan="interval: 1s, settle: 1s, timeout: 1s"))
    v2_host.sh(f"leaked_shim {victim}")
    watch.wait(Topic.SUSPECTED, victim)
    pid = main_pid(v2_host, engine)
    v2_host.sh(f"kill -STOP {pid}")
    try:
        v2_host.wait_for(
            lambda: victim in [c["container_id"] for c in watch.status()["containers"] if c["verdict"] == "undecided"],
            60,
            "undecided",
        )
        watch.waited(10)
        assert not watch.records(Topic.ENDING)
    finally:
        again = monotonic(v2_host)
        v2_host.sh(f"kill -CONT {pid}")
    watch.wait(Topic.ENDED, victim)
    assert moment(watch.records(Topic.ENDING, victim)[0]) >= again + 8
    assert v2_host.sh(f"left {victim}") == NOTHING


@pytest.mark.parametrize("engine", ["docker", "containerd"])
def test_an_engine_that_restarts_in_the_grace_is_not_believed_until_it_has_settled(v2_host: Host, engine: str) -> None:
    victim = v2_host.sh("run2 victim")
    watch = Watch(v2_host)
    v2_host.start_daemon(config(grace="8s", scan="interval: 1s, settle: 4s"))
    v2_host.sh(f"leaked_shim {victim}")
    watch.wait(Topic.SUSPECTED, victim)
    again = monotonic(v2_host)
    v2_host.sh(f"systemctl restart {engine}")
    watch.wait(Topic.ENDED, victim)
    assert moment(watch.records(Topic.ENDING, victim)[0]) >= again + 4 + 8
    assert v2_host.sh(f"left {victim}") == NOTHING


def end_one(host: Host, container_id: str, between: str) -> dict[str, Any]:
    """End it with the real parts; `between` runs after everybody has denied it and before they are asked again."""
    host.write("/run/between", f"set -eu; . {OPT}/tests/engine/orphans.sh\n{between}\n")
    host.sh("sleep 3.5")  # the engines' age is the point, and that is no event
    environment = [f"{key}={value}" for key, value in ENVIRONMENT.items()]
    program = f"{OPT}/tests/engine/end_one.py"
    options = ("--settle", "3", "--before-again", "bash /run/between")
    done = host.run("env", *environment, "/usr/bin/python3", program, container_id, *options, timeout=180)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    assert said["verdict"] == "pending", said
    return said


def test_an_engine_that_restarts_between_answer_and_signal_stops_the_end(v2_host: Host) -> None:
    victim = v2_host.sh("run2 victim")
    pid = int(v2_host.sh(f"init {victim}"))
    v2_host.sh(f"leaked_shim {victim}")
    for engine in ("docker", "containerd"):
        said = end_one(v2_host, victim, f"systemctl restart {engine}")
        assert said["refused"].startswith("it is undecided now"), said
        assert said["steps"] == []
    assert lives(v2_host, pid)


def test_a_container_that_is_known_again_right_before_the_signal_lives(v2_host: Host) -> None:
    victim = v2_host.sh("run2 victim")
    pid = int(v2_host.sh(f"init {victim}"))
    home = f"/var/lib/docker/containers/{victim}"
    v2_host.sh(f"crash docker; mv {home} /root/saved; back")
    said = end_one(v2_host, victim, f"crash docker; mv /root/saved {home}; back")
    assert said["kind"] == "engine-orphan"
    assert said["refused"].startswith("it is managed now"), said
    assert v2_host.sh("docker inspect -f '{{.State.Status}} {{.State.Pid}}' victim") == f"running {pid}"
    assert lives(v2_host, pid)


def test_a_record_that_comes_back_right_before_the_signal_is_a_veto(v2_host: Host) -> None:
    victim = v2_host.sh("run2 victim")
    pid = int(v2_host.sh(f"init {victim}"))
    home = f"/var/lib/docker/containers/{victim}"
    v2_host.sh(f"leaked_shim {victim}")
    said = end_one(v2_host, victim, f"mkdir {home}; echo '{{}}' >{home}/config.v2.json")
    assert home in said["refused"], said
    assert lives(v2_host, pid)
    v2_host.sh(f"rm -r {home}")


# ---- the journal


@pytest.mark.slow
def test_the_journal_in_every_trouble_still_triggers(fresh_host: Callable[..., Host]) -> None:
    """With no timer to speak of, so that only a line can cause the looks that are waited for."""
    host = fresh_host("v2")
    host.sh("mkdir -p /var/log/journal; systemctl restart systemd-journald; journalctl --flush")
    watch = Watch(host)
    host.start_daemon(config(scan="interval: 1h, settle: 1s"))
    pid = main_pid(host)

    def triggers(after: str) -> None:
        for number in range(3):  # the trouble itself may cause a look
            before = watch.status().get("looked_at")

            def looked(before: Any = before, number: int = number) -> bool:
                host.sh(f"logger -t dockerd 'level=warning msg=\"unknown container\" container={number}'")
                return watch.status().get("looked_at") != before

            host.wait_for(looked, 90, f"a look by a line after {after}", 0.5)

    conf, restart = "/etc/systemd/journald.conf.d", "systemctl restart systemd-journald"
    files = "for f in /var/log/journal/*/*.journal; do"
    for trouble in (
        "true",
        "journalctl --rotate",
        "journalctl --rotate; journalctl --vacuum-time=1s",
        restart,
        "systemctl kill -s KILL systemd-journald",
        f"{files} dd if=/dev/urandom of=$f bs=4096 seek=2 count=64 conv=notrunc status=none; done",
        f"{files} dd if=/dev/urandom of=$f bs=64 count=1 conv=notrunc status=none; done; {restart}",
        f"rm -rf /var/log/journal; {restart}",
        f"mkdir -p {conf}; printf '[Journal]\\nStorage=volatile\\n' >{conf}/v.conf; {restart}",
    ):
        host.sh(trouble)
        triggers(trouble)
        assert main_pid(host) == pid
    host.sh("for f in /run/log/journal/*/*.journal; do truncate -s 4096 $f; done; systemctl restart systemd-journald")
    triggers("truncated files")  # to read a mapped file that was cut is SIGBUS: then systemd starts the daemon again


# ---- clocks and old kernels

# as orphand's own code reads it: grpc turns the wall clock into a deadline, which the kernel's clock must fit
CLOCKS = f"""
import sys, time
_time, _local = time.time, time.localtime
def jump():
    if not sys._getframe(2).f_globals.get("__name__", "").startswith("orphand"):
        return 0.0
    try:
        return float(open("{HOOK}/jump").read())
    except (OSError, ValueError):
        return 0.0
time.time = lambda: _time() + jump()
time.localtime = lambda seconds=None: _local(_time() + jump() if seconds is None else seconds)
"""


@pytest.mark.parametrize("days", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_a_wall_clock_that_jumps_moves_no_grace_no_settling_and_no_budget(v2_host: Host, days: int) -> None:
    """The host shares its clock with the machine: so time.time and time.localtime jump, as the daemon reads them."""
    ids = [v2_host.sh(f"run2 victim{n}") for n in range(2)]
    watch = Watch(v2_host)
    with drop_in(v2_host, hook=CLOCKS):
        v2_host.start_daemon(
            config(
                grace="6s",
                kill="term_timeout: 2s, max_share: 100%, max_kills_per_hour: 1",
                scan="interval: 1s, settle: 4s",
            )
        )
        before = watch.looks()["looked_at"]
        v2_host.sh(f"leaked_shim {ids[0]}")
        engine = int(v2_host.sh("systemctl show -p ExecMainStartTimestampMonotonic --value docker")) / 1e6
        v2_host.write(f"{HOOK}/jump", str(days * 86400))
        suspected = watch.wait(Topic.SUSPECTED, ids[0])
        assert moment(suspected) >= engine + 4
        v2_host.write(f"{HOOK}/jump", str(days * 2 * 86400))
        watch.wait(Topic.ENDED, ids[0])
        assert abs(watch.looks()["looked_at"] - before) > 86400, "the clock did not jump"
        assert moment(watch.records(Topic.ORPHANED, ids[0])[0]) >= moment(suspected) + 6
        v2_host.write(f"{HOOK}/jump", str(days * 4 * 86400))
        v2_host.sh(f"leaked_shim {ids[1]}")
        watch.wait(Topic.ORPHANED, ids[1], "max_kills_per_hour is spent")
        watch.looks(3)
        assert len(watch.records(Topic.ENDED)) == 1


NO_PIDFD = "import os, signal\ndel os.pidfd_open\ndel signal.pidfd_send_signal\n"


@pytest.mark.parametrize("kind", ["leaked_shim", "shimless"])
def test_without_pidfds_orphans_end_all_the_same(v2_host: Host, kind: str) -> None:
    """As on Linux before 5.3: the interpreter has none."""
    victim = v2_host.sh("run2 victim")
    watch = Watch(v2_host)
    with drop_in(v2_host, hook=NO_PIDFD):
        v2_host.start_daemon(config())
        assert v2_host.sh(f"ls -l /proc/{main_pid(v2_host)}/fd | grep -c pidfd || :") == "0"
        v2_host.sh(f"{kind} {victim}")
        watch.wait(Topic.ENDED, victim)
        assert v2_host.sh(f"left {victim}") == NOTHING


# ---- short of space, descriptors, memory


@pytest.mark.parametrize("short_of", ["blocks", "inodes"])
def test_without_space_for_its_state_nothing_is_killed(v2_host: Host, short_of: str) -> None:
    victim = v2_host.sh("run2 victim")
    watch = Watch(v2_host)
    v2_host.sh("mkdir -p /run/orphand; mount -t tmpfs -o size=64k,nr_inodes=24 small /run/orphand")
    try:
        v2_host.write("/run/alert", RECEIVER, 0o755)
        # a kill that was not begun must not be counted, or none would be left once there is space
        kill = "term_timeout: 2s, max_share: 100%, max_kills_per_hour: 2"
        v2_host.start_daemon(config(kill=kill, more="alerts: {command: [/run/alert]}"))
        fill = "cat /dev/zero >/run/orphand/fill" if short_of == "blocks" else "touch /run/orphand/fill{1..30}"
        v2_host.sh(f"{fill} 2>/dev/null || :; leaked_shim {victim}")
        watch.wait(Topic.ORPHANED, victim)
        trouble = watch.wait(Topic.TROUBLE, words="No space left on device")
        since = monotonic(v2_host)
        v2_host.wait_for(lambda: monotonic(v2_host) > since + 6, 30, "six seconds of looks")
        assert not watch.records(Topic.ENDING), trouble["MESSAGE"]
        assert len(watch.records(Topic.TROUBLE)) <= 3, [r["MESSAGE"] for r in watch.records(Topic.TROUBLE)]
        v2_host.sh("rm /run/orphand/fill*")
        watch.wait(Topic.ENDED, victim)
        assert v2_host.sh(f"left {victim}") == NOTHING
    finally:
        v2_host.sh("systemctl stop orphand; umount /run/orphand", check=False)


@pytest.mark.parametrize("limit", ["nofile", "as"])
def test_without_descriptors_or_memory_nothing_wrong_is_done(v2_host: Host, limit: str) -> None:
    """The limit falls while the orphan is in its grace, and is lifted again. ENOMEM itself can't be ordered; a limit
    of the address space is the nearest: then a thread may hang before it runs, and the watchdog starts the daemon anew.
    """
    victim, managed = v2_host.sh("run2 victim"), v2_host.sh("run2 managed")
    managed_pid = int(v2_host.sh(f"init {managed}"))
    watch = Watch(v2_host)
    with drop_in(v2_host, "WatchdogSec=15s", "RestartSec=100ms"):
        v2_host.start_daemon(config(grace="5s"))
        v2_host.sh(f"leaked_shim {victim}")
        watch.wait(Topic.SUSPECTED, victim)
        pid = main_pid(v2_host)
        used = v2_host.sh(f"awk '/VmSize/ {{print $2 * 1024}}' /proc/{pid}/status")
        v2_host.sh(f"prlimit --pid {pid} --nofile=8:" if limit == "nofile" else f"prlimit --pid {pid} --as={used}:")
        since = monotonic(v2_host)
        v2_host.wait_for(lambda: monotonic(v2_host) > since + 8, 60, "eight seconds of trouble")
        if limit == "nofile":
            assert not watch.records(Topic.ENDING)
        v2_host.sh(f"prlimit --pid {pid} --nofile=1024: --as=4294967296:", check=False)
        v2_host.wait_for(lambda: v2_host.sh(f"left {victim}") == NOTHING, 120, "the victim's end")
        assert lives(v2_host, managed_pid)
        assert limit == "as" or main_pid(v2_host) == pid
