# SPDX-License-Identifier: Apache-2.0
"""orphand as an admin gets it: the DEB from a signed apt repository, on a booted host (SUITE=bookworm, CGROUP=v2).

One host for the whole file, and the tests in their order: install, use, break, upgrade, remove.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from orphand.report.topics import Topic
from tests.host.conftest import BEFORE, Repository
from tests.host.guest import Host

SUITE = os.environ.get("SUITE", "bookworm")
CGROUP = os.environ.get("CGROUP", "v2")
NOTIFY_RELOAD = 253  # the first systemd that has the type
SERVED = "/srv/orphand"
ALERTS = "/run/alerts.jsonl"
QUICK = """
kill: {allow_short_grace: true, term_timeout: 2s, max_orphans: 50, max_share: 100%}
scan: {settle: 2s, interval: 2s}
"""
NOTHING_LEFT = "shims=0 processes=0 cgroups=0 bundles=0 runc-state=0 tasks=0 containers=0 docker=404"
KINDS = {
    "engine_orphan": "engine-orphan",
    "leaked_shim": "leaked-shim",
    "childless_shim": "childless-shim",
    "shimless": "shimless",
    "stopped_orphan": "engine-orphan",  # last: containerd from 1.7 on clears it away at its next start
}


@pytest.fixture(scope="module")
def host(repository: Repository) -> Iterator[Host]:
    with Host(SUITE, cgroup=CGROUP, binds=[f"{repository.directory}:{SERVED}"]) as host:
        host.sh("live_restore; img; run2 bystander")
        host.write("/usr/share/keyrings/README", "")
        host.sh(f"cp {SERVED}/orphand.gpg /usr/share/keyrings/orphand.gpg; rm -f /etc/apt/sources.list")
        yield host


@pytest.fixture(autouse=True)
def bystander(request: pytest.FixtureRequest, host: Host) -> Iterator[None]:
    """A healthy container keeps its process through every test (but a reboot), and no test leaves an orphan."""
    process = "docker inspect -f '{{.State.Pid}} {{.State.StartedAt}}' bystander"
    before = host.sh(process)
    yield
    after = host.sh(process)
    host.sh("sweep $(docker inspect -f '{{.Id}}' bystander)")
    assert after == before or "reboot" in request.node.name, "the healthy container was ended"


def sources(channel: str) -> str:
    return (
        f"Types: deb\nURIs: file:{SERVED}/apt\nSuites: {channel}\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/orphand.gpg\n"
    )


def apt(host: Host, *arguments: str) -> str:
    """apt-get that must succeed; an edited configuration is kept."""
    command = ["apt-get", "-y", "-q", "-o", "Dpkg::Options::=--force-confold", *arguments]
    return host.sh(f"export DEBIAN_FRONTEND=noninteractive; {shlex.join(command)} 2>&1", timeout=300)


def property_of(host: Host, name: str) -> str:
    return host.sh(f"systemctl show -p {name} --value orphand")


def version_of_systemd(host: Host) -> int:
    return int(host.sh("systemctl --version | sed -n '1s/^systemd \\([0-9]*\\).*/\\1/p'"))


def told(host: Host, topic: Topic, since: str, **fields: str) -> list[dict[str, Any]]:
    """The records of one kind since a cursor that have these fields."""
    return [
        record
        for record in host.journal(since=since)
        if record.get("MESSAGE_ID") == topic.message_id
        and all(record.get(f"ORPHAND_{key.upper()}") == value for key, value in fields.items())
    ]


def start_with(host: Host, config: str, check: bool = True) -> None:
    """A new start with a quick configuration, and no memory of an earlier one."""
    host.sh("systemctl stop orphand; systemctl reset-failed orphand 2>/dev/null || :; rm -rf /run/orphand")
    host.write("/etc/orphand.yaml", config + QUICK)
    host.sh("systemctl start orphand", check=check)


def test_the_package_installs_from_the_signed_repository_and_runs(host: Host) -> None:
    host.write("/etc/apt/sources.list.d/orphand.sources", sources("stable"))
    apt(host, "update")
    apt(host, "install", "orphand")

    assert host.sh("orphand --version") == f"orphand {BEFORE}"
    assert host.sh("systemctl is-enabled orphand; systemctl is-active orphand") == "enabled\nactive"
    expected = "notify-reload" if version_of_systemd(host) >= NOTIFY_RELOAD else "notify"
    assert property_of(host, "Type") == expected
    assert "Failed to parse" not in host.sh("systemctl daemon-reload; journalctl -q -n 20 --no-pager")


def test_the_unit_is_hardened(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    last = host.sh("systemd-analyze security orphand --no-pager | tail -1")
    score = float(last.split(": ")[1].split()[0])
    with capsys.disabled():
        print(f"\n{SUITE}, cgroup {CGROUP}: systemd-analyze security {score}")
    assert score <= 3.0


def test_the_service_has_been_silent_about_its_own_limits(host: Host) -> None:
    """Nothing in the unit is unknown to this systemd, and nothing that orphand does is forbidden by it."""
    unit = property_of(host, "FragmentPath")
    complaints = host.sh(f"systemd-analyze verify {unit} 2>&1 || :").splitlines()
    # man is not installed in these hosts
    pages = ("orphand(8)", "orphand.yaml(5)")
    assert [line for line in complaints if "orphand" in line and not any(page in line for page in pages)] == []
    assert not told(host, Topic.TROUBLE, ""), told(host, Topic.TROUBLE, "")


def test_an_upgrade_restarts_it_and_keeps_an_edited_configuration(host: Host, repository: Repository) -> None:
    host.write("/etc/orphand.yaml", "policy:\n  grace: 150s\n")
    before = property_of(host, "MainPID")
    host.write("/etc/apt/sources.list.d/orphand.sources", sources("testing"))
    apt(host, "update")
    apt(host, "install", "orphand")

    assert host.sh("orphand --version") == f"orphand {repository.current}"
    assert host.read("/etc/orphand.yaml") == "policy:\n  grace: 150s"
    host.sh("test -e /etc/orphand.yaml.dpkg-dist")
    assert property_of(host, "MainPID") != before
    assert property_of(host, "ActiveState") == "active"


def test_a_downgrade_works_and_back(host: Host, repository: Repository) -> None:
    apt(host, "install", "--allow-downgrades", f"orphand={BEFORE}")
    assert host.sh("orphand --version; systemctl is-active orphand") == f"orphand {BEFORE}\nactive"
    apt(host, "install", f"orphand={repository.current}")
    assert host.sh("systemctl is-active orphand") == "active"


def test_from_log_to_alert_to_kill_by_reload(host: Host) -> None:
    """An orphan of each kind: only told, then alerted, then ended with nothing left; the journal is the story."""
    orphans = {}
    for recipe in KINDS:
        orphans[recipe] = host.sh(f"run2 {recipe.replace('_', '-')}")
        host.sh(f"{recipe} {orphans[recipe]}")
    host.write("/usr/local/bin/alert", f"#!/bin/sh\n{{ cat; echo; }} >>{ALERTS}\n", mode=0o755)
    since = host.cursor()

    start_with(host, "policy: {action: log, grace: 4s, jitter: 0s}\nalerts: {command: [/usr/local/bin/alert]}\n")
    for recipe, full_id in orphans.items():
        host.wait_for(partial(told, host, Topic.ORPHANED, since, container_id=full_id), 60, f"the {recipe} to be told")
        (record, *_) = told(host, Topic.SUSPECTED, since, container_id=full_id)
        assert record["ORPHAND_KIND"] == KINDS[recipe]
    assert host.run("orphand", "scan").returncode == 1
    assert host.run("test", "-e", ALERTS).returncode == 1, "log alerts nobody"

    host.sh("sed -i 's/action: log/action: alert/' /etc/orphand.yaml; systemctl reload orphand")
    host.wait_for(lambda: set(orphans.values()) <= alerted(host), 60, "an alert for each orphan")
    assert all(host.sh(f"left {full_id}") != NOTHING_LEFT for full_id in orphans.values()), "alert ends nothing"

    host.sh("sed -i 's/action: alert/action: kill/' /etc/orphand.yaml; systemctl reload orphand")
    for recipe, full_id in orphans.items():
        host.wait_for(partial(told, host, Topic.ENDED, since, container_id=full_id), 90, f"the {recipe} to be ended")
        assert host.sh(f"left {full_id}") == NOTHING_LEFT, recipe
    assert host.run("orphand", "scan").returncode == 0
    assert not told(host, Topic.TROUBLE, since), told(host, Topic.TROUBLE, since)
    assert not told(host, Topic.END_FAILED, since)

    explained = host.sh("journalctl -u orphand -x --no-pager")
    assert "Defined-By: orphand" in explained, "the catalog is in use"


def alerted(host: Host) -> set[str]:
    lines = host.sh(f"cat {ALERTS} 2>/dev/null || :").splitlines()
    documents = [json.loads(line) for line in lines if line.strip()]
    return {document["container"]["id"] for document in documents if document.get("event") == "orphan"}


def test_the_service_unmounts_in_the_hosts_own_namespace(host: Host) -> None:
    """Its sandbox has a mount namespace of its own, where an umount would change nothing outside."""
    bundle = "/run/containerd/io.containerd.runtime.v2.task/lab/solo"
    mounted = f"grep -c ' {bundle}/rootfs ' /proc/1/mountinfo || :"
    start_with(host, "policy: {action: kill, grace: 4s, jitter: 0s}\n")
    shares = "$(ctr run --help | grep -q -- --cpu-shares && echo --cpu-shares 0)"  # as pod() of orphans.sh explains
    started = "docker.io/library/bb:1 solo /bin/busybox sleep 99999"
    host.sh("docker save bb:1 | ctr -n lab images import -")
    host.sh(f"ctr -n lab run -d {shares} --runtime io.containerd.runc.v2 {started} </dev/null >/dev/null 2>&1")
    # the mount is busy, so it stays; containerd 2 undoes it at its start, and gets it again
    host.sh(f"crash containerd; rm -rf {bundle} 2>/dev/null || :; back; ctr -n lab containers rm solo")
    again = f"mkdir -p {bundle}/rootfs; mount -t tmpfs lab {bundle}/rootfs"
    host.sh(f'[ $({mounted}) = 1 ] || {{ {again}; }}; [ $({mounted}) = 1 ]; [ -n "$(shims solo)" ]')

    host.wait_for(lambda: host.sh(mounted) == "0", 90, "the mount to be gone")
    host.wait_for(lambda: host.run("test", "-e", bundle).returncode == 1, 30, "the bundle to be gone")


def test_a_bad_configuration_at_reload_keeps_the_old_one(host: Host) -> None:
    start_with(host, "policy: {action: log, grace: 4s, jitter: 0s}\n")
    since = host.cursor()
    host.sh("sed -i 's/grace: 4s/graze: 4s/' /etc/orphand.yaml; systemctl reload orphand || :")

    (record, *_) = host.wait_for(lambda: told(host, Topic.CONFIG_REFUSED, since), 30, "the mistake to be told")
    assert "/etc/orphand.yaml:1:" in record["MESSAGE"]
    assert "grace" in record["MESSAGE"]
    assert host.sh("systemctl is-active orphand") == "active"
    assert "grace" in host.sh("systemctl status orphand --no-pager || :"), "systemctl status shows it"


def test_a_bad_configuration_at_the_start_is_said_once(host: Host) -> None:
    """No crash loop: status 78, a line that names the mistake, no restart."""
    host.write("/etc/orphand.yaml", "policy: {action: kil}\n")
    assert host.run("systemctl", "restart", "orphand").returncode != 0

    assert property_of(host, "ExecMainStatus") == "78"
    assert property_of(host, "NRestarts") == "0"
    assert "did you mean kill?" in host.sh("systemctl status orphand --no-pager || :")
    assert host.run("orphand", "check-config").returncode == 78


def test_a_package_installs_over_a_bad_configuration(host: Host) -> None:
    """dpkg does not fail, and the service says why it is not up."""
    host.write("/etc/orphand.yaml", "policy: {action: kil}\n")
    apt(host, "install", "--reinstall", "orphand")
    assert property_of(host, "ExecMainStatus") == "78"
    assert "did you mean kill?" in host.sh("systemctl status orphand --no-pager || :")


def test_without_a_journal_it_runs_by_events_and_the_timer(host: Host) -> None:
    drop_in = "/etc/systemd/system/orphand.service.d/hide.conf"
    host.write(drop_in, "[Service]\nTemporaryFileSystem=/run/log /var/log\n")
    host.sh("systemctl daemon-reload")
    try:
        start_with(host, "policy: {action: log}\n")
        assert "the journal can't be followed: there is no journal" in host.sh("systemctl status orphand --no-pager")
        assert property_of(host, "NRestarts") == "0"
    finally:
        host.sh(f"rm {drop_in}; systemctl daemon-reload")


def test_a_missing_module_is_named_once(host: Host) -> None:
    yaml = "/usr/lib/python3/dist-packages/yaml"
    host.sh(f"mv {yaml} /root/yaml")
    try:
        start_with(host, "policy: {action: log}\n", check=False)
        assert property_of(host, "ExecMainStatus") == "78"
        assert property_of(host, "NRestarts") == "0"
        assert "python3-yaml" in host.sh("systemctl status orphand --no-pager || :")
    finally:
        host.sh(f"mv /root/yaml {yaml}")


def test_a_daemon_that_hangs_is_restarted_by_the_watchdog(host: Host) -> None:
    host.write("/etc/systemd/system/orphand.service.d/watchdog.conf", "[Service]\nWatchdogSec=3s\nRestartSec=1s\n")
    host.sh("systemctl daemon-reload")
    start_with(host, "")
    first = property_of(host, "MainPID")

    host.sh(f"kill -STOP {first}")
    host.wait_for(lambda: property_of(host, "NRestarts") == "1", 60, "systemd to restart it")
    host.wait_for(lambda: property_of(host, "ActiveState") == "active", 60, "it to be up again")
    assert property_of(host, "MainPID") != first
    assert property_of(host, "NRestarts") == "1", "it stays up"
    host.sh(
        "rm /etc/systemd/system/orphand.service.d/watchdog.conf; systemctl daemon-reload; systemctl restart orphand"
    )


def test_without_engines_it_runs_and_waits(host: Host) -> None:
    """Docker and containerd stopped, the bystander running: nothing is concluded, nothing is asked to start."""
    start_with(host, "policy: {action: kill, grace: 4s, jitter: 0s}\n")
    host.sh("systemctl stop docker.socket docker containerd")
    try:
        host.wait_for(lambda: host.run("orphand", "status").returncode == 2, 60, "the bystander to be undecided")
        host.sh("systemctl restart orphand")
        assert property_of(host, "ActiveState") == "active"
        assert host.run("systemctl", "is-active", "docker").returncode != 0, "asking must not start it"
    finally:
        host.sh(
            "systemctl reset-failed docker.socket docker containerd; systemctl start containerd docker.socket docker"
        )


def test_after_a_reboot_it_is_there(host: Host) -> None:
    host.reboot()
    host.wait_for(lambda: property_of(host, "ActiveState") == "active", 60, "orphand to be up")
    # no --restart: with cgroup v1 the host can't start a container before it is up (nspawn's read-only controllers)
    host.sh("docker start bystander")
    assert host.run("orphand", "scan").returncode == 0


def test_removal_stops_it_and_purge_leaves_nothing(host: Host) -> None:
    apt(host, "remove", "orphand")
    assert host.run("systemctl", "is-active", "orphand").returncode != 0
    assert host.run("test", "-e", "/etc/orphand.yaml").returncode == 0, "the configuration stays until purge"
    assert host.sh("pgrep -fc '^/usr/bin/python3 -IB /usr/bin/orphand' || :") == "0"

    apt(host, "purge", "orphand")
    ours = "/etc/apt/sources.list.d /usr/share/keyrings /var/lib/apt /var/cache/apt /var/lib/systemd/catalog /opt /srv"
    pruned = " -o ".join(f"-path {place}" for place in ours.split())
    assert (
        host.sh(f"find / -xdev \\( {pruned} \\) -prune -o -iname '*orphand*' -print; find /run -iname '*orphand*'")
        == ""
    )
    assert host.sh("dpkg-query -W -f '${Status}' orphand 2>/dev/null || :") in ("", "unknown ok not-installed")


def test_the_versions_of_this_run(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """The row of docs/evidence.md."""
    versions = host.sh(
        "systemctl --version | head -1; docker --version; containerd --version | cut -d' ' -f1,3;"
        " runc --version | head -1; python3 --version"
    )
    with capsys.disabled():
        print(f"\n{SUITE}, cgroup {CGROUP}: {'; '.join(versions.splitlines())}")
