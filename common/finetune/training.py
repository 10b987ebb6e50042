"""The training loop: the same for dense baselines and for compressed candidates, with or without a teacher."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import cudnn

from ..data import Batch, Dataset, Split
from ..modules import evaluating
from ..progress import OnBatch, Watchers, progress_bar
from .evaluation import check_head, evaluate
from .features import FeatureMaps
from .precision import autocast
from .settings import TrainSettings
from .state import TrainState, fingerprint

CHECKPOINT_PAUSE, QUICK_CHECKPOINT = 20, 0.5
"""After a checkpoint that took more than QUICK_CHECKPOINT seconds to write (VGG16's are of 1.6 GB), the next one waits
CHECKPOINT_PAUSE times as long."""

LOSS_CHECK_INTERVAL = 20
"""Batches between looks at the loss: each look makes a GPU wait."""


class TrainingDiverged(FloatingPointError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class EpochRecord:
    """One epoch, counted from 1: mean training loss, accuracy and loss on validation, wall time of both.

    Losses are None where somebody else's function trains or judges.
    """

    epoch: int
    train_loss: float | None
    val_accuracy: float
    val_loss: float | None
    seconds: float


@dataclass(frozen=True)
class TrainHistory:
    """The epochs so far; `stopped` when `on_epoch` ended the training before its last epoch."""

    epochs: tuple[EpochRecord, ...]
    stopped: bool = False


def train(
    model: nn.Module,
    dataset: Dataset,
    settings: TrainSettings,
    *,
    teacher_logits: Tensor | None = None,
    teacher: nn.Module | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    on_epoch: Callable[[EpochRecord], bool | None] | None = None,
    on_batch: OnBatch | None = None,
) -> TrainHistory:
    """Train `model` in place on the training split, on the data set's device; evaluate on validation only.

    The result depends on the settings and their seed, not on earlier random draws, and is the same bit for bit
    on one device, whether or not the run was interrupted and resumed. (On CUDA, deterministic kernels are used
    where cuDNN has them; pooling that torch sums with atomic additions may differ in the last bits.)
    torch's global generators are left as they were. The model comes back in evaluation mode, channels-last.

    Args:
        teacher_logits: (N_train, classes), from `predict_logits` on the training split; used with distill_weight. They
            are of the images as they are, and say little of augmented ones.
        teacher: in their place the dense network, which is run on every batch just as the model sees it. With
            feature_weight its feature maps teach as well.
        checkpoint: file written after each epoch; a run that finds it continues from it. Where writing it takes long
            beside the epochs, some are skipped.
        progress: show a bar.
        on_epoch: called after each epoch; False ends the training.
        on_batch: called after each batch, with the share of an epoch that it is.

    Raises:
        TrainingDiverged: NaN or infinite loss, with epoch and batch; the model is not usable then.
        StateMismatch: the checkpoint belongs to other settings, data or another model, or is damaged.
        ValueError: teacher_logits that do not fit, or are missing; fewer than 2 training images; labels that do
            not fit the head.
    """
    _check_teacher(teacher_logits, teacher, dataset, settings)
    maps = FeatureMaps.of(model, teacher if settings.feature_weight else None)
    steps = _steps_per_epoch(dataset.train, settings)
    model.to(dataset.device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, settings)
    taught = "no teacher" if teacher is teacher_logits is None else "on batches" if teacher is not None else "once"
    state = TrainState(model, optimizer, fingerprint(settings, dataset, taught))
    targets = _Teacher(teacher, teacher_logits, settings, maps)
    records = [EpochRecord(**record) for record in state.load(checkpoint)] if checkpoint else []
    done = steps * len(records)
    bar = progress_bar(total=steps * settings.epochs, initial=done, unit="batch", shown=progress)
    watchers, stopped, next_save = Watchers(bar, on_batch), False, 0.0
    with bar, _reproducible(dataset.device), maps.watched(model, teacher):
        for epoch in range(len(records), settings.epochs):
            bar.set_description(f"epoch {epoch + 1}/{settings.epochs}")
            started = time.perf_counter()
            train_loss = _train_epoch(model, optimizer, dataset.train, settings, epoch, targets, watchers)
            last = epoch + 1 == settings.epochs  # what is chosen by, and what a loss is counted from: read in full
            found = evaluate(model, dataset.val, limit=None if last else settings.val_images, amp=settings.amp)
            seconds = time.perf_counter() - started
            records.append(EpochRecord(epoch + 1, train_loss, found.accuracy, found.loss, seconds))
            bar.set_postfix(loss=f"{train_loss:.4f}", val=f"{found.accuracy:.4f}")
            if checkpoint and time.perf_counter() >= next_save:
                began = time.perf_counter()
                state.save(checkpoint, [asdict(record) for record in records])
                took = time.perf_counter() - began
                next_save = time.perf_counter() + (CHECKPOINT_PAUSE * took if took > QUICK_CHECKPOINT else 0)
            if on_epoch and on_epoch(records[-1]) is False:
                stopped = epoch + 1 < settings.epochs
                break
    model.eval()
    return TrainHistory(tuple(records), stopped)


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    settings: TrainSettings,
    epoch: int,
    teacher: _Teacher,
    watchers: Watchers,
) -> float:
    """One pass over the training images; returns the mean loss."""
    # All randomness of an epoch follows from (seed, epoch), so a resumed run needs no generator's state.
    seed = settings.seed * 10_007 + epoch
    torch.manual_seed(seed)  # dropout draws from the global generator
    steps, batch_size = _steps_per_epoch(split, settings), min(settings.batch_size, len(split))
    batches = split.batches(
        batch_size,
        generator=torch.Generator().manual_seed(seed),
        augment=settings.augment,
        limit=steps * batch_size,
        drop_last=True,  # a last batch of one image would stop batch norm
    )
    model.train()
    losses: list[Tensor] = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(epoch * steps + step, settings.epochs * steps)
        logits = _forward(model, batch.images, settings)
        if step == 0:
            check_head(logits, split)
        loss = _loss(logits, batch, settings, teacher.logits(batch))
        loss = loss + settings.feature_weight * teacher.maps.distance()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        losses.append(loss.detach())
        watchers.batch(1 / steps)
        if (step + 1) % LOSS_CHECK_INTERVAL == 0 or step + 1 == steps:
            _check_losses(losses, epoch)
            watchers.bar.set_postfix(loss=f"{float(losses[-1]):.4f}", refresh=False)
    return float(torch.stack(losses).double().mean())


def _forward(model: nn.Module, images: Tensor, settings: TrainSettings) -> Tensor:
    """(B, C, S, S) -> logits (B, classes) float32, under bfloat16 autocast where the settings ask for it."""
    with autocast(images.device, settings.amp):
        return model(images.contiguous(memory_format=torch.channels_last)).float()


@dataclass(frozen=True)
class _Teacher:
    """What the dense network says to a batch: run on it, or looked up, or nothing; `maps`: how its insides compare."""

    model: nn.Module | None
    known: Tensor | None
    settings: TrainSettings
    maps: FeatureMaps

    def logits(self, batch: Batch) -> Tensor | None:
        if self.model is None:
            return None if self.known is None else self.known[batch.indices].float()
        with evaluating(self.model), torch.no_grad():
            return _forward(self.model, batch.images, self.settings)


def _loss(logits: Tensor, batch: Batch, settings: TrainSettings, teacher_logits: Tensor | None) -> Tensor:
    """(1 - w) * cross-entropy + w * T^2 * KL(teacher || model), Hinton et al. 2015 (arXiv:1503.02531)."""
    loss = F.cross_entropy(logits, batch.labels, label_smoothing=settings.label_smoothing)
    weight = settings.distill_weight
    if teacher_logits is None or not weight:
        return loss
    distance = distillation(logits, teacher_logits, settings.distill_temperature)
    return (1 - weight) * loss + weight * distance


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || model) at temperature T, the mean over all but the class axis; both (N, classes, ...)."""
    distance = F.kl_div(
        F.log_softmax(logits / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="sum",
        log_target=True,
    )
    return temperature**2 * distance * logits.shape[1] / logits.numel()


def _check_losses(losses: list[Tensor], epoch: int) -> None:
    finite = torch.isfinite(torch.stack(losses)).tolist()
    if not all(finite):
        batch = finite.index(False)
        raise TrainingDiverged(
            f"the training loss became {float(losses[batch])} in epoch {epoch + 1}, batch {batch + 1}: "
            "lower the learning rate, lengthen the warm-up or clip the gradient harder"
        )


def _check_teacher(
    teacher_logits: Tensor | None, teacher: nn.Module | None, dataset: Dataset, settings: TrainSettings
) -> None:
    given = sum(one is not None for one in (teacher_logits, teacher))
    if given > 1:
        raise ValueError("teacher and teacher_logits are the same thing: give one of them")
    if given != (settings.distill_weight > 0) and not (teacher is not None and settings.feature_weight):
        raise ValueError(
            f"distill_weight > 0 and a teacher (teacher_logits, or the network) go together, got "
            f"distill_weight={settings.distill_weight} and {'a' if given else 'no'} teacher"
        )
    if settings.feature_weight and teacher is None:
        raise ValueError(f"feature_weight={settings.feature_weight} needs teacher, the network: logits have no maps")
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


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Weight decay goes to kernels and matrices only: biases and norms (at most one mode) are left out."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9, nesterov=True, fused=True)
    # Fused is about seven times faster on a CPU, where AlexNet's and VGG16's classifiers make a step cost a batch.
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """Deterministic cuDNN kernels inside; afterwards cuDNN's flags and torch's generators are as before."""
    flags = cudnn.deterministic, cudnn.benchmark
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = flags
