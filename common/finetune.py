"""Train, distil and evaluate: the same loop for dense baselines and for compressed candidates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from common.data import Batch, Dataset, Split
from common.train_state import TrainState, fingerprint

LOSS_CHECK_INTERVAL = 20
"""Batches between looks at the loss: each look makes a GPU wait."""


class TrainingDiverged(FloatingPointError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train. The learning rate warms up linearly, then falls to zero along a cosine, batch by batch."""

    epochs: int = 3
    batch_size: int = 128
    learning_rate: float = 0.05
    weight_decay: float = 5e-4  # not applied to biases and norms
    optimizer: str = "sgd"  # "sgd" (Nesterov momentum 0.9) or "adamw"
    warmup: float = 0.2  # share of all batches
    label_smoothing: float = 0.0
    clip_norm: float | None = 5.0  # largest norm of the whole gradient
    seed: int = 0
    max_batches_per_epoch: int | None = None
    augment: bool = True
    amp: bool | None = None  # bfloat16 autocast; None: on CUDA only
    distill_weight: float = 0.0  # share of the loss that comes from the teacher
    distill_temperature: float = 4.0

    def __post_init__(self):
        rules = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "learning_rate": (self.learning_rate > 0, "positive"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "optimizer": (self.optimizer in ("sgd", "adamw"), "'sgd' or 'adamw'"),
            "warmup": (0 <= self.warmup < 1, "in [0, 1)"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "positive or None"),
            "max_batches_per_epoch": (
                self.max_batches_per_epoch is None or self.max_batches_per_epoch >= 1,
                "at least 1 or None",
            ),
            "distill_weight": (0 <= self.distill_weight <= 1, "in [0, 1]"),
            "distill_temperature": (self.distill_temperature > 0, "positive"),
        }
        for name, (legal, rule) in rules.items():
            if not legal:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    def learning_rate_at(self, step: int, total: int) -> float:
        """Learning rate of batch `step` (from 0) out of `total`."""
        warm = round(total * self.warmup)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm + 0.5) / (total - warm)))


@dataclass(frozen=True)
class EpochRecord:
    """One epoch, counted from 1: mean training loss, accuracy and loss on validation, wall time of both."""

    epoch: int
    train_loss: float
    val_accuracy: float
    val_loss: float
    seconds: float


@dataclass(frozen=True)
class TrainHistory:
    """The epochs so far; `stopped` when `on_epoch` ended the training before its last epoch."""

    epochs: tuple[EpochRecord, ...]
    stopped: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Top-1 accuracy (0..1) and mean cross-entropy over `count` images."""

    accuracy: float
    loss: float
    count: int


def evaluate(model: nn.Module, split: Split, *, batch_size: int = 512, limit: int | None = None) -> Evaluation:
    """Measure a model on a split, or on its first `limit` images; each module's training flag is restored.

    Raises:
        ValueError: the split has labels that the model's head does not.
    """
    correct, loss, count = 0, 0.0, 0
    with evaluating(model):
        for batch in split.batches(batch_size, limit=limit):
            logits = _logits(model, batch)
            correct += (logits.argmax(dim=1) == batch.labels).sum()
            loss += F.cross_entropy(logits, batch.labels, reduction="sum").double()
            count += len(batch.labels)
    return Evaluation(accuracy=int(correct) / count, loss=float(loss) / count, count=count)


def predict_logits(model: nn.Module, split: Split, batch_size: int = 512) -> Tensor:
    """Outputs for every image, unaugmented and in split order: (N, classes) float32 on the split's device."""
    with evaluating(model):
        return torch.cat([_logits(model, batch) for batch in split.batches(batch_size)])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module has the training flag it had."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """Forward pass: (B, classes) float32, checked against the labels."""
    logits = model(batch.images).float()
    if int(batch.labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"the split has label {int(batch.labels.max())}, but the model's head knows 0 to {logits.shape[1] - 1}"
        )
    return logits


def train(
    model: nn.Module,
    dataset: Dataset,
    settings: TrainSettings,
    *,
    teacher_logits: Tensor | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    on_epoch: Callable[[EpochRecord], bool | None] | None = None,
) -> TrainHistory:
    """Train `model` in place on the training split, on the data set's device; evaluate on validation only.

    The result depends on the settings and their seed, not on earlier random draws, and is the same bit for bit
    on one device, whether or not the run was interrupted and resumed. torch's global generators are left as
    they were. The model comes back in evaluation mode.

    Args:
        teacher_logits: (N_train, classes), from `predict_logits` on the training split; used with distill_weight.
        checkpoint: file written after each epoch; a run that finds it continues from it.
        progress: show a bar.
        on_epoch: called after each epoch; False ends the training.

    Raises:
        TrainingDiverged: NaN or infinite loss, with epoch and batch.
        ValueError: the checkpoint belongs to other settings, data or another model; teacher_logits that do not
            fit, or are missing; fewer than 2 training images; labels that do not fit the head.
    """
    _check_teacher(teacher_logits, dataset, settings)
    model.to(dataset.device)
    optimizer = _optimizer(model, settings)
    state = TrainState(model, optimizer, fingerprint(settings, dataset, teacher_logits))
    records = [EpochRecord(**record) for record in state.load(checkpoint)] if checkpoint else []
    steps = _steps_per_epoch(dataset.train, settings)
    bar = tqdm(total=steps * settings.epochs, initial=steps * len(records), unit="batch", disable=not progress)
    with bar, _reproducible(dataset.device):
        for epoch in range(len(records), settings.epochs):
            bar.set_description(f"epoch {epoch + 1}/{settings.epochs}")
            started = time.perf_counter()
            train_loss = _train_epoch(model, optimizer, dataset.train, settings, epoch, teacher_logits, bar)
            found = evaluate(model, dataset.val)
            seconds = time.perf_counter() - started
            records.append(EpochRecord(epoch + 1, train_loss, found.accuracy, found.loss, seconds))
            bar.set_postfix(loss=f"{train_loss:.4f}", val=f"{found.accuracy:.4f}")
            if checkpoint:
                state.save(checkpoint, [asdict(record) for record in records])
            if on_epoch and on_epoch(records[-1]) is False:
                break
    model.eval()
    return TrainHistory(tuple(records), stopped=len(records) < settings.epochs)


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    settings: TrainSettings,
    epoch: int,
    teacher_logits: Tensor | None,
    bar: tqdm,
) -> float:
    """One pass over the training images; returns the mean loss."""
    # All randomness of an epoch follows from (seed, epoch), so a resumed run needs no generator's state.
    seed = settings.seed * 10_007 + epoch
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    steps = _steps_per_epoch(split, settings)
    batch_size = min(settings.batch_size, len(split))
    batches = split.batches(
        batch_size,
        generator=generator,
        augment=settings.augment,
        limit=steps * batch_size,
        drop_last=True,  # a last batch of one image would stop batch norm
    )
    model.train()
    losses: list[Tensor] = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(epoch * steps + step, settings.epochs * steps)
        loss = _loss(model, batch, settings, teacher_logits)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        losses.append(loss.detach())
        bar.update()
        if (step + 1) % LOSS_CHECK_INTERVAL == 0 or step + 1 == steps:
            _check_losses(losses, epoch)
            bar.set_postfix(loss=f"{float(losses[-1]):.4f}")
    return float(torch.stack(losses).double().mean())


def _loss(model: nn.Module, batch: Batch, settings: TrainSettings, teacher_logits: Tensor | None) -> Tensor:
    """(1 - w) * cross-entropy + w * T^2 * KL(teacher || model), Hinton et al. 2015 (arXiv:1503.02531)."""
    device = batch.images.device.type
    amp = settings.amp if settings.amp is not None else device == "cuda"
    with torch.autocast(device, dtype=torch.bfloat16, enabled=amp):
        logits = _logits(model, batch)
    loss = F.cross_entropy(logits, batch.labels, label_smoothing=settings.label_smoothing)
    weight, temperature = settings.distill_weight, settings.distill_temperature
    if weight == 0:
        return loss
    distance = F.kl_div(
        F.log_softmax(logits / temperature, dim=1),
        F.log_softmax(teacher_logits[batch.indices].float() / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - weight) * loss + weight * temperature**2 * distance


def _check_losses(losses: list[Tensor], epoch: int) -> None:
    finite = torch.isfinite(torch.stack(losses)).tolist()
    if not all(finite):
        batch = finite.index(False)
        raise TrainingDiverged(
            f"the training loss became {float(losses[batch])} in epoch {epoch + 1}, batch {batch + 1}: "
            "lower the learning rate, lengthen the warm-up or clip the gradient harder"
        )


def _check_teacher(teacher_logits: Tensor | None, dataset: Dataset, settings: TrainSettings) -> None:
    if (teacher_logits is not None) != (settings.distill_weight > 0):
        raise ValueError(
            f"distill_weight {settings.distill_weight} and teacher_logits "
            f"({'given' if teacher_logits is not None else 'missing'}) must come together"
        )
    expected = (len(dataset.train), dataset.num_classes)
    if teacher_logits is not None and tuple(teacher_logits.shape) != expected:
        raise ValueError(
            f"teacher_logits must be {expected} (training images, classes), got {tuple(teacher_logits.shape)}"
        )


def _steps_per_epoch(split: Split, settings: TrainSettings) -> int:
    if len(split) < 2:
        raise ValueError(f"training needs at least 2 images, the training split has {len(split)}")
    steps = split.num_batches(min(settings.batch_size, len(split)), drop_last=True)
    return min(steps, settings.max_batches_per_epoch or steps)


def _optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Weight decay goes to kernels and matrices only: biases and norms (at most one mode) are left out."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """Deterministic cuDNN kernels, and torch's global generators as before afterwards."""
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=torch.backends.cudnn.allow_tf32
        ),
    ):
        yield
