# SPDX-License-Identifier: Apache-2.0
"""Makes orphans by the recipes of tests/engine/orphans.sh, and disturbs the engines."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.churn.book import Entry, Process
from tests.churn.engine import Away
from tests.churn.life import Living, Stuck, Tools
from tests.churn.plan import KINDS, Event, Life, Plan
from tests.churn.watch import children, init_pid, left, shims

RECIPES = Path(__file__).resolve().parents[1] / "engine/orphans.sh"
DAEMON_JSON = Path("/etc/docker/daemon.json")
NAMESPACE = "churn"  # of the pods that lose a member
LOAD = Path("/var/lib/docker/churn-load")


def shell(script: str, timeout: float = 240) -> str:
    """Run a script with orphans.sh sourced. Raises CalledProcessError with its stderr."""
    done = subprocess.run(
        ["bash", "-c", f"set -eu; . {RECIPES}\n{script}"], capture_output=True, text=True, timeout=timeout
    )
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode} of {script}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


def main_pid(unit: str) -> int:
    shown = subprocess.run(["systemctl", "show", "-p", "MainPID", "--value", unit], capture_output=True, text=True)
    return int(shown.stdout.strip() or 0)


def configure(live_restore: bool) -> None:
    DAEMON_JSON.parent.mkdir(exist_ok=True)
    DAEMON_JSON.write_text(json.dumps({"live-restore": live_restore, "shutdown-timeout": 8}))


def make_pod(name: str, namespace: str) -> tuple[str, str]:
    """A sandbox and a container that one shim serves. Their ids look like Docker's: the oracle finds them by that."""
    pod, member = (hashlib.sha256(f"{kind} {name}".encode()).hexdigest() for kind in ("pod", "member"))
    # orphans.sh makes pods in k8s.io, whose containers orphand reports and does not end as long as it asks no CRI
    elsewhere = f'ctr() {{ command ctr "${{@/k8s.io/{namespace}}}"; }}\n'
    shell(f"{elsewhere}pod {pod} {member}")
    return pod, member


class Chaos:
    """Works through the plan's events, one after the other, as lives begin."""

    def __init__(self, plan: Plan, tools: Tools, calm_seconds: float, say: Callable[[str], None]) -> None:
        """`calm_seconds`: what orphand needs from a quiet engine to the end of an orphan."""
        self._events = list(plan.events)
        self._tools, self._calm, self._say = tools, calm_seconds, say
        self._begun = 0
        self._changed = threading.Condition()
        self._stopped = False
        self.pods: list[Entry] = []
        self.residents: list[Living] = []
        self.recipe_failures: list[str] = []
        self.done: dict[str, int] = {}
        self.doing = ""
        self._watch_stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.ends = threading.Thread(target=self._watch_ends, daemon=True)

    # The plan and the lives keep step

    def begun(self, lives: int) -> None:
        """So many lives have begun; waits while more than one event is overdue."""
        with self._changed:
            self._begun = lives
            self._changed.notify_all()
            self._changed.wait_for(lambda: sum(e.at <= lives for e in self._events) <= 1 or self._stopped)

    def finish(self) -> None:
        """After the last life: all events that are left, then return."""
        with self._changed:
            self._begun = 1 << 60
            self._changed.notify_all()
        self.thread.join()

    def _run(self) -> None:
        while self._events:
            event = self._events[0]
            with self._changed:
                self._changed.wait_for(lambda: self._begun >= self._events[0].at)
            try:
                self._do(event)
            except (RuntimeError, Stuck, Away, subprocess.SubprocessError) as error:
                self.recipe_failures.append(f"{event.what}: {error}")
                self._say(f"{event.what} failed: {error}")
            self.done[event.what] = self.done.get(event.what, 0) + 1
            self.doing = "calm" if event.calm else ""
            if event.calm:
                time.sleep(self._calm)
            with self._changed:
                self._events.pop(0)
                self._changed.notify_all()
        self.doing = ""

    def _do(self, event: Event) -> None:
        self.doing = event.what
        begin = time.time()
        try:
            self._dispatch(event)
        finally:
            if "docker" in event.what or "both" in event.what or event.what in KINDS:
                self._answers()
                self._tools.book.docker_start(begin, event.what)

    def _dispatch(self, event: Event) -> None:
        if event.what == "shared_member":
            self._share(event)
        elif event.what in KINDS:
            self._inject(event)
        else:
            getattr(self, "_" + event.what.replace("-", "_"))(event)

    # Orphans

    def _victims(self, event: Event) -> list[Entry]:
        entries = []
        for life in event.victims:
            entry = self._tools.book.open(f"victim{life.number}", "victim", event.what)
            living = Living(life, entry, self._tools)
            if living.create() and living.start() and any(p.died is None for p in entry.processes):
                _, record = self._tools.docker.inspect(entry.full_id)
                key = str(record["NetworkSettings"]["SandboxKey"]).replace("/var/run/", "/run/")
                entry.netns = "" if key.endswith("/default") else key  # that is the host's
                entries.append(entry)
            else:
                living.remove()
        return entries

    def _inject(self, event: Event) -> None:
        entries = self._victims(event)
        if not entries:
            raise RuntimeError(f"no victim came up: {self._tools.book.entries[-1].story}")
        # A recipe takes "docker" down and must not find it started again by a call to docker.socket
        with self._tools.docker.gate.closed(event.quiesce):
            now = time.time()
            for entry in entries:
                entry.lost_from = now
                entry.tell(f"becomes {event.what} ({'quiesced' if event.quiesce else 'among calls'})")
            shell(f"{event.what} {' '.join(e.full_id for e in entries)}")
        for entry in entries:
            entry.lost = time.time()
            entry.tell("recipe is done")

    def _share(self, event: Event) -> None:
        """A pod's shim that serves a sandbox and a container; containerd and its records forget the container."""
        pod, member = make_pod(f"{event.at}", NAMESPACE)
        sandbox, lost = self._adopt(pod, "pod", NAMESPACE), self._adopt(member, "victim", NAMESPACE)
        lost.kind = event.what
        # the shim serves the sandbox too and lives on: only the member's own processes have to go
        lost.processes = [p for p in lost.processes if p.role != "shim"]
        self.pods.append(sandbox)
        lost.lost_from = time.time()
        bundle = f"/run/containerd/io.containerd.runtime.v2.task/{NAMESPACE}/{member}"
        shell(
            f"systemctl stop containerd; umount {bundle}/rootfs; rm -rf {bundle}; systemctl start containerd;"
            f" ctr -n {NAMESPACE} containers rm {member}"
        )
        lost.lost = time.time()
        lost.tell("recipe is done")

    def start_pod(self) -> None:
        """A pod as kubelet's CRI makes them, that lives through the whole run."""
        for full_id in make_pod("resident", "k8s.io"):
            self.pods.append(self._adopt(full_id, "pod", "k8s.io"))

    def _adopt(self, full_id: str, role: str, namespace: str) -> Entry:
        entry = self._tools.book.open(full_id[:12], role)
        entry.namespace = namespace
        self._tools.book.identify(entry, full_id)
        pid = init_pid(full_id, namespace)
        if pid is None:
            raise RuntimeError(f"{full_id} has no init")
        owners = [(s, "shim") for s, (_, i) in shims().items() if i == full_id]
        for process, as_what in [(pid, "init"), *((c, "child") for c in children(pid)), *owners]:
            entry.processes.append(Process(process, as_what, time.time()))
            entry.tell(f"{as_what} is pid {process}")
            self._tools.watcher.watch(entry.processes[-1])
        return entry

    def _watch_ends(self) -> None:
        """When each orphan's last process died, and when nothing of it was left."""
        while not self._watch_stop.is_set():
            for entry in self._tools.book.victims():
                if entry.ended is None and all(p.died for p in entry.processes):
                    entry.ended = max(max(p.died or 0.0 for p in entry.processes), entry.lost or 0.0)
                    entry.tell("its last process died")
                if entry.ended is not None and entry.clean is None:
                    rest = left(entry.full_id, entry.namespace, entry.netns)
                    entry.left = ", ".join(rest)
                    if not rest:
                        entry.clean = time.time()
                        entry.tell("nothing is left")
            self._watch_stop.wait(0.5)

    def start(self) -> None:
        self.thread.start()
        self.ends.start()

    def close(self) -> None:
        self._watch_stop.set()
        self.ends.join()

    # Disturbances

    def _systemctl(self, *argv: str) -> None:
        done = subprocess.run(["systemctl", *argv], capture_output=True, text=True, timeout=240)
        if done.returncode:
            raise RuntimeError(f"systemctl {' '.join(argv)}: {done.stderr}")

    def _restart_docker(self, event: Event) -> None:
        self._systemctl("restart", "docker")

    def _restart_containerd(self, event: Event) -> None:
        self._systemctl("restart", "containerd")

    def _kill(self, *units: str) -> None:
        before = {u: main_pid(u) for u in units}
        self._systemctl("kill", "-s", "KILL", "--kill-who=main", *units)
        end = time.time() + 90
        while any(main_pid(u) in (0, p) for u, p in before.items()) or not self._answers():
            if time.time() > end:
                raise RuntimeError(f"{units} did not come back")
            time.sleep(0.3)

    def _answers(self) -> bool:
        try:
            return self._tools.docker.call("GET", "/_ping", timeout=30)[0] == 200
        except Away:
            return False

    def _kill_docker(self, event: Event) -> None:
        self._kill("docker")

    def _kill_containerd(self, event: Event) -> None:
        self._kill("containerd")

    def _kill_both(self, event: Event) -> None:
        self._kill("docker", "containerd")

    def _pause_unit(self, unit: str, seconds: float) -> None:
        subprocess.run(["systemctl", "kill", "-s", "STOP", "--kill-who=main", unit], check=True, timeout=60)
        time.sleep(seconds)
        subprocess.run(["systemctl", "kill", "-s", "CONT", "--kill-who=main", unit], check=True, timeout=60)

    def _stop_docker(self, event: Event) -> None:
        self._pause_unit("docker", event.seconds)

    def _stop_containerd(self, event: Event) -> None:
        self._pause_unit("containerd", event.seconds)

    def _disk_load(self, event: Event) -> None:
        end = time.time() + event.seconds
        LOAD.mkdir(exist_ok=True)
        number = 0
        while time.time() < end:
            number += 1
            file = LOAD / str(number % 4)
            subprocess.run(
                ["dd", "if=/dev/zero", f"of={file}", "bs=1M", "count=48", "conv=fsync"],
                capture_output=True,
                timeout=120,
            )
        shell(f"rm -rf {LOAD}; sync")

    def _without_live_restore(self, event: Event) -> None:
        """dockerd restarted while live-restore is off ends every container of its, by itself."""
        configure(live_restore=False)
        begin = time.time()
        self._systemctl("reload", "docker")
        time.sleep(event.seconds)
        if int(event.at) % 2:
            self._systemctl("restart", "docker")
        else:
            self._kill("docker")
        configure(live_restore=True)
        self._systemctl("reload", "docker")
        time.sleep(2.0)
        for living in self.residents:
            living.start()
        self._tools.book.phase(begin, f"without live-restore ({event.at})")
        for living in self.residents:
            living.follow()


def start_residents(lives: tuple[Life, ...], tools: Tools) -> list[Living]:
    residents = []
    for life in lives:
        living = Living(life, tools.book.open(f"resident{-life.number}", "resident"), tools)
        if not (living.create() and living.start() and living.entry.processes):
            raise RuntimeError(f"{living.entry.name} did not start: {living.entry.story}")
        residents.append(living)
    return residents
