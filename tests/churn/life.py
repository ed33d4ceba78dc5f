# SPDX-License-Identifier: Apache-2.0
"""One life, from create to gone. Every call may be broken by a dying engine: then what is there is looked up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

from tests.churn.book import MARKS, Book, Entry, Process
from tests.churn.engine import Away, Docker
from tests.churn.plan import Life
from tests.churn.watch import Watcher, children, in_cgroup, init_pid, shims

PATIENCE = 150.0  # seconds for one thing to happen, engines' restarts included
BUSYBOX = "/bin/busybox"


@dataclass(frozen=True)
class Tools:
    """What every life needs."""

    docker: Docker
    book: Book
    watcher: Watcher


class Stuck(Exception):
    """Something did not happen within PATIENCE."""


def command(life: Life, name: str) -> list[str]:
    """Every command but `sleep` and `family` notes in /mark why it exits, before it does."""
    if life.command == "sleep":
        return [BUSYBOX, "sleep", "99999"]
    if life.command == "trap":
        note = f"echo term@$({BUSYBOX} date +%s) >>/mark/{name}"
        script = f"trap '{note}; exit 0' TERM; while :; do {BUSYBOX} sleep 9999 & wait $!; done"
    elif life.command == "family":
        script = f"for i in 1 2 3; do {BUSYBOX} sleep 9999 & done; {BUSYBOX} setsid {BUSYBOX} sleep 9999 & wait"
    else:
        code = 3 if life.host.get("RestartPolicy", {}).get("Name") == "on-failure" else life.number % 4
        script = f"{BUSYBOX} sleep {life.exit_after}; echo exit >>/mark/{name}; exit {code}"
    return [BUSYBOX, "sh", "-c", script]


def body(life: Life, name: str, privileged: bool) -> dict[str, Any]:
    """The request that creates it. `privileged`: the engine can do that, else it gets the capabilities one by one."""
    host = {**life.host, "Binds": [f"{MARKS}:/mark"]}
    if privileged and host.pop("CapDrop", None):
        del host["CapAdd"]
        host["Privileged"] = True
    if life.runtime == "v1":
        host["Runtime"] = "io.containerd.runtime.v1.linux"
    made: dict[str, Any] = {
        "Image": "bb:1",
        "Cmd": command(life, name),
        "Labels": {"churn": "1", "io.kubernetes.pod.name": "not-a-pod"},
        "StopTimeout": 1,
        "HostConfig": host,
    }
    if "PortBindings" in host:
        made["ExposedPorts"] = {"80/tcp": {}}
    if life.health:
        made["Healthcheck"] = {
            "Test": ["CMD", BUSYBOX, "true"],
            "Interval": 1_000_000_000,
            "Timeout": 2_000_000_000,
            "Retries": 2,
        }
    return made


class Living:
    """Does what a Life says, and writes it into the entry."""

    def __init__(self, life: Life, entry: Entry, tools: Tools) -> None:
        self.life, self.entry, self._tools = life, entry, tools
        self._docker = tools.docker
        entry.auto_remove = bool(life.host.get("AutoRemove"))

    def live(self) -> None:
        """The whole life. Raises Stuck."""
        if not self.create():
            return None
        if self.life.end != "never-started":
            if not self.start():
                return self.remove()
            for what, pause in self.life.steps:
                self._step(what)
                time.sleep(pause)
        self._end()
        return None

    # Calls that survive an engine

    def _try(self, method: str, path: str, payload: Any = None) -> Optional[tuple[int, Any]]:
        try:
            answer = self._docker.call(method, path, payload)
        except Away as error:
            self.entry.tell(f"no answer: {error}")
            return None
        if answer[0] >= 300 and answer[0] not in (304, 404, 409):
            self.entry.tell(f"{method} {path.partition('?')[0][-30:]}: {answer[0]} {answer[1]}"[:300])
        return answer

    def _until(self, what: str, done: Callable[[], bool], every: float = 0.3) -> None:
        end = time.time() + PATIENCE
        while not done():
            if time.time() > end:
                self.entry.tell(f"gave up waiting: {what}")
                raise Stuck(f"{self.entry.name}: {what}")
            time.sleep(every)

    def _inspect(self) -> Optional[dict[str, Any]]:
        """Docker's record; {} if there is none; None without an answer."""
        answer = self._try("GET", f"/containers/{self.entry.full_id or self.entry.name}/json")
        if answer is None or answer[0] not in (200, 404):
            return None
        return answer[1] if answer[0] == 200 else {}

    # Its stations

    def create(self) -> bool:
        """Whether it exists now, with its id in the book."""
        self.entry.tell(f"create {self.life.runtime} {self.life.command} {self.life.host}")
        answer = self._try(
            "POST",
            f"/containers/create?name={self.entry.name}",
            body(self.life, self.entry.name, self._docker.drops_what_is_missing),
        )
        if answer and answer[0] == 201:
            self._tools.book.identify(self.entry, answer[1]["Id"])
            return True
        refused = answer is not None and answer[0] < 500
        found: list[dict[str, Any]] = []

        def looked() -> bool:
            record = self._inspect()
            if record is not None:
                found.append(record)
            return record is not None

        self._until("an answer about its create", looked)
        if found[0]:
            self._tools.book.identify(self.entry, found[0]["Id"])
            return True
        self.entry.tell("it was not created")
        self.entry.gone = time.time()
        if refused:
            self._tools.book.refused.append(f"{self.entry.name}: {answer}"[:300])
        else:
            self._tools.book.void_creates += 1
        return False

    def start(self) -> bool:
        """Whether it runs or has run; its init is watched."""
        for pause in (0.0, 1.0, 3.0, 6.0):  # containerd may be away, then Docker answers 500 at once
            time.sleep(pause)
            self.entry.tell("start")
            answer = self._try("POST", f"/containers/{self.entry.full_id}/start")
            if answer and answer[0] in (204, 304):
                self.follow()
                return True
            if answer and answer[0] == 404:
                return self.entry.auto_remove
            if self._settled_running():
                return True
        self._tools.book.unstarted.append(f"{self.entry.name}: {self.entry.story[-1][1]}"[:300])
        return False

    def _settled_running(self) -> bool:
        """After a start whose outcome is not clear."""
        records: list[dict[str, Any]] = []

        def looked() -> bool:
            record = self._inspect()
            if record is not None:
                records.append(record)
            return record is not None

        self._until("an answer about its start", looked)
        if not records[0]:
            return self.entry.auto_remove
        state = records[0]["State"]
        self.entry.tell(f"state after an unclear start: {state['Status']} {state['Error']}"[:200])
        if state["Running"]:  # else what lives of a broken start is nobody's, and the next start's error ends it
            self.follow()
        return bool(state["Running"]) or (state["Status"] == "exited" and state["ExitCode"] < 100)

    def follow(self) -> None:
        """Watch the init that runs now, and of a resident its children and its shim too."""
        pid = init_pid(self.entry.full_id)
        known = {p.pid for p in self.entry.processes}
        if not pid or pid in known or not in_cgroup(pid, self.entry.full_id):
            return
        self._watch(pid, "init")
        if self.entry.role in ("resident", "victim"):
            self._follow_family(pid)

    def _follow_family(self, pid: int) -> None:
        if self.life.command == "family":
            for _ in range(50):
                if len(children(pid)) >= 4:
                    break
                time.sleep(0.1)
        if self.entry.role == "victim" or self.life.command != "trap":
            for child in children(pid):
                self._watch(child, "child")
        for shim, (_, full_id) in shims().items():
            if full_id == self.entry.full_id:
                self._watch(shim, "shim")

    def _watch(self, pid: int, role: str) -> None:
        process = Process(pid, role, time.time())
        self.entry.processes.append(process)
        self.entry.tell(f"{role} is pid {pid}")
        self._tools.watcher.watch(process)

    # Steps

    def _step(self, what: str) -> None:
        if what == "wait":
            return
        getattr(self, f"_do_{what.replace('-', '_')}")(f"/containers/{self.entry.full_id}")

    def _do_exec(self, path: str, seconds: float = 0) -> None:
        argv = [BUSYBOX, "sleep", str(seconds)] if seconds else [BUSYBOX, "true"]
        self.entry.tell(f"exec {argv}")
        answer = self._try("POST", f"{path}/exec", {"Cmd": argv})
        if answer and answer[0] == 201:
            self._try("POST", f"/exec/{answer[1]['Id']}/start", {"Detach": True})

    def _do_exec_long(self, path: str) -> None:
        self._do_exec(path, 3000)

    def _do_pause(self, path: str) -> None:
        self.entry.tell("pause")
        self._try("POST", f"{path}/pause")
        time.sleep(0.3)
        self._unpause(path)

    def _unpause(self, path: str) -> None:
        """Surely: a container that stays frozen could not end."""

        def running() -> bool:
            answer = self._try("POST", f"{path}/unpause")
            record = self._inspect() if answer else None
            return record is not None and not record.get("State", {}).get("Paused")

        self._until("it to be unpaused", running)
        self.entry.tell("unpaused")

    def _do_restart(self, path: str) -> None:
        self.entry.intend("restart")
        self._try("POST", f"{path}/restart?t=1")
        self._start_again()

    def _do_kill_start(self, path: str) -> None:
        self.entry.intend("kill KILL")
        self._try("POST", f"{path}/kill?signal=KILL")
        self._start_again()

    def _start_again(self) -> None:
        if not self.entry.auto_remove:
            self.start()

    def _do_rename(self, path: str) -> None:
        self.entry.tell("rename")
        self._try("POST", f"{path}/rename?name={self.entry.name}-renamed")

    def _do_inspect(self, path: str) -> None:
        self._inspect()

    def _do_top(self, path: str) -> None:
        self._try("GET", f"{path}/top")

    # Ends

    def _end(self) -> None:
        path = f"/containers/{self.entry.full_id}"
        end = self.life.end
        if end in ("auto-remove", "exit-rm"):
            self._wait_for_exit()
        elif end == "restart-policy":
            for _ in range(6):
                time.sleep(0.4)
                self.follow()
        elif end == "kill-rm":
            self.entry.intend("kill TERM" if self.life.number % 2 else "kill KILL")
            self._try("POST", f"{path}/kill?signal={'TERM' if self.life.number % 2 else 'KILL'}")
        elif end == "stop-rm":
            self.entry.intend("stop")
            self._try("POST", f"{path}/stop?t=1")
        elif end == "auto-kill":
            self.entry.intend("kill KILL")
            self._try("POST", f"{path}/kill?signal=KILL")
        elif end == "rm-paused":
            self.entry.tell("pause")
            self._try("POST", f"{path}/pause")
        if self.entry.auto_remove and self._removed_by_itself():
            return
        self.remove()

    def _wait_for_exit(self) -> None:
        end = time.time() + 30
        while time.time() < end and not all(p.died for p in self.entry.processes):
            time.sleep(0.05)

    def _removed_by_itself(self) -> bool:
        """Docker's own work, unless it was killed at it."""
        end = time.time() + 20
        while time.time() < end:
            record = self._inspect()
            if record == {}:
                self.entry.gone = time.time()
                self.entry.tell("removed by Docker")
                return True
            time.sleep(0.15)
        self.entry.tell("was not removed by Docker")
        return False

    def remove(self) -> None:
        """rm -f until Docker says that there is no such container. Raises Stuck."""
        self.entry.intend("rm -f")
        self.entry.removing = self.entry.removing or time.time()

        def removed() -> bool:
            answer = self._try("DELETE", f"/containers/{self.entry.full_id}?force=1&v=1")
            return answer is not None and answer[0] in (204, 404)

        self._until("it to be removed", removed)
        self.entry.gone = time.time()
        self.entry.tell("removed")
