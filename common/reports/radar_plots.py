"""Compressed models beside their dense ones on five measures at once. See `common.plots`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes

from .method_plots import LINES, MARKERS

_RETENTION_SHOWN = (0.9, 1.0)


@dataclass(frozen=True)
class ModelResult:
    """A compressed model beside its dense one, for radar plots; reductions and accuracies are fractions.

    speedup: dense time / compressed time, None where not measured.
    """

    name: str
    params_reduction: float
    flops_reduction: float
    accuracy: float
    baseline_accuracy: float
    compression_rate: float
    speedup: float | None = None


def radar(models: Sequence[ModelResult], *, title: str = "") -> Figure:
    """Five measures of each model, every spoke with its scale; the dense model is the grey dashed line.

    A radar's area says nothing: show it with `radar_with_scatter`, or beside `accuracy_cost_scatter`.
    """
    figure = Figure(figsize=(6.5, 6.2), layout="constrained")
    _draw_radar(figure.add_subplot(projection="polar"), models)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    return figure


def radar_with_scatter(models: Sequence[ModelResult], *, title: str = "") -> Figure:
    """The radar and, beside it, accuracy lost against FLOPs kept for the same models."""
    figure = Figure(figsize=(12, 5.8), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(1.1, 1))
    polar = figure.add_subplot(grid[0], projection="polar")
    _draw_radar(polar, models)
    axes = figure.add_subplot(grid[1])
    for place, model in enumerate(models):
        axes.scatter(
            100 * (1 - model.flops_reduction),
            100 * (model.accuracy - model.baseline_accuracy),
            s=70,
            marker=MARKERS[place % len(MARKERS)],
            color=f"C{place}",
            edgecolors="black",
        )
    axes.scatter([100], [0], s=160, marker="*", color="white", edgecolors="black", label="dense baseline")
    axes.axhline(0, color="0.6", linestyle="--", linewidth=1)
    axes.set_xlim(left=0, right=max(105.0, *axes.get_xlim()))
    axes.set_xlabel("FLOPs kept, % of dense (multiply-accumulates)")
    axes.set_ylabel("Accuracy minus dense accuracy, percentage points")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    handles, labels = polar.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(models) + 1, 4), frameon=False)
    figure.suptitle(title)
    return figure


def _draw_radar(axes: PolarAxes, models: Sequence[ModelResult]) -> None:
    """Spokes from 0 to 1; each label says which values these are."""
    low, high = _RETENTION_SHOWN
    fastest = max([1.0, *(model.speedup for model in models if model.speedup)])
    smallest = max([1.0, *(model.compression_rate for model in models)])
    spokes = [
        "Parameter reduction\n0 to 100 %",
        "FLOPs reduction\n0 to 100 %",
        f"Speed-up\n0 to {fastest:.2g}x",
        f"Accuracy retention\n{low:.0%} to {high:.0%} of dense",
        f"Compression rate\n1 to {smallest:.3g}x, log scale",
    ]
    angles = np.linspace(0, 2 * np.pi, len(spokes), endpoint=False)
    closed = [*angles, angles[0]]
    for place, model in enumerate(models):
        values = _spoke_values(model, fastest, smallest)
        name = model.name if model.speedup else f"{model.name} (speed-up not measured)"
        axes.plot(closed, values, linewidth=1.6, markersize=5, label=name, clip_on=False, color=f"C{place}",
                  linestyle=LINES[place % len(LINES)], marker=MARKERS[place % len(MARKERS)])  # fmt: skip
        axes.fill(closed, values, color=f"C{place}", alpha=0.07)
    dense = ModelResult("dense baseline", 0.0, 0.0, 1.0, 1.0, 1.0, 1.0)
    axes.plot(closed, _spoke_values(dense, fastest, smallest), linewidth=1.4, color="0.4", linestyle=(0, (1, 1)),
              label=dense.name, clip_on=False)  # fmt: skip
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(0, 1)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], labels=[])
    axes.set_xticks(angles, spokes, fontsize=9)
    for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
        # Labels grow away from the circle: to the right on its right side, to the left on its left side.
        side = math.sin(angle)
        label.set_horizontalalignment("left" if side > 0.1 else "right" if side < -0.1 else "center")
    note = "values outside a spoke's scale are clipped to it"
    axes.text(0.5, -0.17, note, transform=axes.transAxes, ha="center", fontsize=8, color="0.3")


def _spoke_values(model: ModelResult, fastest: float, smallest: float) -> np.ndarray:
    """The model's five values on spokes from 0 to 1, the first one repeated to close the line."""
    low, high = _RETENTION_SHOWN
    values = [
        model.params_reduction,
        model.flops_reduction,
        (model.speedup or 0.0) / fastest,
        (model.accuracy / model.baseline_accuracy - low) / (high - low),
        math.log(model.compression_rate) / math.log(smallest) if smallest > 1 else 0.0,
    ]
    return np.clip([*values, values[0]], 0.0, 1.0)
