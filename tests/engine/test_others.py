# SPDX-License-Identifier: Apache-2.0
"""Other engines on the same host: none of their healthy containers ever looks orphaned, with a policy that kills."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

from orphand.report.topics import Topic
from tests.engine.helpers import Watch, config, drop_in, lives, main_pid, scan, verdict
from tests.host.guest import Host

SECOND = "docker -H unix:///run/second/docker.sock"
PAIR = """
mkdir -p /run/second /var/lib/docker/second
cat >/run/second/config.toml <<END
version = 2
root = "/var/lib/containerd/second"
state = "/run/second/containerd"
[grpc]
address = "/run/second/containerd/containerd.sock"
END
systemctl is-active -q second-containerd || systemd-run --quiet --unit=second-containerd -p KillMode=process \
    containerd --config /run/second/config.toml
timeout 30 sh -c 'until [ -S /run/second/containerd/containerd.sock ]; do sleep 0.1; done'
systemctl is-active -q second-docker || systemd-run --quiet --unit=second-docker -p KillMode=process \
    dockerd --config-file /run/second/none.json --live-restore -H unix:///run/second/docker.sock \
    --containerd /run/second/containerd/containerd.sock \
    --data-root /var/lib/docker/second --exec-root /run/second/exec \
    --pidfile /run/second/pid --bridge none --iptables=false --storage-driver vfs
"""
UNPAIR = """
export DOCKER_HOST=unix:///run/second/docker.sock
for id in $(docker ps -aq); do docker rm -f $id; done
systemctl stop second-docker second-containerd; systemctl reset-failed 'second-*'
rm -rf /run/second /var/lib/docker/second /var/lib/containerd/second
"""


@contextlib.contextmanager
def second_pair(host: Host) -> Iterator[tuple[str, int]]:
    """A second containerd and a second dockerd on it, with one container: its id and its init's pid."""
    host.sh("echo '{}' >/run/none; mkdir -p /run/second; cp /run/none /run/second/none.json")
    host.sh(PAIR)
    try:
        host.wait_for(lambda: host.sh(f"{SECOND} info -f '{{{{.ID}}}}'", check=False), 60, "the second dockerd")
        container_id = host.sh(
            f"tar -C / -c -h bin/busybox | {SECOND} import - bb:1 >/dev/null;"
            f"{SECOND} run -d --name other --network none bb:1 /bin/busybox sleep 99999"
        )
        pid = int(host.sh(f"{SECOND} inspect -f '{{{{.State.Pid}}}}' other"))
        yield container_id, pid
    finally:
        host.sh(UNPAIR, check=False)


def test_a_second_docker_is_found_and_its_containers_are_managed(v2_host: Host) -> None:
    """And its orphan is found and ended at its own containerd, while the first pair's containers live."""
    with second_pair(v2_host) as (other, pid):
        first, watch = v2_host.sh("run2 first"), Watch(v2_host)
        v2_host.start_daemon(config())
        watch.waited(5)
        assert (verdict(v2_host, first), verdict(v2_host, other)) == ("managed", "managed")
        assert not watch.records(Topic.SUSPECTED)
        second = v2_host.sh(f"{SECOND} run -d --name victim --network none bb:1 /bin/busybox sleep 99999")
        v2_host.sh(
            "systemctl kill -s KILL --kill-who=main second-docker; wait_gone $(cat /run/second/pid);"
            f"rm -rf /var/lib/docker/second/containers/{second}; systemctl reset-failed second-docker || :; {PAIR}"
        )
        record = watch.wait(Topic.ENDED, second)
        assert record["ORPHAND_KIND"] == "engine-orphan"
        assert lives(v2_host, pid)
        assert (verdict(v2_host, first), verdict(v2_host, other)) == ("managed", "managed")
        assert v2_host.sh("ctr -a /run/second/containerd/containerd.sock -n moby tasks ls -q") == other


def test_a_second_docker_that_is_not_configured_is_undecided(v2_host: Host) -> None:
    with second_pair(v2_host) as (other, pid):
        first, watch = v2_host.sh("run2 first"), Watch(v2_host)
        engines = (
            "docker: {socket: 'unix:///run/docker.sock'}\ncontainerd: {address: /run/containerd/containerd.sock}\n"
        )
        v2_host.start_daemon(config(more=engines))
        v2_host.sh("systemctl restart containerd docker")
        watch.waited(8)
        seen = {c["container_id"]: c for c in watch.status()["containers"]}
        assert seen[other]["verdict"] == "undecided"
        assert "/run/second/containerd/containerd.sock" in seen[other]["reason"]
        assert first not in seen
        assert not watch.records(Topic.SUSPECTED)
        assert lives(v2_host, pid)


def test_a_second_docker_that_is_stopped_leaves_its_containers_undecided(v2_host: Host) -> None:
    """As k3s, rke2 or a snap's Docker may be, on purpose. And if its shims go too, nothing is ended."""
    with second_pair(v2_host) as (other, pid):
        watch = Watch(v2_host)
        v2_host.start_daemon(config())
        v2_host.sh("systemctl kill -s KILL --kill-who=main second-docker second-containerd")
        v2_host.wait_for(lambda: verdict(v2_host, other) == "undecided", 60, "undecided")
        watch.waited(5)
        assert not watch.records(Topic.SUSPECTED)
        v2_host.sh(f"kill -KILL $(shim {other})")
        v2_host.wait_for(lambda: not scan(v2_host)[other][0]["shim"], 60, "the container without its shim")
        watch.waited(5)
        (form,) = scan(v2_host)[other]
        assert form["verdict"] == "undecided" or form["veto"], form
        assert not watch.records(Topic.ENDING)
        assert lives(v2_host, pid)
        v2_host.sh(f"kill -KILL {pid}")


PLUGIN = {
    "description": "does nothing",
    "entrypoint": ["/usr/bin/python3", "/serve.py"],
    "interface": {"types": ["test.idle/1.0"], "socket": "idle.sock"},
    "network": {"type": "none"},
    "workdir": "/",
    "env": [],
    "args": {},
    "linux": {"capabilities": [], "allowAllDevices": False, "devices": []},
    "mounts": [{"source": "/usr", "destination": "/usr", "type": "bind", "options": ["rbind", "ro"]}],
}
SERVE = """
import socket, time
server = socket.socket(socket.AF_UNIX)
server.bind("/run/docker/plugins/idle.sock")
server.listen()
time.sleep(1e6)
"""


def test_a_docker_plugin_is_managed(v2_host: Host) -> None:
    v2_host.write("/root/plugin/config.json", json.dumps(PLUGIN))
    v2_host.write("/root/plugin/rootfs/serve.py", SERVE)
    v2_host.sh(
        "cd /root/plugin/rootfs; mkdir -p usr run/docker/plugins proc sys dev tmp etc;"
        "for n in bin sbin lib lib64; do ln -sf usr/$n $n; done; docker plugin create idle:1 /root/plugin >/dev/null"
    )
    watch = Watch(v2_host)
    v2_host.start_daemon(config())
    try:
        v2_host.sh("docker plugin enable idle:1")
        plugin = v2_host.sh("docker plugin inspect -f '{{.Id}}' idle:1")
        watch.waited(5)
        (form,) = scan(v2_host)[plugin]
        assert (form["namespace"], form["verdict"]) == ("plugins.moby", "managed"), form
        v2_host.sh("systemctl restart docker")  # plugins are not live-restored: it is another process then
        watch.waited(5)
        assert verdict(v2_host, plugin) == "managed"
        assert not watch.records(Topic.ENDING)
    finally:
        v2_host.sh("docker plugin rm -f idle:1; rm -rf /root/plugin", check=False)


def test_a_docker_that_is_stopped_behind_its_socket_is_not_woken(v2_host: Host) -> None:
    container_id = v2_host.sh("run2 one")
    pid, watch = int(v2_host.sh(f"init {container_id}")), Watch(v2_host)
    v2_host.start_daemon(config())
    v2_host.sh("systemctl stop docker.service; systemctl is-active docker.socket")
    v2_host.sh("systemctl reload orphand; systemctl kill -s USR1 orphand")
    watch.waited(5)
    (form,) = scan(v2_host)[container_id]
    assert form["verdict"] == "undecided"
    assert "would wake it" in form["reason"]
    v2_host.orphand("explain", container_id)
    v2_host.orphand("status")
    assert v2_host.orphand("reap", container_id, "--yes").returncode == 3
    v2_host.sh("systemctl restart orphand")
    watch.waited(3)
    assert v2_host.sh("systemctl is-active docker.service || :") == "inactive"
    assert main_pid(v2_host, "docker") == 0
    assert lives(v2_host, pid)
    v2_host.sh("systemctl reset-failed docker || :; systemctl start docker")
    assert not watch.records(Topic.SUSPECTED)


# between the look that finds dockerd and the first connection docker-py is imported, which takes a slow disk so long
SLOW_IMPORT = """
import importlib, sys, time
if "daemon" in sys.argv or "daemon" in getattr(sys, "orig_argv", ()):
    from orphand.authorities import docker_api
    import_module = docker_api.importlib.import_module
    def slow_import(name, *more):
        if name == "docker.transport.unixconn":
            open("/run/importing", "w").close()
            time.sleep(4)
        return import_module(name, *more)
    docker_api.importlib.import_module = slow_import
"""


def test_a_docker_that_dies_while_orphand_prepares_to_ask_is_not_woken(v2_host: Host) -> None:
    watch = Watch(v2_host)
    v2_host.sh("run2 one")
    v2_host.start_daemon(config())
    try:
        with drop_in(v2_host, hook=SLOW_IMPORT):
            v2_host.sh(
                "systemctl restart --no-block orphand; timeout 60 sh -c 'until [ -e /run/importing ]; do :; done'"
            )
            v2_host.sh("crash docker containerd")
            watch.waited(6)
            assert v2_host.sh("systemctl is-active docker.socket") == "active"
            assert v2_host.sh("systemctl is-active docker containerd || :").split() == ["failed", "failed"]
            assert main_pid(v2_host, "docker") == 0
    finally:
        v2_host.sh("back")


# ctr's default of 1024 cpu shares fails where the controller isn't there (nspawn); 1.4's ctr has no such option
RUN = """
cpu=; ! ctr run --help | grep -q -- --cpu-shares || cpu="--cpu-shares 0"
docker save bb:1 | ctr -n {namespace} images import - >/dev/null
ctr -n {namespace} run -d $cpu docker.io/library/bb:1 {name} /bin/busybox sleep 99999
"""


def test_containers_of_ctr_in_any_namespace(v2_host: Host) -> None:
    """They are containerd's own: managed; their orphans are ended, but in k8s.io, where the kubelet isn't asked."""
    names = {"default": ("kept-d", "lost-d"), "example": ("kept-e", "lost-e"), "k8s.io": ("kept-k", "lost-k")}
    for namespace, ids in names.items():
        for container_id in ids:
            v2_host.sh(RUN.format(namespace=namespace, name=container_id))
    listed = "for n in default example k8s.io; do ctr -n $n tasks ls | awk 'NR > 1 {print $1, $2}'; done"
    pids = {line.split()[0]: int(line.split()[1]) for line in v2_host.sh(listed).splitlines()}
    watch = Watch(v2_host)
    v2_host.start_daemon(config())
    watch.waited(4)
    assert {i: verdict(v2_host, i) for i in pids} == dict.fromkeys(pids, "managed")
    tasks = "${MOBY_V2%/moby}"
    # the rootfs, a mount, stays: it is in use
    lose = "; ".join(f"rm -rf {tasks}/{n}/{ids[1]} 2>/dev/null || :" for n, ids in names.items())
    forget = "; ".join(f"ctr -n {n} containers rm {ids[1]}" for n, ids in names.items())
    v2_host.sh(f"crash docker containerd; {lose}; back; {forget}")
    for container_id in ("lost-d", "lost-e"):
        assert watch.wait(Topic.ENDED, container_id)["ORPHAND_KIND"] == "leaked-shim"
    told = watch.wait(Topic.ORPHANED, "lost-k")
    assert "kubelet" in told["MESSAGE"]
    watch.waited(4)
    assert not watch.records(Topic.ENDING, "lost-k")
    assert lives(v2_host, *(pids[i] for i in ("kept-d", "kept-e", "kept-k", "lost-k")))
    assert not lives(v2_host, pids["lost-d"])
    v2_host.sh(
        f"kill -KILL {pids['lost-k']} $(pgrep -f 'containerd-shim.*-id lost-k');"
        "for n in default example; do ctr -n $n tasks rm -f kept-${n:0:1}; ctr -n $n containers rm kept-${n:0:1}; done",
        check=False,
    )
