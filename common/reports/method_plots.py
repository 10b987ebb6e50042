"""Figures of the method and of a search: spectra, the policy, training, screening, latency. See `plots`."""

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

    labels: layer -> what its menu's entries are called, such as `(8, 16, 8)`; the most probable one stands beside its
        row. Menus of different length leave their row's end blank.
    """
    layers = list(probabilities)
    longest = max((len(row) for row in probabilities.values()), default=1)
    table = np.full((max(len(layers), 1), longest), np.nan)
    for place, layer in enumerate(layers):
        table[place, : len(probabilities[layer])] = probabilities[layer]
    figure = Figure(figsize=(4.4 + 0.24 * longest, 1.6 + 0.23 * len(layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(longest), range(1, longest + 1), fontsize=8)
    axes.set_yticks(range(len(layers)), layers, fontsize=8)
    axes.set_xlabel("Entry of the layer's menu, cheapest first")
    axes.set_ylabel("Layer")
    if labels:
        modes = [labels[layer][int(np.argmax(probabilities[layer]))] for layer in layers]
        beside = axes.secondary_yaxis("right")
        beside.set_yticks(range(len(layers)), modes, fontsize=7)
        beside.set_ylabel("Most probable ranks", fontsize=9)
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
    baseline: str | Mapping[str, str] | None = None,
    batch_size: int | None = None,
    spread: Mapping[str, tuple[float, float]] | None = None,
    title: str = "",
) -> Figure:
    """Milliseconds per batch of each model; beside each bar its speed-up.

    seconds: name -> median seconds per batch, all of one interleaved run.
    baseline: the model that speed-ups are counted from; or, for each model, its own, such as the dense network in the
        same runtime.
    spread: name -> (low, high) seconds, drawn as whiskers.

    Raises:
        ValueError: a baseline is not among the models.
    """
    bases = dict.fromkeys(seconds, baseline) if isinstance(baseline, str) else dict(baseline or {})
    if unknown := sorted(set(bases.values()) - set(seconds)):
        raise ValueError(f"baseline {unknown[0]!r} was not measured; measured are {', '.join(seconds)}")
    figure = Figure(figsize=(7.5, 1.4 + 0.45 * len(seconds)), layout="constrained")
    axes = figure.subplots()
    places = range(len(seconds))
    values = [1000 * value for value in seconds.values()]
    shades = ["white" if bases.get(name) == name else "0.6" for name in seconds]
    axes.barh(places, values, color=shades, edgecolor="black", height=0.65)
    ends = dict(zip(seconds, values, strict=True))
    for place, name in enumerate(seconds):
        if spread and name in spread:
            low, high = (1000 * edge for edge in spread[name])
            axes.plot([low, high], [place, place], color="black", linewidth=1.2, marker="|")
            ends[name] = max(ends[name], high)
        ratio = f"  {seconds[bases[name]] / seconds[name]:.2f}x" if name in bases else ""
        axes.text(ends[name], place, f"  {1000 * seconds[name]:.3g} ms{ratio}", va="center", fontsize=9)
    axes.set_yticks(places, list(seconds))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(ends.values(), default=1.0))
    batch = f"batch of {batch_size}" if batch_size else "batch"
    over = baseline if isinstance(baseline, str) else "dense in the same runtime"
    axes.set_xlabel(f"Milliseconds per {batch}" + (f"; factor: speed-up over {over}" if bases else ""))
    axes.set_title(title)
    return figure


def classified(
    image: np.ndarray, probabilities: Mapping[str, Sequence[float]], classes: Sequence[str], *, shown: int = 5
) -> Figure:
    """One image (H, W, 3), values in 0..1, and what each network (name -> class probabilities) takes it for."""
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    picture, bars = figure.subplots(1, 2, width_ratios=(1, 2.4))
    picture.imshow(image)
    picture.set_xlabel("pixels, normalisation undone", fontsize=8)
    picture.set_ylabel("pixels", fontsize=8)
    highest = np.max([list(row) for row in probabilities.values()], axis=0)
    best = np.argsort(highest)[::-1][:shown]
    width = 0.8 / len(probabilities)
    for place, (name, row) in enumerate(probabilities.items()):
        bars.bar(np.arange(len(best)) + place * width, [row[at] for at in best], width, label=name,
                 color=str(0.2 + 0.5 * place / max(len(probabilities) - 1, 1)), hatch=("", "///", "...")[place % 3],
                 edgecolor="white", linewidth=0)  # fmt: skip
    bars.set_xticks(np.arange(len(best)) + 0.4 - width / 2, [str(classes[at]) for at in best], fontsize=9)
    bars.set_xlabel("Class")
    bars.set_ylabel("Probability")
    bars.set_ylim(0, 1)
    bars.legend(fontsize=8)
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
