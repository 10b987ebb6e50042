"""How many calibration images does it take? The same ranks, with moments and fits from ever more images.

    python benchmarks/calibration.py --checkpoint resnet20.th --data folder:PATH

At each budget one configuration, the policy's most probable one, is compressed and reconstructed with the moments of so
many training images, drawn anew for each seed, without any training: points of test accuracy lost, mean and standard
deviation. Writes calibration.json after every row and goes on where it was, then calibration.md and a figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `benchmarks` and `common` are found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cifar_resnet import MEAN, STD, from_checkpoint, network_name
from benchmarks.rows import command, resumed
from common import data
from common.compress import factorize
from common.configuration import Configuration
from common.files import write_text
from common.finetune import evaluate
from common.provenance import provenance
from common.ranks import CostMeasure, build_menus
from common.reports import mean_and_deviation
from common.search import (
    MenuCosts,
    Policy,
    Screener,
    blended_sensitivity,
    configuration,
    measured_sensitivity,
    sensitivity_images,
)


def policy_modes(model: nn.Module, dataset: data.Dataset, budgets: Sequence[float], images: int) -> dict[float, str]:
    """Budget -> the policy's most probable configuration, found with this many calibration images of seed 0."""
    calibration = dataset.train.sample(images, 0)
    factors = factorize(model, calibration)
    menus = build_menus(factors)
    measured = measured_sensitivity(factors, menus, sensitivity_images(calibration))
    sensitivity = blended_sensitivity(menus, measured)
    costs = MenuCosts.of(factors, menus, CostMeasure())
    return {b: str(configuration(menus, Policy.solve(sensitivity, costs, b).mode())) for b in budgets}


def rows_of(
    model: nn.Module, dataset: data.Dataset, configs: Mapping[float, str], count: int, seed: int, screen: int
) -> list[dict[str, Any]]:
    """One row per budget: what its configuration is worth with the moments of `count` images drawn by this seed."""
    started = time.perf_counter()
    images = dataset.train.sample(count, seed)
    factors = factorize(model, images)
    screener = Screener(factors, images, dataset.val, limit=screen)
    shared, rows = time.perf_counter() - started, []
    for budget, text in configs.items():
        started = time.perf_counter()
        network = screener.build(Configuration.parse(text))
        seconds = shared + time.perf_counter() - started
        accuracy = evaluate(network, dataset.test).accuracy
        row = {"images": count, "seed": seed, "budget": budget, "test_accuracy": accuracy, "seconds": seconds}
        rows.append({**row, "divergence": screener.distance(network)})
    return rows


def table(content: Mapping[str, Any]) -> str:
    """Points lost by number of images, a column per budget, and the seconds that factorising and fitting took."""
    rows, dense = content["rows"], content["dense"]
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    lines = []
    for count in sorted({row["images"] for row in rows}):
        own = [row for row in rows if row["images"] == count]
        cells = [
            mean_and_deviation([100 * (dense - r["test_accuracy"]) for r in own if r["budget"] == b]) for b in budgets
        ]
        lines.append([f"{count:,}", *cells, f"{statistics.median(row['seconds'] for row in own):.1f}"])
    heads = ["images", *(f"points lost, {budget:.0%}" for budget in budgets), "seconds"]
    seeds, facts = len({row["seed"] for row in rows}), content["provenance"]
    notes = [
        f"{content['network']}, no training, the same ranks in a column; columns are shares of the dense FLOPs.",
        f"Mean ± standard deviation over {seeds} draw{'s' if seeds > 1 else ''} of the images.",
        f"Dense: {dense:.4f} on test.",
        f"Seconds to factorise and to fit one candidate, {facts['threads']} threads of an {facts['machine']}.",
    ]
    return tabulate(lines, headers=heads, tablefmt="github", disable_numparse=True) + "\n\n" + " ".join(notes)


def figure(content: Mapping[str, Any]) -> Figure:
    """Points lost against the number of images: every draw a point, their mean a line, per budget."""
    drawn = Figure(figsize=(6.5, 4), layout="constrained")
    axes = drawn.subplots()
    rows, dense = content["rows"], content["dense"]
    for place, budget in enumerate(sorted({row["budget"] for row in rows}, reverse=True)):
        own = [(row["images"], 100 * (dense - row["test_accuracy"])) for row in rows if row["budget"] == budget]
        counts = sorted({count for count, _ in own})
        means = [statistics.mean(lost for count, lost in own if count == at) for at in counts]
        axes.plot(counts, means, "-", color=f"C{place}", label=f"{budget:.0%} of the FLOPs")
        axes.plot(*zip(*own, strict=True), "o", color=f"C{place}", markersize=4, alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Calibration images")
    axes.set_ylabel("Points of test accuracy lost, no training")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(content["network"])
    return drawn


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 2 for bad input, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    return command(options.out, "calibration", lambda: _run(options), table, figure)


def _run(options: argparse.Namespace) -> dict[str, Any]:
    if min(options.counts) < 2:
        raise ValueError(f"--counts must be at least 2 images; got {min(options.counts)}")
    dataset = data.load(options.data, image_size=32, mean=MEAN, std=STD)
    if max(options.counts) > len(dataset.train):
        raise ValueError(
            f"--counts: {max(options.counts)} images asked for, there are {len(dataset.train)} to train on"
        )
    model = from_checkpoint(options.checkpoint)
    target = options.out / "calibration.json"
    asked = {name: getattr(options, name) for name in ("budgets", "reference", "screen")}
    content = resumed(target, {"asked": asked, "configs": {}, "rows": [], "provenance": provenance("cpu", 0)})
    if not content["configs"]:
        content["network"] = network_name(model)
        content["dense"] = evaluate(model, dataset.test).accuracy
        found = policy_modes(model, dataset, options.budgets, options.reference)
        content["configs"] = {str(budget): text for budget, text in found.items()}
        write_text(target, json.dumps(content, indent=1) + "\n")
    configs = {float(budget): text for budget, text in content["configs"].items()}
    done = {(row["images"], row["seed"]) for row in content["rows"]}
    left = [(count, seed) for count in options.counts for seed in options.seeds if (count, seed) not in done]
    for count, seed in tqdm(left, desc=content["network"], unit="draw"):
        content["rows"] += rows_of(model, dataset, configs, count, seed, options.screen)
        write_text(target, json.dumps(content, indent=1) + "\n")
    return content


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="state dict of ResNet-20 or ResNet-56")
    parser.add_argument("--data", default="cifar10", help="cifar10 or folder:PATH (default: cifar10)")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.35])
    parser.add_argument("--counts", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the draws of images")
    parser.add_argument("--reference", type=int, default=512, metavar="IMAGES", help="that the ranks are chosen with")
    parser.add_argument("--screen", type=int, default=1000, metavar="IMAGES", help="that the divergence is of")
    parser.add_argument("--out", type=Path, default=Path("results/calibration"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
