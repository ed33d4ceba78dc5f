# SPDX-License-Identifier: Apache-2.0
"""Run in a test host: what everybody on the bench says of every container, as JSON.

ask.py SETTLE TIMEOUT [DOCKER_SOCKET...]
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from orphand.authorities.bench import Bench
from orphand.model import Sighting, Testimony
from orphand.settings import DockerEngine, Scan, Settings
from orphand.sightings import Looker


def said(sighting: Sighting, testimonies: tuple[Testimony, ...]) -> dict[str, Any]:
    return {
        "id": sighting.container_id,
        "namespace": sighting.namespace,
        "address": sighting.address,
        "foreign": sighting.foreign,
        "said": {
            f"{t.authority} {t.role.value}": {"claim": t.claim.value, "detail": t.detail, "veto": t.veto, "pid": t.pid}
            for t in testimonies
        },
    }


def main(settle: str, timeout: str, *sockets: str) -> None:
    docker = tuple(DockerEngine(s) for s in sockets) or None
    bench = Bench(Settings(scan=Scan(settle=float(settle), timeout=float(timeout)), docker=docker))
    sightings = Looker().look(True)
    started = time.monotonic()
    heard = bench.hear(sightings, everybody=True)
    seconds = time.monotonic() - started
    engines = [{"name": e.name, "address": e.address, "problem": e.problem} for e in bench.engines()]
    proven = {e.socket: [e.containerd, e.proven] for e in bench.dockers()}
    print(json.dumps({
        "containers": [said(s, heard[s.key]) for s in sightings],
        "engines": engines,
        "proven": proven,
        "data_roots": bench.data_roots(),
        "seconds": seconds,
    }, indent=1))  # fmt: skip
    bench.close()


main(*sys.argv[1:])
