"""How figures of several seeds become one cell of a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def seeds_behind(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many seeds the figures of these rows are of: a sentence, where a method's figure of one has no deviation."""
    counts = {
        len({row["seed"] for row in rows if (row["method"], row["budget"], row["epochs"]) == key})
        for key in {(row["method"], row["budget"], row["epochs"]) for row in rows}
    }
    several = sorted(counts - {1})
    if not several:
        return "One seed."
    seeds = f"{' or '.join(map(str, several))} seeds"
    return f"±: of {seeds}, else of one." if 1 in counts else f"Mean ± standard deviation of {seeds}."


def mean_and_deviation(values: Sequence[float]) -> str:
    """Two decimals of the mean, and of the standard deviation where there are several; a dash for none."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")
