"""What a search cost in seconds, step by step, beside what fine-tuning every candidate would have cost."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import read_json, write_text


class StepClock:
    """Wall times of a run's steps, kept in a file: what an earlier, interrupted process timed stays as it was."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time the block; nothing is noted if it raises, or if the step was timed before."""
        started = time.perf_counter()
        yield
        known = self.seconds()
        if name not in known:
            write_text(self._path, json.dumps({**known, name: time.perf_counter() - started}))

    def seconds(self) -> dict[str, float]:
        """Step -> seconds, of the steps timed so far."""
        return read_json(self._path) if self._path.exists() else {}


def search_seconds(
    steps: Mapping[str, float], screened: Sequence[Mapping[str, Any]], epochs: Sequence[float], *, most_epochs: int
) -> dict[str, float]:
    """Seconds of each step of a search and of all of it, and of the exhaustive alternative.

    Args:
        steps: what happened once, such as {"factorize": 3.2, "sensitivity": 9.5}.
        screened: the records of all candidates; failed ones have no time and count as tried.
        epochs: seconds of every epoch of fine-tuning that was run, given-up candidates included.
        most_epochs: of one candidate's fine-tuning.

    Returns:
        the steps, "screen", "finetune", "total", and "exhaustive": factorising once, then `most_epochs` of the mean
        length for every candidate that was screened. It is an estimate; the others were measured.
    """
    parts = {**steps, "screen": sum(r["seconds"] for r in screened if "seconds" in r), "finetune": sum(epochs)}
    exhaustive = steps.get("factorize", 0.0)
    if epochs:
        exhaustive += len(screened) * most_epochs * statistics.mean(epochs)
    return {**parts, "total": sum(parts.values()), "exhaustive": exhaustive}
