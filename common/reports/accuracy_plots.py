"""What candidates are worth against what they cost: screened ones by what ranked them, tested ones on test."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from .method_plots import MARKERS
from .tables import pareto_front, standard

COSTS = {"flops": "FLOPs per image (multiply-accumulates)", "params": "Parameters"}
_TOLERANCES_SHOWN = 3.0
"""Points further below the baseline than this many tolerances are drawn on the lower edge, to keep the rest apart."""


def accuracy_cost_scatter(
    candidates: Sequence[Mapping[str, Any]],
    baseline: Mapping[str, Any],
    *,
    title: str = "",
    tolerance: float | None = None,
    chosen: Mapping[str, Mapping[str, Any]] | None = None,
) -> Figure:
    """Candidates against FLOPs and against parameters: on top what was tested, below what was screened.

    The tested ones are drawn by test accuracy, with their Pareto front and the dense network; the screened ones by the
    divergence that ranked them, or by validation accuracy in logs without one. The two never share an axis.

    candidates: records as in a log; those with `accuracy` count as tested, those with only `val_accuracy` as screened.
    baseline: `flops`, `params`, `accuracy` of the dense model.
    chosen: label -> record of the candidates to be ringed.
    """
    alive = [one for one in candidates if one.get("status") != "failed"]
    tested = [one for one in alive if one.get("accuracy") is not None]
    screened = [one for one in alive if one.get("accuracy") is None and one.get("val_accuracy") is not None]
    rows: list[Callable[[Axes, str], None]] = []
    if tested or not screened:
        rows.append(lambda axes, cost: _draw_tested(axes, tested, baseline, cost, tolerance, chosen or {}))
    if screened:
        rows.append(lambda axes, cost: _draw_screened(axes, screened, cost))
    figure = Figure(figsize=(9, 0.9 + 3.2 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 2, squeeze=False, sharex="col", sharey="row")
    for draw, row in zip(rows, panels, strict=True):
        for axes, cost in zip(row, COSTS, strict=True):
            draw(axes, cost)
            axes.grid(alpha=0.3)
    for axes, cost in zip(panels[-1], COSTS, strict=True):
        _cost_axis(axes, [one[cost] for one in (*tested, *screened, baseline)], cost)
    entries = {
        label: handle for axes in panels[:, 0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title)
    return figure


def _draw_tested(
    axes: Axes,
    tested: Sequence[Mapping[str, Any]],
    baseline: Mapping[str, Any],
    cost: str,
    tolerance: float | None,
    chosen: Mapping[str, Mapping[str, Any]],
) -> None:
    floor = standard(baseline) - _TOLERANCES_SHOWN * (tolerance or 0.02)
    inside = [one for one in tested if one["accuracy"] >= floor]
    below = [one[cost] for one in tested if one["accuracy"] < floor]
    if inside:
        costs, values = [one[cost] for one in inside], [one["accuracy"] for one in inside]
        axes.scatter(costs, values, color="C0", edgecolors="white", linewidths=0.4, s=34, zorder=3, label="fine-tuned")
        front = pareto_front(costs, values)
        axes.plot(
            [costs[i] for i in front], [values[i] for i in front], "-", color="black", linewidth=1.2,
            drawstyle="steps-post", label="their Pareto front", zorder=4,
        )  # fmt: skip
    if below:
        axes.scatter(below, [floor] * len(below), marker="v", color="0.4", s=22, zorder=3)
        note = f"{len(below)} below {floor:.3f}, drawn on the lower edge (triangles)"
        axes.text(0.02, 0.02, note, transform=axes.transAxes, fontsize=8, color="0.3", va="bottom")
    axes.scatter(
        [baseline[cost]], [baseline["accuracy"]], marker="*", s=190, color="white", edgecolors="black", zorder=5,
        label="dense baseline",
    )  # fmt: skip
    if tolerance is not None:
        better = "baseline" if standard(baseline) == baseline["accuracy"] else "dense, trained on"
        limit = standard(baseline) - tolerance
        axes.axhline(limit, color="0.4", linestyle="--", linewidth=1, label=f"{better} - {tolerance:g}")
    _ring_chosen(axes, chosen, cost)
    if below:
        axes.set_ylim(bottom=floor - 0.1 * (axes.get_ylim()[1] - floor))
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel("Top-1 accuracy on test")


def _draw_screened(axes: Axes, screened: Sequence[Mapping[str, Any]], cost: str) -> None:
    by_divergence = all(one.get("divergence") is not None for one in screened)
    values = [one["divergence"] if by_divergence else one["val_accuracy"] for one in screened]
    if by_divergence:
        least = min((value for value in values if value > 0), default=1e-6)
        values = [max(value, least) for value in values]  # none at all has no place on a logarithmic axis
        axes.set_yscale("log")
    budgets = list(dict.fromkeys(one.get("budget") for one in screened))
    for place, budget in enumerate(budgets):
        own = [at for at, one in enumerate(screened) if one.get("budget") == budget]
        label = "screened, no training" if budget is None else f"screened, budget {budget:g}"
        axes.scatter(
            [screened[at][cost] for at in own], [values[at] for at in own], marker=MARKERS[place % len(MARKERS)],
            facecolors="none", edgecolors=f"C{place % 10}", s=20, label=label,
        )  # fmt: skip
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel(
            "Divergence from dense\n(nats, validation, log scale)" if by_divergence else "Top-1 accuracy on validation"
        )


def _cost_axis(axes: Axes, costs: Sequence[float], cost: str) -> None:
    """The label; a logarithmic axis where the costs span more than a factor of eight."""
    if max(costs) > 8 * max(min(costs), 1):
        axes.set_xscale("log")
        axes.set_xlabel(f"{COSTS[cost]}, log scale")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(COSTS[cost])
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_minor_formatter(lambda value, position: "")


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
