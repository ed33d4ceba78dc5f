# SPDX-License-Identifier: Apache-2.0
"""The bench: orphand next to what people use, side by side in a throw-away host.

    python3 -m tests.bench                    the whole, for docs/bench (about 80 minutes on a quiet machine)
    python3 -m tests.bench --quick            the same with small sizes, into .cache/bench/quick (about 10 minutes)
    python3 -m tests.bench --only rescan,idle  some of it; what --json FILE has of the rest is kept

CPU is user + system time of the processes, as the kernel counts it, never the time on the wall.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench import sizes, tables
from tests.host.guest import OPT, ROOT, Host, tree

INSIDE = f"{OPT}/tests/bench/inside"
INSTALLED = "/usr/share/orphand"  # compiled, as a package installs it
BESIDE = "bookworm-bench"  # the tree with what orphand is compared with
METRICS = 'version = 2\n[metrics]\n  address = "127.0.0.1:1338"\n'
JOURNALD = "[Journal]\nRateLimitIntervalSec=0\nRateLimitBurst=0\nStorage=persistent\nSystemMaxUse=300M\n"
DOCKER = "[Unit]\nStartLimitIntervalSec=0\n[Service]\nRestartSec=200ms\n"
FAIL2BAN = "[DEFAULT]\nbackend = systemd\n[sshd]\nenabled = true\n"
EAGER = "scan: {settle: 1s, interval: 600s}\n"  # the engines are believed at once, and the timer stays out of it

Found = dict[str, Any]


class Bench:
    """The host and the parts of the bench that run in it, one method each."""

    def __init__(self, host: Host, size: sizes.Sizes) -> None:
        self.host = host
        self.size = size

    def inside(self, script: str, *arguments: object, timeout: float = 3600) -> list[Any]:
        """Run a script of tests/bench/inside in the host: the JSON lines that it printed."""
        environment = [f"PYTHONPATH={INSTALLED}"]
        argv = ["env", *environment, "/usr/bin/python3", f"{INSIDE}/{script}.py", *map(str, arguments)]
        done = self.host.run(*argv, timeout=timeout)
        if done.returncode:
            raise SystemExit(f"{script}.py {' '.join(map(str, arguments))} failed:\n{done.stdout}\n{done.stderr}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    def prepare(self) -> None:
        host = self.host
        host.sh(f"mkdir -p {INSTALLED}; cp -r {OPT}/orphand {INSTALLED}; python3 -m compileall -q {INSTALLED}")
        host.install_unit()
        environment = f"[Service]\nUnsetEnvironment=PYTHONDONTWRITEBYTECODE\nEnvironment=PYTHONPATH={INSTALLED}\n"
        host.write("/etc/systemd/system/orphand.service.d/installed.conf", environment)
        host.write("/etc/containerd/config.toml", METRICS)
        host.write("/etc/systemd/journald.conf.d/bench.conf", JOURNALD)
        host.write("/etc/systemd/system/docker.service.d/bench.conf", DOCKER)
        host.write("/etc/fail2ban/jail.local", FAIL2BAN)
        host.sh("systemctl daemon-reload; systemctl stop fail2ban 2>/dev/null || :")
        host.sh("systemctl restart systemd-journald containerd")
        host.sh("live_restore; img; docker save bb:1 | ctr -n moby images import - >/dev/null")

    def containers(self, wanted: int) -> None:
        """So many real containers run."""
        have = int(self.host.sh("docker ps -q | wc -l"))
        if have > wanted:
            self.host.sh(f"docker ps -q | head -{have - wanted} | xargs docker rm -f >/dev/null", timeout=1800)
        run = "docker run -d --network none bb:1 /bin/busybox sleep 99999 >/dev/null"
        if have < wanted:
            self.host.sh(f"for i in $(seq {wanted - have}); do {run}; done", timeout=3600)

    # ---- the parts

    def rescan(self) -> Found:
        size = self.size
        real = min(size.real, max(size.shims))
        shims, processes = (",".join(map(str, s)) for s in (size.shims, size.processes))
        rows = self.inside("rescan", real, shims, processes, size.repeats, size.settling)
        self.containers(0)
        return {"rows": rows, "real shims": real}

    def latency(self) -> Found:
        found = {}
        for kind in ("journal", "event", "exit"):
            off = "journal: {enabled: false}\n" if kind == "event" else ""
            self.host.start_daemon(EAGER + off)
            time.sleep(3)
            found[kind] = self.inside("latency", kind, self.size.samples)[0]
        self.host.stop_daemon()
        return found

    def growth(self) -> Found:
        """The whole look of the daemon and its memory, over the number of containers; then without Docker."""
        rows = []
        for number in self.size.containers:
            self.containers(number)
            self.host.start_daemon(EAGER)
            time.sleep(self.size.settling)
            rows.append({"containers": number, **self.inside("tick", self.size.looks, self.size.traced)[0]})
        self.host.start_daemon(EAGER + "docker: []\ncontainerd: []\n")
        time.sleep(5)
        off = self.inside("tick", self.size.looks, 0)[0]
        self.host.stop_daemon()
        return {"rows": rows, "without Docker": off}

    def idle(self) -> Found:
        self.containers(self.size.containers[-1])
        self.host.sh("systemd-run -q --unit bench-events sh -c 'exec docker events >/dev/null'")
        names = {"orphand": "orphand", "docker events": "bench-events"}
        if self.size.beside:
            self.host.sh("systemctl start fail2ban")
            names["fail2ban"] = "fail2ban"
        self.host.start_daemon("")
        time.sleep(self.size.settled)
        pids = [f"{n}={self.host.sh(f'systemctl show -p MainPID --value {u}')}" for n, u in names.items()]
        found = self.inside("idle", self.size.idle, *pids)[0]
        self.host.sh("systemctl stop fail2ban bench-events 2>/dev/null || :")
        self.host.stop_daemon()
        return {"containers": self.size.containers[-1], **found}

    def storms(self) -> Found:
        found = {}
        for kind, arguments in {"containers": [self.size.storm], "journal": self.size.flood}.items():
            self.host.start_daemon(EAGER)
            time.sleep(5)
            cursor = self.host.cursor()
            found[kind] = self.inside("storm", kind, *arguments)[0]
            if kind == "journal":
                kept = f"journalctl -q --after-cursor '{cursor}' -t dockerd -o cat | wc -l"
                found[kind]["kept by journald"] = int(self.host.sh(kept, timeout=600))
        self.host.stop_daemon()
        return found

    def calls(self) -> Found:
        self.containers(self.size.containers[-1])
        self.host.start_daemon("")
        found: Found = self.inside("calls", self.size.watched, self.size.few)[0]
        self.host.stop_daemon()
        return {"running": int(self.host.sh("docker ps -q | wc -l")), **found}

    def startup(self) -> Found:
        self.containers(self.size.containers[-1])
        self.host.start_daemon("")
        found: Found = self.inside("startup", self.size.repeats)[0]
        self.host.stop_daemon()
        return {"running": int(self.host.sh("docker ps -q | wc -l")), **found}


PARTS: dict[str, Callable[[Bench], Found]] = {
    name: getattr(Bench, name) for name in ("rescan", "latency", "growth", "startup", "calls", "idle", "storms")
}


def machine(host: Host) -> Found:
    """Where it ran."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    memory = int(Path("/proc/meminfo").read_text().split()[1])
    versions = host.sh(
        "docker version -f '{{.Server.Version}}'; containerd --version | cut -d' ' -f3; /usr/bin/python3 -V; "
        "systemctl --version | head -1 | cut -d' ' -f2"
    ).split("\n")
    return {
        "cpu": model.partition(":")[2].strip() or platform.machine(),
        "cores": os.cpu_count(),
        "memory": f"{memory / 1e6:.0f} GB",
        "kernel": platform.release(),
        "load": round(os.getloadavg()[0], 2),
        **dict(zip(("docker", "containerd", "python", "systemd"), versions)),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, for a look at how it goes")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes: whether everything still works")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of: {','.join(PARTS)}")
    parser.add_argument("--out", type=Path, help="directory of bench.json and results.md")
    parser.add_argument("--plots", help="an interpreter that has matplotlib: draw what was found, too")
    parser.add_argument("--json", type=Path, help="instead of bench.json in --out")
    asked = parser.parse_args()
    kind = "smoke" if asked.smoke else "quick" if asked.quick else "full"
    asked.size = sizes.SIZES[kind]
    asked.out = asked.out or (ROOT / "docs/bench" if kind == "full" else ROOT / ".cache/bench" / kind)
    asked.json = asked.json or asked.out / "bench.json"
    asked.parts = asked.only.split(",")
    unknown = set(asked.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    return asked


def main() -> int:
    asked = arguments()
    asked.out.mkdir(parents=True, exist_ok=True)
    found: Found = json.loads(asked.json.read_text()) if asked.json.exists() else {"parts": {}}
    base = tree("bookworm", BESIDE, "fail2ban") if asked.size.beside else tree("bookworm")
    with Host("bookworm", base=base) as host:
        bench = Bench(host, asked.size)
        bench.prepare()
        found.update(machine=machine(host), date=datetime.datetime.now(datetime.timezone.utc).isoformat(" ", "minutes"))
        found["sizes"] = asked.size.name
        for part in asked.parts:
            begun = time.monotonic()
            print(f"== {part}", file=sys.stderr, flush=True)
            found["parts"][part] = PARTS[part](bench)
            print(f"== {part}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
            asked.json.write_text(json.dumps(found, indent=1) + "\n")
            (asked.out / "results.md").write_text(tables.page(found))
    if asked.plots:
        subprocess.run(
            [asked.plots, str(Path(__file__).with_name("plots.py")), str(asked.json), str(asked.out)], check=True
        )
    print((asked.out / "results.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
