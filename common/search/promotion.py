"""Fine-tune the promoted candidates, at most a few epochs each, and read test once for those that came through.

Successive halving over the epochs: after each epoch the worse half of a budget's candidates is given up (Jamieson and
Talwalkar, 2016). Every epoch and every result is on disk before the next one starts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from ..configuration import Configuration
from ..data import Dataset
from ..files import write_text
from ..finetune import EpochRecord, TrainingDiverged, TrainSettings, evaluate, teacher_logits, train
from ..models import load_compressed, save_compressed
from ..modules import out_of_memory
from ..reports import RunLog, is_accepted
from .records import Record, restored, stored
from .screening import Screener
from .study import OBJECTIVES
from .trainers import OnEpoch, Trainer

_EPOCHS = ".epochs.json"


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
class FinetuneSettings:
    """What fine-tuning needs to know.

    Attributes:
        settings: of the training; its epochs are the most that a candidate gets.
        architecture: of the dense network.
        baseline_accuracy: the dense network's, on test.
        tolerance: accuracy that may be lost for a candidate to be accepted.
    """

    settings: TrainSettings
    architecture: str
    baseline_accuracy: float
    tolerance: float = 0.02


def promote(records: list[Record], count: int, objective: str = "divergence") -> list[Record]:
    """The best `count` screened candidates of each budget, without those that another of them beats in every respect.

    Two candidates with the same configuration count once. Cheapest budget last, best first within a budget.
    """
    score = OBJECTIVES[objective]
    picked: list[Record] = []
    for budget in sorted({record["budget"] for record in records}, reverse=True):
        screened = [r for r in records if r["budget"] == budget and r["status"] == "screened"]
        distinct = {r["config"]: r for r in screened}
        picked += sorted(distinct.values(), key=score, reverse=True)[:count]

    def beaten(one: Record) -> bool:
        return any(
            score(other) >= score(one)
            and other["flops"] <= one["flops"]
            and other["params"] <= one["params"]
            and (score(other), other["flops"], other["params"]) != (score(one), one["flops"], one["params"])
            for other in picked
        )

    return [record for record in picked if not beaten(record)]


def finetune_promoted(
    promoted: list[Record],
    screener: Screener,
    dataset: Dataset,
    plan: FinetuneSettings,
    folder: Path,
    log: RunLog,
    *,
    progress: bool = True,
) -> list[Finalist]:
    """Fine-tune on one of our data sets, distilling from the dense network; evaluate the survivors once on test.

    See `finetune_with`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    teacher = teacher_logits(screener.factors.model, dataset, folder) if plan.settings.distill_weight > 0 else None
    trainer = _SplitTrainer(dataset, plan, teacher)
    standard = AcceptanceRule(plan.baseline_accuracy, plan.tolerance)
    return finetune_with(promoted, screener, trainer, standard, folder, log, progress=progress)


@dataclass(frozen=True)
class AcceptanceRule:
    """The dense network's final score (None: there is no metric), and how much of it a candidate may lose."""

    baseline: float | None
    tolerance: float

    def accepts(self, score: float | None) -> bool:
        return self.baseline is not None and is_accepted(score, self.baseline, self.tolerance)


def finetune_with(
    promoted: list[Record],
    screener: Screener,
    trainer: Trainer,
    standard: AcceptanceRule,
    folder: Path,
    log: RunLog,
    *,
    progress: bool = True,
) -> list[Finalist]:
    """Fine-tune with successive halving; give the survivors their final score.

    Returns the survivors and the failures, in the order of `promoted`; who was given up when is said in the log.

    What the folder holds from an earlier, interrupted call is not done again. A candidate whose loss turns NaN or that
    does not fit into memory becomes a failed record, and the others go on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    running = {record["trial"]: record for record in promoted}
    results: dict[str, Finalist] = {}
    bar = tqdm(total=len(promoted) * trainer.epochs, desc="fine-tuning", unit="epoch", disable=not progress)
    with bar:
        for epoch in range(1, trainer.epochs + 1):
            scores = {}
            for trial, record in running.items():
                run = _Run(record, screener, trainer, standard, folder)
                try:
                    scores[trial] = run.until(epoch)
                    if not math.isfinite(scores[trial]):
                        raise TrainingDiverged(f"the validation score became {scores.pop(trial)} in epoch {epoch}")
                except (TrainingDiverged, RuntimeError, MemoryError) as failure:
                    reason = str(failure) if isinstance(failure, TrainingDiverged) else out_of_memory(failure)
                    if reason is None:
                        raise
                    results[trial] = Finalist({**record, "status": "failed", "reason": reason}, None, trainer)
                bar.update()
                bar.set_postfix_str(f"{trial}: validation {scores.get(trial, float('nan')):.4f}")
            kept = _survivors(running, scores, last=epoch == trainer.epochs)
            for trial in set(scores) - set(kept):
                log.info(f"Gave up {trial} after epoch {epoch}: validation accuracy {scores[trial]:.4f}")
            bar.total -= (len(running) - len(kept)) * (trainer.epochs - epoch)
            running = {trial: running[trial] for trial in kept}
    for record in running.values():
        results[record["trial"]] = _Run(record, screener, trainer, standard, folder).finish()
    return [results[record["trial"]] for record in promoted if record["trial"] in results]


def epoch_seconds(folder: Path) -> list[float]:
    """Wall time of every epoch of fine-tuning in this folder, those of candidates that were given up included."""
    files = sorted(folder.glob(f"candidate-*{_EPOCHS}"))
    return [one["seconds"] for path in files for one in json.loads(path.read_text())]


@dataclass(frozen=True)
class _SplitTrainer:
    """Trains on one of our data sets, whose teacher's outputs were computed once; see `Trainer`."""

    dataset: Dataset
    plan: FinetuneSettings
    teacher: Tensor | None

    @property
    def epochs(self) -> int:
        return self.plan.settings.epochs

    @property
    def facts(self) -> Mapping[str, Any]:
        return asdict(self.plan.settings)

    def train(self, model: nn.Module, checkpoint: Path, on_epoch: OnEpoch) -> list[EpochRecord]:
        history = train(
            model,
            self.dataset,
            self.plan.settings,
            teacher_logits=self.teacher,
            checkpoint=checkpoint,
            progress=False,
            on_epoch=on_epoch,
        )
        return list(history.epochs)

    def test(self, model: nn.Module) -> float:
        return evaluate(model, self.dataset.test).accuracy

    def save(self, model: nn.Module, path: Path, config: Configuration, metadata: dict[str, Any]) -> None:
        save_compressed(
            model,
            path,
            architecture=self.plan.architecture,
            num_classes=self.dataset.num_classes,
            image_size=self.dataset.image_size,
            config=config,
            metadata={
                "dataset": self.dataset.name,
                "classes": list(self.dataset.classes),
                "mean": list(self.dataset.mean),
                "std": list(self.dataset.std),
                **metadata,
            },
        )

    def load(self, path: Path, device: str) -> nn.Module:
        return load_compressed(path, device)[0]


class _Run:
    """One candidate's fine-tuning: where its files lie, and how far it has come."""

    def __init__(
        self, record: Record, screener: Screener, trainer: Trainer, standard: AcceptanceRule, folder: Path
    ) -> None:
        self.record, self.screener, self.trainer, self.standard = record, screener, trainer, standard
        stem = re.sub(r"[^\w.-]+", "-", f"candidate-{record['trial']}")
        self.checkpoint = folder / f"{stem}.unfinished.pt"
        self.progress = folder / f"{stem}{_EPOCHS}"
        self.result = folder / f"{stem}.json"
        self.weights = folder / f"{stem}.safetensors"

    def until(self, epoch: int) -> float:
        """Train until `epoch` epochs are done, unless they are; validation score at that point."""
        if epoch > len(self._epochs()):
            self._train(epoch)
        return self._epochs()[epoch - 1]["val_accuracy"]

    def finish(self) -> Finalist:
        """The result, read from the folder or made: the final score, the network saved."""
        if not self.result.exists():
            self._write_result()
        return Finalist(restored(json.loads(self.result.read_text())), self.weights, self.trainer)

    def _epochs(self) -> list[dict[str, float]]:
        """What is known of each epoch so far, as `EpochRecord` has it."""
        return json.loads(self.progress.read_text()) if self.progress.exists() else []

    def _train(self, epoch: int) -> nn.Module:
        """The network after at least `epoch` epochs, continued from its checkpoint."""

        def on_epoch(done: EpochRecord) -> bool:
            write_text(self.progress, json.dumps([*self._epochs()[: done.epoch - 1], asdict(done)]))
            return done.epoch < epoch

        model = self.screener.build(self.record["config"])
        if not self.trainer.epochs:
            return model
        history = self.trainer.train(model, self.checkpoint, on_epoch)
        # A kill between the checkpoint and the note of its epoch leaves the note behind; the history has both.
        write_text(self.progress, json.dumps([asdict(one) for one in history]))
        return model

    def _write_result(self) -> None:
        model, config = self._train(self.trainer.epochs), self.record["config"]
        score, epochs = self.trainer.test(model), self._epochs()
        # Without any metric, epochs were judged by the divergence, which is no accuracy.
        judged = epochs[-1]["val_accuracy"] if epochs and self.standard.baseline is not None else None
        record = {
            **self.record,
            "accuracy": score,
            "accepted": self.standard.accepts(score),
            "status": "fine-tuned",
            "screened_accuracy": self.record["val_accuracy"],
            "val_accuracy": self.record["val_accuracy"] if judged is None else judged,
            "epochs": len(epochs),
            "finetune_seconds": sum(one["seconds"] for one in epochs),
            "finetune": dict(self.trainer.facts),
        }
        self.trainer.save(model, self.weights, config, {"accuracy": score, "trial": self.record["trial"]})
        write_text(self.result, json.dumps(stored(record), indent=1))
        self.checkpoint.unlink(missing_ok=True)


def _survivors(running: Mapping[str, Record], scores: Mapping[str, float], *, last: bool) -> list[str]:
    """The better half (rounded up) of each budget's candidates that are still in training."""
    kept = []
    for budget in {record["budget"] for record in running.values()}:
        own = [trial for trial in scores if running[trial]["budget"] == budget]
        ranked = sorted(own, key=scores.get, reverse=True)
        kept += ranked if last else ranked[: -(-len(ranked) // 2)]
    return [trial for trial in running if trial in kept]
