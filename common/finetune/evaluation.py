"""Measure a network on a split: accuracy, loss, outputs. Nothing here trains or changes a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..data import Dataset, Split
from ..files import atomic_path
from ..modules import evaluating, evaluation_batch
from ..progress import progress_bar
from .precision import autocast


@dataclass(frozen=True)
class Evaluation:
    """Top-1 accuracy (0..1) and mean cross-entropy (nats) over `count` images."""

    accuracy: float
    loss: float
    count: int


def evaluate(
    model: nn.Module,
    split: Split,
    *,
    batch_size: int | None = None,
    limit: int | None = None,
    amp: bool | None = None,
) -> Evaluation:
    """Measure a model on a split, or on its first `limit` images; each module's training flag is restored.

    Args:
        batch_size: None takes `evaluation_batch`.
        amp: bfloat16 autocast, as in training; None: where the device is fast at it.

    Raises:
        ValueError: the split has labels that the model's head does not.
    """
    correct, loss, count = 0, 0.0, 0
    with evaluating(model), torch.no_grad(), autocast(split.device, amp):
        for batch in split.batches(batch_size or _batch(split), limit=limit):
            logits = model(batch.images).float()
            if count == 0:
                check_head(logits, split)
            correct += (logits.argmax(dim=1) == batch.labels).sum()
            loss += F.cross_entropy(logits, batch.labels, reduction="sum").double()
            count += len(batch.labels)
    return Evaluation(accuracy=int(correct) / count, loss=float(loss) / count, count=count)


def predict_logits(model: nn.Module, split: Split, *, amp: bool | None = None, progress: bool = False) -> Tensor:
    """Outputs for every image, unaugmented and in split order: (N, classes) float32 on the split's device.

    amp: see `evaluate`.
    """
    size = _batch(split)
    batches = progress_bar(
        split.batches(size), total=split.num_batches(size), desc="dense outputs", unit="batch", shown=progress
    )
    with evaluating(model), torch.no_grad(), autocast(split.device, amp):
        return torch.cat([model(batch.images).float() for batch in batches])


def _batch(split: Split) -> int:
    return evaluation_batch(*split.format.size)


def check_head(logits: Tensor, split: Split) -> None:
    """Raise ValueError where the split has labels beyond the outputs. logits: (B, classes)."""
    largest = int(split.labels.max())
    if largest >= logits.shape[1]:
        raise ValueError(
            f"the split has labels up to {largest}, but the model's head has {logits.shape[1]} outputs "
            f"(labels 0 to {logits.shape[1] - 1})"
        )


def teacher_logits(model: nn.Module, dataset: Dataset, folder: Path, *, progress: bool = False) -> Tensor:
    """The dense network's outputs on the training split ``(N, classes)``, computed once per folder."""
    path = folder / "teacher.safetensors"
    try:
        known = load_file(path)["logits"].to(dataset.device)
        if known.shape == (len(dataset.train), dataset.num_classes):
            return known
    except (FileNotFoundError, SafetensorError, KeyError):
        path.unlink(missing_ok=True)
    logits = predict_logits(model, dataset.train, progress=progress)
    with atomic_path(path) as temporary:
        save_file({"logits": logits.cpu()}, temporary)
    return logits
