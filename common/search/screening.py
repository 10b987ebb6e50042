"""Screen a candidate: what it is worth before any training, in seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compress import ModelFactors, recalibrate
from ..configuration import Ranks
from ..data import Split
from ..finetune import check_head
from ..modules import evaluating, evaluation_batch, out_of_memory
from .sensitivity import divergence


class CandidateFailed(ArithmeticError):
    """A candidate that cannot be used, with the reason."""


@dataclass(frozen=True)
class Screening:
    """What screening found.

    Attributes:
        accuracy: top-1 on the screened part of validation, 0..1.
        divergence: mean KL divergence (nats) of the candidate's output from the dense network's on the same images;
            finer than accuracy, which moves in steps of one image.
        params, flops: of the candidate; FLOPs are multiply-accumulates per image.
        seconds: wall time of compressing, recalibrating and evaluating.
    """

    accuracy: float
    divergence: float
    params: int
    flops: int
    seconds: float


class Screener:
    """Screens configurations of one model, all on the same images.

    Args:
        factors: of the dense model.
        calibration: training images ``(N, C, H, W)`` for batch-norm statistics and biases.
        validation: the split that accuracy is measured on.
        limit: how many of its images; the first ones, for every candidate.
    """

    def __init__(self, factors: ModelFactors, calibration: Tensor, validation: Split, *, limit: int) -> None:
        self.factors = factors
        self._calibration = calibration.contiguous(memory_format=torch.channels_last)
        with evaluating(factors.model), torch.no_grad():
            batch_size = evaluation_batch(*calibration.shape[-2:])
            batches = list(validation.batches(batch_size, limit=min(limit, len(validation))))
            self._batches = [(batch.images, batch.labels, self._dense(batch.images)) for batch in batches]
            check_head(self._batches[0][2], validation)

    def build(self, config: Mapping[str, Ranks]) -> nn.Module:
        """The compressed and recalibrated network of a configuration.

        It is channels-last: small convolutions run two to five times faster in it on a CPU.
        """
        factors = self.factors
        model = factors.compress(config).to(memory_format=torch.channels_last)
        return recalibrate(model, self._calibration, factors.output_means(), factors.output_stds())

    def screen(self, config: Mapping[str, Ranks]) -> Screening:
        """Compress, recalibrate, evaluate.

        Raises:
            CandidateFailed: NaN or infinite outputs, or out of memory.
            ValueError: a configuration that cannot be built.
        """
        started = time.perf_counter()
        try:
            accuracy, distance = self._evaluate(self.build(config))
        except (RuntimeError, MemoryError) as error:
            if (reason := out_of_memory(error)) is None:
                raise
            raise CandidateFailed(reason) from error
        if not torch.isfinite(torch.tensor(distance)):
            raise CandidateFailed(f"the compressed network's outputs are not finite (divergence {distance})")
        factors = self.factors
        seconds = time.perf_counter() - started
        return Screening(accuracy, distance, factors.params(config), factors.flops(config), seconds)

    def _dense(self, images: Tensor) -> Tensor:
        return F.log_softmax(self.factors.model(images).double(), dim=1)

    def _evaluate(self, model: nn.Module) -> tuple[float, float]:
        correct, distance, count = 0, 0.0, 0
        with evaluating(model), torch.no_grad():
            for images, labels, dense in self._batches:
                logits = model(images)
                correct += int((logits.argmax(1) == labels).sum())
                distance += divergence(dense, logits) * len(labels)
                count += len(labels)
        return correct / count, distance / count
