"""Where candidates are screened: in this process, one after the other, or elsewhere; what comes back is the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ..configuration import Configuration
from .screening import CandidateFailed, Screener

EXECUTORS = ("local", "ray")


class Executor(Protocol):
    """Screens configurations."""

    def screen_all(self, configs: Sequence[Configuration]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The place of each configuration and what `screened` found, as they are done, in whatever order."""

    def close(self) -> None:
        """Let go of whatever it holds."""


def screened(screener: Screener, config: Configuration) -> dict[str, Any]:
    """What screening a configuration found, as the rest of its record; a failure is one too."""
    try:
        found = screener.screen(config)
    except CandidateFailed as failure:
        return {"status": "failed", "reason": str(failure), "stage": "screen"}
    return {
        "params": found.params,
        "flops": found.flops,
        "accuracy": None,
        "inference_time": None,
        "compression_rate": screener.factors.dense_params / found.params,
        "accepted": False,
        "status": "screened",
        "val_accuracy": found.accuracy,
        "divergence": found.divergence,
        **({"metric": "evaluate"} if screener.scored else {}),
        "seconds": found.seconds,
    }


class LocalExecutor:
    """One after the other, in this process."""

    def __init__(self, screener: Screener) -> None:
        self._screener = screener

    def screen_all(self, configs: Sequence[Configuration]) -> Iterator[tuple[int, dict[str, Any]]]:
        for place, config in enumerate(configs):
            yield place, screened(self._screener, config)

    def close(self) -> None:
        """Nothing is held."""
