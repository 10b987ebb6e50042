"""One promoted candidate's fine-tuning: where its files lie, how far it has come, and what came of it.

All of it is in files, so that whoever goes on, later or elsewhere, needs the folder and the record alone.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..configuration import Configuration
from ..files import read_json, write_text
from ..finetune import EpochRecord, TrainingDiverged
from ..models import load_compressed
from ..modules import out_of_memory
from ..progress import OnBatch
from ..reports import is_accepted
from .records import Record, restored, stored
from .screening import Screener
from .trainers import Trainer

EPOCHS_SUFFIX = ".epochs.json"

CONTROL = "dense, trained on"
"""What the dense network is called that was trained as long as the candidates."""


@dataclass(frozen=True)
class Finalist:
    """A fine-tuned candidate: its record, as it will be logged, and where its network lies (None: it failed)."""

    record: Record
    path: Path | None
    trainer: Trainer | None = field(repr=False, compare=False, default=None)

    def load(self, device: str = "cpu") -> nn.Module:
        """The network, in eval mode.

        Raises:
            ValueError: it failed, or its file is damaged.
        """
        if self.path is None:
            raise ValueError(f"candidate {self.record['trial']} failed: {self.record['reason']}")
        return load_compressed(self.path, device)[0] if self.trainer is None else self.trainer.load(self.path, device)


@dataclass(frozen=True)
class AcceptanceRule:
    """The dense network's score on validation (None: there is no metric), and how much of it a candidate may lose.

    Test is for reporting: nothing is accepted by it.
    """

    baseline: float | None
    tolerance: float

    def accepts(self, score: float | None) -> bool:
        return self.baseline is not None and is_accepted(score, self.baseline, self.tolerance)


@dataclass(frozen=True)
class Finetuning:
    """What the fine-tuning of all candidates has in common.

    Attributes:
        screener: builds a candidate's network.
        trainer: trains it, tests it, writes it.
        rule: who is accepted.
        folder: where the files are.
        on_batch: called after every batch that this process trains on; see `common.progress`.
    """

    screener: Screener
    trainer: Trainer
    rule: AcceptanceRule
    folder: Path
    on_batch: OnBatch | None = field(default=None, repr=False, compare=False)

    def until(self, record: Record, epoch: int | None) -> dict[str, Any]:
        """Train until `epoch` epochs are done, unless they are; None: finish, with the final score.

        Returns:
            {"score": of validation after that epoch}, {} when it is finished, or {"failed": why} for a loss that
            became NaN or a network that does not fit into memory.
        """
        run = _CandidateRun(self, record)
        try:
            if epoch is None:
                run.finish()
                return {}
            score = run.until(epoch)
            if not math.isfinite(score):
                raise TrainingDiverged(f"the validation score became {score} in epoch {epoch}")
            return {"score": score}
        except (TrainingDiverged, RuntimeError, MemoryError) as failure:
            reason = str(failure) if isinstance(failure, TrainingDiverged) else out_of_memory(failure)
            if reason is None:
                raise
            return {"failed": reason}

    def control(self) -> Record:
        """The record that `until` trains as a candidate of which nothing is compressed; its network is not kept."""
        factors = self.screener.factors
        costs = {"params": factors.dense_params, "flops": factors.dense_flops}
        return {"trial": CONTROL, "config": Configuration(), "budget": 1.0, "val_accuracy": None, **costs}

    def finished(self, record: Record) -> Finalist:
        """What a candidate that was finished came to, as its files say."""
        run = _CandidateRun(self, record)
        return Finalist(restored(read_json(run.result)), run.weights, self.trainer)

    def failed(self, record: Record, reason: str) -> Finalist:
        """A candidate that could not be trained."""
        return Finalist({**record, "status": "failed", "reason": reason}, None, self.trainer)


def stem_of(record: Record) -> str:
    """How the names of a candidate's files begin."""
    if record["trial"] == CONTROL:
        return "dense-control"
    return re.sub(r"[^\w.-]+", "-", f"candidate-{record['trial']}")


class _CandidateRun:
    def __init__(self, common: Finetuning, record: Record) -> None:
        self.common, self.record = common, record
        stem = stem_of(record)
        self.checkpoint = common.folder / f"{stem}.unfinished.pt"
        self.progress = common.folder / f"{stem}{EPOCHS_SUFFIX}"
        self.result = common.folder / f"{stem}.json"
        self.weights = common.folder / f"{stem}.safetensors"

    def until(self, epoch: int) -> float:
        """Train until `epoch` epochs are done, unless they are; validation score at that point."""
        if epoch > len(self._epochs()):
            self._train(epoch)
        return self._epochs()[epoch - 1]["val_accuracy"]

    def finish(self) -> None:
        """The final score and the network in the folder, unless they are there."""
        if not self.result.exists():
            self._write_result()

    def _epochs(self) -> list[dict[str, float]]:
        """What is known of each epoch so far, as `EpochRecord` has it."""
        return read_json(self.progress) if self.progress.exists() else []

    def _train(self, epoch: int) -> nn.Module:
        """The network after at least `epoch` epochs, continued from its checkpoint."""

        def on_epoch(done: EpochRecord) -> bool:
            write_text(self.progress, json.dumps([*self._epochs()[: done.epoch - 1], asdict(done)]))
            return done.epoch < epoch

        model, trainer = self.common.screener.build(self.record["config"]), self.common.trainer
        if not trainer.epochs:
            return model
        history = trainer.train(model, self.checkpoint, on_epoch, self.common.on_batch)
        # A kill between the checkpoint and the note of its epoch leaves the note behind; the history has both.
        write_text(self.progress, json.dumps([asdict(one) for one in history]))
        return model

    def _write_result(self) -> None:
        trainer, rule = self.common.trainer, self.common.rule
        model, config = self._train(trainer.epochs), self.record["config"]
        score, epochs = trainer.test(model), self._epochs()
        # Without any metric, epochs were judged by the divergence, which is no accuracy.
        judged = epochs[-1]["val_accuracy"] if epochs and rule.baseline is not None else self.record["val_accuracy"]
        record = {
            **self.record,
            "accuracy": score,
            "accepted": rule.accepts(judged),
            "status": "fine-tuned",
            "screened_accuracy": self.record["val_accuracy"],
            "val_accuracy": judged,
            "epochs": len(epochs) if trainer.on_training_data else 0,
            "finetune_seconds": sum(one["seconds"] for one in epochs),
            "finetune": dict(trainer.facts),
        }
        if self.record["trial"] != CONTROL:
            trainer.save(model, self.weights, config, {"accuracy": score, "trial": self.record["trial"]})
        write_text(self.result, json.dumps(stored(record), indent=1))
        self.checkpoint.unlink(missing_ok=True)
