"""How figures of several seeds become one cell of a table."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def seeds_behind(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many seeds the figures of these rows are of: a sentence, where a method's figure of one has no deviation."""
    figures = {(row["method"], row["budget"], row["epochs"], row["seed"]) for row in rows}
    counts = set(Counter(figure[:-1] for figure in figures).values())
    several = sorted(counts - {1})
    if not several:
        return "One seed."
    seeds = f"{' or '.join(map(str, several))} seeds"
    return f"±: of {seeds}, else of one." if 1 in counts else f"Mean ± standard deviation of {seeds}."


def mean_and_deviation(values: Sequence[float], form: str = "{:.2f}") -> str:
    """The mean, and the standard deviation where there are several values; a dash for none.

    Args:
        form: how each of the two is written.
    """
    if not values:
        return "-"
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean
