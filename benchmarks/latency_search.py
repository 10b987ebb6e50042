"""What to count in a search: FLOPs, or measured time? Networks found for either, deployed alike and timed in turns.

    python benchmarks/latency_search.py --checkpoint resnet56.th --data folder:PATH --image-size 32
    python benchmarks/latency_search.py --weights finetuned/saved_models/resnet18_mnist_224.safetensors --data mnist

The same policy, candidates and images with menus priced three ways: FLOPs, the time of each layer alone, and its time
in networks of its like (see `common.ranks.timed_menus`). At each budget the candidate of least divergence on validation
images is taken, without training. Writes latency-search.json, .md and a figure into --out. Let nothing else run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `benchmarks` and `common` are found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cifar_resnet import MEAN, STD, from_checkpoint, network_name
from common import data
from common.compress import factorize
from common.configuration import Configuration
from common.cost import latency_samples
from common.deploy import deploy
from common.files import atomic_path, write_text
from common.finetune import evaluate
from common.models import load_checkpoint
from common.provenance import provenance
from common.ranks import CostMeasure, Menus, build_menus, time_menus
from common.search import (
    Screener,
    Search,
    SearchSettings,
    blended_sensitivity,
    measured_sensitivity,
    sensitivity_images,
)

COSTS = ("FLOPs", "time alone", "time in the network")


class Bench:
    """One network with its factors, menus and sensitivities; what all three searches have in common."""

    def __init__(self, model: nn.Module, dataset: data.Dataset, options: argparse.Namespace) -> None:
        self.model, self.dataset, self.options = model, dataset, options
        self.images = dataset.train.sample(options.calibration, options.seed)
        self.example = self.images[: options.batch].clone()
        self.factors = factorize(model, self.images)
        self.screener = Screener(self.factors, self.images, dataset.val, limit=options.screen)
        self.menus = build_menus(self.factors)
        self.measured = measured_sensitivity(self.factors, self.menus, sensitivity_images(self.images))

    def priced(self, kind: str) -> tuple[Menus, CostMeasure]:
        """The menus and what they are priced by."""
        if kind == "FLOPs":
            return self.menus, CostMeasure()
        inside = kind == "time in the network"
        times = time_menus(self.factors, self.menus, self.example, runtime=self.options.runtime, in_network=inside)
        return times.priced(self.factors, self.menus)

    def found(self, kind: str) -> list[dict[str, Any]]:
        """One row per budget that can be met: the candidate of least divergence."""
        menus, cost = self.priced(kind)
        kept = {name: {entry.ranks for entry in menu} for name, menu in menus.items()}
        measured = {
            name: tuple(
                value
                for entry, value in zip(self.menus[name], self.measured[name], strict=True)
                if entry.ranks in kept[name]
            )
            for name in menus
        }
        sensitivity, rows = blended_sensitivity(menus, measured), []
        for budget in self.options.budgets:
            settings = SearchSettings(
                budgets=(budget,), candidates=self.options.candidates, cost=cost, seed=self.options.seed
            )
            try:
                records = Search(self.screener, menus, sensitivity, settings).run()
            except ValueError as reason:
                print(f"{kind}, {budget}: {reason}", file=sys.stderr)
                continue
            screened = [record for record in records if record["status"] == "screened"]
            if screened:
                best = min(screened, key=lambda record: record["divergence"])
                rows.append({"cost": kind, "budget": budget, "config_str": str(best["config"]), **_facts(best)})
        return rows

    def timed(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The rows with test accuracy and time; and the dense network's. All are timed in turns."""
        networks = {"dense": self.model}
        networks |= {str(i): self.screener.build(Configuration.parse(r["config_str"])) for i, r in enumerate(rows)}
        runs = {
            name: deploy(network, self.example, runtime=self.options.runtime).run
            for name, network in tqdm(networks.items(), desc="deploying", unit="network")
        }
        load = os.getloadavg()[0]
        samples = latency_samples(runs, self.example, rounds=self.options.rounds)
        facts = {
            name: {
                "test_accuracy": evaluate(network, self.dataset.test, limit=self.options.test).accuracy,
                "seconds": statistics.median(samples[name]),
                "speedup": statistics.median(d / s for d, s in zip(samples["dense"], samples[name], strict=True)),
            }
            for name, network in networks.items()
        }
        return [{**row, **facts[str(i)]} for i, row in enumerate(rows)], {**facts["dense"], "load_average": load}


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("flops", "params", "divergence", "val_accuracy")}


def table(content: Mapping[str, Any]) -> str:
    """A line per network, from the slowest to the fastest of each cost."""
    dense, facts = content["dense"], content["provenance"]
    lines = [
        [
            row["cost"],
            f"{row['budget']:.0%}",
            f"{row['flops'] / content['dense_flops']:.1%}",
            f"{row['divergence']:.4f}",
            f"{100 * (dense['test_accuracy'] - row['test_accuracy']):.2f}",
            f"{1e3 * row['seconds']:.2f}",
            f"{row['speedup']:.2f}x",
        ]
        for row in content["rows"]
    ]
    heads = ["counted", "budget", "FLOPs kept", "divergence", "points lost", "ms per batch", "speed-up"]
    parts = [tabulate(lines, headers=heads, tablefmt="github", disable_numparse=True), *leads(content)]
    parts.append(
        f"{content['network']}, {content['image_size']} px, {content['runtime']}, batch {content['batch']}; no "
        f"training; the best of {content['candidates']} candidates by divergence on validation; dense: "
        f"{dense['test_accuracy']:.4f} on test, {1e3 * dense['seconds']:.2f} ms. {facts['machine']}, "
        f"{facts['threads']} threads, revision {facts['git_revision']}, load average before the timings "
        f"{dense['load_average']:.1f}."
    )
    return "\n\n".join(parts)


def leads(content: Mapping[str, Any]) -> list[str]:
    """How much faster networks found for time are than those found for FLOPs, at the same divergence."""
    curves = {
        kind: sorted((row["speedup"], row["divergence"]) for row in content["rows"] if row["cost"] == kind)
        for kind in COSTS
    }
    found = []
    for kind in COSTS[1:]:
        ratios = [
            at / speedup
            for speedup, divergence in curves["FLOPs"]
            if (at := speed_at(curves[kind], divergence)) is not None
        ]
        if ratios:
            said = f"{min(ratios):.2f} to {max(ratios):.2f} times as fast" if len(ratios) > 1 else f"{ratios[0]:.2f}"
            found.append(f"Found by {kind}: {said} as those found by FLOPs of the same divergence ({len(ratios)}).")
    return found


def speed_at(curve: Sequence[tuple[float, float]], divergence: float) -> float | None:
    """The largest speed-up at which a curve of (speed-up, divergence) has this divergence, between its points."""
    reached = None
    for (slow, low), (fast, high) in pairwise(curve):
        if min(low, high) <= divergence <= max(low, high):
            share = 0.0 if high == low else (divergence - low) / (high - low)
            reached = slow + share * (fast - slow)
    return reached


def figure(content: Mapping[str, Any]) -> Figure:
    """Divergence against speed-up, a line per cost."""
    drawn, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for kind in COSTS:
        points = sorted((row["speedup"], row["divergence"]) for row in content["rows"] if row["cost"] == kind)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=f"found by {kind}")
    axes.set_yscale("log")
    axes.set_xlabel(f"speed-up in {content['runtime']}, batch {content['batch']}")
    axes.set_ylabel("divergence from the dense network")
    axes.set_title(f"{content['network']}, {content['image_size']} px, no training")
    axes.legend()
    return drawn


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        if options.checkpoint is not None:
            model = from_checkpoint(options.checkpoint)
            network = network_name(model)
        else:
            model, header = load_checkpoint(options.weights)
            network = header["architecture"]
        own = {} if options.checkpoint is None else {"mean": MEAN, "std": STD}
        dataset = data.load(options.data, image_size=options.image_size, **own)
        bench = Bench(model, dataset, options)
        rows, dense = bench.timed([row for kind in options.costs for row in bench.found(kind)])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    content = {
        "network": network,
        "dense": dense,
        "dense_flops": bench.factors.dense_flops,
        **{key: getattr(options, key) for key in ("image_size", "runtime", "batch", "candidates", "calibration")},
        "rows": rows,
        "provenance": provenance("cpu", options.seed),
    }
    out = options.out or Path("results") / f"latency-search-{network.lower()}-{options.runtime}"
    write_text(out / "latency-search.json", json.dumps(content, indent=1) + "\n")
    write_text(out / "latency-search.md", table(content) + "\n")
    with atomic_path(out / "latency-search.png") as temporary:
        figure(content).savefig(temporary, format="png", dpi=120)
    print(table(content))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--checkpoint", type=Path, metavar="PATH", help="state dict of CIFAR-10's ResNet-20 or -56")
    given.add_argument("--weights", type=Path, metavar="PATH", help="a baseline of finetune_models.py (.safetensors)")
    parser.add_argument("--data", default="mnist", help="data set, or folder:PATH (default: mnist)")
    parser.add_argument("--image-size", type=int, default=224, metavar="PIXELS")
    parser.add_argument("--runtime", default="onnxruntime", help="onnxruntime (default) or openvino")
    parser.add_argument("--batch", type=int, default=16, help="images per batch (default: 16)")
    parser.add_argument("--costs", nargs="+", choices=COSTS, default=list(COSTS), metavar="COST", help=", ".join(COSTS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.65, 0.5, 0.35])
    parser.add_argument("--candidates", type=int, default=16, help="screened per budget (default: 16)")
    parser.add_argument("--calibration", type=int, default=256, metavar="IMAGES")
    parser.add_argument("--screen", type=int, default=512, metavar="IMAGES", help="for divergences (default: 512)")
    parser.add_argument("--test", type=int, default=2000, metavar="IMAGES", help="for accuracies (default: 2000)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: results/latency-search-NETWORK-RUNTIME")
    return parser


if __name__ == "__main__":
    sys.exit(main())
