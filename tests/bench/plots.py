# SPDX-License-Identifier: Apache-2.0
"""bench.json as pictures: plots.py bench.json DIRECTORY. Needs matplotlib (requirements.txt), nothing of orphand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt

Found = dict[str, Any]
COLOURS = {"orphand": "#0b6e4f", "raw": "#888888"}
SIZE = (8, 5)


def colour(name: str) -> Any:
    return next((shade for start, shade in COLOURS.items() if name.startswith(start)), None)


def save(directory: Path, name: str) -> None:
    plt.tight_layout()
    plt.savefig(directory / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close()


def rescan(found: Found, directory: Path) -> None:
    """CPU of finding the shims, over the number of processes, for the most shims; and of orphand over shims."""
    most = max(row["shims"] for row in found["rows"])
    rows = sorted((r for r in found["rows"] if r["shims"] == most), key=lambda r: r["processes"])
    plt.figure(figsize=SIZE)
    for name in (n for n in rows[0]["by"] if n != "seen"):
        style = {"orphand, warm": "-o", "orphand, cold": "--o", "orphand, full sweep": ":o"}.get(name, "-s")
        values = [[r["by"][name][k] * 1e3 for r in rows] for k in ("median", "q1", "q3")]
        counts = [r["processes"] for r in rows]
        plt.loglog(counts, values[0], style, label=name, color=colour(name))
        plt.fill_between(counts, values[1], values[2], alpha=0.15, color=colour(name))
    plt.xlabel("processes on the node")
    plt.ylabel("CPU for one time, ms")
    plt.title(f"Finding the shims among them ({most} shims)")
    plt.legend(fontsize=8)
    plt.grid(True, which="both", alpha=0.2)
    save(directory, "rescan")


def latency(found: Found, directory: Path) -> None:
    """What share of the triggers had been dealt with after how long."""
    plt.figure(figsize=SIZE)
    for kind, one in found.items():
        values = sorted(one["all"])
        plt.step(
            [v * 1e3 for v in values], [(i + 1) / len(values) for i in range(len(values))], label=kind, where="post"
        )
    plt.axvline(250, color="#cc3311", linestyle=":", label="goal")
    plt.xlabel("ms from the trigger")
    plt.ylabel("share of the triggers")
    plt.title("From a trigger to the suspicion (exit: to the end of the look)")
    plt.legend()
    plt.grid(True, alpha=0.2)
    save(directory, "latency")


def growth(found: Found, directory: Path) -> None:
    """The whole look, its system calls and the memory, over the number of containers."""
    rows = found["rows"]
    counts = [row["containers"] for row in rows]
    drawn = {
        "CPU of one look, ms": [row["cpu"]["median"] * 1e3 for row in rows],
        "system calls of one look": [row["syscalls"].get("all", 0) for row in rows],
        "RSS, MB": [row["memory"]["rss"] for row in rows],
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 4))
    for axis, (name, values) in zip(axes, drawn.items()):
        axis.plot(counts, values, "-o", color=COLOURS["orphand"])
        axis.set_title(name)
        axis.set_xlabel("containers")
        axis.set_ylim(bottom=0)
        axis.grid(True, alpha=0.2)
    figure.suptitle("A look with all sources on")
    save(directory, "growth")


def idle(found: Found, directory: Path) -> None:
    """CPU, wake-ups and memory of the idle daemons."""
    names = list(found["by"])
    drawn = {
        "CPU, % of a core": [found["by"][n]["share of a core"] * 100 for n in names],
        "wake-ups a minute": [found["by"][n]["wake-ups a minute"] for n in names],
        "RSS, MB": [found["by"][n]["memory"]["rss"] for n in names],
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 4))
    for axis, (name, values) in zip(axes, drawn.items()):
        axis.bar(names, values, color=[colour(n) or "#999999" for n in names])
        axis.set_title(name)
        axis.tick_params(axis="x", labelrotation=20)
    figure.suptitle(f"Idle, with {found['containers']} containers")
    save(directory, "idle")


PLOTS = {"rescan": rescan, "latency": latency, "growth": growth, "idle": idle}


def main() -> None:
    found, directory = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for name, plot in PLOTS.items():
        if name in found["parts"]:
            plot(found["parts"][name], directory)


main()
