"""The ranks of each layer as bars, as a share of the full ranks where those are known."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

RANK_NAMES = {
    1: ("rank",),
    2: ("first rank", "second rank"),
    3: ("rank_in (or single rank)", "rank_mid", "rank_out"),
}
_SHADES, _HATCHES = ("0.25", "0.55", "0.8"), ("", "///", "...")

Ranks = Mapping[str, Sequence[int]]


def layer_ranks(configurations: Mapping[str, Ranks], *, full_ranks: Ranks | None = None, title: str = "") -> Figure:
    """One panel per configuration (label -> layer -> ranks), one group of bars per layer.

    Three ranks are (rank_in, rank_mid, rank_out). With `full_ranks`, in the same order, bars are per cent of them;
    without, ranks on a logarithmic axis. A layer that another configuration has and this one has not is dense there.
    """
    layers = _merged_order([*configurations.values(), full_ranks or {}])
    most = max((len(ranks) for config in configurations.values() for ranks in config.values()), default=1)
    rows = max(len(configurations), 1)
    width = min(max(5.0, 1.5 + 0.42 * len(layers)), 11)
    figure = Figure(figsize=(width, 1.9 + 1.8 * rows), layout="constrained")
    panels = figure.subplots(rows, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (label, config) in zip(panels, configurations.items(), strict=False):
        _draw(axes, layers, config, full_ranks, RANK_NAMES.get(most, RANK_NAMES[3]))
        axes.set_title(label, fontsize=9, loc="left")
    panels[-1].set_xticks(range(len(layers)), layers, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    panels[-1].set_xlabel("Layer")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


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


def _draw(axes: Axes, layers: Sequence[str], config: Ranks, full_ranks: Ranks | None, names: Sequence[str]) -> None:
    width = 0.8 / len(names)
    for order, name in enumerate(names):
        offset = (order - (len(names) - 1) / 2) * width
        places = [place for place, layer in enumerate(layers) if len(config.get(layer, ())) > order]
        heights = [_height(config, full_ranks, layers[place], order) for place in places]
        style = {"color": _SHADES[order], "hatch": _HATCHES[order], "edgecolor": "white", "linewidth": 0}
        axes.bar([place + offset for place in places], heights, width, label=name, **style)
    for place, layer in enumerate(layers):
        if not config.get(layer):
            axes.text(place, 0.03, "dense", transform=axes.get_xaxis_transform(), rotation=90, ha="center",
                      va="bottom", fontsize=7, color="0.3")  # fmt: skip
    if full_ranks is None:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.set_ylabel("Rank (log scale)")
    else:
        axes.set_ylim(0, 100)
        axes.set_ylabel("Rank, % of full rank")
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)


def _height(config: Ranks, full_ranks: Ranks | None, layer: str, order: int) -> float:
    rank = config[layer][order]
    return rank if full_ranks is None else 100 * rank / full_ranks[layer][order]
