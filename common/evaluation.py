"""Measure a network on a split: accuracy, loss, outputs. Nothing here trains or changes a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cost import evaluating
from common.precision import autocast
from common.splits import Split

MOST_IMAGES, MOST_PIXELS = 512, 2**21
"""What a batch holds at most: the first maps of VGG16 at 224 px take 13 million bytes an image."""


@dataclass(frozen=True)
class Evaluation:
    """Top-1 accuracy (0..1) and mean cross-entropy (nats) over `count` images."""

    accuracy: float
    loss: float
    count: int


def evaluation_batch(height: int, width: int) -> int:
    """How many images of this size a batch should hold when nothing is trained."""
    return max(1, min(MOST_IMAGES, MOST_PIXELS // (height * width)))


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


def predict_logits(model: nn.Module, split: Split, *, amp: bool | None = None) -> Tensor:
    """Outputs for every image, unaugmented and in split order: (N, classes) float32 on the split's device.

    amp: see `evaluate`.
    """
    with evaluating(model), torch.no_grad(), autocast(split.device, amp):
        return torch.cat([model(batch.images).float() for batch in split.batches(_batch(split))])


def _batch(split: Split) -> int:
    return evaluation_batch(split.format.image_size, split.format.image_size)


def check_head(logits: Tensor, split: Split) -> None:
    """Raise ValueError where the split has labels beyond the outputs. logits: (B, classes)."""
    largest = int(split.labels.max())
    if largest >= logits.shape[1]:
        raise ValueError(
            f"the split has labels up to {largest}, but the model's head has {logits.shape[1]} outputs "
            f"(labels 0 to {logits.shape[1] - 1})"
        )
