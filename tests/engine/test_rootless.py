# SPDX-License-Identifier: Apache-2.0
"""A user's own dockerd (rootless): its containers are another engine's, whatever becomes of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orphand.report.topics import Topic
from tests.engine.conftest import prepare
from tests.engine.helpers import Watch, config, lives, scan, verdict
from tests.host.guest import Host, tree

pytestmark = pytest.mark.slow  # a tree of its own

AS_USER = "runuser -u user -- env XDG_RUNTIME_DIR=/run/user/1000"
DOCKER = f"{AS_USER} docker -H unix:///run/user/1000/docker.sock"
# The kernel lets a user mount proc and sysfs only where he sees whole ones: the host's are partly covered (nspawn)
START = """
mkdir -p /run/whole/{proc,sys}; mount -t proc proc /run/whole/proc; mount -t sysfs sysfs /run/whole/sys
useradd -m -u 1000 user; echo user:100000:65536 | tee /etc/subuid >/etc/subgid
mkdir -p /home/user/.config/systemd/user
cat >/home/user/.config/systemd/user/docker.service <<END
[Service]
Environment=PATH=/usr/sbin:/usr/bin:/sbin:/bin
ExecStart=/usr/share/docker.io/contrib/dockerd-rootless.sh --storage-driver vfs --iptables=false --bridge none
Delegate=yes
KillMode=process
Type=notify
NotifyAccess=all
END
chown -R user: /home/user; loginctl enable-linger user
timeout 30 sh -c 'until [ -S /run/user/1000/bus ]; do sleep 0.1; done'
"""
# what makes an engine-orphan, and then a shimless one, of a container of the host's
FORGET = """
kill -KILL $(pgrep -u user -x rootlesskit) $(pgrep -u user -x dockerd) $(pgrep -u user -x containerd) || :
rm -rf /home/user/.local/share/docker/containers/*
"""


@pytest.fixture(scope="module")
def rootless_host() -> Iterator[Host]:
    base = tree("bookworm", "bookworm-rootless", "rootlesskit,slirp4netns,uidmap,dbus-user-session")
    with Host("bookworm", base=base) as host:
        host.sh(START)
        host.sh(f"{AS_USER} systemctl --user start docker", timeout=180)
        host.sh(f"tar -C / -c -h bin/busybox | {DOCKER} import - bb:1 >/dev/null")
        yield prepare(host)


def test_a_rootless_dockers_containers_are_foreign_and_live(rootless_host: Host) -> None:
    """Also when their engine is gone and has forgotten them, and when their shim is."""
    host = rootless_host
    container_id = host.sh(f"{DOCKER} run -d --name mine --network none bb:1 /bin/busybox sleep 99999")
    own, watch = host.sh("run2 own"), Watch(host)
    host.start_daemon(config())
    watch.waited(5)
    (form,) = scan(host)[container_id]
    shim = form["shim"]["process"]["pid"]
    init = int(host.sh(f"pgrep -P {shim}"))
    assert (form["verdict"], verdict(host, own)) == ("foreign", "managed")
    assert "uid 1000: rootless" in form["reason"]
    host.sh(FORGET)
    watch.waited(5)
    assert verdict(host, container_id) == "foreign"
    host.sh(f"kill -KILL {shim}")
    watch.waited(5)
    assert verdict(host, container_id) in ("foreign", "")
    assert lives(host, init)
    assert not watch.records(Topic.SUSPECTED)
    assert verdict(host, own) == "managed"
