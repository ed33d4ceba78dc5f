# SPDX-License-Identifier: Apache-2.0
"""What real Docker engines say, and which engine is asked for what. Asked with no settling time unless it matters."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from tests.host.guest import ENVIRONMENT, OPT, ROOT, Host

DOCKER, CONTAINERD = "docker owner", "containerd /run/containerd/containerd.sock keeper"
PYTHON = ["env", *(f"{key}={value}" for key, value in ENVIRONMENT.items()), "/usr/bin/python3"]


def bench(host: Host, settle: float = 0, timeout: float = 20, *sockets: str) -> dict[str, Any]:
    done = host.run(*PYTHON, f"{OPT}/tests/engine/ask.py", str(settle), str(timeout), *sockets)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def claims(said: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {c["id"]: {who: s["claim"] for who, s in c["said"].items()} for c in said["containers"]}


def details(said: dict[str, Any], container_id: str) -> str:
    (container,) = (c for c in said["containers"] if c["id"] == container_id)
    return "; ".join(s["detail"] for s in container["said"].values())


def vetoes(said: dict[str, Any]) -> dict[str, str]:
    return {c["id"]: c["said"][DOCKER]["veto"] for c in said["containers"]}


def test_each_kind(any_host: Host) -> None:
    managed, lost, leaked = (any_host.sh(f"run2 {name}") for name in ("managed", "lost", "leaked"))
    any_host.sh(f"engine_orphan {lost}; leaked_shim {leaked}")
    said = bench(any_host)
    assert claims(said)[managed] == {DOCKER: "known", CONTAINERD: "known"}
    assert claims(said)[lost] == {DOCKER: "unknown", CONTAINERD: "known"}
    assert claims(said)[leaked] == {DOCKER: "unknown", CONTAINERD: "unknown"}
    assert set(vetoes(said).values()) == {""}
    assert said["proven"] == {"/run/docker.sock": ["/run/containerd/containerd.sock", True]}


def test_paused_and_restarting_containers_are_known(v2_host: Host) -> None:
    paused = v2_host.sh("run2 paused; docker pause paused >/dev/null")
    assert claims(bench(v2_host))[paused][DOCKER] == "known"
    v2_host.sh("docker unpause paused >/dev/null")


LISTED = """
import json
from orphand.authorities import docker
from orphand.authorities.docker_api import Client
print(json.dumps({c["Id"]: c["State"] for c in Client("/run/docker.sock", 20).get(docker.LIST, 1 << 20).json()}))
"""


def test_the_list_is_of_those_that_have_processes(v2_host: Host) -> None:
    """A node keeps thousands of exited ones; each would be read in each look."""
    running, paused, exited = (v2_host.sh(f"run2 {name}") for name in ("running", "paused", "exited"))
    created = v2_host.sh("docker create --name created --network none bb:1 true")
    v2_host.sh("docker pause paused >/dev/null; docker kill exited >/dev/null")
    listed = json.loads(v2_host.run(*PYTHON, "-c", LISTED).stdout)
    assert {i: listed.get(i) for i in (running, paused, exited, created)} == {
        running: "running", paused: "paused", exited: None, created: None,
    }  # fmt: skip
    v2_host.sh("docker unpause paused >/dev/null")


def test_disowned(fresh_host: Callable[..., Host]) -> None:
    host = fresh_host("v2")
    container = host.sh("run2 web")
    host.sh("disowned")
    host.wait_for(lambda: claims(bench(host, settle=1))[container][DOCKER] == "disowned", 60, "it to be disowned")


def test_after_a_restart_only_a_yes_counts(v2_host: Host) -> None:
    managed, leaked = v2_host.sh("run2 managed"), v2_host.sh("run2 leaked")
    v2_host.sh(f"leaked_shim {leaked}")
    said = bench(v2_host, settle=3600)
    assert claims(said)[managed][DOCKER] == "known"
    assert set(claims(said)[leaked].values()) == {"unavailable"}
    assert "is believed after 3600 s" in details(said, leaked)


def test_a_stopped_docker_is_not_woken(v2_host: Host) -> None:
    container = v2_host.sh("run2 web")
    v2_host.start_daemon("scan: {interval: 2s}\n")
    v2_host.sh("systemctl stop docker 2>/dev/null")
    try:
        said = bench(v2_host)
        assert set(claims(said)[container].values()) == {"unavailable"}
        assert "would wake it" in details(said, container)
        lost = "no events from Docker"
        v2_host.wait_for(
            lambda: [r for r in v2_host.journal() if lost in str(r["MESSAGE"])], 60, "orphand to lose the events"
        )
        v2_host.sh("sleep 5")  # two looks of the daemon and five of its events
        assert v2_host.sh("systemctl is-active docker", check=False) == "inactive"
        assert v2_host.sh("systemctl is-active docker.socket") == "active"
    finally:
        v2_host.sh("systemctl start docker")
    back = "its events are followed again"
    v2_host.wait_for(lambda: [r for r in v2_host.journal() if back in str(r["MESSAGE"])], 60, "orphand to find them")
    assert claims(bench(v2_host))[container][DOCKER] == "known"


def test_a_docker_that_is_frozen_is_no_answer(v2_host: Host) -> None:
    container = v2_host.sh("run2 web")
    v2_host.sh("kill -STOP $(pidof dockerd)")
    try:
        said = bench(v2_host, timeout=2)
    finally:
        v2_host.sh("kill -CONT $(pidof dockerd)")
    assert claims(said)[container] == {DOCKER: "unavailable", CONTAINERD: "known"}


def test_containers_of_another_storage_driver_are_vetoed(fresh_host: Callable[..., Host]) -> None:
    host = fresh_host("v2")
    container = host.sh("run2 web")
    config = '{"live-restore": true, "storage-driver": "vfs"}'
    host.sh(f"echo '{config}' >/etc/docker/daemon.json; systemctl restart docker")
    assert host.sh("docker ps -q") == ""
    said = bench(host)
    assert claims(said)[container][DOCKER] == "unknown"
    assert f"/var/lib/docker/containers/{container}" in vetoes(said)[container]
    host.sh("live_restore")
    assert claims(bench(host))[container][DOCKER] == "known"


SECOND = """
mkdir -p /etc/second /var/lib/docker/second
cat >/etc/second/config.toml <<'.'
version = 2
root = "/var/lib/containerd/second"
state = "/run/second"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "/run/second/containerd.sock"
.
echo '{}' >/etc/second/daemon.json
systemd-run -q --unit=second-containerd -p Delegate=yes -p KillMode=process containerd --config /etc/second/config.toml
for i in $(seq 300); do [ -S /run/second/containerd.sock ] && break; sleep 0.1; done
systemd-run -q --unit=second-docker -p Delegate=yes -p KillMode=process dockerd --config-file /etc/second/daemon.json \
    -H unix:///run/second/docker.sock --containerd /run/second/containerd.sock --data-root /var/lib/docker/second \
    --exec-root /run/second/docker --pidfile /run/second/docker.pid --bridge=none --iptables=false
export DOCKER_HOST=unix:///run/second/docker.sock
for i in $(seq 300); do docker info >/dev/null 2>&1 && break; sleep 0.1; done
img; run2 second
"""


def test_a_second_docker_with_a_containerd_of_its_own(fresh_host: Callable[..., Host]) -> None:
    host = fresh_host("v2")
    first, second = host.sh("run2 first"), host.sh(SECOND)
    said = bench(host)
    assert claims(said)[first] == {DOCKER: "known", CONTAINERD: "known"}
    assert claims(said)[second] == {
        "docker at /run/second/docker.sock owner": "known",
        "containerd /run/second/containerd.sock keeper": "known",
    }
    only_first = bench(host, 0, 20, "/run/docker.sock")
    assert set(claims(only_first)[second].values()) == {"unavailable"}
    assert "no dockerd found that uses /run/second/containerd.sock" in details(only_first, second)
    host.sh("systemctl kill -s KILL --kill-who=main second-docker")
    gone = host.wait_for(lambda: claims(bench(host))[second], 60, "its docker to end")
    assert "unknown" not in gone.values()


def test_a_second_docker_on_the_same_containerd(fresh_host: Callable[..., Host]) -> None:
    """Both have their containers in moby of one containerd: only both together can deny."""
    host = fresh_host("v2")
    second = host.sh(
        SECOND.replace("--containerd /run/second/containerd.sock", "--containerd /run/containerd/containerd.sock")
    )
    assert claims(bench(host))[second] == {
        DOCKER: "unknown",
        "docker at /run/second/docker.sock owner": "known",
        CONTAINERD: "known",
    }


OWN_CONTAINERD = """
docker rm -f $(docker ps -aq) >/dev/null
systemctl stop docker.socket docker containerd 2>/dev/null
rm -f /run/containerd/containerd.sock
mkdir -p /etc/systemd/system/docker.service.d
printf '[Service]\\nExecStart=\\nExecStart=/usr/sbin/dockerd -H fd://\\n' >/etc/systemd/system/docker.service.d/own.conf
systemctl mask -q containerd
systemctl daemon-reload
systemctl start docker.socket docker
run2 own
"""


def test_a_docker_that_runs_its_own_containerd(fresh_host: Callable[..., Host]) -> None:
    host = fresh_host("v2")
    container = host.sh(OWN_CONTAINERD)
    said = bench(host)
    address = "/var/run/docker/containerd/containerd.sock"
    assert said["proven"] == {"/run/docker.sock": [address, True]}
    assert claims(said)[container] == {DOCKER: "known", f"containerd {address} keeper": "known"}


IN_A_CONTAINER = """
docker run -d --name inner --network none -v /run/containerd:/run/containerd -v /tmp/dockerd:/dockerd bb:1 \
    /bin/busybox sh -c 'exec -a sleep /dockerd 9999'
"""


def test_a_dockerd_in_a_container_that_has_the_hosts_containerd(v2_host: Host) -> None:
    """A program that is called dockerd stands for it: it is never asked, only seen."""
    leaked = v2_host.sh("run2 leaked")
    v2_host.sh(f"leaked_shim {leaked}")
    assert claims(bench(v2_host))[leaked][DOCKER] == "unknown"
    v2_host.sh(f"cp /bin/busybox /tmp/dockerd; {IN_A_CONTAINER}")
    said = bench(v2_host)
    assert "unavailable" in claims(said)[leaked].values()
    assert "a dockerd in a container" in details(said, leaked)


REMAP = """
useradd -r dockremap
for file in /etc/subuid /etc/subgid; do grep -q dockremap $file || echo dockremap:200000:65536 >>$file; done
echo '{"live-restore": true, "userns-remap": "default"}' >/etc/docker/daemon.json
systemctl restart docker
img; run2 remapped
"""


@pytest.mark.slow
def test_user_namespaces_of_docker_26(fresh_host: Callable[..., Host]) -> None:
    """Its containers are in another namespace then, and /info doesn't name it before 27."""
    host = fresh_host("v2", suite="trixie")
    before = host.sh("run2 before")
    remapped = host.sh(REMAP)
    said = bench(host)
    (container,) = (c for c in said["containers"] if c["id"] == remapped)
    assert container["namespace"].startswith("moby-")
    assert claims(said)[remapped] == {DOCKER: "known", CONTAINERD: "known"}
    assert set(claims(said)[before].values()) == {"unavailable"}
    assert f"in namespace {container['namespace']}" in details(said, before)


CHURN = """
i=0
while [ ! -e /tmp/enough ]; do
    i=$((i + 1))
    docker run --rm --name "c$i" --network none bb:1 /bin/busybox true
    docker run -d --name "d$i" --network none bb:1 /bin/busybox sleep 99 >/dev/null
    docker restart -t 0 "d$i" >/dev/null
    docker stop -t 0 "d$i" >/dev/null
    docker start "d$i" >/dev/null
    docker rm -f "d$i" >/dev/null
done
echo $i
"""


def test_nothing_that_lives_is_denied_while_containers_come_and_go(v2_host: Host) -> None:
    script = f"set -eu; . {OPT}/tests/engine/orphans.sh\nrm -f /tmp/enough\n{CHURN}"
    argv = [str(ROOT / "tests/host/host"), "exec", v2_host.name, "bash", "-c", script]
    churn = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done = v2_host.run(*PYTHON, f"{OPT}/tests/engine/watch_claims.py", "15", "5")
    v2_host.sh("touch /tmp/enough")
    rounds, errors = churn.communicate(timeout=120)
    assert churn.returncode == 0, errors
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    print(answer, "in", rounds.strip(), "rounds")
    assert answer["denied"] == []
    assert answer["seen"] > 3
