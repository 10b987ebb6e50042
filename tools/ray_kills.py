"""What a run on Ray's workers survives, counted: python tools/ray_kills.py [--kills 20] [--out FILE]

A cluster of three nodes on this machine; while runs go on there, workers, nodes and the driver are killed at random
moments, and started again. Every run must come to the records of one that ran in this process undisturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `common` and `tools` are found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.files import write_text
from common.provenance import provenance
from tools.reliability import outcome, searched

MOST_SECONDS = 240
"""A run that takes longer than this, kills and all, has hung."""


class Nodes:
    """A head and two nodes of Ray's on this machine, of which the two may be lost."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self._others = [self._cluster.add_node(num_cpus=1) for _ in range(2)]

    @property
    def address(self) -> str:
        return self._cluster.address

    def lose(self, chance: random.Random) -> None:
        """Kill one of the two, and start another in its place."""
        self._cluster.remove_node(self._others.pop(chance.randrange(2)), allow_graceful=False)
        self._others.append(self._cluster.add_node(num_cpus=1))

    def shutdown(self) -> None:
        self._cluster.shutdown()


def workers() -> list[int]:
    """Process numbers of the actors that run on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith((b"ray::Worker", b"ray::TrainingWorker")):
                found.append(int(path.parent.name))
    return found


def killed_runs(kills: int, seed: int, nodes: Nodes, base: Path) -> Counter[str]:
    """Runs on the cluster, one after the other, until so many kills have been dealt."""
    found: Counter[str] = Counter()
    context = multiprocessing.get_context("spawn")
    searched(str(base / "whole"))
    whole = outcome(base / "whole")
    knobs = {"executor": "ray", "address": nodes.address, "workers": 2, "threads": 1}
    while sum(found[f"{what} killed"] for what in ("workers", "nodes", "drivers")) < kills:
        number = found["runs"]
        folder, began = base / str(number), time.monotonic()
        chance = random.Random(f"ray {seed} {number}")
        driver = _start(context, folder, knobs)
        while driver.is_alive() and time.monotonic() < began + MOST_SECONDS:
            driver.join(chance.uniform(1.0, 6.0))
            if not driver.is_alive():
                break
            what = chance.choice(("workers", "workers", "nodes", "drivers"))
            there = workers()
            if what == "workers" and there:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(there), signal.SIGKILL)
                    found["workers killed"] += 1
            elif what == "nodes":
                nodes.lose(chance)
                found["nodes killed"] += 1
            elif what == "drivers":
                os.kill(driver.pid, signal.SIGKILL)
                driver.join()
                found["drivers killed"] += 1
                driver = _start(context, folder, knobs)
        hung = driver.is_alive()
        driver.kill()
        found["runs"] += 1
        found["runs that hung or failed"] += hung or driver.exitcode != 0
        if not hung and driver.exitcode == 0:
            own = outcome(folder)
            found["runs that differ"] += own != whole
            for one, other in zip(own, whole, strict=False):
                differing = {key: (one.get(key), value) for key, value in other.items() if one.get(key) != value}
                if differing:
                    print(f"run {number}, {other['trial']}, {other['status']}: {differing}", file=sys.stderr)
        print(dict(found), flush=True)
    return found


def _start(context: Any, folder: Path, knobs: dict[str, Any]) -> Any:
    process = context.Process(target=searched, args=(str(folder),), kwargs=knobs)
    process.start()
    return process


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0; 1 where a run hung, failed or came to other records."""
    parser = argparse.ArgumentParser(description="Kill Ray's workers, nodes and drivers, and count what is lost.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/scale/kills.json"))
    options = parser.parse_args(arguments)
    # Beside other programs, workers of the usual niceness would hardly run.
    os.environ.update(OMP_NUM_THREADS="1", RAY_worker_niceness="0")
    nodes = Nodes()
    try:
        with tempfile.TemporaryDirectory() as base:
            found = killed_runs(options.kills, options.seed, nodes, Path(base))
    finally:
        nodes.shutdown()
    write_text(
        options.out, json.dumps({"counts": found, "provenance": provenance("cpu", options.seed)}, indent=1) + "\n"
    )
    return 1 if found["runs that hung or failed"] or found["runs that differ"] else 0


if __name__ == "__main__":
    sys.exit(main())
