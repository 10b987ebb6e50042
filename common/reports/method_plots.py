"""Figures of the method and of a search: spectra, the policy, training, screening, latency. See `common.plots`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"


def singular_values(spectra: Mapping[str, Sequence[float]], *, title: str = "") -> Figure:
    """Singular values of nodes or layers (name -> values in falling order), each divided by its largest."""
    figure, axes = _single_panel(title)
    for place, (name, values) in enumerate(spectra.items()):
        values = np.asarray(values, dtype=float)
        axes.semilogy(range(1, len(values) + 1), values / values.max(), label=name, **_line(place))
    axes.set_xlabel("Index of the singular value")
    axes.set_ylabel("Singular value / largest of its node (log scale)")
    return _finish(figure, axes)


def error_against_rank(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], *, title: str = "") -> Figure:
    """Relative error against rank: name -> (ranks, errors), errors relative to the norm of the whole.

    An error of exactly zero has no place on a logarithmic axis and is left out.
    """
    figure, axes = _single_panel(title)
    for place, (name, (ranks, errors)) in enumerate(curves.items()):
        axes.semilogy(ranks, np.where(np.asarray(errors) > 0, errors, np.nan), marker=MARKERS[place % 8],
                      markersize=4, label=name, **_line(place))  # fmt: skip
    axes.set_xlabel("Rank")
    axes.set_ylabel("Relative error (log scale)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finish(figure, axes)


def policy_heatmap(
    probabilities: Mapping[str, Sequence[float]],
    labels: Mapping[str, Sequence[str]] | None = None,
    *,
    title: str = "",
) -> Figure:
    """The policy's pdf: one row per layer, one column per entry of its menu, dark is probable.

    labels: layer -> what to write into its cells, such as `8,16,8`; without it, the probabilities are written.
    Menus of different length leave their row's end blank.
    """
    layers = list(probabilities)
    longest = max((len(row) for row in probabilities.values()), default=1)
    table = np.full((max(len(layers), 1), longest), np.nan)
    for place, layer in enumerate(layers):
        table[place, : len(probabilities[layer])] = probabilities[layer]
    width = 0.85 if labels else 0.6
    figure = Figure(figsize=(3.0 + width * longest, 1.7 + 0.32 * len(layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            text = labels[layers[row]][column] if labels else f"{value:.2f}"
            axes.text(
                column, row, text, ha="center", va="center", fontsize=7, color="white" if value > 0.5 else "black"
            )
    axes.set_xticks(range(longest), range(1, longest + 1))
    axes.set_yticks(range(len(layers)), layers, fontsize=8)
    axes.set_xlabel("Entry of the layer's menu")
    axes.set_ylabel("Layer")
    figure.colorbar(image, ax=axes, label="Probability", pad=0.02)
    axes.set_title(title)
    return figure


def training_curve(history: Sequence[Mapping[str, Any]], *, title: str = "") -> Figure:
    """Losses and accuracies by epoch: a list of epochs such as {"epoch": 1, "train_loss": 0.3, "val_accuracy": 0.97}.

    Keys with `loss` go to the left panel, keys with `accuracy` to the right one; without `epoch`, epochs are counted
    from 1.
    """
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    keys = list(dict.fromkeys(key for epoch in history for key in epoch))
    for axes, word, label in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), ("Loss (mean over images)", "Top-1 accuracy"), strict=True
    ):
        for place, key in enumerate(key for key in keys if word in key):
            points = [(epoch.get("epoch", at), epoch[key]) for at, epoch in enumerate(history, 1) if key in epoch]
            epochs, values = zip(*points, strict=True)
            axes.plot(
                epochs, values, marker=MARKERS[place % 8], markersize=4, label=key.replace("_", " "), **_line(place)
            )
        axes.set_xlabel("Epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _finish(figure, axes)
    figure.suptitle(title)
    return figure


def correlation(screened: Sequence[float], finetuned: Sequence[float], *, title: str = "") -> Figure:
    """Accuracy after fine-tuning against accuracy when screened, for the same candidates, with Spearman's rho."""
    figure, axes = _single_panel(title)
    axes.scatter(screened, finetuned, color="C0", edgecolors="black", linewidths=0.5, s=36, alpha=0.85)
    axes.set_xlabel("Accuracy screened, no training (validation)")
    axes.set_ylabel("Accuracy after fine-tuning")
    rho = _spearman(screened, finetuned)
    text = f"Spearman's rho = {rho:.2f}, n = {len(screened)}" if np.isfinite(rho) else f"n = {len(screened)}"
    axes.text(0.03, 0.97, text, transform=axes.transAxes, va="top")
    return _finish(figure, axes)


def latency_bars(
    seconds: Mapping[str, float],
    *,
    baseline: str | None = None,
    batch_size: int | None = None,
    spread: Mapping[str, tuple[float, float]] | None = None,
    title: str = "",
) -> Figure:
    """Milliseconds per batch of each model; beside each bar its speed-up over the model named `baseline`.

    seconds: name -> median seconds per batch, all of one interleaved run.
    spread: name -> (low, high) seconds, drawn as whiskers.

    Raises:
        ValueError: `baseline` is not among the models.
    """
    if baseline is not None and baseline not in seconds:
        raise ValueError(f"baseline {baseline!r} was not measured; measured are {', '.join(seconds)}")
    figure = Figure(figsize=(7.5, 1.4 + 0.45 * len(seconds)), layout="constrained")
    axes = figure.subplots()
    places = range(len(seconds))
    values = [1000 * value for value in seconds.values()]
    shades = ["white" if name == baseline else "0.6" for name in seconds]
    axes.barh(places, values, color=shades, edgecolor="black", height=0.65)
    ends = dict(zip(seconds, values, strict=True))
    for place, name in enumerate(seconds):
        if spread and name in spread:
            low, high = (1000 * edge for edge in spread[name])
            axes.plot([low, high], [place, place], color="black", linewidth=1.2, marker="|")
            ends[name] = max(ends[name], high)
        ratio = f"  {seconds[baseline] / seconds[name]:.2f}x" if baseline else ""
        axes.text(ends[name], place, f"  {1000 * seconds[name]:.3g} ms{ratio}", va="center", fontsize=9)
    axes.set_yticks(places, list(seconds))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(ends.values(), default=1.0))
    batch = f"batch of {batch_size}" if batch_size else "batch"
    axes.set_xlabel(f"Milliseconds per {batch}" + (f"; factor: speed-up over {baseline}" if baseline else ""))
    axes.set_title(title)
    return figure


def _single_panel(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.5, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def _finish(figure: Figure, axes: Axes) -> Figure:
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, fontsize=8, ncols=1 + len(labels) // 10)
    return figure


def _line(place: int) -> dict[str, Any]:
    return {"color": f"C{place % 10}", "linestyle": LINES[place % len(LINES)]}


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN where one side does not vary."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return float("nan")
    from scipy.stats import spearmanr  # slow to import, and the scripts that read logs start at once

    return float(spearmanr(first, second).statistic)
