"""Where candidates are screened and trained: in this process, one after the other, or elsewhere; to the same end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ..configuration import Configuration
from .finetuning import Finetuning
from .records import Record
from .screening import CandidateFailed, Screener

EXECUTORS = ("local", "ray")


class Executor(Protocol):
    """Screens configurations, and trains those that were promoted."""

    def screen_all(self, configs: Sequence[Configuration]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The place of each configuration and what `screened` found, as they are done, in whatever order."""

    def finetune_all(
        self, common: Finetuning, records: Sequence[Record], epoch: int | None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """The trial of each record and what `Finetuning.until` says of it, as they are done, in whatever order."""

    def close(self) -> None:
        """Let go of whatever it holds; it takes it up again when it is asked for more."""


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

    def finetune_all(
        self, common: Finetuning, records: Sequence[Record], epoch: int | None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for record in records:
            yield record["trial"], common.until(record, epoch)

    def close(self) -> None:
        """Nothing is held."""
