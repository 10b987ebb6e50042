"""How promoted candidates are trained: on one of our data sets, on anybody's batches, or by anybody's own function."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compress import HTLayer
from ..compress.proof import output_tensors
from ..configuration import Configuration
from ..data import Split
from ..finetune import (
    EpochRecord,
    FeatureMaps,
    TrainingDiverged,
    TrainSettings,
    TrainState,
    autocast,
    distillation,
    make_optimizer,
)
from ..inputs import channels_last, like_model, pairs_of, run
from ..models import load_compressed, save_compressed
from ..modules import evaluating, laid_out
from ..progress import OnBatch

OnEpoch = Callable[[EpochRecord], bool | None]


class Trainer(Protocol):
    """What fine-tuning asks of a task.

    Attributes:
        on_training_data: False where epochs are passes over something else, which a record does not count as epochs.
    """

    on_training_data: bool
    epochs: int
    facts: Mapping[str, Any]

    def train(
        self, model: nn.Module, checkpoint: Path, on_epoch: OnEpoch, on_batch: OnBatch | None = None
    ) -> list[EpochRecord]:
        """Train in place, going on from the checkpoint if there is one; `on_epoch` may end it by False."""

    def test(self, model: nn.Module) -> float | None:
        """The final score, on images that nothing was chosen by where there are such; None without any metric."""

    def save(self, model: nn.Module, path: Path, config: Configuration, metadata: dict[str, Any]) -> None:
        """Write a network that `load` gives back."""

    def load(self, path: Path, device: str) -> nn.Module:
        """A network that `save` wrote, in eval mode."""


@dataclass(frozen=True)
class BatchTrainer:
    """Trains on anything that yields (inputs, targets), distilling from the dense network batch by batch.

    Attributes:
        teacher: the dense network; it stays as it is.
        data: a DataLoader, a list of batches or a split, walked through once an epoch.
        settings: of the training; `batch_size` and `augment` are for our own splits, which are shuffled as well: of
            anything else they are the data's own affair.
        kind: of the outputs, see `common.search.divergence`: logits are distilled by KL, others by squared error.
        loss: (output, targets) -> scalar, in place of cross-entropy; without it, outputs that are no logits are
            trained on the teacher's alone. With a distill_weight of 1 all are, and nobody looks at the targets.
        validate: model -> number, after each epoch; higher is better.
        score: model -> number, the final score; None where there is no metric.
        details: kept in the files of finished networks.
        untrained: there is nothing to train; candidates are judged as they are screened.
    """

    teacher: nn.Module
    data: Iterable[Any]
    settings: TrainSettings
    kind: str
    validate: Callable[[nn.Module], float]
    score: Callable[[nn.Module], float] | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    untrained: bool = False

    on_training_data = True

    @property
    def epochs(self) -> int:
        return 0 if self.untrained else self.settings.epochs

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.settings.recorded()

    def train(
        self, model: nn.Module, checkpoint: Path, on_epoch: OnEpoch, on_batch: OnBatch | None = None
    ) -> list[EpochRecord]:
        """
        Raises:
            TrainingDiverged: a NaN or infinite loss.
            ValueError: batches without targets, or none at all.
        """
        device = next(self.teacher.parameters()).device
        laid_out(model.to(device), channels_last=True)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            # A network frozen as a whole: what is new in it is trained; of a control, in which nothing is new, all.
            for module in [one for one in model.modules() if isinstance(one, HTLayer)] or [model]:
                module.requires_grad_(True)
        optimizer = make_optimizer(model, self.settings)
        state = TrainState(model, optimizer, {**self.facts, "kind": self.kind, "own loss": self.loss is not None})
        records = [EpochRecord(**known) for known in state.load(checkpoint)]
        maps = FeatureMaps.of(model, self.teacher if self.settings.feature_weight else None)
        with (
            maps.watched(model, self.teacher),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            for epoch in range(len(records), self.epochs):
                torch.manual_seed(self.settings.seed * 10_007 + epoch)
                started = time.perf_counter()
                loss = self._epoch(model, optimizer, epoch, maps, on_batch)
                value = self.validate(model)
                records.append(EpochRecord(epoch + 1, loss, value, None, time.perf_counter() - started))
                state.save(checkpoint, [asdict(one) for one in records])
                if on_epoch(records[-1]) is False:
                    break
        model.eval()
        return records

    def _epoch(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        epoch: int,
        maps: FeatureMaps,
        on_batch: OnBatch | None,
    ) -> float:
        batches, steps = self._batches(epoch)
        losses: list[float] = []
        model.train()
        for step, (inputs, targets) in enumerate(pairs_of(batches, "train")):
            done = epoch * steps + step if steps else epoch
            for group in optimizer.param_groups:
                group["lr"] = self.settings.learning_rate_at(done, self.epochs * (steps or 1))
            loss = self._loss(model, inputs, targets)
            loss = loss + self.settings.feature_weight * maps.distance()
            if not torch.isfinite(loss):
                raise TrainingDiverged(
                    f"the training loss became {float(loss)} in epoch {epoch + 1}, batch {step + 1}: "
                    "lower learning_rate"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self.settings.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), self.settings.clip_norm)
            optimizer.step()
            losses.append(float(loss.detach()))
            if on_batch is not None and steps:
                on_batch(1 / steps)
        if not losses:
            raise ValueError(
                "train: the data yielded no batch in this epoch: give a DataLoader or a list, not a generator"
            )
        return sum(losses) / len(losses)

    def _batches(self, epoch: int) -> tuple[Iterable[Any], int | None]:
        """The batches of an epoch, and how many there are, if that is known."""
        settings = self.settings
        if isinstance(self.data, Split):
            size = min(settings.batch_size, len(self.data))
            generator = torch.Generator().manual_seed(settings.seed * 10_007 + epoch)
            batches = self.data.batches(size, generator=generator, augment=settings.augment, drop_last=True)
            steps = self.data.num_batches(size, drop_last=True)
        else:
            batches, steps = self.data, len(self.data) if hasattr(self.data, "__len__") else None
        if settings.max_batches_per_epoch is None:
            return batches, steps
        most = min(steps or settings.max_batches_per_epoch, settings.max_batches_per_epoch)
        return islice(batches, most), most

    def _loss(self, model: nn.Module, inputs: Any, targets: Any) -> Tensor:
        inputs = channels_last(like_model(inputs, self.teacher))
        device = next(self.teacher.parameters()).device
        targets = targets.to(device) if isinstance(targets, Tensor) else targets
        with autocast(device, self.settings.amp):
            output = run(model, inputs)
            with evaluating(self.teacher), torch.no_grad():
                dense = run(self.teacher, inputs)
        weight = self.settings.distill_weight
        if self.kind == "kl":
            from_teacher = distillation(output.float(), dense.float(), self.settings.distill_temperature)
            own = self.loss or self._cross_entropy
        else:
            pairs = zip(output_tensors(output), output_tensors(dense), strict=True)
            from_teacher = sum(
                F.mse_loss(a.float(), b.float()) / b.float().square().mean().clamp_min(1e-12) for a, b in pairs
            )
            own = self.loss
        if own is None or weight == 1:
            return from_teacher
        return (1 - weight) * own(output, targets) + weight * from_teacher

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.settings.label_smoothing)

    def test(self, model: nn.Module) -> float | None:
        return None if self.score is None else float(self.score(model))

    def save(self, model: nn.Module, path: Path, config: Configuration, metadata: dict[str, Any]) -> None:
        save_compressed(model, path, dense=self.teacher, config=config, metadata={**self.details, **metadata})

    def load(self, path: Path, device: str) -> nn.Module:
        return load_compressed(path, device, model=self.teacher)[0]


@dataclass(frozen=True)
class CallbackTrainer(BatchTrainer):
    """Hands the training to the user's own function, which gets (model, teacher, epochs) and changes the model."""

    finetune: Callable[[nn.Module, nn.Module, int], Any] | None = None

    @property
    def epochs(self) -> int:
        return 0 if self.untrained else 1

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"epochs": self.settings.epochs, "finetune": getattr(self.finetune, "__name__", "own function")}

    def train(
        self, model: nn.Module, checkpoint: Path, on_epoch: OnEpoch, on_batch: OnBatch | None = None
    ) -> list[EpochRecord]:
        """All epochs at once: they are the function's own affair, and so is resuming in their middle."""
        device = next(self.teacher.parameters()).device
        model.to(device)
        state = TrainState(model, torch.optim.SGD(model.parameters(), lr=1.0), dict(self.facts))
        records = [EpochRecord(**known) for known in state.load(checkpoint)]
        if not records:
            started = time.perf_counter()
            self.finetune(model, self.teacher, self.settings.epochs)
            value = self.validate(model)
            records = [EpochRecord(1, None, value, None, time.perf_counter() - started)]
            state.save(checkpoint, [asdict(one) for one in records])
        on_epoch(records[-1])
        model.eval()
        return records
