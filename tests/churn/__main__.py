# SPDX-License-Identifier: Apache-2.0
"""Boots a throw-away host, churns in it, tells the verdict. Exit status: 0 passed, 1 failed, 2 could not run."""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Optional

from tests.host.guest import OPT, SCRIPT, Host, HostError

SETTLE = 3.0
PATIENCE = 90.0  # seconds, for the last orphans
# One crash of containerd under a burst of creates makes up to 20 childless shims besides the injected orphans
CONFIG = """\
policy: {{action: kill, grace: {grace:g}s, jitter: 0s}}
kill: {{term_timeout: 2s, max_orphans: 30, max_share: 80%, max_kills_per_hour: 10000, allow_short_grace: true}}
scan: {{interval: 10s, sweep_interval: 60s, settle: {settle:g}s}}
"""
MAX_GROWTH = 1024.0  # KiB of private memory, after the warm-up, in a run long enough to have one
LONG_RUN = 1000  # lives


def main() -> int:
    arguments = _parse()
    print(
        f"churn: seed {arguments.seed}, {arguments.lives} lives, {arguments.suite}, cgroup {arguments.cgroup}",
        flush=True,
    )
    try:
        with Host(arguments.suite, cgroup=arguments.cgroup) as host:
            report = _churn(host, arguments)
            if arguments.save:
                _save(host, arguments.save, report)
    except (HostError, subprocess.SubprocessError) as error:
        print(f"churn: could not run: {error}", file=sys.stderr)
        return 2
    failures = judge(report)
    report["verdict"] = failures or "passed"
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))
    _tell(report, failures)
    return 1 if failures else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m tests.churn", description=__doc__)
    parser.add_argument("--lives", type=int, default=300, help="containers that are lived (default 300)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of the plan")
    parser.add_argument("--cgroup", choices=["v1", "v2"], default="v2")
    parser.add_argument("--suite", default="bookworm", help="Debian suite of the host")
    parser.add_argument("--every", type=int, default=50, help="about so many lives between two orphans (default 50)")
    parser.add_argument("--workers", type=int, default=8, help="lives at a time (default 8)")
    parser.add_argument(
        "--short-grace", type=_seconds, default=6.0, metavar="TIME", help="orphand's grace (default 6s)"
    )
    parser.add_argument("--save", type=Path, help="directory for the report and the host's journal")
    parser.add_argument("--json", type=Path, help="file for the report")
    parser.add_argument("--idle", action="store_true", help="the engines alone, without orphand: what do they kill?")
    parser.add_argument(
        "--saboteur", action="store_true", help="run a stand-in that kills managed containers: must fail"
    )
    return parser.parse_args()


def _seconds(text: str) -> float:
    return float(text.rstrip("s"))


def _churn(host: Host, arguments: argparse.Namespace) -> dict[str, Any]:
    driver = ["env", f"PYTHONPATH={OPT}", "PYTHONDONTWRITEBYTECODE=1", "/usr/bin/python3", "-m", "tests.churn.driver"]
    driver += [f"--lives={arguments.lives}", f"--seed={arguments.seed}", f"--every={arguments.every}"]
    driver += [f"--cgroup={arguments.cgroup}", f"--workers={arguments.workers}"]
    # a stand-in never ends what is waited for
    patience = 1.0 if arguments.idle or arguments.saboteur else PATIENCE
    driver += [f"--grace={arguments.short_grace}", f"--settle={SETTLE}", f"--patience={patience}"]
    prepared = host.run(*driver, "--prepare", unit=True, timeout=300)
    if prepared.returncode:
        raise HostError(f"the host could not be prepared: {prepared.stderr}")
    _start_daemon(host, arguments)
    argv = [str(SCRIPT), "unit", host.name, *driver]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        try:
            report = _follow(process, arguments.lives)
        finally:
            process.terminate()
    if report is None:
        log = host.sh("journalctl -n 60 --no-pager -o short-precise", check=False)
        raise HostError(f"the driver ended without a report ({shlex.join(argv)})\n{log}")
    return report


def _start_daemon(host: Host, arguments: argparse.Namespace) -> None:
    config = CONFIG.format(grace=arguments.short_grace, settle=SETTLE)
    if not (arguments.saboteur or arguments.idle):
        host.start_daemon(config)
        return
    stand_in = "/usr/bin/sleep infinity" if arguments.idle else "/usr/bin/python3 -m tests.churn.saboteur"
    unit = f"[Service]\nEnvironment=PYTHONPATH={OPT}\nExecStart={stand_in}\n"
    host.write("/etc/systemd/system/orphand.service", unit)
    host.sh("systemctl daemon-reload; systemctl start orphand")


def _follow(process: subprocess.Popen[str], lives: int) -> Optional[dict[str, Any]]:
    assert process.stdout
    report = None
    for line in process.stdout:
        try:
            data = json.loads(line)
        except ValueError:
            print(line, end="", flush=True)
            continue
        kind = data.pop("kind")
        if kind == "report":
            report = data
        elif kind == "note":
            print(f"churn: {data['text']}", flush=True)
        else:
            print(
                f"{data['seconds']:5d} s  {data['over']}/{lives} lives ({data['begun'] - data['over']} now)"
                f"  orphans {data['orphans']}, ended {data['ended']}, clean {data['clean']}"
                f"  engines' own {data['stray']}  rss {data['rss']} KiB  {data['doing']}",
                flush=True,
            )
    return report


def judge(report: dict[str, Any]) -> list[str]:
    """Why the run failed; empty if it passed."""
    failures = list(report["failures"])
    counted = {
        "managed containers killed": report["managed_killed"],
        "orphans missed": report["orphans_missed"],
        "orphans not clean": report["orphans_unclean"],
        "lives that nobody knows": report["unknown_living"],
        "pieces of residue": report["residue"],
    }
    failures += [f"{len(found)} {what}" for what, found in counted.items() if found]
    growth = report["daemon"].get("growth", 0.0)
    if report["lives"] >= LONG_RUN and growth > MAX_GROWTH:
        failures.append(f"the daemon's private memory grew by {growth:.0f} KiB after the warm-up")
    return failures


def _tell(report: dict[str, Any], failures: list[str]) -> None:
    shown = {k: v for k, v in report.items() if k not in ("stories", "verdict", "strays", "engines_own_leftovers")}
    for key, value in shown.items():
        print(f"{key:22} {json.dumps(value) if isinstance(value, (dict, list)) else value}"[:1500])
    print(
        f"{'strays':22} {len(report['strays'])}, longest {max([s['seconds'] for s in report['strays']], default=0)} s"
    )
    print(f"{'engines_own_leftovers':22} {len(report['engines_own_leftovers'])}")
    for story in report["stories"].values():
        print("\n  ".join(["", *story]))
    print(f"churn: seed {report['seed']}: {'FAILED: ' + '; '.join(failures) if failures else 'passed'}", flush=True)


def _save(host: Host, directory: Path, report: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.json").write_text(json.dumps(report, indent=1))
    (directory / "book.txt").write_text(host.read("/var/log/churn.txt"))
    log = host.run("journalctl", "--no-pager", "-o", "short-precise", timeout=600)
    (directory / "journal.txt").write_text(log.stdout)
    records = host.run("journalctl", "--no-pager", "-u", "orphand", "-o", "json", "--all", timeout=600)
    (directory / "orphand.jsonl").write_text(records.stdout)


if __name__ == "__main__":
    sys.exit(main())
