# SPDX-License-Identifier: Apache-2.0
"""The ground for the other tests: recipes make what they say, neighbours live, a sweep leaves nothing."""

from __future__ import annotations

import pytest

from tests.host.guest import Host

NOTHING = "shims=0 processes=0 cgroups=0 bundles=0 runc-state=0 tasks=0 containers=0 docker=404"
RECIPES = {  # recipe: shims, processes, tasks of containerd's that are left
    "engine_orphan": (1, 1, 1),
    "stopped_orphan": (1, 0, 1),
    "leaked_shim": (1, 1, 0),
    "childless_shim": (1, 0, 0),
    "shimless": (0, 1, 0),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_makes_its_kind_of_orphan_and_a_sweep_ends_it(any_host: Host, recipe: str) -> None:
    full_id = any_host.sh("run2 victim")
    any_host.sh(f"{recipe} {full_id}")
    words = dict(word.split("=") for word in any_host.sh(f"left {full_id}").split())

    shims, processes, tasks = RECIPES[recipe]
    assert words["docker"] == "404"
    assert (int(words["shims"]), int(words["processes"]), int(words["tasks"])) == (shims, processes, tasks)

    any_host.sh("sweep $(docker ps -q --no-trunc)")
    assert any_host.sh(f"left {full_id}") == NOTHING


def test_a_v1_shim_is_one_and_leaks(v1_host: Host) -> None:
    full_id = v1_host.sh("run1 old")
    argv = v1_host.sh(f"tr '\\0' ' ' </proc/$(shim {full_id})/cmdline")
    assert "containerd-shim -namespace moby -workdir" in argv

    v1_host.sh(f"leaked_shim {full_id}")
    assert v1_host.sh(f"cut -d' ' -f4 /proc/$(shim {full_id})/stat") == "1", "its parent is PID 1"
    assert v1_host.sh(f"left {full_id}").startswith("shims=1 processes=1")


def test_a_pod_is_served_by_one_shim(v2_host: Host) -> None:
    v2_host.sh("pod p a b")
    assert v2_host.sh("pgrep -fc '^[^ ]*containerd-shim-runc-v2 -namespace k8s.io'") == "1"
    assert v2_host.sh("ctr -n k8s.io tasks ls -q | sort | tr '\\n' ' '") == "a b p"
