"""Fine-tune the promoted candidates, at most a few epochs each, and read test once for those that came through.

Successive halving over the epochs: after each epoch the worse half of a budget's candidates is given up (Jamieson and
Talwalkar, 2016). Every epoch and every result is on disk before the next one starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..configuration import Configuration
from ..data import Dataset
from ..files import read_json
from ..finetune import EpochRecord, TrainSettings, evaluate, teacher_logits, train
from ..models import load_compressed, save_compressed
from ..progress import EpochsBar, OnBatch
from ..reports import RunLog
from .executor import Executor, LocalExecutor
from .finetuning import CONTROL, EPOCHS_SUFFIX, AcceptanceRule, Finalist, Finetuning
from .records import Record
from .screening import Screener
from .study import OBJECTIVES
from .trainers import OnEpoch, Trainer


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


def split_trainer(
    dense: nn.Module,
    dataset: Dataset,
    settings: TrainSettings,
    architecture: str,
    folder: Path,
    *,
    progress: bool = False,
) -> Trainer:
    """Trains on one of our data sets; the dense network's outputs are computed once, and kept in the folder.

    settings: their epochs are the most that a candidate gets; architecture: of the dense network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    teacher = None
    if settings.distill_weight > 0:
        teacher = teacher_logits(dense, dataset, folder, progress=progress)
    return _SplitTrainer(dataset, settings, architecture, teacher)


def train_control(common: Finetuning, executor: Executor, log: RunLog, *, progress: bool = True) -> Record | None:
    """The dense network, trained as a candidate is: its record; None where that failed, which the log says.

    What the folder holds is not done again.
    """
    common.folder.mkdir(parents=True, exist_ok=True)
    record, epochs = common.control(), common.trainer.epochs
    with EpochsBar(epochs, CONTROL, shown=progress) as bar:
        [(_, found)] = executor.finetune_all(replace(common, on_batch=bar.batch), [record], None)
        bar.epochs(epochs)
    if "failed" in found:
        log.warning(f"{CONTROL}: failed, {found['failed']}; losses are counted from the dense network as it was")
        return None
    return common.finished(record).record


def finetune_with(
    promoted: list[Record],
    screener: Screener,
    trainer: Trainer,
    standard: AcceptanceRule,
    folder: Path,
    log: RunLog,
    *,
    executor: Executor | None = None,
    progress: bool = True,
) -> list[Finalist]:
    """Fine-tune with successive halving; give the survivors their final score.

    Returns the survivors and the failures, in the order of `promoted`; who was given up when is said in the log.

    What the folder holds from an earlier, interrupted call is not done again. A candidate whose loss turns NaN or that
    does not fit into memory becomes a failed record, and the others go on.

    executor: who trains; None: this process, one candidate after the other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    executor = executor or LocalExecutor(screener)
    running = {record["trial"]: record for record in promoted}
    results: dict[str, Finalist] = {}
    with EpochsBar(len(promoted) * trainer.epochs, "fine-tuning", shown=progress) as bar:
        common = Finetuning(screener, trainer, standard, folder, bar.batch)
        for epoch in range(1, trainer.epochs + 1):
            scores = {}
            for trial, found in executor.finetune_all(common, list(running.values()), epoch):
                if "failed" in found:
                    results[trial] = common.failed(running[trial], found["failed"])
                else:
                    scores[trial] = found["score"]
                bar.epochs(said=f"{trial}: validation {scores.get(trial, float('nan')):.4f}")
            kept = _survivors(running, scores, last=epoch == trainer.epochs)
            for trial in sorted(set(scores) - set(kept)):
                log.info(f"Gave up {trial} after epoch {epoch}: validation accuracy {scores[trial]:.4f}")
            bar.give_up((len(running) - len(kept)) * (trainer.epochs - epoch))
            running = {trial: running[trial] for trial in kept}
    for trial, found in executor.finetune_all(common, list(running.values()), None):
        failure = found.get("failed")
        results[trial] = common.failed(running[trial], failure) if failure else common.finished(running[trial])
    return [results[record["trial"]] for record in promoted if record["trial"] in results]


def epoch_seconds(folder: Path) -> list[float]:
    """Wall time of every epoch of fine-tuning in this folder, those of candidates that were given up included."""
    files = sorted(folder.glob(f"candidate-*{EPOCHS_SUFFIX}"))
    return [one["seconds"] for path in files for one in read_json(path)]


@dataclass(frozen=True)
class _SplitTrainer:
    """Trains on one of our data sets, whose teacher's outputs were computed once; see `Trainer`."""

    dataset: Dataset
    settings: TrainSettings
    architecture: str
    teacher: Tensor | None

    on_training_data = True

    @property
    def epochs(self) -> int:
        return self.settings.epochs

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.settings.recorded()

    def train(
        self, model: nn.Module, checkpoint: Path, on_epoch: OnEpoch, on_batch: OnBatch | None = None
    ) -> list[EpochRecord]:
        history = train(
            model,
            self.dataset,
            self.settings,
            teacher_logits=self.teacher,
            checkpoint=checkpoint,
            progress=False,
            on_epoch=on_epoch,
            on_batch=on_batch,
        )
        return list(history.epochs)

    def test(self, model: nn.Module) -> float:
        return evaluate(model, self.dataset.test).accuracy

    def save(self, model: nn.Module, path: Path, config: Configuration, metadata: dict[str, Any]) -> None:
        save_compressed(
            model,
            path,
            architecture=self.architecture,
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


def _survivors(running: Mapping[str, Record], scores: Mapping[str, float], *, last: bool) -> list[str]:
    """The better half (rounded up) of each budget's candidates that are still in training."""
    kept = []
    for budget in {record["budget"] for record in running.values()}:
        own = [trial for trial in scores if running[trial]["budget"] == budget]
        ranked = sorted(own, key=scores.get, reverse=True)
        kept += ranked if last else ranked[: -(-len(ranked) // 2)]
    return [trial for trial in running if trial in kept]
