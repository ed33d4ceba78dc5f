# SPDX-License-Identifier: Apache-2.0
"""What others write is data: forged shims, forged lines, forged files and names spare nobody and kill nobody."""

from __future__ import annotations

import json
from collections.abc import Callable

from orphand.report.topics import Topic
from tests.engine.helpers import PRIVILEGED, Watch, config, hostile, lives, scan, uptime, usr_image
from tests.host.guest import Host

SHIM = "/usr/bin/containerd-shim-runc-v2"
ADDRESS = "/run/containerd/containerd.sock"
FAKE = "/opt/orphand/tests/engine/fake_shim.py"
UNKNOWN = "e" * 64
COPY = "/home/mallory/containerd-shim-runc-v2"  # a program of the user's own under a shim's name
USER = "setpriv --reuid=1234 --regid=1234 --clear-groups"


# starts the real shim as containerd does: it listens on descriptor 3, and its working directory has a fifo "log"
REAL = f"""
import os, socket
server = socket.socket(socket.AF_UNIX)
server.bind("/home/mallory/s")
server.listen()
os.dup2(server.fileno(), 3)
os.set_inheritable(3, True)
os.chdir("/home/mallory")
os.mkfifo("log")
os.set_inheritable(os.open("log", os.O_RDWR), True)
print(os.getpid(), flush=True)
argv = ["{SHIM}", "-namespace", "moby", "-id", "{UNKNOWN}", "-address", "{ADDRESS}"]
os.execve("{SHIM}", argv, {{"TTRPC_ADDRESS": "{ADDRESS}.ttrpc"}})
"""


def start(host: Host, name: str, command: str) -> int:
    """Run a fake as a unit of its own, a child of PID 1 as a real shim is; the pid that it prints."""
    host.sh(f"systemd-run --quiet --collect --unit={name} -p StandardOutput=file:/run/{name}.pid {command}")
    pid = host.wait_for(lambda: host.sh(f"head -1 /run/{name}.pid", check=False), 30, f"{name} to have its name")
    return int(pid)


def forged(container_id: str, exe: str = "/usr/bin/python3", address: str = ADDRESS) -> str:
    return f"{exe} {FAKE} {SHIM} -namespace moby -id {container_id} -address {address}"


def stop(host: Host) -> None:
    host.sh("systemctl kill -s KILL 'fake-*' || :; systemctl stop 'fake-*' || :; rm -rf /run/fake-* /home/mallory")


def forge(host: Host, managed: str, orphan: str, ways: dict[str, tuple[str, str]]) -> list[int]:
    """Fake shims with a managed, an unknown and an orphan's id, in each way (what runs it, executable): their pids."""
    host.sh(f"mkdir -p /home/mallory; cp $(readlink -f /usr/bin/python3) {COPY}; chown -R 1234 /home/mallory")
    ids = {"managed": managed, "unknown": UNKNOWN, "orphan": orphan}
    return [
        start(host, f"fake-{way}-{name}", f"{run} {forged(container_id, exe)}")
        for name, container_id in ids.items()
        for way, (run, exe) in ways.items()
    ]


def only_the_orphan_ends(host: Host, orphan: str, fakes: list[int]) -> None:
    """Make it one: it is ended, nobody else is suspected, and the fakes live."""
    watch = Watch(host)
    host.start_daemon(config())
    host.sh(f"leaked_shim {orphan}")
    watch.wait(Topic.ENDED, orphan)
    watch.waited(5)
    assert lives(host, *fakes)
    assert {r["ORPHAND_CONTAINER_ID"] for r in watch.records(Topic.SUSPECTED)} == {orphan}


def test_forged_shims_neither_die_nor_save_nor_accuse(v2_host: Host) -> None:
    """A user's: another program, a copy of his own, and the real shim; with managed, unknown and orphaned ids."""
    managed, orphan = (v2_host.sh(f"run2 {name}") for name in ("managed", "orphan"))
    ways = {"user": (USER, "/usr/bin/python3"), "copy": (USER, COPY), "root": ("", COPY)}
    fakes = forge(v2_host, managed, orphan, ways)
    v2_host.write("/home/mallory/real.py", REAL)
    real = start(v2_host, "fake-real", f"{USER} /usr/bin/python3 /home/mallory/real.py")
    v2_host.wait_for(lambda: v2_host.sh(f"readlink /proc/{real}/exe", check=False) == SHIM, 30, "a user's real shim")
    try:
        only_the_orphan_ends(v2_host, orphan, [real, *fakes])
        assert v2_host.sh(f"docker inspect -f '{{{{.State.Status}}}}' {managed}") == "running"
        found = scan(v2_host)
        assert [f["verdict"] for f in found[managed]] == ["managed"]
        assert UNKNOWN not in found
        assert orphan not in found
    finally:
        stop(v2_host)


def test_forged_shims_in_a_users_own_namespaces(v2_host: Host) -> None:
    """Where he is root, as in a rootless engine: shown as another's, and nobody's fate changes by it."""
    managed, orphan = (v2_host.sh(f"run2 {name}") for name in ("managed", "orphan"))
    fakes = forge(v2_host, managed, orphan, {"rootless": (f"{USER} unshare --user --map-root-user", COPY)})
    try:
        only_the_orphan_ends(v2_host, orphan, fakes)
        assert v2_host.sh(f"docker inspect -f '{{{{.State.Status}}}}' {managed}") == "running"
        found = scan(v2_host)
        assert sorted(f["verdict"] for f in found[managed]) == ["foreign", "managed"]
        assert [f["verdict"] for f in (*found[UNKNOWN], *found[orphan])] == ["foreign", "foreign"]
        assert "uid 1234: rootless" in found[UNKNOWN][0]["reason"]
    finally:
        stop(v2_host)


def test_forged_shims_of_root_in_a_privileged_container(v2_host: Host) -> None:
    """In the host's pid and cgroup namespaces, moved to containerd's own cgroup: still in another mount namespace."""
    usr_image(v2_host)
    managed, orphan = (v2_host.sh(f"run2 {name}") for name in ("managed", "orphan"))
    copy = "cp $(readlink -f /usr/bin/python3) /tmp/containerd-shim-runc-v2"
    for number, container_id in enumerate((managed, UNKNOWN, orphan)):
        for away, move in enumerate(("", "echo $$ >/sys/fs/cgroup/system.slice/containerd.service/cgroup.procs;")):
            v2_host.sh(
                f"docker run -d --name evil{number}{away} --network none {PRIVILEGED} --pid host --cgroupns host"
                " -v /usr:/usr:ro -v /opt:/opt:ro -v /sys/fs/cgroup:/sys/fs/cgroup usr:1"
                f" sh -c '{copy}; {move} cd /; {forged(container_id, '/tmp/containerd-shim-runc-v2')} & wait'"
            )
    pids = v2_host.wait_for(
        lambda: [int(p) for p in v2_host.sh("docker logs evil01; docker logs evil21", check=False).split()],
        30,
        "the fakes",
    )
    only_the_orphan_ends(v2_host, orphan, pids)
    assert v2_host.sh("docker ps -q -f name=evil | wc -l") == "6"
    found = scan(v2_host)
    assert sorted(f["verdict"] for f in found[managed]) == ["foreign", "foreign", "managed"]
    assert {f["verdict"] for f in found[UNKNOWN]} == {"foreign"}
    assert "inside container" in found[UNKNOWN][0]["reason"] + found[UNKNOWN][1]["reason"]
    assert "mount namespace" in found[UNKNOWN][0]["reason"] + found[UNKNOWN][1]["reason"]


def test_a_forged_address_is_not_asked(v2_host: Host) -> None:
    """A socket that a user serves, named by his own shim and by root's: he gets no connection, and gives no no."""
    spy = (
        "import os, socket; s = socket.socket(socket.AF_UNIX); s.bind('/run/fake-spy/s'); s.listen();"
        "print(os.getpid(), flush=True); s.accept(); open('/run/fake-spy/caught', 'w')"
    )
    v2_host.sh("mkdir -p /run/fake-spy; chown 1234 /run/fake-spy")
    try:
        start(v2_host, "fake-spy", f'{USER} /usr/bin/python3 -c "{spy}"')
        user = start(v2_host, "fake-user", f"{USER} {forged(UNKNOWN, address='/run/fake-spy/s')}")
        v2_host.sh("mkdir -p /run/fake-bin; cp $(readlink -f /usr/bin/python3) /run/fake-bin/containerd-shim-runc-v2")
        exe = "/run/fake-bin/containerd-shim-runc-v2"
        root = start(v2_host, "fake-root", forged("f" * 64, exe, "/run/fake-spy/s"))
        watch = Watch(v2_host)
        v2_host.start_daemon(config())
        watch.waited(5)
        (form,) = scan(v2_host)["f" * 64]
        assert form["verdict"] == "undecided", form
        assert "/run/fake-spy/s" in form["reason"]
        assert UNKNOWN not in scan(v2_host)
        assert lives(v2_host, user, root)
        assert v2_host.sh("test -e /run/fake-spy/caught || echo quiet") == "quiet"
        assert not watch.records(Topic.SUSPECTED)
    finally:
        stop(v2_host)


def test_a_flood_of_forged_lines_costs_few_looks(fresh_host: Callable[..., Host]) -> None:
    host = fresh_host("v2")
    host.write(
        "/etc/systemd/journald.conf.d/flood.conf",
        "[Journal]\nRateLimitIntervalSec=0\nStorage=volatile\nRuntimeMaxUse=64M\n",
    )
    host.sh("systemctl restart systemd-journald")
    watch = Watch(host)
    host.start_daemon(config(scan="interval: 1h, settle: 1s"))
    pid = host.sh("systemctl show -p MainPID --value orphand")
    ticks = f"sed 's/.*) //' /proc/{pid}/stat | awk '{{print $12 + $13}}'"
    line = f'level=warning msg="unknown container" container={UNKNOWN} module=libcontainerd namespace=moby'
    busy, began = int(host.sh(ticks)), uptime(host)
    seen = host.sh(
        f"yes '{line}' | timeout 6 systemd-cat -t dockerd & yes '{line}' | timeout 6 systemd-cat -t docker.service &"
        "for i in $(seq 80); do grep -o '\"looked_at\": [0-9.]*' /run/orphand/status.json || :; sleep 0.1; done;"
        "wait || :"
    )
    busy, took = int(host.sh(ticks)) - busy, uptime(host) - began
    looks = len(set(seen.splitlines()))
    lines = int(host.sh("journalctl -q -t dockerd -o cat | wc -l"))
    print(
        f"flood: at least {lines} forged lines kept of {took:.0f} s; {looks} looks; "
        f"orphand's CPU {busy / 100:.2f} s, {busy / took:.1f} % of one core"
    )
    assert lines > 1000
    assert 1 <= looks <= took + 4  # at most one a second and two at once (triggers/pace.py)
    assert not watch.records(Topic.SUSPECTED)
    assert lives(host, int(pid))


def test_links_in_a_bundle_and_a_record_of_somebody_elses_pid(v2_host: Host) -> None:
    """By hand, without the unit's sandbox, which would forbid most of it anyway."""
    orphan, other = v2_host.sh("run2 orphan"), v2_host.sh("run2 other")
    work = "/var/lib/containerd/io.containerd.runtime.v2.task/moby"
    other_pid = int(v2_host.sh(f"init {other}"))
    v2_host.sh(
        f"leaked_shim {orphan}; rm -rf /root/precious; mkdir -p /root/precious/sub; echo x >/root/precious/sub/file;"
        f'echo \'{{"process": {{"args": ["stolen"]}}}}\' >/root/precious/config.json;'
        f"b=$MOBY_V2/{orphan}; mkdir -p $b; ln -s / $b/rootfs; ln -s /root/precious $b/work;"
        "ln -s /root/precious/config.json $b/config.json; ln -s /root/precious/sub/file $b/init.pid;"
        f"s=$RUNC_STATE/{orphan}/state.json; cp $RUNC_STATE/{other}/state.json $s; sed -i 's/{other}/{orphan}/g' $s;"
        f"mkdir -p {work}; ln -sfn /root/precious {work}/{orphan}"
    )
    (form,) = scan(v2_host)[orphan]
    assert other_pid not in [init["process"]["pid"] for init in form["inits"]]
    assert "stolen" not in json.dumps(form)
    v2_host.orphand("reap", orphan, "--yes")
    watch = Watch(v2_host)
    v2_host.start_daemon(config())
    watch.waited(6)
    assert lives(v2_host, other_pid)
    assert v2_host.sh("find /root/precious | sort | tr '\\n' ' '") == (
        "/root/precious /root/precious/config.json /root/precious/sub /root/precious/sub/file"
    )
    assert v2_host.sh("test -x /bin/busybox && echo there") == "there"
    v2_host.sh(f"rm -rf /root/precious $MOBY_V2/{orphan}; rm -f {work}/{orphan}")


NASTY = 'evil\\x1b]0;owned\\x07\\x1b[2J\\n{\\"MESSAGE\\": \\"forged\\"}\\r\\x9b31m\\u202eMESSAGE=forged\\nPRIORITY=0'


def test_control_characters_stay_within_one_record(v2_host: Host) -> None:
    """In arguments, labels, environment and pod annotations, of a container of Docker's and of one of ctr's."""
    v2_host.sh(
        f'nasty=$\'{NASTY}\'; docker run -d --name nasty --network none --label "l=$nasty" -e "A=$nasty"'
        ' bb:1 /bin/busybox sh -c "sleep 99999 # $nasty" "$nasty"'
    )
    docker_id = v2_host.sh("docker inspect -f '{{.Id}}' nasty")
    v2_host.sh(
        f"nasty=$'{NASTY}'; docker save bb:1 | ctr images import - >/dev/null;"
        'ctr run -d --cpu-shares 0 --annotation "io.kubernetes.cri.container-name=$nasty"'
        ' --annotation "io.kubernetes.cri.sandbox-name=$nasty"'
        ' --annotation "io.kubernetes.cri.sandbox-namespace=$nasty"'
        ' docker.io/library/bb:1 nasty-ctr /bin/busybox sh -c "sleep 99999 # $nasty"'
    )
    watch = Watch(v2_host)
    v2_host.start_daemon(config("log"))
    v2_host.sh(
        f"engine_orphan {docker_id}; crash docker containerd; b=${{MOBY_V2%/moby}}/default/nasty-ctr;"
        "mv $b /run/nasty-bundle; back; ctr containers rm nasty-ctr; mkdir -p $b; cp /run/nasty-bundle/config.json $b/"
    )
    for container_id in (docker_id, "nasty-ctr"):
        watch.wait(Topic.ORPHANED, container_id)
    for record in v2_host.journal():
        ours = {k: v for k, v in record.items() if k.startswith(("MESSAGE", "ORPHAND_"))}
        assert not [v for v in ours.values() if not isinstance(v, str) or hostile(v) or "\n" in v or "\u202e" in v], (
            ours
        )
        assert not record["MESSAGE"].startswith("forged")
    assert len(watch.records(Topic.ORPHANED)) == 2
    commands = ("scan", "status", "history", f"explain {docker_id}", "explain nasty-ctr")
    for command in commands:
        done = v2_host.orphand(*command.split())
        assert done.returncode in (0, 1), done.stderr
        assert not hostile(done.stdout + done.stderr), (command, hostile(done.stdout + done.stderr))
        assert "\u202e" not in done.stdout
        text = v2_host.orphand(*command.split(), "--json").stdout
        for line in text.splitlines() if command == "history" else [text]:
            json.loads(line)
    assert "nasty" in v2_host.orphand("scan").stdout
    for container_id in (docker_id, "nasty-ctr"):
        assert "sleep 99999" in v2_host.orphand("explain", container_id).stdout, "the identity was not even read"
    v2_host.orphand("reap", "nasty-ctr", "--yes")
    v2_host.sh("rm -rf /run/nasty-bundle; ctr tasks rm -f nasty-ctr; ctr containers rm nasty-ctr", check=False)
