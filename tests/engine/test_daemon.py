# SPDX-License-Identifier: Apache-2.0
"""The daemon on real engines: what it finds, tells and does, and what holds it back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orphand.report.topics import Topic
from tests.host.guest import Host

FAST = "grace: 3s, jitter: 0s"
SCAN = "scan: {interval: 1s, settle: 1s}\n"
KILL = f"policy: {{action: kill, {FAST}}}\nkill: {{allow_short_grace: true, term_timeout: 2s, max_share: 100%}}\n{SCAN}"
LOG = f"policy: {{action: log, {FAST}}}\nkill: {{allow_short_grace: true, max_share: 100%}}\n{SCAN}"
GONE = "shims=0 processes=0"


BEGUN: dict[str, str] = {}  # host -> where its journal was when the test began


@pytest.fixture(autouse=True)
def begun(request: pytest.FixtureRequest) -> None:
    name = next(n for n in ("any_host", "v1_host", "v2_host") if n in request.fixturenames)
    host: Host = request.getfixturevalue(name)
    BEGUN[host.name] = host.cursor()


def records(host: Host, topic: Topic, container_id: str = "") -> list[dict[str, Any]]:
    """The daemon's records of one topic (and one container) in this test."""
    found = [r for r in host.journal(since=BEGUN[host.name]) if r.get("MESSAGE_ID") == topic.message_id]
    return [r for r in found if not container_id or r.get("ORPHAND_CONTAINER_ID") == container_id]


def wait_record(host: Host, topic: Topic, container_id: str = "") -> dict[str, Any]:
    return host.wait_for(lambda: records(host, topic, container_id), 90, f"{topic.name} {container_id[:12]}")[-1]


@pytest.mark.parametrize("make", ["leaked_shim", "engine_orphan", "shimless", "childless_shim"])
def test_it_ends_an_orphan_and_tells_the_story(any_host: Host, make: str) -> None:
    container_id = any_host.sh("run2 victim")
    any_host.start_daemon(KILL)
    any_host.sh(f"{make} {container_id}")
    ended = wait_record(any_host, Topic.ENDED, container_id)
    assert ended["ORPHAND_KIND"] == make.replace("_", "-")
    order = [Topic.SUSPECTED, Topic.ORPHANED, Topic.ENDING, Topic.ENDED]
    times = [int(records(any_host, t, container_id)[0]["__REALTIME_TIMESTAMP"]) for t in order]
    assert times == sorted(times)
    assert any_host.sh(f"left {container_id}").startswith(GONE)


def test_it_ends_a_v1_shim_too(v1_host: Host) -> None:
    container_id = v1_host.sh("run1 victim")
    v1_host.start_daemon(KILL)
    v1_host.sh(f"leaked_shim {container_id}")
    wait_record(v1_host, Topic.ENDED, container_id)
    assert v1_host.sh(f"left {container_id}").startswith(GONE)


def test_log_only_logs(v2_host: Host) -> None:
    container_id = v2_host.sh("run2 victim")
    v2_host.start_daemon(LOG)
    v2_host.sh(f"leaked_shim {container_id}")
    record = wait_record(v2_host, Topic.ORPHANED, container_id)
    assert container_id[:12] in record["MESSAGE"]
    assert not records(v2_host, Topic.ENDING)
    assert not v2_host.sh(f"left {container_id}").startswith(GONE)
    assert v2_host.orphand("scan").returncode == 1


def test_alert_runs_the_command_once(v2_host: Host) -> None:
    container_id = v2_host.sh("run2 victim")
    v2_host.write("/root/alert", "#!/bin/sh\ncat >>/run/alerts; echo >>/run/alerts\n", 0o755)
    v2_host.sh("rm -f /run/alerts")
    v2_host.start_daemon(LOG.replace("action: log", "action: alert") + "alerts: {command: [/root/alert]}\n")
    v2_host.sh(f"leaked_shim {container_id}")
    v2_host.wait_for(lambda: v2_host.sh("cat /run/alerts 2>/dev/null", check=False), 90, "the alert")
    v2_host.sh("kill -USR1 $(systemctl show -p MainPID --value orphand); sleep 3; systemctl restart orphand; sleep 8")
    alerts = [json.loads(line) for line in v2_host.sh("cat /run/alerts").splitlines() if line]
    assert [a["event"] for a in alerts] == ["orphan"]
    assert alerts[0]["container"]["id"] == container_id


def test_many_at_once_trip_the_breaker_and_nothing_is_killed(v2_host: Host) -> None:
    ids = [v2_host.sh(f"run2 victim{n}") for n in range(4)]
    v2_host.start_daemon(KILL)
    v2_host.sh(f"leaked_shim {' '.join(ids)}")
    tripped = wait_record(v2_host, Topic.BREAKER_TRIPPED)
    assert "max_orphans" in tripped["MESSAGE"]
    for container_id in ids:
        record = wait_record(v2_host, Topic.ORPHANED, container_id)
        assert "max_orphans" in record["MESSAGE"]
    assert not records(v2_host, Topic.ENDING)
    assert len(records(v2_host, Topic.BREAKER_TRIPPED)) == 1
    done = v2_host.orphand("reap", ids[0][:16], "--yes")
    assert done.returncode == 0, done.stderr
    wait_record(v2_host, Topic.BREAKER_RESET)
    for container_id in ids[1:]:
        wait_record(v2_host, Topic.ENDED, container_id)


def test_a_hold_stops_kills_at_once_and_outlives_a_restart(v2_host: Host) -> None:
    container_id = v2_host.sh("run2 victim")
    v2_host.start_daemon(KILL)
    assert "storage work" in v2_host.orphand("hold", "--for", "2h", "storage", "work").stdout
    v2_host.sh(f"leaked_shim {container_id}")
    wait_record(v2_host, Topic.ORPHANED, container_id)
    v2_host.sh("systemctl restart orphand")
    v2_host.wait_for(lambda: len(records(v2_host, Topic.ORPHANED, container_id)) == 2, 60, "the second daemon's record")
    assert "storage work" in v2_host.orphand("status").stdout
    assert not records(v2_host, Topic.ENDING)
    v2_host.orphand("resume")
    wait_record(v2_host, Topic.RESUMED)
    wait_record(v2_host, Topic.ENDED, container_id)


def test_the_hourly_limit(v2_host: Host) -> None:
    ids = [v2_host.sh(f"run2 victim{n}") for n in range(2)]
    v2_host.start_daemon(KILL.replace("kill: {", "kill: {max_kills_per_hour: 1, "))
    v2_host.sh(f"leaked_shim {' '.join(ids)}")
    wait_record(v2_host, Topic.ENDED)
    first = records(v2_host, Topic.ENDED)[0]["ORPHAND_CONTAINER_ID"]
    (second,) = set(ids) - {first}
    v2_host.wait_for(
        lambda: "max_kills_per_hour" in str(records(v2_host, Topic.ORPHANED, second)), 60, "the limit's record"
    )
    v2_host.sh("systemctl restart orphand; sleep 8")
    assert not v2_host.sh(f"left {second}").startswith(GONE)


def test_outside_the_window_it_waits(v2_host: Host) -> None:
    container_id = v2_host.sh("run2 victim")
    hour = (int(v2_host.sh("date +%-H")) + 12) % 24
    window = f"windows: ['{hour:02}:00-{(hour + 1) % 24:02}:00'], "
    v2_host.start_daemon(KILL.replace("policy: {", "policy: {" + window))
    v2_host.sh(f"leaked_shim {container_id}")
    record = wait_record(v2_host, Topic.ORPHANED, container_id)
    assert "waits for" in record["MESSAGE"]
    v2_host.sh("sleep 5")
    assert not records(v2_host, Topic.ENDING)


def test_a_config_with_an_error_is_refused_at_start_and_kept_out_at_reload(v2_host: Host) -> None:
    v2_host.start_daemon(LOG)
    v2_host.write("/etc/orphand.yaml", "policy: {acton: kill}\n")
    v2_host.sh("systemctl reload orphand")
    refused = wait_record(v2_host, Topic.CONFIG_REFUSED)
    assert "acton" in refused["MESSAGE"]
    assert "action" in refused["MESSAGE"]
    assert v2_host.sh("systemctl is-active orphand") == "active"
    v2_host.sh("sleep 2")
    assert "errors" in v2_host.sh("systemctl show -p StatusText orphand")
    v2_host.sh("systemctl restart orphand || :")
    v2_host.wait_for(
        lambda: v2_host.sh("systemctl is-failed orphand", check=False) == "failed", 30, "failed, no restart"
    )
    assert v2_host.sh("systemctl show -p ExecMainStatus --value orphand") == "78"
    assert v2_host.sh("systemctl show -p NRestarts --value orphand") == "0"


def test_a_new_config_is_taken_at_reload(v2_host: Host) -> None:
    container_id = v2_host.sh("run2 victim")
    v2_host.start_daemon(LOG)
    v2_host.sh(f"leaked_shim {container_id}")
    wait_record(v2_host, Topic.ORPHANED, container_id)
    v2_host.write("/etc/orphand.yaml", KILL)
    v2_host.sh("systemctl reload orphand")
    wait_record(v2_host, Topic.RELOADED)
    wait_record(v2_host, Topic.ENDED, container_id)


def test_it_stops_within_two_seconds(v2_host: Host) -> None:
    v2_host.start_daemon(LOG)
    took = float(
        v2_host.sh("s=$(date +%s.%N); systemctl stop orphand; e=$(date +%s.%N); echo $e $s | awk '{print $1-$2}'")
    )
    assert took < 10  # systemd would end it after its own timeout of 15 s
    assert wait_record(v2_host, Topic.STOPPED)
