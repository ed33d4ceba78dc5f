# SPDX-License-Identifier: Apache-2.0
"""The results as a page of tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Found = dict[str, Any]
WARM = "orphand, warm"
SEED = "ps | egrep | awk"


def page(found: Found) -> str:
    """The whole of results.md."""
    machine = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    head = [
        "<!-- SPDX-License-Identifier: Apache-2.0 -->",
        "# Results of the bench",
        f"Made by `make bench` on {found['date']} UTC, sizes: {found['sizes']}. Don't edit: see ../bench.md.",
        f"The machine: {machine}.",
    ]
    parts = [PART[name](found["parts"][name]) for name in PART if name in found["parts"]]
    return "\n\n".join([*head, goals(found["parts"]), *parts]) + "\n"


def goals(parts: Found) -> str:
    """What was to be reached, and what was."""
    rows = [row for name, made in GOALS.items() if name in parts for row in made(parts[name])]
    return "\n\n".join(["## Goals", table(["", "goal", "here"], rows)])


def rescan_goals(found: Found) -> Iterator[Sequence[object]]:
    rows = sorted(found["rows"], key=lambda row: (row["shims"], row["processes"]))
    most = rows[-1]
    few = next(row for row in rows if row["shims"] == most["shims"])
    by, size = most["by"], f"{most['processes']:,} processes, {most['shims']} shims"
    yield f"{SEED} : warm look, {size}", "at least 300", times(by[SEED]["median"] / by[WARM]["median"])
    grown = by[WARM]["median"] / few["by"][WARM]["median"]
    yield f"warm look, {most['processes']:,} : {few['processes']:,} processes", "flat", f"{grown:.2f}"
    sweep = by["orphand, full sweep"]["median"] / by["raw /proc/*/stat"]["median"]
    yield f"full sweep : raw /proc/*/stat, {size}", "at most 1.5", f"{sweep:.2f}"


def latency_goals(found: Found) -> Iterator[Sequence[object]]:
    for kind, one in found.items():
        yield f"trigger to suspicion, {kind}, p99", "at most 250 ms", f"{one['seconds']['p99'] * 1e3:.0f} ms"
        if "announced" in one:
            own = (one["seconds"]["median"] - one["announced"]["median"]) * 1e3
            yield f"of the median of {kind}, after journald has told of the line", "", f"{own:.0f} ms"


def growth_goals(found: Found) -> Iterator[Sequence[object]]:
    most = found["rows"][-1]
    words = f"RSS with Docker and journal on, {most['containers']} containers"
    yield words, "at most 40 MB", f"{most['memory']['rss']:.1f} MB"
    yield "RSS with Docker off", "at most 30 MB", f"{found['without Docker']['memory']['rss']:.1f} MB"


def idle_goals(found: Found) -> Iterator[Sequence[object]]:
    share = found["by"]["orphand"]["share of a core"] * 100
    yield f"idle, {found['containers']} containers", "at most 0.05 % of a core", f"{share:.4f} %"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def milliseconds(spread: Found, factor: float = 1e3) -> str:
    """Median and the quartiles."""
    middle, low, high = (spread[name] * factor for name in ("median", "q1", "q3"))
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def times(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def rescan(found: Found) -> str:
    names = [n for n in found["rows"][0]["by"] if n != "seen"]
    rows, ratios = [], []
    for row in found["rows"]:
        by = row["by"]
        rows.append([f"{row['processes']:,}", row["shims"], *(milliseconds(by[n]) for n in names)])
        warm = by[WARM]["median"]
        ratios.append(
            [
                f"{row['processes']:,}",
                row["shims"],
                *(times(by[n]["median"] / warm) for n in names if not n.startswith("orphand, w")),
                f"{by['orphand, full sweep']['median'] / by['raw /proc/*/stat']['median']:.2f}",
            ]
        )
    text = [
        "## Finding the shims of a node",
        "Milliseconds of CPU for one time: median (quartiles). `orphand` here is the look at /proc, which is what the "
        f"others do too; what asking the engines adds is below. Up to {found['real shims']} shims are real, more are "
        "look-alikes.",
        table(["processes", "shims", *names], rows),
        "How many times as much CPU as orphand's warm look; last, the full sweep against reading /proc/*/stat raw:",
        table(["processes", "shims", *(n for n in names if not n.startswith("orphand, w")), "sweep : raw"], ratios),
    ]
    return "\n\n".join(text)


def latency(found: Found) -> str:
    words = {
        "journal": "dockerd's warning in the journal, to the record of the suspicion",
        "event": "a Docker event, to the record of the suspicion",
        "exit": "SIGKILL to dockerd, to the end of the look",
    }
    rows = []
    for kind, one in found.items():
        s = one["seconds"]
        rows.append([words[kind], s["n"], *(f"{s[n] * 1e3:.0f}" for n in ("median", "p99", "max"))])
        if "announced" in one:
            told = one["announced"]
            rows.append(
                [
                    "of that, until journald tells any follower of the line",
                    told["n"],
                    *(f"{told[n] * 1e3:.0f}" for n in ("median", "p99", "max")),
                ]
            )
    return "\n\n".join(
        ["## From a trigger to what comes of it", table(["milliseconds", "of", "median", "p99", "max"], rows)]
    )


def growth(found: Found) -> str:
    rows = [
        [
            row["containers"],
            milliseconds(row["cpu"]),
            f"{row['syscalls'].get('all', 0):,.0f}",
            row["memory"]["rss"],
            row["memory"]["uss"],
        ]
        for row in found["rows"]
    ]
    off = found["without Docker"]
    rows.append(["without Docker", milliseconds(off["cpu"]), "", off["memory"]["rss"], off["memory"]["uss"]])
    calls = found["rows"][-1]["syscalls"]
    most = ", ".join(f"{name} {count:,.0f}" for name, count in calls.items() if name != "all")
    return "\n\n".join(
        [
            "## One whole look of the daemon",
            "All sources on, wished for by SIGUSR1: processes, engines, verdicts, status file.",
            table(["containers", "CPU, ms", "system calls", "RSS, MB", "USS, MB"], rows),
            f"System calls of the last, by name: {most}.",
        ]
    )


def startup(found: Found) -> str:
    ready = found["to ready"]
    rows = [["from exec to READY=1", milliseconds(ready["seconds"]), milliseconds(ready["cpu"])]]
    rows += [[name, milliseconds(s["seconds"]), milliseconds(s["cpu"])] for name, s in found["steps"].items()]
    modules = ", ".join(f"{name} {seconds * 1e3:.0f}" for name, seconds in found["imports"])
    return "\n\n".join(
        [
            "## Start-up",
            f"With {found['running']} containers. The steps are runs of their own, each with all before it; they end "
            "the interpreter, too.",
            table(["milliseconds", "time", "CPU"], rows),
            f"The dearest imports, in milliseconds with what they bring (under -X importtime): {modules}.",
        ]
    )


def calls(found: Found) -> str:
    rows = []
    for what, engines in found["by"].items():
        for engine, counted in engines.items():
            said = ", ".join(f"{name} {count}" for name, count in sorted(counted.items())) or "none"
            rows.append([what, engine, sum(counted.values()), said])
    return "\n\n".join(
        [
            "## Calls that the engines received",
            f"{found['running']} containers; idle: {found['seconds']:g} s; containers: {found['containers']} started "
            f"and removed; looks: {found['looks']} by SIGUSR1. Docker's counted at its socket, orphand's only; "
            "containerd's counted by itself, dockerd's included.",
            table(["when", "engine", "calls", "which"], rows),
        ]
    )


def idle(found: Found) -> str:
    rows = [
        [
            name,
            f"{one['share of a core'] * 100:.4f} %",
            one["cpu seconds"],
            one["wake-ups a minute"],
            one["memory"]["rss"],
            one["memory"]["uss"],
        ]
        for name, one in found["by"].items()
    ]
    head = ["", "CPU, of a core", "CPU, s", "wake-ups a minute", "RSS, MB", "USS, MB"]
    return "\n\n".join([f"## Idle: {found['seconds']:g} s with {found['containers']} containers", table(head, rows)])


def storms(found: Found) -> str:
    names = list(dict.fromkeys(name for one in found.values() for name in one if name != "storm"))
    rows = [[name, *(one.get(name, "") for one in found.values())] for name in names]
    shown = [[r[0], *(f"{v:.4g}" if isinstance(v, float) else v for v in r[1:])] for r in rows]
    return "\n\n".join(["## Storms", table(["", *found], shown)])


GOALS = {"rescan": rescan_goals, "latency": latency_goals, "growth": growth_goals, "idle": idle_goals}
PART = {
    "rescan": rescan,
    "latency": latency,
    "growth": growth,
    "startup": startup,
    "calls": calls,
    "idle": idle,
    "storms": storms,
}

if __name__ == "__main__":
    print(page(json.loads(Path(sys.argv[1]).read_text())), end="")
