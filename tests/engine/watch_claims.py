# SPDX-License-Identifier: Apache-2.0
"""Run in a test host: look and ask without a pause, and print every no about a container that still lives.

watch_claims.py SECONDS SETTLE
"""

from __future__ import annotations

import json
import sys
import time

from orphand.authorities.bench import Bench
from orphand.model import Claim, Role
from orphand.settings import Scan, Settings
from orphand.sightings import Looker


def main(seconds: str, settle: str) -> None:
    bench = Bench(Settings(scan=Scan(settle=float(settle))))
    looker = Looker()
    denied, looks, seen = [], 0, set()
    until = time.monotonic() + float(seconds)
    while time.monotonic() < until:
        sightings = looker.look(looks % 20 == 0)
        looks += 1
        heard = bench.hear(sightings)
        for sighting in sightings:
            seen.add(sighting.container_id)
            owners = [t for t in heard[sighting.key] if t.role is Role.OWNER]
            if any(t.claim in (Claim.UNKNOWN, Claim.DISOWNED) for t in owners) and looker.again(sighting):
                denied.append([sighting.container_id, [f"{t.claim.value} {t.detail}" for t in owners]])
    print(json.dumps({"looks": looks, "seen": len(seen), "denied": denied}))
    bench.close()


main(*sys.argv[1:])
