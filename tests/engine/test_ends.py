# SPDX-License-Identifier: Apache-2.0
"""Every kind of orphan, of both shim generations, ended for real: nothing of it is left, and nobody else is touched.

The bystanders' pids are compared by the fixture after each test (conftest.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.host.guest import ENVIRONMENT, OPT, Host

NOTHING = "shims=0 processes=0 cgroups=0 bundles=0 runc-state=0 tasks=0 containers=0 docker=404"
KINDS = {
    "engine_orphan": "engine-orphan",
    "stopped_orphan": "engine-orphan",
    "leaked_shim": "leaked-shim",
    "childless_shim": "childless-shim",
    "shimless": "shimless",
}
TRAP = "/bin/busybox sh -c 'trap : TERM; while :; do sleep 1; done'"


def end_one(host: Host, container_id: str, *options: str, wrapper: Sequence[str] = ()) -> CompletedProcess[str]:
    environment = [f"{key}={value}" for key, value in ENVIRONMENT.items()]
    script = f"{OPT}/tests/engine/end_one.py"
    return host.run(*wrapper, "env", *environment, "/usr/bin/python3", script, container_id, *options, timeout=180)


def end(host: Host, container_id: str, *options: str, wrapper: Sequence[str] = ()) -> dict[str, Any]:
    done = end_one(host, container_id, *options, wrapper=wrapper)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert "cases" not in result, result
    return result


def left(host: Host, container_id: str) -> str:
    return host.sh(f"left {container_id}")


def run(host: Host, runner: str, name: str, command: str = "", options: str = "") -> str:
    """Start a container with a command of its own; its full id."""
    if not command:
        return host.sh(f"{runner} {name} {options}")
    runtime = "--runtime io.containerd.runtime.v1.linux" if runner == "run1" else ""
    return host.sh(f"docker run -d --name {name} --network none {runtime} {options} bb:1 {command} 2>/dev/null")


def assert_gone(host: Host, container_id: str, result: dict[str, Any], netns: int = 2) -> None:
    """`netns`: how many network namespaces of managed containers there are: two bystanders'."""
    assert result["refused"] == ""
    assert result["ended"] is True, result
    assert result["left"] == [], result
    assert result["remembered"] is False
    assert left(host, container_id) == NOTHING
    assert host.sh("grep -c '/run/docker/netns/.* nsfs ' /proc/1/mountinfo") == str(netns)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["v1_host/run1", "v1_host/run2", "v2_host/run2"])
def test_each_kind_ends_and_leaves_nothing(request: pytest.FixtureRequest, where: str, kind: str) -> None:
    fixture, runner = where.split("/")
    host: Host = request.getfixturevalue(fixture)
    victim = run(host, runner, "victim")
    host.sh(f"{kind} {victim}")
    result = end(host, victim)
    assert (result["verdict"], result["kind"], result["veto"]) == ("pending", KINDS[kind], ""), result["reason"]
    assert_gone(host, victim, result)


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["bullseye", "trixie", "sid"])
def test_each_kind_of_other_engine_versions(fresh_host: Callable[..., Host], suite: str) -> None:
    """Docker 20.10.5, 26.1 and 28.5; containerd 1.4, 1.7 and 2.1. Its TERM is ignored by bullseye's v2 shim."""
    host = fresh_host("v2", suite=suite)
    for kind in KINDS:
        victim = run(host, "run2", kind)
        host.sh(f"{kind} {victim}")
        result = end(host, victim)
        assert (result["verdict"], result["kind"], result["veto"]) == ("pending", KINDS[kind], ""), result["reason"]
        assert_gone(host, victim, result)


@pytest.mark.parametrize("kind", ["leaked_shim", "shimless"])
def test_cleanup_reaches_the_host_from_a_mount_namespace_of_its_own(any_host: Host, kind: str) -> None:
    """As a hardened unit has: a umount in there would change nothing outside."""
    victim = run(any_host, "run2", "victim")
    any_host.sh(f"{kind} {victim}; touch /run/docker/netns/lost")
    any_host.sh(f"nsenter -t 1 -m mount --bind /proc/$(init {victim})/ns/net /run/docker/netns/lost")
    result = end(any_host, victim, wrapper=("unshare", "--mount", "--propagation", "slave"))
    assert "removed network namespace /run/docker/netns/lost" in result["steps"]
    assert_gone(any_host, victim, result)


def test_a_managed_container_is_refused(any_host: Host) -> None:
    victim = run(any_host, "run2", "victim")
    pid = any_host.sh(f"init {victim}")
    result = end(any_host, victim)
    assert result["verdict"] == "managed"
    assert result["refused"].startswith("it is managed")
    assert not result["steps"]
    assert any_host.sh(f"init {victim}; test -d /proc/{pid} && echo lives") == f"{pid}lives"


@pytest.mark.parametrize("runner", ["run1", "run2"])
def test_a_handler_for_term_gets_its_time(v1_host: Host, runner: str) -> None:
    victim = run(v1_host, runner, "victim", "/bin/busybox sh -c 'trap \"exit 0\" TERM; while :; do sleep 0.1; done'")
    v1_host.sh(f"leaked_shim {victim}")
    result = end(v1_host, victim, "--term", "30")
    assert "its init has ended" in result["steps"]
    assert not [s for s in result["steps"] if "KILL" in s]
    assert_gone(v1_host, victim, result)


def test_an_init_that_ignores_term_is_killed(any_host: Host) -> None:
    victim = run(any_host, "run2", "victim", TRAP)
    any_host.sh(f"leaked_shim {victim}")
    result = end(any_host, victim, "--term", "2")
    assert [s for s in result["steps"] if s.startswith("KILL to all in its cgroup")]
    assert_gone(any_host, victim, result)


def test_a_paused_container_ends(any_host: Host) -> None:
    victim = run(any_host, "run2", "victim")
    any_host.sh(f"docker pause victim; leaked_shim {victim}")
    result = end(any_host, victim)
    assert [s for s in result["steps"] if s.startswith("thawed")]
    assert_gone(any_host, victim, result)


def test_a_paused_engine_orphan_ends(any_host: Host) -> None:
    victim = run(any_host, "run2", "victim")
    any_host.sh(f"docker pause victim; engine_orphan {victim}")
    assert_gone(any_host, victim, end(any_host, victim))


@pytest.mark.parametrize("kind", ["leaked_shim", "engine_orphan"])
def test_a_stopped_shim_ends(any_host: Host, kind: str) -> None:
    victim = run(any_host, "run2", "victim")
    any_host.sh(f"{kind} {victim}; kill -STOP $(shim {victim})")
    result = end(any_host, victim)
    if result["verdict"] == "undecided":  # containerd waits for the stopped shim: nobody can say that it is an orphan
        assert kind == "engine_orphan"
        assert result["refused"]
        return
    assert [s for s in result["all_steps"] if "CONT to" in s]
    assert_gone(any_host, victim, result)


@pytest.mark.parametrize("kernel", ["new", "before 5.14", "before 5.3"])
def test_a_fork_bomb_ends(any_host: Host, kernel: str) -> None:
    """In the host's pid namespace, so that the death of its init doesn't end it."""
    loops = " ".join(["(while :; do /bin/busybox sleep 0.01 & wait; done) &"] * 6)
    victim = run(any_host, "run2", "victim", f"/bin/busybox sh -c '{loops} wait'", "--pid host")
    any_host.sh(f"leaked_shim {victim}")
    options = {"new": [], "before 5.14": ["--no-cgroup-kill"], "before 5.3": ["--no-cgroup-kill", "--no-pidfd"]}
    assert_gone(any_host, victim, end(any_host, victim, *options[kernel]))


def test_a_fork_bomb_at_its_limit_ends(v1_host: Host) -> None:
    bomb = "/bin/busybox sh -c 'f() { f & f & /bin/busybox sleep 1; }; f & while :; do /bin/busybox sleep 1; done'"
    victim = run(v1_host, "run2", "victim", bomb, "--pid host --pids-limit 100")
    v1_host.sh(f"leaked_shim {victim}")
    assert_gone(v1_host, victim, end(v1_host, victim, "--no-cgroup-kill"))


SUBGROUPS = """
for d in $(find /sys/fs/cgroup -type d -name '*VICTIM*'); do
    case $d in */cpuset/*) continue;; esac  # whose new groups have no cpus
    mkdir -p $d/docker/HEX; for p in $(cat $d/cgroup.procs); do echo $p >$d/docker/HEX/cgroup.procs; done
done
""".replace("HEX", "c0" * 32)


@pytest.mark.parametrize("kind", ["leaked_shim", "shimless"])
def test_a_container_with_cgroups_of_its_own_ends(any_host: Host, kind: str) -> None:
    """All its processes are below its cgroup, in one that bears another id, as Docker in Docker has them.

    Made from outside: a privileged container, which would do it itself, can't be had in these hosts.
    """
    victim = run(any_host, "run2", "victim", TRAP)
    any_host.sh(SUBGROUPS.replace("VICTIM", victim))
    any_host.sh(f"{kind} {victim}")
    assert_gone(any_host, victim, end(any_host, victim, "--term", "1"))
    assert any_host.sh(f"find /sys/fs/cgroup -name '*{'c0' * 32}*'") == ""


def test_a_disowned_one_ends_and_docker_keeps_its_record(fresh_host: Callable[..., Host]) -> None:
    """containerd has lost its records and found its tasks again; Docker says exited. Only by a rule for it."""
    host = fresh_host()
    victim = run(host, "run2", "victim")
    host.sh("disowned")
    result = end(host, victim)
    assert (result["verdict"], result["kind"]) == ("pending", "disowned"), result["reason"]
    assert (result["refused"], result["ended"], result["left"]) == ("", True, []), result
    assert left(host, victim) == NOTHING.replace("docker=404", "docker=exited")


@pytest.mark.parametrize("cgroup", ["v1", "v2"])
def test_a_task_without_a_record_ends_by_signals(fresh_host: Callable[..., Host], cgroup: str) -> None:
    """containerd lists it, but can neither give nor kill it, since its record is lost; Docker's too."""
    host = fresh_host(cgroup)
    victim = run(host, "run2", "victim")
    host.sh(f"crash docker containerd; forget_all; forget_docker {victim}; back")
    assert "tasks=1 containers=0 docker=404" in left(host, victim)
    result = end(host, victim)
    assert result["kind"] == "engine-orphan", result["reason"]
    assert "containerd can be told nothing about it, since its record is lost: by signals" in result["steps"]
    assert (result["ended"], result["left"]) == (True, []), result
    assert left(host, victim) == NOTHING


@pytest.mark.parametrize("where", ["v1_host/run1", "v1_host/run2", "v2_host/run2"])
def test_a_task_whose_bundle_is_gone_ends_by_its_shim(request: pytest.FixtureRequest, where: str) -> None:
    """A cleaner of /run took the bundle of a running container: runc, and so containerd, can't delete it any more."""
    fixture, runner = where.split("/")
    host: Host = request.getfixturevalue(fixture)
    victim = run(host, runner, "victim")
    host.sh(f"engine_orphan {victim}; forget_bundle {victim}")
    init = host.sh(f"init {victim}")
    result = end(host, victim)
    assert result["kind"] == "engine-orphan", result["reason"]
    assert f"TERM to init {init}" in result["steps"]
    assert_gone(host, victim, result)


def test_its_network_namespace_goes(any_host: Host) -> None:
    """dockerd unmounts a lost sandbox when it starts; here it has not been started since."""
    victim = run(any_host, "run2", "victim")
    any_host.sh(f"leaked_shim {victim}; touch /run/docker/netns/lost")
    any_host.sh(f"nsenter -t 1 -m mount --bind /proc/$(init {victim})/ns/net /run/docker/netns/lost")
    result = end(any_host, victim)
    assert "removed network namespace /run/docker/netns/lost" in result["steps"]
    assert_gone(any_host, victim, result)
    assert any_host.sh("test -e /run/docker/netns/lost || echo gone") == "gone"


def test_without_cleanup_only_processes_end(any_host: Host) -> None:
    victim = run(any_host, "run2", "victim")
    any_host.sh(f"leaked_shim {victim}")
    result = end(any_host, victim, "--no-cleanup")
    assert result["ended"] is True
    assert result["left"] == []
    assert "runc-state=1" in left(any_host, victim)
    assert "shims=0 processes=0" in left(any_host, victim)


STEPS = [
    *(
        ("leaked_shim", step)
        for step in ("TERM to init", "KILL to all", "TERM to shim", "its shim has", "removed runc")
    ),
    *(
        ("engine_orphan", f"containerd: {step}")
        for step in ("TERM", "KILL", "deleted its task", "deleted its container")
    ),
    ("shimless", "no process of it is left"),
    ("childless_shim", "TERM to shim"),
]


@pytest.mark.parametrize(("kind", "step"), STEPS)
def test_what_sigkill_interrupts_the_next_run_finishes(any_host: Host, kind: str, step: str) -> None:
    victim = run(any_host, "run2", "victim")
    any_host.sh(f"{kind} {victim}")
    killed = end_one(any_host, victim, "--crash-at", step)
    assert (killed.returncode in (-9, 137), killed.stdout) == (True, ""), killed
    assert any_host.sh("test -e /run/end_one.json && echo remembered") == "remembered"
    assert_gone(any_host, victim, end(any_host, victim, "--resume"))


def test_what_somebody_knows_by_now_is_not_finished(any_host: Host) -> None:
    """After the crash the record still names its processes; but Docker knows them again."""
    victim = run(any_host, "run2", "victim", TRAP)
    pid = any_host.sh(f"init {victim}")
    any_host.sh(f"cp -a /var/lib/docker/containers/{victim} /root/kept; engine_orphan {victim}")
    assert end_one(any_host, victim, "--crash-at", "TERM to its task", "--term", "1").stdout == ""
    any_host.sh(f"crash docker; cp -a /root/kept /var/lib/docker/containers/{victim}; rm -r /root/kept; back")
    result = end(any_host, victim, "--resume")
    assert (result["refused"][:8], result["steps"], result["remembered"]) == ("known to", [], True)
    assert any_host.sh(f"test -d /proc/{pid} && docker inspect -f '{{{{.State.Pid}}}}' {victim}") == pid
    any_host.sh("rm /run/end_one.json")


def test_the_end_stops_when_somebody_knows_it_after_term(any_host: Host) -> None:
    victim = run(any_host, "run2", "victim", TRAP)
    any_host.sh(f"leaked_shim {victim}")
    pid = any_host.sh(f"init {victim}")
    result = end(any_host, victim, "--term", "1", "--known-at", "TERM to init")
    assert result["ended"] is False
    assert result["left"][0] == "stopped: the test knows it now"
    assert any_host.sh(f"test -d /proc/{pid} && echo lives") == "lives"
    assert "shims=1" in left(any_host, victim)


@pytest.mark.parametrize("kind", ["leaked_shim", "engine_orphan"])
@pytest.mark.parametrize("runner", ["run1", "run2"])
def test_an_orphan_with_another_container_in_its_cgroup_is_refused(v1_host: Host, runner: str, kind: str) -> None:
    """A managed container that was started with the orphan's cgroup as its parent: runc could kill it too."""
    victim = run(v1_host, runner, "victim", TRAP)
    guest = run(v1_host, "run2", "guest", "", f"--cgroup-parent /docker/{victim}")
    pid = v1_host.sh(f"init {guest}")
    v1_host.sh(f"{kind} {victim}")
    result = end(v1_host, victim, "--term", "1")
    assert f"container {guest[:12]} is below" in result["refused"]
    result = end(v1_host, victim, "--term", "1", "--overrule")
    assert result["refused"].startswith(f"process {pid} is in its cgroup, but not its own")
    assert v1_host.sh("docker inspect -f '{{.State.Pid}} {{.State.Running}}' guest") == f"{pid} true"
    v1_host.sh("docker rm -f guest >/dev/null")
    assert_gone(v1_host, victim, end(v1_host, victim, "--term", "1"))


@pytest.mark.parametrize("kind", ["leaked_shim", "shimless", "engine_orphan"])
def test_an_orphan_whose_death_would_kill_another_container_is_refused(any_host: Host, kind: str) -> None:
    """A managed container that was started with --pid container:VICTIM dies with the victim's init."""
    victim = run(any_host, "run2", "victim")
    guest = run(any_host, "run2", "guest", "", "--pid container:victim")
    pid = any_host.sh(f"init {guest}")
    any_host.sh(f"{kind} {victim}")
    result = end(any_host, victim)
    assert result["verdict"] == "pending"
    assert result["refused"] == f"container {guest[:12]} lives in its pid namespace and would die with it"
    result = end(any_host, victim, "--overrule")
    assert result["refused"] == f"process {pid}, which is not its own, lives in its pid namespace and would die with it"
    assert any_host.sh("docker inspect -f '{{.State.Pid}} {{.State.Running}}' guest") == f"{pid} true"
    any_host.sh("docker rm -f guest >/dev/null")
    assert_gone(any_host, victim, end(any_host, victim))


def test_a_container_whose_cgroup_is_below_a_removed_ones_is_not_that_one(v1_host: Host) -> None:
    """Nobody knows the parent any more, and its name is above the managed one's in every cgroup of its processes."""
    parent = run(v1_host, "run2", "parent")
    guest = run(v1_host, "run2", "guest", "", f"--cgroup-parent /docker/{parent}")
    pid = v1_host.sh(f"init {guest}")
    v1_host.sh("docker rm -f parent >/dev/null 2>&1", check=False)
    assert v1_host.sh(f"grep -c /docker/{parent}/{guest} /proc/{pid}/cgroup") != "0"
    seen = {c["container_id"]: c for c in json.loads(v1_host.orphand("scan", "--json").stdout)["containers"]}
    assert parent not in seen
    assert (seen[guest]["verdict"], seen[guest]["inits"][0]["process"]["pid"]) == ("managed", int(pid))


def test_a_guest_in_a_managed_containers_pid_namespace_ends_alone(any_host: Host) -> None:
    owner = run(any_host, "run2", "owner")
    victim = run(any_host, "run2", "victim", "", "--pid container:owner")
    pid = any_host.sh(f"init {owner}")
    any_host.sh(f"leaked_shim {victim}")
    assert_gone(any_host, victim, end(any_host, victim), netns=3)
    assert any_host.sh("docker inspect -f '{{.State.Pid}} {{.State.Running}}' owner") == f"{pid} true"


def pods(host: Host, script: str) -> str:
    """With orphans.sh's pod() for a namespace that is not the CRI's (bench.py vetoes every end in k8s.io)."""
    return host.sh(f'eval "$(declare -f pod | sed s/k8s.io/pods/g)"; {script}')


def forget_member(host: Host, name: str) -> None:
    """containerd loses one member of a pod: its bundle goes while containerd is down, its record afterwards."""
    bundle = f"/run/containerd/io.containerd.runtime.v2.task/pods/{name}"
    host.sh(f"crash containerd; rm -rf {bundle} 2>/dev/null || :; back; ctr -n pods containers rm {name}")


def sweep_pods(host: Host) -> None:
    host.sh(
        "for i in $(ctr -n pods tasks ls -q); do ctr -n pods tasks rm -f $i; done >/dev/null 2>&1;"
        "for i in $(ctr -n pods containers ls -q); do ctr -n pods containers rm $i; done",
        check=False,
    )


def test_a_member_of_a_pod_ends_alone(any_host: Host) -> None:
    """The shim that serves it serves others too, and gets no signal; they keep their pids."""
    pods(any_host, "pod pod1 app1 app2")
    try:
        before = any_host.sh("ctr -n pods tasks ls | grep -v app1 | awk '{print $1, $2}' | sort")
        assert "pod1" in before
        shim = any_host.sh("shims pod1")
        forget_member(any_host, "app1")
        result = end(any_host, "app1")
        assert (result["verdict"], result["kind"]) == ("pending", "leaked-shim"), result["reason"]
        assert sorted(result["siblings"]) == ["app2", "pod1"]
        assert result["ended"] is True, result
        assert result["left"] == []
        assert f"left shim {shim} alone: it serves others too" in result["steps"]
        assert [s for s in result["steps"] if s.startswith("removed mount") and s.endswith("app1/rootfs")]
        assert any_host.sh("ctr -n pods tasks ls | grep -v app1 | awk '{print $1, $2}' | sort") == before
        assert any_host.sh("shims pod1") == shim
        assert any_host.sh("find /sys/fs/cgroup /run/containerd/io* /var/lib/containerd/io* -name '*app1*'") == ""
        assert any_host.sh("grep -c app1 /proc/1/mountinfo || :") == "0"
    finally:
        sweep_pods(any_host)


def test_a_whole_lost_pod_ends_member_by_member(any_host: Host) -> None:
    """The sandbox goes first here, the worst order; the shim is ended when it has nobody left."""
    pods(any_host, "pod pod1 app1 app2")
    try:
        shim = any_host.sh("shims pod1")
        bundles = "/run/containerd/io.containerd.runtime.v2.task/pods"
        any_host.sh(f"crash containerd; rm -rf {bundles}/* 2>/dev/null || :; back")
        any_host.sh("ctr -n pods containers rm pod1 app1 app2")
        for name in ("pod1", "app1", "app2"):
            result = end(any_host, name)
            assert (result["ended"], result["left"]) == (True, []), result
        if any_host.sh("shims pod1"):
            result = end(any_host, "pod1")
            assert (result["kind"], result["ended"], result["left"]) == ("childless-shim", True, []), result
        assert any_host.sh(f"test -d /proc/{shim} || echo gone") == "gone"
        traces = "find /sys/fs/cgroup /run/containerd/io* /var/lib/containerd/io* -name '*pod1*' -o -name '*app[12]*'"
        assert any_host.sh(traces) == ""
        assert any_host.sh("grep -cE '/(pod1|app1|app2)/' /proc/1/mountinfo || :") == "0"
    finally:
        sweep_pods(any_host)


def test_the_only_living_member_is_not_the_whole_pod(any_host: Host) -> None:
    pods(any_host, "pod pod1 app1")
    try:
        result = end(any_host, "app1")
        assert (result["verdict"], result["steps"]) == ("managed", [])
    finally:
        sweep_pods(any_host)


DUPLICATE = """
run() { ctr -n pods run -d $shares "$@" docker.io/library/bb:1 dup /bin/busybox sleep 99999 </dev/null; }
shares=; ! ctr run --help | grep -q -- --cpu-shares || shares="--cpu-shares 0"
docker save bb:1 | ctr -n pods images import - >/dev/null
bundle=/run/containerd/io.containerd.runtime.v2.task/pods/dup
run
crash containerd; rm -rf $bundle 2>/dev/null || :; back; ctr -n pods containers rm dup
rm /run/containerd/s/$(printf /run/containerd/containerd.sock/pods/dup | sha256sum | cut -d' ' -f1)
umount $bundle/rootfs 2>/dev/null || :; rm -rf $bundle /run/containerd/runc/pods/dup
shims dup
run --cgroup /another/dup
ctr -n pods tasks ls | awk '$1 == "dup" {print $2}'
"""


def test_of_two_shims_for_one_id_the_forgotten_one_ends(any_host: Host) -> None:
    """Everything on disk is the new one's by now; only the old one's two processes may end.

    The look itself can't prove which process is the old one's init, and vetoes: overruled here.
    """
    try:
        old, pid = pods(any_host, DUPLICATE).split()
        result = end(any_host, "dup", "--shim", old)
        assert (result["kind"], result["refused"]) == ("duplicate-shim", result["veto"]), result["reason"]
        result = end(any_host, "dup", "--shim", old, "--overrule")
        assert (result["ended"], result["left"]) == (True, []), result
        assert any_host.sh("ctr -n pods tasks ls | awk '$1 == \"dup\" {print $2, $3}'") == f"{pid} RUNNING"
        assert any_host.sh(f"test -d /proc/{old} || echo gone") == "gone"
        assert any_host.sh("ctr -n pods tasks exec --exec-id e1 dup /bin/busybox echo hello </dev/null") == "hello"
        # A shim that is told to go takes its socket along, whose name is that of the new one's: containerd, started
        # anew, would find nobody there and kill the container
        any_host.sh("crash containerd; back")
        assert any_host.sh("ctr -n pods tasks ls | awk '$1 == \"dup\" {print $2, $3}'") == f"{pid} RUNNING"
    finally:
        sweep_pods(any_host)
