# SPDX-License-Identifier: Apache-2.0
"""What a look finds on hosts with real engines, in health and after every mishap."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Optional

import pytest

from tests.host.guest import Host, tree

LOOK = """
import json, sys
sys.path.insert(0, "/opt/orphand")
from dataclasses import asdict
from orphand.identity import identify
from orphand.sightings import Looker
looker = Looker()
full = looker.look(full=True)
cheap = looker.look()
again = [looker.again(s) for s in full]
print(json.dumps([
    {**asdict(s), "warm": s.key in {c.key for c in cheap}, "cold": s.key in {c.key for c in Looker().look()},
     "again": bool(a), "identity": asdict(identify(s, ["/var/lib/docker"]))}
    for s, a in zip(full, again)
]))
"""


def look(host: Host) -> dict[str, dict[str, Any]]:
    done = host.run("python3", "-c", LOOK)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    by_id = {s["container_id"]: s for s in found}
    assert len(by_id) == len(found)
    assert all(s["warm"] for s in found)
    return by_id


def one(host: Host, container_id: str) -> dict[str, Any]:
    """That sighting, which the cheap look of a new Looker and a second reading must find too."""
    found = look(host)[container_id]
    assert found["cold"]
    assert found["again"]
    return found


def pids(sighting: dict[str, Any]) -> tuple[Optional[int], list[int]]:
    shim = sighting["shim"]
    return shim["process"]["pid"] if shim else None, [i["process"]["pid"] for i in sighting["inits"]]


def init_of(host: Host, container_id: str) -> int:
    return int(host.sh(f"docker inspect -f '{{{{.State.Pid}}}}' {container_id}"))


FORMS = {
    "plain": "",
    "tini": "--init",
    "host-pid": "--pid host",
    "host-everything": "--pid host --uts host --ipc host --cgroupns host",
    "host-cgroup": "--cgroupns host",
    "parent": "--cgroup-parent orphandtest.slice",
    "capable": "--cap-add ALL --cap-drop SYS_RESOURCE --security-opt seccomp=unconfined",
    "user": "--user 1234:1234",
    "restart": "--restart always",
    "read-only": "--read-only",
}


# Docker refuses the v1 runtime on cgroup v2
HOSTS_AND_SHIMS = pytest.mark.parametrize(("host", "runner"), [("v1", "run1"), ("v1", "run2"), ("v2", "run2")])


def host_of(request: pytest.FixtureRequest, cgroup: str) -> Host:
    found: Host = request.getfixturevalue(f"{cgroup}_host")
    return found


@HOSTS_AND_SHIMS
def test_every_healthy_form_by_dockers_own_pid(request: pytest.FixtureRequest, host: str, runner: str) -> None:
    any_host = host_of(request, host)
    ids = {name: any_host.sh(f"{runner} {name} {options}") for name, options in FORMS.items()}
    found = look(any_host)
    for name, container_id in ids.items():
        sighting = found[container_id]
        assert pids(sighting)[1] == [init_of(any_host, container_id)], name
        assert sighting["shim"]["generation"] == ("v1" if runner == "run1" else "runc-v2")
        assert (sighting["foreign"], sighting["siblings"], sighting["again"], sighting["cold"]) == ("", [], True, True)
        assert sighting["metadata"].startswith("Docker's metadata of it is still there: /var/lib/docker"), name
        assert sighting["identity"]["name"] == name
        cgroup = any_host.sh(f"cat /proc/{pids(sighting)[1][0]}/cgroup")
        assert f":{sighting['inits'][0]['cgroup']}" in cgroup
    assert {s["namespace"] for s in found.values()} == {"moby"}


@pytest.mark.parametrize("options", ["", "--pid host"])
def test_execs_and_pauses_change_nothing(any_host: Host, options: str) -> None:
    container_id = any_host.sh(f"run2 victim {options}")
    before = one(any_host, container_id)
    any_host.sh("for i in 1 2 3; do docker exec -d victim /bin/busybox sleep 900; done")
    # a process that lost its parent: with the host's pid namespace it becomes a child of the shim
    any_host.sh("docker exec -d victim /bin/busybox sh -c '/bin/busybox sleep 901 & exec /bin/busybox true'")
    any_host.wait_for(lambda: any_host.run("pgrep", "-f", "sleep 901").stdout, 30, "the process left behind")
    any_host.sh("docker pause victim")
    after = one(any_host, container_id)
    any_host.sh("docker unpause victim")
    assert pids(after) == pids(before)
    assert after["veto"] == before["veto"]


def test_a_task_that_is_created_but_not_started(any_host: Host) -> None:
    any_host.sh("docker save bb:1 | ctr -n default images import - >/dev/null")
    any_host.sh("ctr -n default containers create docker.io/library/bb:1 waiting /bin/busybox sleep 9")
    # `ctr task start` attaches and starts at once; a runtime hook could not hold it for longer than this does
    any_host.sh("docker create --name created bb:1 /bin/busybox sleep 9 >/dev/null")
    assert "waiting" not in look(any_host)  # no task, no shim, no sighting


@HOSTS_AND_SHIMS
@pytest.mark.parametrize("options", ["", "--pid host --cgroupns host"])
def test_every_mishap(request: pytest.FixtureRequest, host: str, runner: str, options: str) -> None:
    any_host = host_of(request, host)
    kinds = ("leaked_shim", "childless_shim", "shimless", "engine_orphan")
    ids = {kind: any_host.sh(f"{runner} {kind} {options}") for kind in kinds}
    before = {kind: pids(one(any_host, container_id)) for kind, container_id in ids.items()}
    for kind, container_id in ids.items():
        any_host.sh(f"{kind} {container_id}")
    for kind, container_id in ids.items():
        sighting = one(any_host, container_id)
        shim, inits = before[kind]
        expected = {"childless_shim": (shim, []), "shimless": (None, inits)}.get(kind, (shim, inits))
        assert pids(sighting) == expected, kind
        assert (sighting["namespace"], sighting["address"]) == ("moby", "/run/containerd/containerd.sock"), kind
        assert (sighting["foreign"], sighting["veto"]) == ("", ""), kind
        assert sighting["identity"]["hostname"], kind


def test_a_pod_by_ctr(any_host: Host) -> None:
    any_host.sh("pod p1 app1 app2")
    found = look(any_host)
    assert {"p1", "app1", "app2"} <= set(found)
    assert len({pids(found[i])[0] for i in ("p1", "app1", "app2")}) == 1
    assert set(found["app1"]["siblings"]) == {"p1", "app2"}
    tasks = {row[0]: int(row[1]) for row in map(str.split, any_host.sh("ctr -n k8s.io tasks ls | sed 1d").splitlines())}
    assert {i: pids(found[i])[1] for i in tasks} == {i: [pid] for i, pid in tasks.items()}
    assert {found[i]["veto"] for i in tasks} == {""}
    any_host.sh(f"kill -KILL {tasks['app2']}")
    any_host.wait_for(lambda: "STOPPED" in any_host.sh("ctr -n k8s.io tasks ls"), 30, "app2 stopped")
    found = look(any_host)
    assert pids(found["app2"])[1] == []  # its bundle still names the shim's socket
    assert set(found["p1"]["siblings"]) == {"app1", "app2"}


def test_a_pod_shim_whose_own_bundle_is_gone(any_host: Host) -> None:
    bundle = "/run/containerd/io.containerd.runtime.v2.task/k8s.io/p1"
    any_host.sh(f"pod p1 app1; crash docker containerd; find {bundle} -maxdepth 1 -type f -delete")
    found = look(any_host)
    any_host.sh("back")
    assert set(found["p1"]["siblings"]) == {"app1"}
    assert len(pids(found["p1"])[1]) == 1


def test_processes_in_cgroups_below_the_containers_own(any_host: Host) -> None:
    """containerd#13784: then containerd itself takes the shim for a leaked one."""
    container_id = any_host.sh("run2 victim")
    before = one(any_host, container_id)
    (init,) = pids(before)[1]
    cgroup = before["inits"][0]["cgroup"]
    any_host.sh(
        f"""for d in $(find /sys/fs/cgroup -maxdepth 5 -type d -path '*{cgroup}'); do
            mkdir -p $d/init.scope/{"b" * 64}
            echo {init} > $d/init.scope/{"b" * 64}/cgroup.procs 2>/dev/null || : # a new cpuset takes none
        done"""
    )
    assert f"{cgroup}/init.scope" in any_host.sh(f"cat /proc/{init}/cgroup")
    after = one(any_host, container_id)
    assert after["inits"] == before["inits"]
    assert "b" * 64 not in look(any_host)


def test_two_shims_for_one_id_are_told_apart_by_the_live_socket(any_host: Host) -> None:
    """A second shim is started by hand, as containerd 1.4 did after a crash during create."""
    container_id = any_host.sh("run2 victim")
    shim = pids(one(any_host, container_id))[0]
    assert shim
    bundle = f"/run/containerd/io.containerd.runtime.v2.task/moby/{container_id}"
    any_host.sh(
        f"""
        cd {bundle}; cp address /root/address; mv "$(sed s,unix://,, address)" /root/old.sock
        TTRPC_ADDRESS=/run/containerd/containerd.sock.ttrpc containerd-shim-runc-v2 -namespace moby \\
            -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id {container_id} start
        """
    )
    found = json.loads(any_host.run("python3", "-c", LOOK).stdout)
    twins = {s["shim"]["process"]["pid"]: s["owns_socket"] for s in found if s["container_id"] == container_id}
    assert len(twins) == 2
    assert twins[shim] is False
    (second,) = set(twins) - {shim}
    assert twins[second] is True
    any_host.sh(f"kill -KILL {second}; mv /root/old.sock $(sed s,unix://,, /root/address); cp /root/address {bundle}/")


def test_docker_in_docker_is_foreign(any_host: Host) -> None:
    options = (
        "--cap-add ALL --cap-drop SYS_RESOURCE --security-opt seccomp=unconfined --security-opt apparmor=unconfined "
        "--security-opt systempaths=unconfined -v /usr:/usr:ro -v /lib:/lib:ro -v /lib64:/lib64:ro "
        "-v /sbin:/sbin:ro --tmpfs /run --tmpfs /tmp:exec --tmpfs /var/lib:exec"
    )
    outer = any_host.sh(f"run2 dind {options}")
    inside = "export PATH=/usr/sbin:/usr/bin:/sbin:/bin DOCKER_HOST=unix:///run/docker.sock;"
    any_host.sh(
        f"""docker exec -d dind /bin/busybox sh -c '{inside} mkdir -p /var; ln -s /run /var/run
        for c in /sys/fs/cgroup /sys/fs/cgroup/*; do mount -o remount,bind,rw $c || mount -o remount,rw $c; done
        exec dockerd --storage-driver vfs --iptables=false --bridge=none -H unix:///run/docker.sock >/tmp/log 2>&1'"""
    )

    def within(script: str) -> str:
        return any_host.sh(f"docker exec dind /bin/busybox sh -c '{inside} {script}'", check=False)

    any_host.wait_for(lambda: within("docker version >/dev/null 2>&1 && echo yes"), 60, "the inner dockerd")
    within("tar -C / -c bin/busybox | docker import - bb:1")
    inner = within("docker run -d --security-opt seccomp=unconfined --network none bb:1 /bin/busybox sleep 900")
    assert len(inner) == 64, within("tail -5 /tmp/log")
    found = look(any_host)
    assert found[outer]["foreign"] == ""
    assert f"inside container {outer[:12]}" in found[inner]["foreign"]
    assert found[inner]["address"] == ""
    shim = pids(found[inner])[0]
    any_host.sh(
        f"docker exec dind /bin/busybox sh -c 'pkill dockerd; pkill containerd'; kill -KILL {shim}", check=False
    )
    found = look(any_host)
    if inner in found:  # its containerd may have ended it
        assert f"inside container {outer[:12]}" in found[inner]["foreign"]


# --- other engines ------------------------------------------------------------------------------------

OTHERS = "podman,crun,systemd-container,lxc"
LXC = "lxc.rootfs.path = dir:/root/tree\nlxc.net.0.type = none\nlxc.apparmor.profile = unconfined\n"


@pytest.fixture(scope="module", params=["v1", "v2"])
def others(request: pytest.FixtureRequest) -> Iterator[Host]:
    """A host that has podman, LXC and nspawn beside Docker."""
    with Host("bookworm", cgroup=request.param, base=tree("bookworm", "bookworm-others", OTHERS)) as host:
        host.write(
            "/etc/containers/storage.conf", '[storage]\ndriver = "vfs"\nrunroot = "/run/c"\ngraphroot = "/root/c"\n'
        )
        host.sh(
            """mkdir -p /root/tree/{bin,proc,sys,dev,run,tmp,var,usr,etc}
            cp /bin/busybox /root/tree/bin/; ln -s busybox /root/tree/bin/sh; touch /root/tree/etc/os-release
            tar -C /root/tree -c . | podman import - bb >/dev/null 2>&1"""
        )
        yield host


@pytest.mark.parametrize("cgroups", ["systemd", "cgroupfs"])
def test_podman_is_foreign(others: Host, cgroups: str) -> None:
    # on cgroup v2 crun wants CAP_SYS_RESOURCE (for RLIMIT_MEMLOCK), which a test machine may lack
    runtime = "crun" if others.cgroup == "v1" else "runc"
    container_id = others.sh(
        f"podman --runtime {runtime} --cgroup-manager {cgroups} run -d --network none --pids-limit -1 --ulimit host"
        " --security-opt seccomp=unconfined bb /bin/busybox sleep 900"
    ).splitlines()[-1]
    found = look(others)[container_id]
    others.sh(f"podman rm -f -t 0 {container_id} >/dev/null")
    assert "podman" in found["foreign"]
    assert found["shim"] is None


def test_nspawn_is_foreign(others: Host) -> None:
    others.sh(
        "systemd-run -q --unit nspawn-test systemd-nspawn -q --register=no --keep-unit -D /root/tree "
        "--system-call-filter=@known /bin/busybox sleep 907"
    )
    others.wait_for(lambda: others.run("pgrep", "-fx", "/bin/busybox sleep 907").stdout, 30, "nspawn's payload")
    pid = int(others.sh("pgrep -fx '/bin/busybox sleep 907'"))
    named = [s for s in look(others).values() if pid in pids(s)[1]]
    others.sh("systemctl stop nspawn-test")
    # without a registration its cgroup names no container, so that it is none of our business at all
    assert all(s["foreign"] for s in named)


def test_lxc_is_foreign(others: Host) -> None:
    others.write("/root/lxc.conf", LXC)
    others.sh("lxc-execute -n web -f /root/lxc.conf -d -- /bin/busybox sleep 908")
    others.wait_for(lambda: others.run("pgrep", "-f", "busybox sleep 908").stdout, 30, "LXC's payload")
    found = look(others)
    others.sh("lxc-stop -k -n web", check=False)
    assert "LXC" in found["web"]["foreign"]


def test_services_with_namespaces_of_their_own_are_no_containers(others: Host) -> None:
    others.sh(
        "systemd-run -q --unit private -p PrivateTmp=yes -p PrivateUsers=yes -p ProtectSystem=strict sleep 909;"
        "systemd-run -q --unit unshared unshare --pid --fork --mount-proc sleep 910"
    )
    before = look(others)
    others.sh("systemctl kill -s KILL private unshared")
    assert not [s for s in before.values() if "sleep 9" in s["identity"]["command"]]


# --- spoofing ------------------------------------------------------------------------------------------

PRETEND = """
import sys, ctypes
ctypes.CDLL(None).prctl(15, b"containerd-shim", 0, 0, 0)
import time
time.sleep(600)
"""


def test_argv_of_a_shim_by_nobody_and_by_a_privileged_container(any_host: Host) -> None:
    known = any_host.sh("run2 victim")
    truth = look(any_host)
    any_host.write("/srv/pretend.py", PRETEND)
    argv = f"exec -a containerd-shim-runc-v2 python3 /srv/pretend.py -namespace moby -id {known} -address /run/x.sock"
    any_host.sh(f"systemd-run -q --unit forged -p User=nobody bash -c '{argv}'")
    any_host.sh(
        "cp /bin/busybox /tmp/containerd-shim-runc-v2; docker rm -f forger >/dev/null 2>&1 || :;"
        " docker run -d --name forger --pid host --cgroupns host --cap-add ALL --cap-drop SYS_RESOURCE"
        " -v /tmp/containerd-shim-runc-v2:/bin/containerd-shim-runc-v2:ro --network none bb:1 /bin/busybox sh -c"
        f" 'while :; do /bin/containerd-shim-runc-v2 sleep 60; done' -namespace moby -id {known}"
    )
    any_host.wait_for(lambda: any_host.run("pgrep", "-u", "nobody").stdout, 30, "the forged shim")
    found = look(any_host)
    any_host.sh("systemctl stop forged; docker rm -f forger >/dev/null")
    assert found[known]["inits"] == truth[known]["inits"]
    assert found[known]["shim"] == truth[known]["shim"]
    assert found[known]["veto"] == truth[known]["veto"]


def test_without_root_it_says_what_it_could_not_see(any_host: Host) -> None:
    container_id = any_host.sh("run2 victim")
    script = LOOK.replace("print(json", "print(json.dumps(looker.blind)); print(json")
    any_host.write("/tmp/look.py", script)
    done = any_host.run("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "python3", "/tmp/look.py")
    assert done.returncode == 0, done.stderr
    blind, found = map(json.loads, done.stdout.splitlines())
    assert any("root" in b for b in blind)
    sighting = next(s for s in found if s["container_id"] == container_id)
    assert sighting["veto"]


# --- the other suites -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["bullseye", "trixie", "sid"])
def test_other_versions_of_the_engines(fresh_host: Callable[..., Host], suite: str) -> None:
    host = fresh_host("v2", suite=suite)
    kinds = ("leaked_shim", "childless_shim", "shimless", "engine_orphan")
    ids = {kind: host.sh(f"run2 {kind}") for kind in kinds}
    before = {kind: pids(one(host, container_id)) for kind, container_id in ids.items()}
    if suite != "bullseye":  # its ctr can't annotate a container, which makes a pod
        host.sh("pod p1 app1")
        assert set(look(host)["p1"]["siblings"]) == {"app1"}
    for kind, container_id in ids.items():
        assert before[kind][1] == [init_of(host, container_id)]
        host.sh(f"{kind} {container_id}")
    for kind, container_id in ids.items():
        shim, inits = before[kind]
        sighting = one(host, container_id)
        assert pids(sighting) == {"childless_shim": (shim, []), "shimless": (None, inits)}.get(kind, (shim, inits))
        assert (sighting["foreign"], sighting["veto"]) == ("", "")
