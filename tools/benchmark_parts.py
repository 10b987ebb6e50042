"""The measured parts of documents that are made from what benchmarks have left."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from common.reports import mean_and_deviation, seeds_behind

HOPELESS = 50
"""Points lost by which an untrained network is one that waits for its training."""

TUNED = 0.5
"""Among the numbers of epochs, that of networks tuned on calibration images: more than none, and not one yet."""


def fine_tuned(content: Mapping[str, Any]) -> str:
    """Test accuracy after fine-tuning of each rank rule at each budget: mean and spread over the seeds."""
    rows = [row for row in content["rows"] if row["table"] == "rules" and row.get("test_accuracy") is not None]
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        values = [[r["test_accuracy"] for r in rows if (r["name"], r["budget"]) == (name, b)] for b in budgets]
        lines.append([name, *(mean_and_deviation(found, "{:.4f}") for found in values)])
    heads = ["ranks from", *(f"{budget:.0%} of the FLOPs" for budget in budgets)]
    table = tabulate(lines, headers=heads, tablefmt="github", disable_numparse=True)
    seeds = len({row["seed"] for row in rows})
    return f"{table}\n\nDense: {content['dense_test']:.4f}. Mean ± standard deviation of {seeds} seeds."


def beside_others(content: Mapping[str, Any], network: str, tuned: Sequence[Mapping[str, Any]] = ()) -> str:
    """Points lost on one published network: a line per method, a column per budget, without training and with.

    tuned: rows of networks that were tuned on the calibration images alone.
    """
    every = [*content["rows"], *({**row, "epochs": TUNED} for row in tuned)]
    own = [row for row in every if row["network"] == network and "test_accuracy" in row]
    dense, rows = content["dense"][network], [row for row in own if row["budget"] < 1]
    controls = [row["test_accuracy"] for row in own if row["budget"] == 1]
    trained = max(dense, statistics.mean(controls)) if controls else dense
    columns = sorted({(row["epochs"], row["budget"]) for row in rows}, key=lambda column: (column[0], -column[1]))

    def cell(method: str, epochs: float, budget: float) -> str:
        key = (method, epochs, budget)
        reference = trained if epochs >= 1 else dense
        lost = [
            100 * (reference - row["test_accuracy"])
            for row in rows
            if (row["method"], row["epochs"], row["budget"]) == key
        ]
        # Channels and ranks that were chosen without data wait for their training: what they lose before says nothing.
        hopeless = lost and not epochs and statistics.mean(lost) > HOPELESS
        return "-" if hopeless else mean_and_deviation(lost)

    methods = dict.fromkeys(row["method"] for row in rows)
    lines = [[method, *(cell(method, *column) for column in columns)] for method in methods]
    named = {0: "untrained", TUNED: "tuned"}
    heads = [f"{budget:.0%}, {named.get(epochs, f'{epochs} epochs')}" for epochs, budget in columns]
    table = tabulate(lines, headers=["points lost", *heads], tablefmt="github", disable_numparse=True)
    trained_on = f", trained on as long {statistics.mean(controls):.4f}" if controls else ""
    return f"{table}\n\nDense: {dense:.4f}{trained_on}. Lower is better. {seeds_behind(rows)}"


def published_on_cifar10(published: Mapping[str, Any]) -> str:
    """What others publish for CIFAR-10's residual networks, as they state it."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"-{value:.1%}"

    rows = [
        [
            one["network"],
            one["method"],
            share(one.get("flops_removed")),
            share(one.get("params_removed")),
            f"{one['points_lost']:.2f}",
            "not stated here" if one["epochs"] is None else one["epochs"],
        ]
        for one in published["cifar10"]
    ]
    heads = ["network", "method", "FLOPs", "parameters", "points lost", "epochs"]
    return tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True)


def reliability(content: Mapping[str, Any]) -> str:
    """What was damaged or killed, how often, and what came of it."""
    rows = []
    for what, counts in content["counts"].items():
        told = ", ".join(f"{value:,} {key}" for key, value in counts.items())
        rows.append([what, told])
    origin = content["provenance"]
    table = tabulate(rows, headers=["what", "counts"], tablefmt="github", disable_numparse=True)
    return f"{table}\n\n{origin['machine']}, seed {origin['seed']}, revision {origin['git_revision']}."


def factorisation(measured: Mapping[str, Any]) -> str:
    """What factorising and compressing cost beside a Tucker-2 decomposition of the same layers."""
    seconds = measured["median_seconds"]
    rows = [[name, f"{value:.2f}", f"{seconds['partial_tucker'] / value:.0f}x"] for name, value in seconds.items()]
    heads = ["step", "seconds", "faster than partial_tucker"]
    return tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True)
