# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from orphand.bundles import MAX_FILE
from orphand.identity import command_line, identify, mask_arguments
from orphand.model import Identity, Sighting
from orphand.sightings import Looker
from tests.fakeproc import FakeNode

A = "a" * 64
BUNDLE = f"/run/containerd/io.containerd.runtime.v2.task/moby/{A}"
SPEC = {
    "hostname": "web-1",
    "process": {"args": ["nginx", "-g", "daemon off;"], "env": ["DB_PASSWORD=hunter2hunter2"]},
    "annotations": {
        "io.kubernetes.cri.container-name": "nginx",
        "io.kubernetes.cri.sandbox-name": "web-7d9f",
        "io.kubernetes.cri.sandbox-namespace": "shop",
        "io.kubernetes.cri.image-name": "registry.example/nginx:1",
    },
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/etc/hosts", "type": "bind", "source": "/var/lib/x/hosts"},
        {"destination": "/data", "type": "bind", "source": "/srv/data"},
    ],
}


@pytest.fixture
def node(tmp_path: Path) -> FakeNode:
    return FakeNode(tmp_path)


def who(node: FakeNode, *roots: str) -> Identity:
    (sighting,) = Looker(node.proc, node.disk).look()
    return identify(sighting, roots, node.proc, node.disk)


def with_shim(node: FakeNode, **init: Any) -> None:
    node.v2_shim(50, A)
    node.init(51, 50, A, **init)


def test_from_the_bundle(node: FakeNode) -> None:
    with_shim(node)
    node.write(f"{BUNDLE}/config.json", SPEC)
    found = who(node)
    assert (found.name, found.image) == ("nginx", "registry.example/nginx:1")
    assert (found.pod, found.pod_namespace, found.hostname) == ("web-7d9f", "shop", "web-1")
    assert found.command == "sleep 9999"  # what runs counts more than what was to run
    assert found.mounts == ("/data from /srv/data",)
    assert datetime.fromisoformat(found.started).tzinfo is not None
    assert "hunter2" not in repr(found)


def test_command_of_a_childless_shim_from_the_bundle(node: FakeNode) -> None:
    node.v2_shim(50, A)
    node.write(f"{BUNDLE}/config.json", SPEC)
    assert who(node).command == "nginx -g 'daemon off;'"


def test_from_what_docker_left(node: FakeNode) -> None:
    with_shim(node)
    node.write(
        f"/var/lib/docker/containers/{A}/config.v2.json",
        {
            "Name": "/shop_web_1",
            "Path": "nginx",
            "Config": {
                "Image": "nginx:1",
                "Hostname": "web",
                "Env": ["TOKEN=hunter2hunter2"],
                "Labels": {"io.kubernetes.pod.name": "p", "io.kubernetes.pod.namespace": "ns"},
            },
            "NetworkSettings": {"Ports": {"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8080"}], "443/tcp": None}},
        },
    )
    found = who(node, "/nowhere", "/var/lib/docker")
    assert (found.name, found.image, found.hostname) == ("shop_web_1", "nginx:1", "web")
    assert (found.pod, found.pod_namespace) == ("p", "ns")
    assert found.ports == ("0.0.0.0:8080->80/tcp",)
    assert "hunter2" not in repr(found)


def test_from_runcs_record_when_the_bundle_is_gone(node: FakeNode) -> None:
    node.init(51, 1, A)
    node.record(
        "/run/containerd/runc", "k8s.io", A, 51, hostname="h",
        labels=["bundle=/x", "io.kubernetes.cri.sandbox-name=p", "io.kubernetes.cri.sandbox-namespace=ns"],
        mounts=[{"source": "/srv", "destination": "/data"}],
    )  # fmt: skip
    found = who(node)
    assert (found.pod, found.pod_namespace, found.hostname) == ("p", "ns", "h")
    assert found.mounts == ("/data from /srv",)


def test_pod_uid_from_the_cgroup(node: FakeNode) -> None:
    uid = "0f8fad5b_d9cb_469f_a165_70867728950e"
    slice_ = f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{uid}.slice"
    node.init(51, 1, A, cgroup=f"{slice_}/cri-containerd-{A}.scope")
    assert who(node).pod == f"uid {uid.replace('_', '-')}"


def test_mounts_from_the_init_itself(node: FakeNode) -> None:
    node.init(51, 1, A)
    lines = [
        "1 0 0:1 / / rw - overlay overlay rw,lowerdir=/x",
        "2 1 0:2 / /proc rw - proc proc rw",
        "3 1 8:1 /srv/data /data rw,relatime shared:1 - ext4 /dev/sda1 rw",
        "4 1 0:3 / /dev/shm rw - tmpfs shm rw",
        "broken",
    ]
    (node.proc_root / "51" / "mountinfo").write_text("\n".join(lines))
    assert who(node).mounts == ("/data from /srv/data of /dev/sda1",)


def _truncated(bundle: Path) -> None:
    (bundle / "config.json").write_text(json.dumps(SPEC)[:-10])


def _huge(bundle: Path) -> None:
    with (bundle / "config.json").open("w") as file:
        json.dump(SPEC, file)
        file.truncate(MAX_FILE + 1)


def _symlink(bundle: Path) -> None:
    elsewhere = bundle.parent / "elsewhere"
    elsewhere.write_text(json.dumps(SPEC))
    (bundle / "config.json").symlink_to(elsewhere)


def _directory(bundle: Path) -> None:
    (bundle / "config.json").mkdir()


def _fifo(bundle: Path) -> None:
    os.mkfifo(bundle / "config.json")


def _somebodys(bundle: Path) -> None:
    (bundle / "config.json").write_text(json.dumps(SPEC))
    os.chown(bundle / "config.json", 1000, 1000)


def _binary(bundle: Path) -> None:
    (bundle / "config.json").write_bytes(b"\xff\x00" * 100)


def _deep(bundle: Path) -> None:
    (bundle / "config.json").write_text('{"a":' * 100_000)


def _list(bundle: Path) -> None:
    (bundle / "config.json").write_text("[1, 2]")


@pytest.mark.parametrize(
    "spoil",
    [_truncated, _huge, _symlink, _directory, _fifo, _somebodys, _binary, _deep, _list],
    ids=lambda f: f.__name__,
)
def test_a_bundle_that_is_not_to_be_trusted_tells_less(node: FakeNode, spoil: Any) -> None:
    with_shim(node)
    spoil(node.disk_root / BUNDLE.lstrip("/"))
    found = who(node)
    assert (found.name, found.image, found.hostname) == ("", "", "")
    assert found.command == "sleep 9999"


@pytest.mark.parametrize("wrong", [None, 7, [], {}, "x", [[]], {"a": {"b": []}}, True])
def test_values_of_any_type(node: FakeNode, wrong: Any) -> None:
    with_shim(node)
    node.write(f"{BUNDLE}/config.json", dict.fromkeys(SPEC, wrong) | {"mounts": [wrong]})
    node.write(
        f"/d/containers/{A}/config.v2.json",
        dict.fromkeys(("Name", "Path", "Args", "Config", "NetworkSettings"), wrong),
    )
    node.write(
        f"/e/containers/{A}/config.v2.json",
        {"Config": {"Image": wrong, "Labels": wrong}, "NetworkSettings": {"Ports": {"80/tcp": wrong}}},
    )
    node.record("/run/docker/runtime-runc", "moby", A, 51, labels=wrong, mounts=wrong, hostname=wrong)
    for root in ("/d", "/e"):
        assert isinstance(who(node, root), Identity)


def test_long_values_are_bounded(node: FakeNode) -> None:
    node.v2_shim(50, A)
    node.write(f"{BUNDLE}/config.json", {
        "hostname": "h" * 10_000,
        "process": {"args": ["x" * 5000] * 500},
        "mounts": [{"source": f"/s{i}", "destination": f"/d{i}" * 500} for i in range(500)],
    })  # fmt: skip
    found = who(node)
    assert len(found.hostname) <= 256
    assert len(found.command) <= 512
    assert len(found.mounts) <= 32


def test_an_id_is_never_a_path() -> None:
    evil = Sighting("../../etc", "..", "", None, (), 0.0)
    assert identify(evil, ["/var/lib/docker"]) == Identity()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["app", "--password", "hunter2"], "app --password ***"),
        (["app", "--db-password=hunter2", "x"], "app '--db-password=***' x"),
        (["app", "-e", "A=b"], "app -e 'A=***'"),
        (["app", "--tokenizer", "bpe"], "app --tokenizer bpe"),
        (["app", "--keyspace=x", "--port", "80"], "app --keyspace=x --port 80"),
        (["sh", "-c", "PGPASSWORD=x psql -h db"], "sh -c 'PGPASSWORD=*** psql -h db'"),
        (["sh", "-c", "sleep 1"], "sh -c 'sleep 1'"),
        (["redis-server", "--requirepass", "hunter2"], "redis-server --requirepass ***"),
        (["x", "postgres://u:hunter2@db/x?sslmode=off"], "x 'postgres://u:***@db/x?sslmode=off'"),
        (["x", "--token"], "x --token"),
        (["x", "--no-auth", "--verbose"], "x --no-auth --verbose"),
        ([], ""),
    ],
)
def test_command_lines(argv: list[str], line: str) -> None:
    assert command_line(argv) == line


HOSTILE = [
    "a" * 1023 + " ",
    "passwd" * 170 + "\t",
    "secret " * 146,
    "x:" * 500,
    "a1" * 500 + " ",
    "://a:" * 200,
    "eyJ-" * 250,
]


def test_no_argument_keeps_the_look_busy() -> None:
    """An orphan that made each look take minutes would never be ended; systemd would restart the daemon for ever."""
    script = "import sys; from orphand.identity import command_line; command_line([sys.argv[1]] * 64)"
    for argument in HOSTILE:
        subprocess.run([sys.executable, "-c", script, argument], check=True, timeout=60)


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("mysql --password hunter2 -u root", "mysql --password *** -u root"),
        ("export API_KEY='a b' && run", "export API_KEY=*** && run"),
        ("token: abc secret=def x", "token: *** secret=*** x"),
        ("curl -ehttp://user:pw@host/x y", "curl -ehttp://user:***@host/x y"),
        ("curl 9https://user:pw@host/x y", "curl 9https://user:***@host/x y"),
        ("say password", "say password"),
    ],
)
def test_secrets_in_the_middle_of_an_argument(argument: str, shown: str) -> None:
    assert mask_arguments(["sh", "-c", argument])[2] == shown
