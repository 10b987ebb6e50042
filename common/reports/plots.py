"""Every figure of results: pure functions from plain data to a matplotlib Figure.

No pyplot and no files but in `save`, so that a notebook can show a figure and a script can store it. Figures are
readable in grey: series differ by marker, hatch or line style, not by colour alone. `common.method_plots` has the
figures of the method and of the search, `common.radar_plots` the radar; they are importable from here too.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from ..files import atomic_path
from .method_plots import (
    MARKERS,
    correlation,
    error_against_rank,
    latency_bars,
    policy_heatmap,
    singular_values,
    training_curve,
)
from .radar_plots import ModelResult, radar, radar_with_scatter
from .tables import pareto_front

__all__ = [
    "ModelResult",
    "accuracy_cost_scatter",
    "correlation",
    "error_against_rank",
    "latency_bars",
    "layer_ranks",
    "policy_heatmap",
    "radar",
    "radar_with_scatter",
    "save",
    "singular_values",
    "training_curve",
]

RANK_NAMES = {
    1: ("rank",),
    2: ("first rank", "second rank"),
    3: ("rank_in (or single rank)", "rank_mid", "rank_out"),
}
COSTS = {"flops": "FLOPs per image (multiply-accumulates)", "params": "Parameters"}
# Points further below the baseline than this many tolerances are drawn on the lower edge, to keep the rest apart.
_TOLERANCES_SHOWN = 3.0


def save(figure: Figure, path: str | os.PathLike, dpi: int = 130) -> None:
    """Writes the figure in one step, in the format that the suffix of `path` names."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi, bbox_inches="tight")


def accuracy_cost_scatter(
    candidates: Sequence[Mapping[str, Any]],
    baseline: Mapping[str, Any],
    *,
    title: str = "",
    tolerance: float | None = None,
    chosen: Mapping[str, Mapping[str, Any]] | None = None,
) -> Figure:
    """Accuracy against FLOPs and against parameters, with the Pareto front of the tested candidates.

    candidates: records as in a log; those with `accuracy` are drawn as tested, those with only `val_accuracy`
        as screened.
    baseline: `flops`, `params`, `accuracy` of the dense model.
    chosen: label -> record of the candidates to be ringed.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, cost in zip(panels, COSTS, strict=True):
        _draw_candidates(axes, candidates, baseline, cost, tolerance)
        _ring_chosen(axes, chosen or {}, cost)
    panels[0].set_ylabel("Top-1 accuracy")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    return figure


def layer_ranks(
    configurations: Mapping[str, Mapping[str, Sequence[int]]],
    *,
    full_ranks: Mapping[str, Sequence[int]] | None = None,
    title: str = "",
) -> Figure:
    """The ranks of each layer as bars, one panel per configuration (label -> layer -> ranks).

    Three ranks are (rank_in, rank_mid, rank_out). `full_ranks`, in the same order, are drawn as outlines.
    A layer that another configuration has and this one has not is dense there.
    """
    layers = _merged_order([*configurations.values(), full_ranks or {}])
    most = max((len(ranks) for config in configurations.values() for ranks in config.values()), default=1)
    names = {1: ["rank"], 2: ["first rank", "second rank"]}.get(
        most, ["rank_in (or single rank)", "rank_mid", "rank_out"]
    )
    rows = max(len(configurations), 1)
    figure = Figure(figsize=(min(max(6.0, 1.5 + 0.55 * len(layers)), 16), 1.5 + 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (label, config) in zip(panels, configurations.items(), strict=False):
        _draw_ranks(axes, layers, config, full_ranks or {}, names)
        axes.set_title(label, fontsize=10, loc="left")
    panels[-1].set_xticks(range(len(layers)), layers, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    panels[-1].set_xlabel("Layer")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _draw_candidates(
    axes: Axes,
    candidates: Sequence[Mapping[str, Any]],
    baseline: Mapping[str, Any],
    cost: str,
    tolerance: float | None,
) -> None:
    tested = [one for one in candidates if one.get("accuracy") is not None and one.get("status") != "failed"]
    screened = [one for one in candidates if one.get("accuracy") is None and one.get("val_accuracy") is not None]
    floor = baseline["accuracy"] - _TOLERANCES_SHOWN * (tolerance or 0.02)
    below = 0
    for group, key, style in (
        (screened, "val_accuracy", {"marker": "o", "facecolors": "none", "edgecolors": "0.55", "s": 18, "zorder": 2}),
        (tested, "accuracy", {"marker": "o", "color": "C0", "edgecolors": "white", "linewidths": 0.4, "s": 30}),
    ):
        if not group:
            continue
        name = "screened, no training (validation)" if key == "val_accuracy" else "tested (test)"
        costs, values = [one[cost] for one in group], [one[key] for one in group]
        inside = [value >= floor for value in values]
        axes.scatter(_where(costs, inside), _where(values, inside), label=name, **{"zorder": 3} | style)
        outside = [not one for one in inside]
        axes.scatter(_where(costs, outside), [floor] * sum(outside), marker="v", color="0.4", s=22, zorder=3)
        below += sum(outside)
    if tested:
        costs, values = [one[cost] for one in tested], [one["accuracy"] for one in tested]
        front = [index for index in pareto_front(costs, values) if values[index] >= floor]
        x, y = [costs[index] for index in front], [values[index] for index in front]
        axes.plot(
            x, y, "-", color="black", linewidth=1.2, drawstyle="steps-post", label="Pareto front (tested)", zorder=4
        )
    axes.scatter(
        [baseline[cost]], [baseline["accuracy"]], marker="*", s=190, color="white", edgecolors="black", zorder=5,
        label="dense baseline",
    )  # fmt: skip
    if tolerance is not None:
        axes.axhline(
            baseline["accuracy"] - tolerance, color="0.4", linestyle="--", linewidth=1,
            label=f"accepted: baseline - {tolerance:g}",
        )  # fmt: skip
    _finish_scatter(axes, [one[cost] for one in (*tested, *screened, baseline)], cost)
    if below:
        note = f"{below} below {floor:.3f}, drawn on the lower edge (triangles)"
        axes.text(0.02, 0.02, note, transform=axes.transAxes, fontsize=8, color="0.3", va="bottom")
        axes.set_ylim(bottom=floor - 0.1 * (axes.get_ylim()[1] - floor))


def _finish_scatter(axes: Axes, costs: Sequence[float], cost: str) -> None:
    """Labels and grid; a logarithmic axis where the costs span more than a factor of eight."""
    if max(costs) > 8 * max(min(costs), 1):
        axes.set_xscale("log")
        axes.set_xlabel(f"{COSTS[cost]}, log scale")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(COSTS[cost])
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_minor_formatter(lambda value, position: "")
    axes.grid(alpha=0.3)


def _ring_chosen(axes: Axes, chosen: Mapping[str, Mapping[str, Any]], cost: str) -> None:
    """A ring for each chosen record; records chosen for several reasons share one ring."""
    reasons: dict[int, list[str]] = {}
    for label, record in chosen.items():
        reasons.setdefault(id(record), []).append(label)
    records = {id(record): record for record in chosen.values()}
    for place, (key, labels) in enumerate(reasons.items()):
        axes.scatter(
            records[key][cost], records[key]["accuracy"], s=150, marker=MARKERS[place + 1], facecolors="none",
            edgecolors="C3", linewidths=1.8, zorder=6, label=" = ".join(labels),
        )  # fmt: skip


def _merged_order(configurations: Sequence[Mapping[str, Any]]) -> list[str]:
    """All layers, each that is new in a configuration right after the one it follows there."""
    layers: list[str] = []
    for config in configurations:
        place = 0
        for layer in config:
            if layer not in layers:
                layers.insert(place, layer)
            place = layers.index(layer) + 1
    return layers


def _draw_ranks(
    axes: Axes,
    layers: Sequence[str],
    config: Mapping[str, Sequence[int]],
    full_ranks: Mapping[str, Sequence[int]],
    names: Sequence[str],
) -> None:
    width = 0.8 / len(names)
    shades, hatches = ("0.25", "0.55", "0.8"), ("", "///", "...")
    for order, name in enumerate(names):
        offset = (order - (len(names) - 1) / 2) * width
        for ranks_of, style, label in (
            (config, {"color": shades[order], "hatch": hatches[order], "edgecolor": "white", "linewidth": 0}, name),
            (
                full_ranks,
                {"facecolor": "none", "edgecolor": "0.5", "linewidth": 0.7},
                "full rank" if order == 0 else None,
            ),
        ):
            places = [place for place, layer in enumerate(layers) if len(ranks_of.get(layer, ())) > order]
            heights = [ranks_of[layers[place]][order] for place in places]
            if heights:
                axes.bar([place + offset for place in places], heights, width, label=label, **style)
    for place, layer in enumerate(layers):
        if not config.get(layer):
            axes.text(place, 0, "dense", rotation=90, ha="center", va="bottom", fontsize=7, color="0.3")
    axes.set_ylabel("Rank")
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)


def _where(values: Sequence[float], mask: Sequence[bool]) -> list[float]:
    return [value for value, keep in zip(values, mask, strict=True) if keep]
