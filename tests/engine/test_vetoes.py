# SPDX-License-Identifier: Apache-2.0
"""What holds a kill back although everybody denies the container: vetoes, breakers, and containers that look odd.

Each test has a host of its own, since it wrecks the engines' configuration. The policy is kill throughout.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from orphand.report.topics import Topic
from tests.engine.conftest import BYSTANDERS
from tests.engine.helpers import GONE, RECEIVER, Watch, alerts, config, lives, scan, verdict
from tests.host.guest import Host

Boot = Callable[..., Host]
ALERT = "alerts: {command: [/root/alert]}"


def containers(host: Host, more: int = 0) -> dict[str, int]:
    """id -> init's pid of the bystanders and so many others, all healthy."""
    names = [*BYSTANDERS, *(f"more{n}" for n in range(more))]
    for name in names[len(BYSTANDERS) :]:
        host.sh(f"run2 {name}")
    ids = host.sh(f"docker inspect -f '{{{{.Id}}}} {{{{.State.Pid}}}}' {' '.join(names)}")
    return {line.split()[0]: int(line.split()[1]) for line in ids.splitlines()}


def docker_with(host: Host, options: str) -> None:
    """Restart dockerd with this daemon.json; live-restore keeps the containers."""
    host.write("/etc/docker/daemon.json", f'{{"live-restore": true{options}}}\n')
    host.sh("systemctl reset-failed docker; systemctl restart docker")


def assert_nothing_ended(watch: Watch, pids: dict[str, int]) -> None:
    assert not watch.records(Topic.ENDING)
    assert not watch.records(Topic.ENDED)
    assert lives(watch.host, *pids.values())


def test_another_storage_driver_is_a_veto(fresh_host: Boot) -> None:
    """Docker answers 404 for running containers, whose directories it still has."""
    host = fresh_host("v2")
    pids, watch = containers(host), Watch(host)
    host.write("/root/alert", RECEIVER, 0o755)
    host.start_daemon(config(more=ALERT))
    docker_with(host, ', "storage-driver": "vfs"')
    assert host.sh("docker ps -q") == ""
    for container_id in pids:
        record = watch.wait(Topic.ORPHANED, container_id)
        assert f"Docker has a directory of it: /var/lib/docker/containers/{container_id}" in record["MESSAGE"]
        refused = host.orphand("reap", container_id, "--yes")
        assert refused.returncode == 3
        assert "must not be ended" in refused.stderr
    watch.waited(5)
    assert sorted(a["container"]["id"] for a in alerts(host) if a["event"] == "orphan") == sorted(pids)
    docker_with(host, "")
    for container_id in pids:
        watch.wait(Topic.CLEARED, container_id)
    assert {verdict(host, i) for i in pids} == {"managed"}
    assert_nothing_ended(watch, pids)


def test_an_empty_data_root_opens_the_breaker_until_it_is_the_old_one_again(fresh_host: Boot) -> None:
    host = fresh_host("v2")
    pids, watch = containers(host, more=3), Watch(host)
    host.write("/root/alert", RECEIVER, 0o755)
    host.start_daemon(config(kill="term_timeout: 2s", more=ALERT))
    docker_with(host, ', "data-root": "/var/lib/docker/other"')
    tripped = watch.wait(Topic.BREAKER_TRIPPED)["MESSAGE"]
    assert "containers look orphaned at once" in tripped
    assert "orphand reap ID" in tripped
    assert "orphand scan" in tripped
    for container_id in pids:
        watch.wait(Topic.ORPHANED, container_id)
    assert "breaker" in host.orphand("status").stdout
    first = next(iter(pids))
    by_hand = host.orphand("reap", first)  # nobody at a terminal: it asks, and does nothing
    assert by_hand.returncode == 3
    host.sh("systemctl restart orphand")
    watch.waited(4)
    assert len([a for a in alerts(host) if a["event"] == "breaker"]) == 1

    host.sh("systemctl stop docker.socket docker")  # silence is no all-clear
    watch.host.wait_for(lambda: watch.status()["counts"]["undecided"] == 5, 60, "everything undecided")
    watch.waited(4)
    assert watch.status()["breaker"]
    assert not watch.records(Topic.BREAKER_RESET)

    host.write("/etc/docker/daemon.json", '{"live-restore": true}\n')
    host.sh("systemctl reset-failed docker docker.socket; systemctl start docker.socket docker")
    watch.wait(Topic.BREAKER_RESET)
    watch.waited(4)
    assert {verdict(host, i) for i in pids} == {"managed"}
    assert len(watch.records(Topic.BREAKER_TRIPPED)) == 1
    assert_nothing_ended(watch, pids)


def test_another_state_directory_of_containerd_kills_nobody(fresh_host: Boot) -> None:
    """containerd starts empty behind the same socket; dockerd, started again, takes its containers for dead."""
    host = fresh_host("v2")
    pids, watch = containers(host), Watch(host)
    host.start_daemon(config())
    host.sh("systemctl stop docker.socket docker containerd")
    host.write(
        "/etc/containerd/config.toml",
        'version = 2\nroot = "/var/lib/containerd/other"\nstate = "/run/containerd-other"\n'
        '[grpc]\naddress = "/run/containerd/containerd.sock"\n',
    )
    host.sh("systemctl reset-failed; systemctl start containerd docker.socket docker")
    watch.waited(8)
    found = scan(host)
    for container_id in pids:
        (form,) = found[container_id]
        assert form["verdict"] in ("managed", "undecided") or form["kind"] == "disowned" or form["veto"], form
        assert lives(host, pids[container_id])
    assert_nothing_ended(watch, pids)


@pytest.mark.parametrize("suite", ["bookworm", pytest.param("trixie", marks=pytest.mark.slow)])
def test_a_container_that_moved_all_its_processes_to_sub_cgroups(fresh_host: Boot, suite: str) -> None:
    """containerd 1.7 to 2.3.3 takes it for a leak at its next start (containerd#13784) and drops its shim."""
    host = fresh_host("v2", suite=suite)
    pids, watch = containers(host), Watch(host)
    moved, pid = next(iter(pids.items()))
    host.start_daemon(config())
    host.sh(
        f"d=$(find /sys/fs/cgroup -type d -name '*{moved}*' | head -1); mkdir $d/inside;"
        f"echo {pid} >$d/inside/cgroup.procs"
    )
    watch.waited(4)
    assert verdict(host, moved) == "managed"
    host.sh("systemctl restart containerd")
    watch.waited(6)
    assert_nothing_ended(watch, pids)
    (form,) = scan(host)[moved]
    print(f"{suite}: {form['verdict']}, {form['kind']}, {form['reason']}, {form['veto']}")
    assert form["verdict"] == "managed" or form["kind"] == "disowned", form
    if suite == "bookworm":
        assert form["verdict"] == "managed"


def test_a_disowned_container_is_ended_only_by_a_rule_that_names_the_kind(fresh_host: Boot) -> None:
    """containerd lost its database: Docker has a record that says Exited, and the processes live."""
    host = fresh_host("v2")
    pids, watch = containers(host), Watch(host)
    host.start_daemon(config())
    host.sh("disowned")
    for container_id in pids:
        record = watch.wait(Topic.ORPHANED, container_id)
        assert record["ORPHAND_KIND"] == "disowned"
        assert "only by a rule with kind: disowned" in record["MESSAGE"]
    watch.waited(4)
    assert_nothing_ended(watch, pids)
    host.write("/etc/orphand.yaml", config(policy="rules: [{match: {kind: disowned}, action: kill}]"))
    host.sh("systemctl reload orphand")
    for container_id in pids:
        watch.wait(Topic.ENDED, container_id)
        assert host.sh(f"left {container_id}").startswith(GONE)
