"""How a search grows: with candidates and workers, simulated; and what Ray's workers cost and bring, measured.

    python benchmarks/scale.py steps
    python benchmarks/scale.py simulate
    python benchmarks/scale.py workers --workers 2 4 8 16
    python benchmarks/scale.py overhead --workers 2
    python benchmarks/scale.py --blocks 9 sensitivity

steps: factorisation, menus, sensitivity, a candidate, by layers and images. simulate: the real search (policy, study,
log) with screening in place of which a duration is drawn; the workers' clock is simulated, the driver's is real.
workers: candidates that sleep for a second, on Ray's workers. overhead: a real search on noise, in this process and on
workers, in turn. sensitivity: the longest step, by whole passes, with the beginnings of passes kept, on workers.

Writes one JSON file per command into --out, and tables into its scale.md.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `benchmarks` and `common` are found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cifar_resnet import CifarResNet
from benchmarks.scale_tables import tables
from common.compress import ModelFactors, factorize
from common.configuration import Configuration
from common.files import write_text
from common.provenance import provenance
from common.ranks import CostMeasure, Menus, build_menus
from common.reports import RunLog
from common.search import (
    GENERATION,
    LocalExecutor,
    MenuCosts,
    Policy,
    RayExecutor,
    RaySettings,
    Screener,
    Screening,
    Search,
    SearchSettings,
    blended_sensitivity,
    configuration,
    measured_sensitivity,
    proxy_sensitivity,
    sensitivity_images,
)
from common.search.sensitivity import ANCHORS, divergences

BUDGET = 0.5

SPREAD = 0.3
"""Of the simulated durations: the standard deviation of their logarithm."""


class StandIn:
    """A screener that computes nothing: a divergence from the menus' proxies, and a duration that it sleeps or tells.

    Attributes:
        factors, targets, scored: as a `Screener` has them.
        median, spread: of the durations, seconds and the standard deviation of their logarithm.
        sleeps: whether screening takes that long.
    """

    def __init__(self, real: Screener, menus: Menus, *, median: float, spread: float, sleeps: bool) -> None:
        self.factors, self.targets, self.scored = real.factors, real.targets, False
        self.median, self.spread, self.sleeps = median, spread, sleeps
        self._worth = {
            (name, entry.ranks): value
            for name, menu in menus.items()
            for entry, value in zip(menu, proxy_sensitivity(menus)[name], strict=True)
        }

    def screen(self, config: Configuration) -> Screening:
        noise = np.random.default_rng(zlib.crc32(str(config).encode())).normal(size=2)
        seconds = self.median * math.exp(self.spread * noise[0])
        if self.sleeps:
            time.sleep(seconds)
        worth = sum(self._worth.get((name, ranks), 0.0) for name, ranks in config.items())
        factors = self.factors
        return Screening(0.9, worth * math.exp(0.2 * noise[1]), factors.params(config), factors.flops(config), seconds)


class SimulatedWorkers(LocalExecutor):
    """Screens in this process at once, and notes how long numbers of workers would have been at it."""

    def __init__(self, screener: StandIn, workers: Sequence[int]) -> None:
        super().__init__(screener)
        self.makespan = dict.fromkeys(workers, 0.0)
        self.own = 0.0

    def screen_all(self, configs: Sequence[Configuration]) -> Iterator[tuple[int, dict[str, Any]]]:
        began = time.perf_counter()
        found = list(super().screen_all(configs))
        self.own += time.perf_counter() - began
        for count in self.makespan:
            self.makespan[count] += makespan([record["seconds"] for _, record in found], count)
        yield from found


def makespan(seconds: Sequence[float], workers: int) -> float:
    """When the last of these jobs is done, each taken up in order by the worker that is free first."""
    free = [0.0] * min(workers, max(1, len(seconds)))
    for job in seconds:
        heapq.heapreplace(free, free[0] + job)
    return max(free)


def network_of(blocks: int, images: int = 32) -> tuple[ModelFactors, Menus, Screener]:
    """An untrained residual network of CIFAR-10's on noise: what a search costs does not depend on what it knows."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(images, 3, 32, 32), torch.arange(images) % 10
    model: nn.Module = CifarResNet(blocks).eval()
    factors = factorize(model, inputs)
    return factors, build_menus(factors), Screener(factors, inputs, [(inputs, labels)], limit=images)


def measure_steps(options: argparse.Namespace) -> dict[str, Any]:
    """What each step of a run takes, by the number of layers and of images; one candidate stands for its screening."""
    rows = []
    for blocks in options.depths:
        for images in options.images:
            torch.manual_seed(0)
            inputs, labels = torch.randn(images, 3, 32, 32), torch.arange(images) % 10
            seconds, model = {}, CifarResNet(blocks).eval()
            began = time.perf_counter()
            factors = factorize(model, inputs)
            seconds["factorize"] = time.perf_counter() - began
            began = time.perf_counter()
            menus = build_menus(factors)
            seconds["menus"] = time.perf_counter() - began
            few = sensitivity_images(inputs)
            began = time.perf_counter()
            sensitivity = blended_sensitivity(menus, measured_sensitivity(factors, menus, few, progress=False))
            seconds["sensitivity"] = time.perf_counter() - began
            screener = Screener(factors, inputs, [(inputs, labels)], limit=images)
            began = time.perf_counter()
            policy = Policy.solve(sensitivity, MenuCosts.of(factors, menus, CostMeasure()), BUDGET)
            seconds["policy"] = time.perf_counter() - began
            config = configuration(menus, policy.mode())
            screener.screen(config)
            seconds["a candidate"] = screener.screen(config).seconds
            entries = sum(len(menu) for menu in menus.values())
            network = f"ResNet-{6 * blocks + 2}"
            rows.append({"network": network, "layers": len(menus), "entries": entries, "images": images, **seconds})
            print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows}


def simulate(options: argparse.Namespace) -> dict[str, Any]:
    """One row per generation size: the driver's seconds by thousands of candidates, the workers' by their number."""
    _, menus, real = network_of(options.blocks)
    rows = []
    for size in options.generations:
        stand_in = StandIn(real, menus, median=options.seconds, spread=SPREAD, sleeps=False)
        with tempfile.TemporaryDirectory() as folder:
            rows += [{"generation": size, **row} for row in grow(stand_in, menus, size, options, Path(folder))]
        print(json.dumps(rows[-1]), flush=True)
    facts = {"blocks": options.blocks, "layers": len(menus), "median_seconds": options.seconds, "spread": SPREAD}
    return {**facts, "rows": rows}


def grow(stand_in: StandIn, menus: Menus, size: int, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A search that is given more and more candidates: what it took to go on, and to open what was there."""
    rows, workers = [], SimulatedWorkers(stand_in, sorted({1, *options.workers}))
    driver = 0.0
    for upto in (size * math.ceil(step / size) for step in options.steps):
        if rows and upto <= rows[-1]["candidates"]:
            continue
        began, workers.own = time.perf_counter(), 0.0
        with RunLog(folder / "run.log") as log:
            settings = SearchSettings(budgets=(BUDGET,), candidates=upto, generation=size)
            search = Search(stand_in, menus, proxy_sensitivity(menus), settings, folder / "state", log, workers)
            search.settings = replace(settings, candidates=rows[-1]["candidates"] if rows else size)
            search.run(progress=False)
            opening = time.perf_counter() - began - workers.own
            search.settings, began, workers.own = settings, time.perf_counter(), 0.0
            search.run(progress=False)
        driver += time.perf_counter() - began - workers.own
        rows.append({"candidates": upto, "opening": opening, "driver": driver, "makespan": dict(workers.makespan)})
    return rows


def measure_workers(options: argparse.Namespace) -> dict[str, Any]:
    """Sleeping candidates on Ray's workers: what share of the ideal is reached, and how long the start takes."""
    _, menus, real = network_of(options.blocks)
    stand_in = StandIn(real, menus, median=options.seconds, spread=0.0, sleeps=True)
    rows = []
    for count in options.workers:
        candidates, size = options.rounds * count, max(8, count)
        executor = RayExecutor(stand_in, RaySettings(workers=count, threads=1), most=count)
        try:
            began = time.perf_counter()
            executor.processes()
            start = time.perf_counter() - began
            settings = SearchSettings(budgets=(BUDGET,), candidates=candidates, generation=size)
            with tempfile.TemporaryDirectory() as folder, RunLog(Path(folder) / "run.log") as log:
                search = Search(
                    stand_in, menus, proxy_sensitivity(menus), settings, Path(folder) / "state", log, executor
                )
                began = time.perf_counter()
                search.run(progress=False)
                seconds = time.perf_counter() - began
        finally:
            executor.close()
        ideal = options.seconds * candidates / count
        rows.append({"workers": count, "candidates": candidates, "start": start, "seconds": seconds, "ideal": ideal})
        print(json.dumps(rows[-1]), flush=True)
    return {"seconds": options.seconds, "rows": rows}


def measure_overhead(options: argparse.Namespace) -> dict[str, Any]:
    """The same candidates in this process and on workers, a generation here and a generation there, in turn."""
    factors, menus, real = network_of(options.blocks, images=options.images)
    count = options.workers[0]
    policy = Search(real, menus, proxy_sensitivity(menus), SearchSettings(budgets=(BUDGET,))).policies[BUDGET]
    choices = [policy.sample(np.random.default_rng(number)) for number in range(options.candidates)]
    configs = [configuration(menus, choice) for choice in choices]
    size = options.generation
    local, spread = LocalExecutor(real), RayExecutor(real, RaySettings(workers=count), most=count)
    seconds = {"local": 0.0, "ray": 0.0}
    try:
        began = time.perf_counter()
        spread.processes()
        start = time.perf_counter() - began
        for place in tqdm(range(0, len(configs), size), desc="generations", unit="generation"):
            part = configs[place : place + size]
            pair = (("local", local), ("ray", spread)) if place // size % 2 else (("ray", spread), ("local", local))
            found = {}
            for name, executor in pair:
                began = time.perf_counter()
                found[name] = dict(executor.screen_all(part))
                seconds[name] += time.perf_counter() - began
            for one in range(len(part)):
                ours, theirs = (found[name][one]["divergence"] for name in ("local", "ray"))
                if not math.isclose(ours, theirs, rel_tol=1e-2):
                    raise AssertionError(f"{part[one]}: {ours} here, {theirs} on a worker")
    finally:
        spread.close()
    return {
        "network": f"ResNet-{6 * options.blocks + 2}",
        "layers": len(factors.layers),
        "images": options.images,
        "candidates": len(configs),
        "generation": size,
        "workers": count,
        "threads_local": torch.get_num_threads(),
        "start": start,
        **seconds,
    }


def time_sensitivity(options: argparse.Namespace) -> dict[str, Any]:
    """The divergences of all layers' menus, in each of the ways that there are, in turn."""
    factors, menus, real = network_of(options.blocks, images=options.images)
    images, count = real.targets.images, options.workers[0]
    spread = RayExecutor(real, RaySettings(workers=count), most=count)
    here = partial(divergences, factors, menus, images, "kl", ANCHORS, progress=False)
    ways = {
        "whole passes": partial(here, whole=True),
        "beginnings kept": here,
        f"on {count} workers": lambda: spread.divergences(menus, images, "kl", ANCHORS),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    try:
        spread.processes()
        for _ in tqdm(range(options.rounds), desc="rounds", unit="round"):
            for name, way in ways.items():
                began = time.perf_counter()
                found[name] = way()
                seconds[name].append(time.perf_counter() - began)
    finally:
        spread.close()
    whole = found["whole passes"]
    return {
        "network": f"ResNet-{6 * options.blocks + 2}",
        "layers": len(factors.layers),
        "images": options.images,
        "threads_local": torch.get_num_threads(),
        "seconds": seconds,
        "difference": max(
            abs(value - whole[layer][place])
            for one in found.values()
            for layer, values in one.items()
            for place, value in values.items()
        ),
    }


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        content = {**options.measure(options), "provenance": provenance("cpu", 0)}
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_text(options.out / f"{options.kind}.json", json.dumps(content, indent=1) + "\n")
    write_text(options.out / "scale.md", tables(options.out) + "\n")
    print(tables(options.out))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/scale"))
    parser.add_argument("--blocks", type=int, default=3, help="of each stage: 3 for ResNet-20, 9 for ResNet-56")
    kinds = parser.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("steps", help="what the steps of a run take")
    one.add_argument("--depths", type=int, nargs="+", default=[3, 9], help="blocks of each stage (default: 3 9)")
    one.add_argument("--images", type=int, nargs="+", default=[128, 512])
    one.set_defaults(measure=measure_steps)
    one = kinds.add_parser("simulate", help="thousands of candidates, up to thousands of workers")
    one.add_argument("--steps", type=int, nargs="+", default=[1000, 5000, 10_000], help="candidates")
    one.add_argument("--generations", type=int, nargs="+", default=[8, 64, 1000])
    one.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64, 1000])
    one.add_argument("--seconds", type=float, default=10.0, help="a candidate's, median (default: 10)")
    one.set_defaults(measure=simulate)
    one = kinds.add_parser("workers", help="sleeping candidates on Ray's workers")
    one.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8, 16])
    one.add_argument("--rounds", type=int, default=16, help="candidates of a worker (default: 16)")
    one.add_argument("--seconds", type=float, default=1.0, help="a candidate's (default: 1)")
    one.set_defaults(measure=measure_workers)
    one = kinds.add_parser("overhead", help="a real search here and on Ray's workers, in turn")
    one.add_argument("--workers", type=int, nargs=1, default=[2])
    one.add_argument("--candidates", type=int, default=100)
    one.add_argument("--generation", type=int, default=GENERATION)
    one.add_argument("--images", type=int, default=512, help="for the layers' fits and for screening (default: 512)")
    one.set_defaults(measure=measure_overhead)
    one = kinds.add_parser("sensitivity", help="the sensitivities by whole passes, with beginnings kept, on workers")
    one.add_argument("--workers", type=int, nargs=1, default=[2])
    one.add_argument("--images", type=int, default=128)
    one.add_argument("--rounds", type=int, default=3)
    one.set_defaults(measure=time_sensitivity)
    return parser


if __name__ == "__main__":
    sys.exit(main())
