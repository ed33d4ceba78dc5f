# SPDX-License-Identifier: Apache-2.0
"""A booted throw-away Debian host with its own systemd, Docker and containerd, for tests.

    with Host("bookworm", cgroup="v2") as host:
        cid = host.sh("run2 w1")                  # orphans.sh is sourced
        host.sh(f"leaked_shim {cid}")
        host.start_daemon("policy: {action: log}\\n")
        host.wait_for(lambda: host.journal(), 30, "a first record")

The checkout is mounted read-only at /opt/orphand: the guest runs the code as it is now.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Optional, TypeVar

ROOT = Path(__file__).resolve().parents[2]
HOSTS = Path(os.environ.get("HOSTS_DIR", "/tmp/orphand-hosts"))
SCRIPT = ROOT / "tests/host/host"
OPT = "/opt/orphand"
ENVIRONMENT = {"PYTHONPATH": OPT, "PYTHONDONTWRITEBYTECODE": "1"}

T = TypeVar("T")


class HostError(Exception):
    """The host could not be made or booted, or a command in it failed."""


def tree(suite: str, name: str = "", extra: str = "") -> Path:
    """The root tree of `suite`, made if it isn't there (a minute). `extra`: more packages, as tree `name`."""
    argv = [str(ROOT / "tests/host/mkhost"), suite, *([name, extra] if name else [])]
    made = subprocess.run(argv, stdout=subprocess.PIPE, text=True, timeout=1800)
    if made.returncode:
        raise HostError(f"no tree for {suite} (see the lines of mkhost above)")
    return Path(made.stdout.strip().splitlines()[-1])


class Host:
    """One host. Boots on entry, ends on exit, also by Ctrl-C; what a killed run left is swept at the next boot."""

    def __init__(
        self,
        suite: str = "bookworm",
        cgroup: str = "v2",
        name: str = "",
        base: Optional[Path] = None,
        binds: Sequence[str] = (),
        checkout: bool = True,
    ) -> None:
        """`binds`: further read-only mounts, `/path:/path/inside`. `checkout=False`: no /opt/orphand."""
        self.suite, self.cgroup = suite, cgroup
        self.name = name or f"{suite}-{cgroup}-{os.getpid()}-{uuid.uuid4().hex[:4]}"
        self._base, self._binds = base, [*binds, *([f"{ROOT}:{OPT}"] if checkout else [])]
        self._up = False
        self.root = HOSTS / self.name / "root"  # its files; not what is a mount inside: /run, /tmp, /var/lib/docker

    # ---- life

    def __enter__(self) -> Host:
        self.up()
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], value: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.down()

    def up(self) -> None:
        """Boot and wait until systemd is up. Raises HostError with the reason."""
        base = self._base or tree(self.suite)
        subprocess.run([str(SCRIPT), "sweep"], timeout=300)
        self._up = True
        try:
            self._script("up", str(base), *(f"--bind-ro={bind}" for bind in self._binds))
            self._script("wait", "180")
        except BaseException:
            self.down()
            raise

    def down(self, now: bool = True) -> None:
        """End it and remove all that it left. `now=False`: a clean power off first."""
        if self._up:
            subprocess.run([str(SCRIPT), "down", self.name, *(["now"] if now else [])], timeout=300)
            self._up = False

    def reboot(self) -> None:
        """A clean power off, then a boot with the same files (/run and /tmp are new)."""
        self._script("reboot")

    def _script(self, verb: str, *args: str) -> None:
        environment = {**os.environ, "CGROUP": self.cgroup, "HOST_OWNER": str(os.getpid())}
        try:
            subprocess.run(
                [str(SCRIPT), verb, self.name, *args],
                env=environment,
                check=True,
                text=True,
                capture_output=True,
                timeout=240,
                # own session: Ctrl-C is for us, who then end the host in order
                start_new_session=True,
            )
        except subprocess.CalledProcessError as error:
            raise HostError(f"host {verb} {self.name} ({self.suite}, cgroup {self.cgroup}): {error.stderr}") from None

    # ---- commands

    def run(
        self, *argv: str, stdin: str = "", timeout: float = 120, unit: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root in the host. `unit=True`: as a transient unit, a child of its PID 1."""
        return subprocess.run(
            [str(SCRIPT), "unit" if unit else "exec", self.name, *argv],
            input=stdin,
            text=True,
            errors="replace",
            capture_output=True,
            timeout=timeout,
        )

    def sh(self, script: str, check: bool = True, timeout: float = 120, unit: bool = False) -> str:
        """Run a bash script (set -eu, orphans.sh sourced); its stdout, stripped. HostError if it fails."""
        whole = f"set -eu; . {OPT}/tests/engine/orphans.sh\n{script}"
        done = self.run("bash", "-c", whole, timeout=timeout, unit=unit)
        if check and done.returncode:
            raise HostError(f"exit {done.returncode} of: {script}\n{done.stdout}{done.stderr}".rstrip())
        return done.stdout.strip()

    def orphand(self, *args: str, stdin: str = "", timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """`python3 -m orphand ARGS` of the checkout, in the host."""
        environment = [f"{key}={value}" for key, value in ENVIRONMENT.items()]
        return self.run("env", *environment, "/usr/bin/python3", "-m", "orphand", *args, stdin=stdin, timeout=timeout)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file of the host, with its directories."""
        place = shlex.quote(path)
        script = f'mkdir -p "$(dirname {place})"; cat >{place}; chmod {mode:o} {place}'
        done = self.run("sh", "-c", script, stdin=text)
        if done.returncode:
            raise HostError(f"can't write {path}: {done.stderr}")

    def read(self, path: str) -> str:
        """A file of the host."""
        return self.sh(f"cat {shlex.quote(path)}")

    # ---- the daemon

    def install_unit(self) -> None:
        """The checkout's own orphand.service, which runs the checkout's code."""
        self.write("/etc/systemd/system/orphand.service", (ROOT / "systemd/orphand.service").read_text())
        lines = [f"Environment={key}={value}" for key, value in ENVIRONMENT.items()]
        override = ["[Service]", "ExecStart=", "ExecStart=/usr/bin/python3 -m orphand daemon", *lines]
        self.write("/etc/systemd/system/orphand.service.d/checkout.conf", "\n".join(override) + "\n")
        self.sh("systemctl daemon-reload")

    def start_daemon(self, config: str, timeout: float = 90) -> None:
        """Write /etc/orphand.yaml, then start (or restart) the unit; returns when it said READY."""
        self.write("/etc/orphand.yaml", config)
        if not self.sh("test -e /etc/systemd/system/orphand.service && echo yes", check=False):
            self.install_unit()
        script = "systemctl reset-failed orphand 2>/dev/null; systemctl restart orphand"
        done = self.run("sh", "-c", script, timeout=timeout)
        if done.returncode:
            log = self.sh("journalctl -u orphand -n 40 --no-pager -o short-precise")
            raise HostError(f"orphand did not start: {done.stderr}\n{log}")

    def stop_daemon(self) -> None:
        """Stop the unit; the next start begins without configuration, memory and old failures."""
        script = "systemctl stop orphand 2>/dev/null || :; systemctl reset-failed orphand 2>/dev/null || :"
        self.sh(f"{script}; rm -rf /etc/orphand.yaml /etc/orphand.d /run/orphand /var/lib/orphand/*", check=False)

    def cursor(self) -> str:
        """A place in the journal, for `journal(since=…)`."""
        return self.sh("journalctl -n 0 --show-cursor -q").partition("cursor: ")[2]

    def journal(self, unit: str = "orphand", since: Optional[str] = None) -> list[dict[str, Any]]:
        """The unit's records, oldest first, as journalctl -o json gives them; `since`: a `cursor()`."""
        after = ["--after-cursor", since] if since else []
        lines = self.run("journalctl", "-u", unit, "-o", "json", "-q", "--all", "--no-pager", *after)
        return [json.loads(line) for line in lines.stdout.splitlines()]

    def wait_for(self, predicate: Callable[[], T], timeout: float, what: str, every: float = 0.2) -> T:
        """What `predicate` returns once that is true; after `timeout` seconds AssertionError that names `what`."""
        end = time.monotonic() + timeout
        while True:
            value = predicate()
            if value:
                return value
            if time.monotonic() > end:
                log = self.sh("journalctl -n 30 --no-pager -o short-precise", check=False)
                raise AssertionError(f"waited {timeout:g} s for {what}\n{log}")
            time.sleep(every)
