# SPDX-License-Identifier: Apache-2.0
"""What several engine tests need: short configurations, and a daemon's records since the test began."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from orphand.report.topics import Topic
from tests.host.guest import OPT, Host

GONE = "shims=0 processes=0"
NOTHING = "shims=0 processes=0 cgroups=0 bundles=0 runc-state=0 tasks=0 containers=0 docker=404"
# what --privileged gives, but for CAP_SYS_RESOURCE, which the machine itself may lack (then --privileged fails)
PRIVILEGED = (
    "--cap-add ALL --cap-drop SYS_RESOURCE --security-opt seccomp=unconfined --security-opt apparmor=unconfined"
    " --security-opt systempaths=unconfined --device-cgroup-rule 'a *:* rwm'"
)
RECEIVER = "#!/bin/sh\ncat >>/run/alerts; echo >>/run/alerts\n"


def config(
    action: str = "kill", policy: str = "", kill: str = "", scan: str = "", more: str = "", grace: str = "3s"
) -> str:
    """A configuration for a hurry. The parts are added to their mappings; a later key wins nothing, so name it once."""
    lines = [
        f"policy: {{action: {action}, grace: {grace}, jitter: 0s, {policy}}}",
        f"kill: {{allow_short_grace: true, {kill or 'term_timeout: 2s, max_share: 100%'}}}",
        f"scan: {{{scan or 'interval: 1s, settle: 1s'}}}",
        more,
    ]
    return "\n".join(lines) + "\n"


class Watch:
    """A host's records and containers from now on."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._begun = host.cursor()

    def records(self, topic: Topic, container_id: str = "") -> list[dict[str, Any]]:
        """The daemon's records of one topic (and one container), oldest first."""
        found = [r for r in self.host.journal(since=self._begun) if r.get("MESSAGE_ID") == topic.message_id]
        return [r for r in found if not container_id or r.get("ORPHAND_CONTAINER_ID") == container_id]

    def wait(self, topic: Topic, container_id: str = "", words: str = "", timeout: float = 90) -> dict[str, Any]:
        """The newest record of that topic, as soon as there is one that has these words in its message."""
        return self.host.wait_for(
            lambda: [r for r in self.records(topic, container_id) if words in str(r["MESSAGE"])],
            timeout,
            f"{topic.name} {container_id[:12]} {words}",
        )[-1]

    def status(self) -> dict[str, Any]:
        """What the daemon wrote of its last look; {} before the first."""
        text = self.host.sh("cat /run/orphand/status.json", check=False)
        status: dict[str, Any] = json.loads(text) if text else {}
        return status

    def looks(self, number: int = 1, timeout: float = 60) -> dict[str, Any]:
        """Wait until so many more looks were completed; the last one's status."""
        for _ in range(number):
            before = self.status().get("looked_at")
            self.host.wait_for(lambda seen=before: self.status().get("looked_at") != seen, timeout, "another look", 0.1)
        return self.status()

    def waited(self, seconds: float) -> None:
        """Wait until the daemon has gone on looking for so many seconds: longer than a grace, to see nothing happen."""
        begun = self.looks()["looked_at"]
        self.host.wait_for(lambda: self.status().get("looked_at", 0) - begun >= seconds, 60 + seconds, "more looks")


def scan(host: Host) -> dict[str, list[dict[str, Any]]]:
    """`orphand scan --json`: container id -> its forms (more than one where several shims claim it)."""
    done = host.orphand("scan", "--json")
    assert done.returncode in (0, 1, 2), done.stderr
    found: dict[str, list[dict[str, Any]]] = {}
    for form in json.loads(done.stdout)["containers"]:
        found.setdefault(form["container_id"], []).append(form)
    return found


def verdict(host: Host, container_id: str) -> str:
    """The verdict of one container in a scan; "" if it is not sighted."""
    return ", ".join(form["verdict"] for form in scan(host).get(container_id, ()))


def uptime(host: Host) -> float:
    """The guest's boot clock."""
    return float(host.sh("cut -d' ' -f1 /proc/uptime"))


def lives(host: Host, *pids: int) -> bool:
    """Whether all of these pids are there and no zombies."""
    states = host.sh(f"sed 's/.*) //' {' '.join(f'/proc/{pid}/stat' for pid in pids)} 2>/dev/null", check=False)
    return [line[0] not in "ZX" for line in states.splitlines()] == [True] * len(pids)


def alerts(host: Host) -> list[dict[str, Any]]:
    """What RECEIVER was given."""
    text = host.sh("cat /run/alerts 2>/dev/null", check=False)
    return [json.loads(line) for line in text.splitlines() if line]


def usr_image(host: Host) -> None:
    """Image usr:1: nothing but the links of a merged /usr, for containers that get the host's /usr as a mount."""
    host.sh(
        "docker image inspect usr:1 >/dev/null 2>&1 && exit; d=$(mktemp -d); cd $d;"
        "mkdir -p usr etc tmp run var/lib/docker proc sys dev root home;"
        "for n in bin sbin lib lib64; do ln -s usr/$n $n; done; cp /etc/passwd /etc/group /etc/ld.so.cache etc/;"
        "tar c . | docker import - usr:1 >/dev/null; rm -r $d"
    )


def hostile(text: str) -> list[str]:
    """The characters of a text that a terminal or a log must never get: control characters but the newline."""
    return sorted({c for c in text if c != "\n" and (ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0)})


HOOK = "/run/hook"


@contextlib.contextmanager
def drop_in(host: Host, *lines: str, hook: str = "") -> Iterator[None]:
    """A drop-in of the unit, for as long as it is entered. `hook`: Python that the daemon runs before anything else."""
    if hook:
        host.write(f"{HOOK}/sitecustomize.py", hook)
        lines = (*lines, f"Environment=PYTHONPATH={HOOK}:{OPT}")
    host.write("/run/systemd/system/orphand.service.d/test.conf", "\n".join(["[Service]", *lines]) + "\n")
    host.sh("systemctl daemon-reload")
    try:
        yield
    finally:
        host.stop_daemon()
        host.sh(f"rm -rf {HOOK} /run/systemd/system/orphand.service.d/test.conf; systemctl daemon-reload")


def main_pid(host: Host, unit: str = "orphand") -> int:
    return int(host.sh(f"systemctl show -p MainPID --value {unit}"))


def moment(record: dict[str, Any]) -> float:
    """When a record was written, on the monotonic clock."""
    return int(record["__MONOTONIC_TIMESTAMP"]) / 1e6


def monotonic(host: Host) -> float:
    return float(host.sh("python3 -c 'import time; print(time.monotonic())'"))
