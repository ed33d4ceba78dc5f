# SPDX-License-Identifier: Apache-2.0
"""orphand dies, hangs, or is told to reload in the middle of an end: nothing is half-killed, nobody else is harmed."""

from __future__ import annotations

import json

from orphand.report.topics import Topic
from tests.engine.helpers import (
    GONE,
    HOOK,
    NOTHING,
    Watch,
    config,
    drop_in,
    lives,
    main_pid,
    monotonic,
    verdict,
)
from tests.host.guest import Host

TRAP = "/bin/busybox sh -c 'trap : TERM; while :; do sleep 1; done'"
SLOW_TO_END = "/bin/busybox sh -c 'trap \"sleep 4; exit 0\" TERM; while :; do sleep 0.2; done'"


def container(host: Host, name: str, command: str) -> str:
    return host.sh(f"docker run -d --name {name} --network none bb:1 {command}")


# dies by SIGKILL right after it wrote each step, once for each step, and right after each time it kept its ends
DIES = f"""
import os, re, signal, sys
if "daemon" in sys.argv or "daemon" in getattr(sys, "orig_argv", ()):
    from orphand import daemon
    from orphand.report import journal
    def die_once(what):
        what = re.sub("[0-9]+", "N", re.sub("[0-9a-f]{{12,}}", "ID", what))
        try:
            seen = open("{HOOK}/seen").read().splitlines()
        except OSError:
            seen = []
        if what not in seen:
            with open("{HOOK}/seen", "a") as file:
                print(what, file=file)
            os.kill(os.getpid(), signal.SIGKILL)
    report = journal.JournalReport.__call__
    def dying_report(self, topic, message, case=None, **fields):
        report(self, topic, message, case, **fields)
        if topic.name in ("ENDING", "ORPHANED") :
            die_once(topic.name + " " + re.sub("^[0-9a-f]{{12}}: |container [0-9a-f]+|orphand explain.*", "", message))
    journal.JournalReport.__call__ = dying_report
    save = daemon.save_state
    def dying_save(path, state):
        save(path, state)
        die_once("saved " + " ".join(sorted(e["kind"] + str(bool(e["shim"])) for e in state.ends.values())))
    daemon.save_state = dying_save
"""


def test_killed_at_every_step_of_every_kind_it_finishes_the_job(v1_host: Host) -> None:
    """systemd starts it again each time; in the end nothing is left of any of them."""
    kinds = ("leaked_shim", "engine_orphan", "stopped_orphan", "shimless", "childless_shim")
    victims = {f"{run}-{kind}".replace("_", "-"): run for kind in kinds for run in ("run1", "run2")}
    ids = {name: v1_host.sh(f"{run} {name}") for name, run in victims.items()}
    for kind in kinds:
        wanted = " ".join(ids[f"{run}-{kind}".replace("_", "-")] for run in ("run1", "run2"))
        v1_host.sh(f"{kind} {wanted}", timeout=240)
    with drop_in(v1_host, "RestartSec=100ms", hook=DIES):
        v1_host.write("/run/systemd/system/orphand.service.d/limit.conf", "[Unit]\nStartLimitIntervalSec=0\n")
        v1_host.write(
            "/etc/orphand.yaml",
            config(grace="1s", kill="term_timeout: 2s, max_share: 100%, max_orphans: 50, max_kills_per_hour: 500"),
        )
        v1_host.install_unit()
        v1_host.sh("systemctl daemon-reload; systemctl start --no-block orphand")
        try:
            for name, container_id in ids.items():
                v1_host.wait_for(
                    lambda i=container_id: v1_host.sh(f"left {i}") == NOTHING, 240, f"{name}: nothing left of it", 1.0
                )
            v1_host.wait_for(
                lambda: json.loads(v1_host.sh("cat /run/orphand/state.json", check=False) or "{}").get("ends") == {},
                60,
                "no end in progress",
            )
            seen = v1_host.sh(f"cat {HOOK}/seen").splitlines()
        finally:
            v1_host.sh("rm -f /run/systemd/system/orphand.service.d/limit.conf")
    restarts = len(seen)
    print(f"{restarts} deaths:", *sorted(seen), sep="\n  ")
    for step in ("TERM to init", "KILL to all", "its shim has ended", "removed runc", "task", "saved leaked-shim"):
        assert [s for s in seen if step in s], f"it never died at {step!r}: {seen}"


DIES_AT_FIRST = """
import os, signal
from orphand import daemon
save = daemon.save_state
def dying_save(path, state):
    save(path, state)
    if state.ends:
        os.kill(os.getpid(), signal.SIGKILL)
daemon.save_state = dying_save
"""


def test_what_a_crash_left_whole_is_judged_anew(v2_host: Host) -> None:
    """It was about to be ended; then orphand died, and the admin exempted it."""
    victim = v2_host.sh("run2 victim")
    pid, watch = int(v2_host.sh(f"init {victim}")), Watch(v2_host)
    with drop_in(v2_host, "RestartSec=3s", hook=DIES_AT_FIRST):
        v2_host.start_daemon(config())
        v2_host.sh(f"leaked_shim {victim}")
        watch.wait(Topic.ORPHANED, victim)
        v2_host.wait_for(lambda: main_pid(v2_host) == 0, 30, "its death", 0.05)
        v2_host.write("/etc/orphand.yaml", config(policy=f"exempt: [{{container_id: '{victim}'}}]"))
        v2_host.sh("rm /run/hook/sitecustomize.py; systemctl restart orphand")
        watch.wait(Topic.END_REFUSED, words="judged anew")
        watch.waited(5)
        assert lives(v2_host, pid)
        assert not watch.records(Topic.ENDING)


def test_a_reload_during_a_kill(v2_host: Host) -> None:
    """The same policy: the kill goes on. One that only logs: it stops before its next step."""
    victims = [container(v2_host, "patient", SLOW_TO_END), container(v2_host, "stubborn", TRAP)]
    watch = Watch(v2_host)
    kill = config(kill="term_timeout: 8s, max_share: 100%")
    v2_host.start_daemon(kill)
    v2_host.sh(f"leaked_shim {victims[0]}")
    watch.wait(Topic.ENDING, words="TERM to init")
    v2_host.sh("systemctl reload orphand")
    watch.wait(Topic.RELOADED)
    watch.wait(Topic.ENDED, victims[0])
    assert v2_host.sh(f"left {victims[0]}") == NOTHING
    assert not [r for r in watch.records(Topic.ENDING) if "KILL to" in r["MESSAGE"]]

    pid = int(v2_host.sh(f"init {victims[1]}"))
    v2_host.sh(f"leaked_shim {victims[1]}")
    watch.wait(Topic.ENDING, victims[1], "TERM to init")
    v2_host.write("/etc/orphand.yaml", config("log"))
    v2_host.sh("systemctl reload orphand")
    failed = watch.wait(Topic.END_FAILED, victims[1])
    assert "the policy does not kill any more" in failed["MESSAGE"]
    assert lives(v2_host, pid)


def test_a_receiver_that_hangs_holds_up_no_kill(v2_host: Host) -> None:
    victim = v2_host.sh("run2 victim")
    watch = Watch(v2_host)
    hang = "import socket, time\ns = socket.socket()\ns.bind(('127.0.0.1', 8099))\ns.listen()\ntime.sleep(999)\n"
    v2_host.write("/run/hang.py", hang)
    v2_host.sh("ip link set lo up; systemd-run --quiet --collect --unit=hang python3 /run/hang.py")
    v2_host.write("/run/hangs", "#!/bin/sh\nsleep 1000\n", 0o755)
    try:
        v2_host.start_daemon(
            config(more="alerts: {command: [/run/hangs], webhook: 'http://127.0.0.1:8099/', timeout: 30s}")
        )
        v2_host.sh(f"leaked_shim {victim}")
        watch.wait(Topic.ENDED, victim)
        assert v2_host.sh(f"left {victim}") == NOTHING
        watch.looks(2)
        stopping = monotonic(v2_host)
        v2_host.sh("systemctl stop orphand")
        assert monotonic(v2_host) - stopping < 14  # systemd would use SIGKILL after 15 s
        assert watch.records(Topic.STOPPED)
    finally:
        v2_host.sh("systemctl stop hang", check=False)


def test_a_daemon_that_hangs_is_restarted_by_the_watchdog(v2_host: Host) -> None:
    victim = v2_host.sh("run2 victim")
    watch = Watch(v2_host)
    with drop_in(v2_host, "WatchdogSec=6s", "RestartSec=100ms", "TimeoutAbortSec=2s"):
        v2_host.start_daemon(config())
        pid = main_pid(v2_host)
        watch.waited(8)  # while it looks it is fed
        assert main_pid(v2_host) == pid
        v2_host.sh(f"kill -STOP {pid}")
        v2_host.wait_for(lambda: main_pid(v2_host) not in (0, pid), 90, "another daemon")
        assert int(v2_host.sh("systemctl show -p NRestarts --value orphand")) == 1
        v2_host.sh(f"leaked_shim {victim}")
        watch.wait(Topic.ENDED, victim)
        assert v2_host.sh(f"left {victim}").startswith(GONE)
        assert verdict(v2_host, victim) == ""


STOPS_DOCKER = f"""
import os, signal, sys
from orphand.report import journal
report = journal.JournalReport.__call__
def dying_report(self, topic, message, case=None, **fields):
    report(self, topic, message, case, **fields)
    if "its shim has ended" in message:
        os.kill(int(open("{HOOK}/dockerd").read()), signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGKILL)
journal.JournalReport.__call__ = dying_report
"""


def test_what_a_crash_left_lying_about_is_removed_once_somebody_can_be_asked(v2_host: Host) -> None:
    """No process of it is left, so that no look would find it again; and at its start orphand gets no answer."""
    victim = v2_host.sh("run2 victim")
    watch = Watch(v2_host)
    with drop_in(v2_host, "RestartSec=100ms", hook=STOPS_DOCKER):
        v2_host.start_daemon(config(scan="interval: 1s, settle: 1s, timeout: 1s"))
        v2_host.sh(f"leaked_shim {victim}")
        dockerd = main_pid(v2_host, "docker")
        v2_host.write(f"{HOOK}/dockerd", str(dockerd))
        try:
            failed = watch.wait(Topic.END_FAILED, words="not gone on with")
            assert "no answer from docker" in failed["MESSAGE"]
            watch.looks(3)
            assert len(watch.records(Topic.END_FAILED)) == 1, "told again at each look"
        finally:
            v2_host.sh(f"kill -CONT {dockerd}")
        watch.wait(Topic.ENDED, words="is finished")
        assert v2_host.sh(f"left {victim}") == NOTHING
