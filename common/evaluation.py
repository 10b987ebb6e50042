"""Measure a network on a split: accuracy, loss, outputs. Nothing here trains or changes a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cost import evaluating
from common.splits import Split


@dataclass(frozen=True)
class Evaluation:
    """Top-1 accuracy (0..1) and mean cross-entropy (nats) over `count` images."""

    accuracy: float
    loss: float
    count: int


def evaluate(model: nn.Module, split: Split, *, batch_size: int = 512, limit: int | None = None) -> Evaluation:
    """Measure a model on a split, or on its first `limit` images; each module's training flag is restored.

    Raises:
        ValueError: the split has labels that the model's head does not.
    """
    correct, loss, count = 0, 0.0, 0
    with evaluating(model), torch.no_grad():
        for batch in split.batches(batch_size, limit=limit):
            logits = model(batch.images).float()
            if count == 0:
                check_head(logits, split)
            correct += (logits.argmax(dim=1) == batch.labels).sum()
            loss += F.cross_entropy(logits, batch.labels, reduction="sum").double()
            count += len(batch.labels)
    return Evaluation(accuracy=int(correct) / count, loss=float(loss) / count, count=count)


def predict_logits(model: nn.Module, split: Split, batch_size: int = 512) -> Tensor:
    """Outputs for every image, unaugmented and in split order: (N, classes) float32 on the split's device."""
    with evaluating(model), torch.no_grad():
        return torch.cat([model(batch.images).float() for batch in split.batches(batch_size)])


def check_head(logits: Tensor, split: Split) -> None:
    """Raise ValueError where the split has labels beyond the outputs. logits: (B, classes)."""
    largest = int(split.labels.max())
    if largest >= logits.shape[1]:
        raise ValueError(
            f"the split has labels up to {largest}, but the model's head has {logits.shape[1]} outputs "
            f"(labels 0 to {logits.shape[1] - 1})"
        )
