"""Fine-tune the promoted candidates, at most a few epochs each, and read test once for those that came through.

Successive halving over the epochs: after each epoch the worse half of a budget's candidates is given up (Jamieson and
Talwalkar, 2016). Every epoch and every result is on disk before the next one starts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from ..data import Dataset
from ..files import write_text
from ..finetune import EpochRecord, TrainingDiverged, TrainSettings, evaluate, teacher_logits, train
from ..models import load_compressed, save_compressed
from ..modules import out_of_memory
from ..reports import RunLog, is_accepted
from .records import Record, restored, stored
from .screening import Screener
from .study import OBJECTIVES

_EPOCHS = ".epochs.json"


@dataclass(frozen=True)
class Finalist:
    """A fine-tuned candidate: its record, as it will be logged, and where its network lies (None: it failed)."""

    record: Record
    path: Path | None

    def load(self, device: str = "cpu") -> nn.Module:
        """The network, in eval mode.

        Raises:
            ValueError: it failed, or its file is damaged.
        """
        if self.path is None:
            raise ValueError(f"candidate {self.record['trial']} failed: {self.record['reason']}")
        return load_compressed(self.path, device)[0]


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
    """Fine-tune with successive halving, distilling from the dense network; evaluate the survivors once on test.

    Returns the survivors and the failures, in the order of `promoted`; who was given up when is said in the log.

    What the folder holds from an earlier, interrupted call is not done again. A candidate whose loss turns NaN or that
    does not fit into memory becomes a failed record, and the others go on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    teacher = teacher_logits(screener.factors.model, dataset, folder) if plan.settings.distill_weight > 0 else None
    running = {record["trial"]: record for record in promoted}
    results: dict[str, Finalist] = {}
    bar = tqdm(total=len(promoted) * plan.settings.epochs, desc="fine-tuning", unit="epoch", disable=not progress)
    with bar:
        for epoch in range(1, plan.settings.epochs + 1):
            scores = {}
            for trial, record in running.items():
                run = _Run(record, screener, dataset, plan, folder, teacher)
                try:
                    scores[trial] = run.until(epoch)
                except (TrainingDiverged, RuntimeError, MemoryError) as failure:
                    reason = str(failure) if isinstance(failure, TrainingDiverged) else out_of_memory(failure)
                    if reason is None:
                        raise
                    results[trial] = Finalist({**record, "status": "failed", "reason": reason}, None)
                bar.update()
                bar.set_postfix_str(f"{trial}: validation {scores.get(trial, float('nan')):.4f}")
            kept = _survivors(running, scores, last=epoch == plan.settings.epochs)
            for trial in set(scores) - set(kept):
                log.info(f"Gave up {trial} after epoch {epoch}: validation accuracy {scores[trial]:.4f}")
            bar.total -= (len(running) - len(kept)) * (plan.settings.epochs - epoch)
            running = {trial: running[trial] for trial in kept}
    for record in running.values():
        results[record["trial"]] = _Run(record, screener, dataset, plan, folder, teacher).finish()
    return [results[record["trial"]] for record in promoted if record["trial"] in results]


def epoch_seconds(folder: Path) -> list[float]:
    """Wall time of every epoch of fine-tuning in this folder, those of candidates that were given up included."""
    files = sorted(folder.glob(f"candidate-*{_EPOCHS}"))
    return [one["seconds"] for path in files for one in json.loads(path.read_text())]


class _Run:
    """One candidate's fine-tuning: where its files lie, and how far it has come."""

    def __init__(
        self,
        record: Record,
        screener: Screener,
        dataset: Dataset,
        plan: FinetuneSettings,
        folder: Path,
        teacher: Tensor | None,
    ) -> None:
        self.record, self.screener, self.dataset, self.plan, self.teacher = record, screener, dataset, plan, teacher
        stem = re.sub(r"[^\w.-]+", "-", f"candidate-{record['trial']}")
        self.checkpoint = folder / f"{stem}.unfinished.pt"
        self.progress = folder / f"{stem}{_EPOCHS}"
        self.result = folder / f"{stem}.json"
        self.weights = folder / f"{stem}.safetensors"

    def until(self, epoch: int) -> float:
        """Train until `epoch` epochs are done, unless they are; validation accuracy at that point."""
        if epoch > len(self._epochs()):
            self._train(epoch)
        return self._epochs()[epoch - 1]["val_accuracy"]

    def finish(self) -> Finalist:
        """The result, read from the folder or made: evaluate on test, save the network."""
        if not self.result.exists():
            self._write_result()
        return Finalist(restored(json.loads(self.result.read_text())), self.weights)

    def _epochs(self) -> list[dict[str, float]]:
        """What is known of each epoch so far, as `EpochRecord` has it."""
        return json.loads(self.progress.read_text()) if self.progress.exists() else []

    def _train(self, epoch: int) -> nn.Module:
        """The network after at least `epoch` epochs, continued from its checkpoint."""

        def on_epoch(done: EpochRecord) -> bool:
            write_text(self.progress, json.dumps([*self._epochs()[: done.epoch - 1], asdict(done)]))
            return done.epoch < epoch

        model = self.screener.build(self.record["config"])
        history = train(
            model,
            self.dataset,
            self.plan.settings,
            teacher_logits=self.teacher,
            checkpoint=self.checkpoint,
            progress=False,
            on_epoch=on_epoch,
        )
        # A kill between the checkpoint and the note of its epoch leaves the note behind; the history has both.
        write_text(self.progress, json.dumps([asdict(one) for one in history.epochs]))
        return model

    def _write_result(self) -> None:
        model = self._train(self.plan.settings.epochs)
        plan, config = self.plan, self.record["config"]
        accuracy = evaluate(model, self.dataset.test).accuracy
        record = {
            **self.record,
            "accuracy": accuracy,
            "accepted": is_accepted(accuracy, plan.baseline_accuracy, plan.tolerance),
            "status": "fine-tuned",
            "screened_accuracy": self.record["val_accuracy"],
            "val_accuracy": self._epochs()[-1]["val_accuracy"],
            "epochs": len(self._epochs()),
            "finetune_seconds": sum(one["seconds"] for one in self._epochs()),
            "finetune": asdict(plan.settings),
        }
        save_compressed(
            model,
            self.weights,
            architecture=plan.architecture,
            num_classes=self.dataset.num_classes,
            image_size=self.dataset.image_size,
            config=config,
            metadata={"dataset": self.dataset.name, "accuracy": accuracy, "trial": self.record["trial"]},
        )
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
