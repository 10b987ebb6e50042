"""How to train: one frozen record of every choice, and the choices that suit an architecture."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

UNNORMALISED = ("alexnet", "squeezenet1_0", "squeezenet1_1", "vgg11", "vgg13", "vgg16", "vgg19")
"""torchvision's networks without normalisation layers: they need smaller steps to get going."""

SMALL_DATA, MEDIUM_DATA = 5_000, 10_000
"""Training images below which batches of 32 and of 64 are taken: batches of 128 would leave too few steps."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train. The learning rate warms up linearly, then falls to zero along a cosine, batch by batch."""

    epochs: int = 3
    batch_size: int = 128
    learning_rate: float = 0.05  # the highest one
    weight_decay: float = 5e-4  # not applied to biases and norms
    optimizer: str = "sgd"  # "sgd" (Nesterov momentum 0.9) or "adamw"
    warmup: float = 0.2  # share of all batches
    label_smoothing: float = 0.0
    clip_norm: float | None = 5.0  # largest norm of the whole gradient
    seed: int = 0
    max_batches_per_epoch: int | None = None
    augment: bool = True
    val_images: int | None = None  # evaluated after each epoch, the first of the validation split; None: all
    amp: bool | None = None  # bfloat16 autocast; None: on CUDA, and on processors that have bfloat16
    distill_weight: float = 0.0  # share of the loss that comes from the teacher
    distill_temperature: float = 4.0

    def __post_init__(self):
        batches = self.max_batches_per_epoch
        rules = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 2, "at least 2"),
            "learning_rate": (self.learning_rate > 0, "positive"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "optimizer": (self.optimizer in ("sgd", "adamw"), "'sgd' or 'adamw'"),
            "warmup": (0 <= self.warmup < 1, "in [0, 1)"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "positive or None"),
            "max_batches_per_epoch": (batches is None or batches >= 1, "at least 1 or None"),
            "val_images": (self.val_images is None or self.val_images >= 1, "at least 1 or None"),
            "distill_weight": (0 <= self.distill_weight <= 1, "in [0, 1]"),
            "distill_temperature": (self.distill_temperature > 0, "positive"),
        }
        for name, (legal, rule) in rules.items():
            if not legal:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    def learning_rate_at(self, step: int, total: int) -> float:
        """Learning rate of batch `step` (from 0) out of `total`."""
        warm = min(round(total * self.warmup), total - 1)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm + 0.5) / (total - warm)))


def recipe(architecture: str, *, pretrained: bool = False, train_images: int | None = None) -> TrainSettings:
    """Settings that train an architecture well in few epochs.

    Args:
        architecture: canonical name, such as "resnet18".
        pretrained: start from trained weights, which large steps would destroy.
        train_images: how many there are, where known; few of them go in small batches.
    """
    small = train_images is not None and train_images < SMALL_DATA
    medium = not small and train_images is not None and train_images < MEDIUM_DATA
    if architecture in UNNORMALISED:
        # Plain SGD takes epochs to leave the plateau around random weights; AdamW takes tens of batches.
        settings = TrainSettings(optimizer="adamw", learning_rate=3e-4, weight_decay=0.01, clip_norm=1.0, warmup=0.3)
    else:
        settings = TrainSettings(learning_rate=0.02 if small else 0.03 if medium else 0.05)
    # The steps of networks with large classifiers are slow whatever the batch: they take no batches of 32.
    smallest = 64 if architecture in UNNORMALISED else 32
    return replace(
        settings,
        batch_size=smallest if small else 64 if medium else settings.batch_size,
        learning_rate=settings.learning_rate / 5 if pretrained else settings.learning_rate,
    )
