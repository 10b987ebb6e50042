"""Compressed models beside their dense ones on four measures at once, one small radar for each. See `plots`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.projections.polar import PolarAxes

from .method_plots import MARKERS

_TIMES_SHOWN = (0.25, 64.0)
_POINTS_SHOWN = (-4.0, 0.0)
_ACROSS = 3
"""Panels in one row of a figure."""


@dataclass(frozen=True)
class ModelResult:
    """A compressed model beside its dense one, for radar plots; reductions and accuracies are fractions.

    speedup: dense time / compressed time, None where not measured. The accuracies are None where they are not known.
    """

    name: str
    params_reduction: float
    flops_reduction: float
    accuracy: float | None = None
    baseline_accuracy: float | None = None
    speedup: float | None = None

    @property
    def points(self) -> float | None:
        """Accuracy minus the dense network's, in percentage points."""
        if self.accuracy is None or self.baseline_accuracy is None:
            return None
        return 100 * (self.accuracy - self.baseline_accuracy)


def radar(
    models: Sequence[ModelResult], *, published: Mapping[str, ModelResult] | None = None, title: str = ""
) -> Figure:
    """One radar per model, every spoke with its scale; the dense network is the grey dotted line.

    published: name of a model -> figures of others for it, drawn dashed.

    A radar's area says nothing: show it with `radar_with_scatter`, or beside `accuracy_cost_scatter`.
    """
    figure = _grid_figure(len(models), title)
    for place, model in enumerate(models):
        _draw_radar(figure.add_subplot(*_grid(len(models)), place + 1, projection="polar"), model, published or {})
    _legend(figure)
    return figure


def radar_with_scatter(
    models: Sequence[ModelResult], *, published: Mapping[str, ModelResult] | None = None, title: str = ""
) -> Figure:
    """The radars and, as the last panel, accuracy lost against FLOPs kept for the same models."""
    panels = len(models) + 1
    figure = _grid_figure(panels, title)
    for place, model in enumerate(models):
        _draw_radar(figure.add_subplot(*_grid(panels), place + 1, projection="polar"), model, published or {})
    axes = figure.add_subplot(*_grid(panels), panels)
    for place, model in enumerate(models):
        if model.points is not None:
            axes.scatter(
                100 * (1 - model.flops_reduction), model.points, s=55, marker=MARKERS[place % len(MARKERS)],
                color=f"C{place % 10}", edgecolors="black", label=model.name,
            )  # fmt: skip
    axes.scatter([100], [0], s=130, marker="*", color="white", edgecolors="black", label="dense baseline")
    axes.axhline(0, color="0.6", linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, position: "")
    axes.set_xlabel("FLOPs kept, % of dense, log scale\n(multiply-accumulates)", fontsize=9)
    axes.set_ylabel("Accuracy minus dense, points", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.32), ncols=2, frameon=False)
    _legend(figure)
    return figure


def _grid(panels: int) -> tuple[int, int]:
    across = min(panels, _ACROSS)
    return -(-panels // across), across


def _grid_figure(panels: int, title: str) -> Figure:
    rows, across = _grid(panels)
    figure = Figure(figsize=(max(3.2 * across, 5.5), 1.3 + 3.0 * rows), layout="constrained")
    figure.suptitle(title)
    return figure


def _legend(figure: Figure) -> None:
    """The kinds of lines, once for all panels, and what is cut off."""
    entries = {
        label: handle
        for axes in figure.axes
        if axes.name == "polar"
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    least, most = (f"{value:g}" for value in _TIMES_SHOWN)
    low, high = (f"{value:g}" for value in _POINTS_SHOWN)
    note = (
        f"Parameters and FLOPs: times fewer than dense; speed: times faster; all from {least}x to {most}x, log scale.\n"
        f"Accuracy: points against dense, {low} to {high}. Values outside a scale are clipped to it."
    )
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=4, frameon=False, fontsize=9, title=note,
                  title_fontsize=8)  # fmt: skip


def _draw_radar(axes: PolarAxes, model: ModelResult, published: Mapping[str, ModelResult]) -> None:
    """Spokes from 0 to 1; the legend says which values these are."""
    spokes = ["parameters", "FLOPs", "accuracy", "speed"]
    angles = np.linspace(0, 2 * np.pi, len(spokes), endpoint=False)
    closed = [*angles, angles[0]]
    dense = ModelResult("dense baseline", 0.0, 0.0, 1.0, 1.0, 1.0)
    lines = [(dense, "dense baseline", {"color": "0.45", "linestyle": ":"})]
    if model.name in published:
        lines.append((published[model.name], "published", {"color": "C1", "linestyle": "--", "marker": "s"}))
    lines.append((model, "this repository", {"color": "C0", "linestyle": "-", "marker": "o"}))
    for one, label, style in lines:
        axes.plot(closed, _spoke_values(one), label=label, linewidth=1.5, markersize=4, clip_on=False, **style)
    axes.fill(closed, _spoke_values(model), color="C0", alpha=0.08)
    for angle, value, text in zip(angles, _spoke_values(model), _said(model), strict=False):
        # The white rim keeps a minus sign legible on the polygon's line.
        rim = [withStroke(linewidth=2.5, foreground="white")]
        inside = {"textcoords": "offset points", "fontsize": 8, "color": "C0", "va": "center", "path_effects": rim}
        shift = {0: (5, -9), 1: (-2, 9), 2: (5, 9), 3: (2, 9)}[round(angle / (np.pi / 2))]
        align = {0: "left", 1: "right", 2: "left", 3: "left"}[round(angle / (np.pi / 2))]
        axes.annotate(text, (angle, value), xytext=shift, ha=align, **inside)
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(0, 1)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], labels=[])
    axes.set_xticks(angles, spokes, fontsize=8)
    for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
        # Labels grow away from the circle: to the right on its right side, to the left on its left side.
        side = math.sin(angle)
        label.set_horizontalalignment("left" if side > 0.1 else "right" if side < -0.1 else "center")
    unmeasured = "" if model.speedup else " (speed-up not measured)"
    axes.set_title(f"{model.name}{unmeasured}", fontsize=9, pad=12)


def _said(model: ModelResult) -> list[str]:
    """The model's own numbers, one for each spoke."""
    fewer = [
        1 / (1 - reduction) if reduction < 1 else math.inf
        for reduction in (model.params_reduction, model.flops_reduction)
    ]
    return [
        f"{fewer[0]:.3g}x",
        f"{fewer[1]:.3g}x",
        "" if model.points is None else f"{model.points:+.1f}",
        f"{model.speedup:.2g}x" if model.speedup else "",
    ]


def _spoke_values(model: ModelResult) -> np.ndarray:
    """The model's four values on spokes from 0 to 1, the first one repeated to close the line; NaN where unknown."""

    def times(value: float | None) -> float:
        least, most = _TIMES_SHOWN
        return math.nan if not value else math.log(value / least) / math.log(most / least)

    low, high = _POINTS_SHOWN
    values = [
        times(1 / max(1 - model.params_reduction, 1e-9)),
        times(1 / max(1 - model.flops_reduction, 1e-9)),
        math.nan if model.points is None else (model.points - low) / (high - low),
        times(model.speedup) if model.speedup else 0.0,
    ]
    return np.clip([*values, values[0]], 0.0, 1.0)
