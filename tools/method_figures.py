"""The figures of docs/method.md, drawn from a trained network: tree, HSVD, moments, policy, screening.

    python tools/method_figures.py --model resnet18 --dataset mnist --image-size 32

Writes docs/figures/*.png, and figures.json with every number that is drawn and where it comes from.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `common` and `finetuned` are found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import data
from common import notebook as report
from common.compress import ModelFactors, factorize, htucker
from common.files import write_text
from common.finetune import baseline
from common.provenance import provenance
from common.ranks import build_menus, uniform
from common.reports import plots
from common.search import MenuCosts, Policy, Screener, blended_sensitivity, measured_sensitivity

FRACTIONS = (0.10, 0.15, 0.20, 0.25, 0.35, 0.50)
BASES = {"weight": "weights alone", "input": "whitened input", "both": "whitened input and output moments"}
BOX = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "black"}


def tree_figure() -> Figure:
    """The dimension tree of a kernel, and the chain of convolutions that a truncated one is."""
    nodes = {
        "W[out, in, kh, kw]": (0.5, 0.92),
        "(in, kh)": (0.28, 0.68),
        "(kw, out)": (0.72, 0.68),
        "in": (0.16, 0.44),
        "kh": (0.40, 0.44),
        "kw": (0.60, 0.44),
        "out": (0.84, 0.44),
    }
    edges = {
        ("W[out, in, kh, kw]", "(in, kh)"): "r_mid",
        ("W[out, in, kh, kw]", "(kw, out)"): "",
        ("(in, kh)", "in"): "r_in",
        ("(in, kh)", "kh"): "full",
        ("(kw, out)", "kw"): "full",
        ("(kw, out)", "out"): "r_out",
    }
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for (above, below), rank in edges.items():
        (x, y), (u, v) = nodes[above], nodes[below]
        axes.plot([x, u], [y, v], color="0.5", zorder=0)
        axes.text((x + u) / 2, (y + v) / 2 + 0.02, rank, ha="center", fontsize=9, style="italic")
    for label, (x, y) in nodes.items():
        axes.text(x, y, label, ha="center", va="center", bbox=BOX)
    stages = ("1 x 1\nC_in -> r_in", "k_h x 1\nr_in -> r_mid", "1 x k_w\nr_mid -> r_out", "1 x 1\nr_out -> C_out")
    for place, stage in enumerate(stages):
        axes.text(0.14 + 0.24 * place, 0.12, stage, ha="center", va="center", bbox=BOX | {"facecolor": "0.93"})
        if place:
            arrow = {"arrowstyle": "->", "color": "0.3"}
            start, end = 0.14 + 0.24 * (place - 1) + 0.08, 0.14 + 0.24 * place - 0.085
            axes.annotate("", (end, 0.12), (start, 0.12), arrowprops=arrow)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    return figure


def hsvd_curves(kernel: torch.Tensor) -> dict[str, tuple[list[int], list[float]]]:
    """Label -> (ranks, relative errors) of HSVD with equal ranks, the bound, and the least that any tensor could do.

    Args:
        kernel: ``(C_out, C_in, k_h, k_w)``, of the trained network.
    """
    tree = htucker.DimensionTree(((1, 2), (3, 0)))
    kernel = kernel.double()
    values, limits = htucker.node_singular_values(kernel, tree), htucker.max_ranks(kernel.shape, tree)
    norm = float(kernel.norm())
    ranks = list(range(8, min(limits[(1,)], limits[(0,)]) + 1, 8))
    curves: dict[str, list[float]] = {
        "bound: root of all discarded": [],
        "error of HSVD": [],
        "best possible is above": [],
    }
    for rank in ranks:
        chosen = {node: min(rank, limit) for node, limit in limits.items()}
        error = float((htucker.hsvd(kernel, tree, ranks=chosen).to_dense() - kernel).norm())
        curves["error of HSVD"].append(error / norm)
        curves["bound: root of all discarded"].append(htucker.error_bound(values, chosen, tree) / norm)
        # No tensor of these ranks can beat the discarded part of any single node.
        least = max(float(values[node][kept:].square().sum().sqrt()) for node, kept in chosen.items())
        curves["best possible is above"].append(least / norm)
    return {label: (ranks, errors) for label, errors in curves.items()}


def moments_figure(measured: Mapping[str, list[float]]) -> Figure:
    """Accuracy without training against the uniform rank fraction, one line for each kind of bases."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for place, (name, label) in enumerate(BASES.items()):
        axes.plot(FRACTIONS, measured[name], marker="osD"[place], linestyle=("-.", "--", "-")[place], label=label)
    axes.axhline(measured["dense"][0], color="0.6", linewidth=1)
    axes.set(xlabel="Ranks as a fraction of the channels", ylabel="Validation accuracy, no training (grey: dense)")
    axes.grid(alpha=0.3)
    axes.legend(title="bases from")
    return figure


def screened_accuracies(factors: Mapping[str, ModelFactors], images: torch.Tensor, val: data.Split, limit: int) -> Any:
    """Bases -> accuracy at each of FRACTIONS; "dense" -> the dense network's, all on the same images."""
    measured = {}
    for name, one in factors.items():
        screener = Screener(one, images, val, limit=limit)
        measured[name] = [screener.screen(uniform(one, fraction)).accuracy for fraction in FRACTIONS]
        measured["dense"] = [screener.screen({}).accuracy]
    return measured


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        dataset = data.load(options.dataset, image_size=options.image_size)
        dense = baseline(options.model, dataset)
        images = dataset.train.sample(min(1024, len(dataset.train)), 0)
        factors = {name: factorize(dense.model, images, bases=name) for name in BASES}
        drawn = {
            "hsvd": hsvd_curves(dense.model.get_submodule(options.layer).weight.detach()),
            "moments": screened_accuracies(factors, images, dataset.val, options.screen),
        }
        menus = build_menus(factors["both"])
        measured = measured_sensitivity(factors["both"], menus, images[:256])
        policy = Policy.solve(
            blended_sensitivity(menus, measured), MenuCosts.of(factors["both"], menus), options.budget, temperature=1.0
        )
    except (ValueError, AttributeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    figures = {
        "tree": tree_figure(),
        "hsvd": plots.error_against_rank(drawn["hsvd"], title=f"{options.layer}: all ranks cut to the same number"),
        "moments": moments_figure(drawn["moments"]),
        "policy": plots.policy_heatmap(report.policy_rows(policy), title=f"Policy at {options.budget:.0%}, T = 1"),
    }
    for name, figure in figures.items():
        plots.save(figure, options.out / f"{name}.png")
    content = {"provenance": provenance("cpu", 0), "fractions": FRACTIONS, **drawn}
    write_text(options.out / "figures.json", json.dumps(content, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Draw the figures of docs/method.md.")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--image-size", type=int, default=32, metavar="PIXELS")
    parser.add_argument("--layer", default="layer1.0.conv2", help="whose kernel is decomposed in the figure of HSVD")
    parser.add_argument("--budget", type=float, default=0.15, help="share of the dense FLOPs in the policy's figure")
    parser.add_argument("--screen", type=int, default=2000, metavar="IMAGES", help="validation images")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), metavar="DIR")
    return parser


if __name__ == "__main__":
    sys.exit(main())
