"""Tune a fitted network on its calibration images alone: no labels, no other data, a few passes.

The closed-form fit takes the layers one after the other, each as it is. What is left is what their errors do to each
other, and it shows in the feature maps of whole blocks: in a few passes over the same images a network learns the dense
one's maps and outputs, by gradients. Maps say so much about an image that few images will do (Li et al. 2020,
arXiv:1812.01839; block by block Li et al. 2021, arXiv:2102.05426). Outputs alone say too little: by them a network
unlearns more than it learns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ..finetune import EpochRecord, TrainSettings
from ..inputs import Inputs, length
from ..progress import OnBatch
from .trainers import BatchTrainer, OnEpoch

BATCH = 32
"""Images at a time: a network in training keeps all its maps in memory."""

MAPS_WEIGHT = 1000.0
"""Of the feature maps beside the outputs, where none is asked for: chosen among 0, 100, 1000 and 3000 by the divergence
on validation, for ResNet-20 on CIFAR-10. It leaves the outputs little to say; the gradient's norm is clipped."""


@dataclass(frozen=True)
class CalibrationPasses:
    """Several passes over the same inputs, in another order each time, as one row of batches without targets.

    Raises:
        ValueError: fewer than 2 samples: a batch norm in training has nothing to normalise by.
    """

    inputs: Inputs
    passes: int
    seed: int

    def __post_init__(self) -> None:
        if length(self.inputs) < 2:
            raise ValueError("calibration_passes takes at least 2 calibration images")

    def __len__(self) -> int:
        return self.passes * (length(self.inputs) // self._size)

    def __iter__(self) -> Iterator[tuple[Inputs, None]]:
        generator, number = torch.Generator().manual_seed(self.seed), length(self.inputs)
        device = tree_leaves(self.inputs)[0].device
        for _ in range(self.passes):
            order = torch.randperm(number, generator=generator).to(device)
            for place in range(0, number - self._size + 1, self._size):
                chosen = order[place : place + self._size]
                yield tree_map(lambda tensor, chosen=chosen: tensor[chosen], self.inputs), None

    @property
    def _size(self) -> int:
        return min(BATCH, length(self.inputs))


@dataclass(frozen=True)
class CalibrationTrainer(BatchTrainer):
    """Trains on `CalibrationPasses`, all of them as the one epoch that the learning rate rises and falls over.

    A network that is farther from the dense one afterwards is as it was fitted: there was nothing to gain, or too few
    images to gain it from.

    Attributes:
        distance: of a network from the dense one, on samples that are not tuned on.
    """

    distance: Callable[[nn.Module], float] = field(kw_only=True)

    on_training_data = False

    @property
    def facts(self) -> Mapping[str, Any]:
        found = {"calibration_images": length(self.data.inputs), "calibration_passes": self.data.passes}
        return {**super().facts, **found}

    def train(
        self, model: nn.Module, checkpoint: Path, on_epoch: OnEpoch, on_batch: OnBatch | None = None
    ) -> list[EpochRecord]:
        """
        Raises:
            TrainingDiverged: a NaN or infinite loss.
        """
        fitted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        before = self.distance(model)
        (found,) = super().train(model, checkpoint, lambda done: None, on_batch)
        if not self.distance(model) < before:
            model.load_state_dict(fitted)
            found = replace(found, val_accuracy=self.validate(model))
        on_epoch(found)
        return [found]


def for_tuning(settings: TrainSettings) -> TrainSettings:
    """The settings of a training as they are for tuning: by maps and outputs, and by no targets."""
    return replace(
        settings,
        epochs=1,
        batch_size=BATCH,
        augment=False,
        distill_weight=1.0,
        feature_weight=settings.feature_weight or MAPS_WEIGHT,
        max_batches_per_epoch=None,
    )
