"""How to train: one frozen record of every choice, and the choices that suit an architecture."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from ..checked import check_fields

UNNORMALISED = ("alexnet", "squeezenet1_0", "squeezenet1_1", "vgg11", "vgg13", "vgg16", "vgg19")
"""torchvision's networks without normalisation layers: they need smaller steps to get going."""

SMALL_DATA, MEDIUM_DATA = 5_000, 10_000
"""Training images below which batches of 32 and of 64 are taken: batches of 128 would leave too few steps."""


Count = Annotated[int, Field(ge=1, description="at least 1")]
Share = Annotated[float, Field(ge=0, lt=1, description="in [0, 1)")]
Positive = Annotated[float, Field(gt=0, description="positive")]


@dataclass(frozen=True)
class TrainSettings:
    """How to train. The learning rate warms up linearly, then falls to zero along a cosine, batch by batch.

    Attributes:
        learning_rate: the highest one.
        weight_decay: not applied to biases and norms.
        optimizer: sgd (Nesterov momentum 0.9) or adamw.
        warmup: share of all batches.
        clip_norm: largest norm of the whole gradient; None: any.
        val_images: evaluated after each epoch but the last, the first of the validation split; None: all. The last
            epoch's score is of all.
        amp: bfloat16 autocast; None: on CUDA, and on processors that have bfloat16.
        distill_weight: share of the loss that comes from the teacher's outputs.
        feature_weight: of the squared distance between the network's feature maps and the teacher's, which comes on
            top; see `common.finetune.features`. 0: they are not compared.

    Raises:
        ValueError: a value of the wrong type or out of its range.
    """

    epochs: Count = 3
    batch_size: Annotated[int, Field(ge=2, description="at least 2")] = 128
    learning_rate: Positive = 0.05
    weight_decay: Annotated[float, Field(ge=0, description="0 or more")] = 5e-4
    optimizer: Annotated[Literal["sgd", "adamw"], Field(description="'sgd' or 'adamw'")] = "sgd"
    warmup: Share = 0.2
    label_smoothing: Share = 0.0
    clip_norm: Annotated[float | None, Field(gt=0, description="positive or None")] = 5.0
    seed: Annotated[int, Field(ge=0, lt=2**63, description="0 or more")] = 0
    max_batches_per_epoch: Annotated[int | None, Field(ge=1, description="at least 1 or None")] = None
    augment: bool = True
    val_images: Annotated[int | None, Field(ge=1, description="at least 1 or None")] = None
    amp: bool | None = None
    distill_weight: Annotated[float, Field(ge=0, le=1, description="in [0, 1]")] = 0.0
    distill_temperature: Positive = 4.0
    feature_weight: Annotated[float, Field(ge=0, description="0 or more")] = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

    def recorded(self) -> dict[str, Any]:
        """What checkpoints are known by. A field that came later is left out where it changes nothing: what was
        trained before there was such a field is the same."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("feature_weight", 0)}

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
