# SPDX-License-Identifier: Apache-2.0
"""The churn test: thousands of container lives on real engines, with orphans among them, and an oracle that counts.

    make test-churn N=300                                   # or, with every option:
    python3 -m tests.churn --lives 5100 --seed 7 --cgroup v1 --suite bookworm --every 100 --save out --json out.json

It boots a throw-away host (tests/host), starts orphand there with policy kill, and a driver that lives N container
lives while the engines are restarted, killed and stopped. Orphans of every kind are made between them. The same seed
makes the same plan; what the engines make of it differs, since they race.

    plan.py      from a seed to lives, injections and disturbances; pure
    engine.py    Docker's API over its socket
    book.py      the oracle's own record: what was created, done and seen to die; judges each death
    watch.py     pidfds of inits and shims; what is left of an id; who lives that nobody knows
    life.py      one life, from create to gone
    chaos.py     orphans by tests/engine/orphans.sh; engines restarted, killed, stopped; load on the disk
    driver.py    runs inside the host: all of the above, and the verdict on the run
    saboteur.py  a stand-in for orphand that kills managed containers: the oracle must catch it
    __main__.py  outside: boots the host, shows progress, saves logs

The oracle uses no code of orphand's. A managed container counts as killed when a record of orphand's says that it
ended one (ENDING, ENDED, END_FAILED) whose removal the driver had not asked for, or when an init died without a cause:
no kill, stop, restart or rm of the driver's, no exit that the container itself announced (it writes a mark first), no
restart of dockerd while live-restore was off.
"""
