"""Screen a candidate: what it is worth before any training, in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..compress import ModelFactors, Targets, reconstruct
from ..configuration import Ranks
from ..data import Split
from ..finetune import check_head
from ..inputs import Inputs, channels_last, first, length, like_model, pairs_of, run
from ..modules import evaluating, inputs_batch, laid_out, out_of_memory
from .divergence import Reference, accuracy, is_finite, kind_for


class CandidateFailed(ArithmeticError):
    """A candidate that cannot be used, with the reason."""


@dataclass(frozen=True)
class Screening:
    """What screening found.

    Attributes:
        accuracy: top-1 on the screened part of validation, 0..1; or the task's own score, or None where it has none.
        divergence: mean divergence of the candidate's output from the dense network's on the same images (nats for
            logits, see `divergence`); finer than accuracy, which moves in steps of one image.
        params, flops: of the candidate; FLOPs are multiply-accumulates per image.
        seconds: wall time of compressing, reconstructing and evaluating.
    """

    accuracy: float | None
    divergence: float
    params: int
    flops: int
    seconds: float


class Screener:
    """Screens configurations of one model, all on the same images.

    Args:
        factors: of the dense model.
        calibration: training images ``(N, C, H, W)``, or several inputs, that every layer is fitted on.
        validation: a split, or anything that yields (inputs, targets), that candidates are judged on.
        limit: how many of its samples; the first ones, for every candidate. No more than these are read.
        score: model -> number, higher is better, in place of accuracy.

    Raises:
        ValueError: labels that the network's head does not have; no validation images; outputs without tensors.
    """

    def __init__(
        self,
        factors: ModelFactors,
        calibration: Inputs,
        validation: Split | Iterable[Any],
        *,
        limit: int,
        score: Callable[[nn.Module], float] | None = None,
    ) -> None:
        self.factors, self._score = factors, score
        calibration = channels_last(like_model(calibration, factors.model))
        self.targets = Targets.of(factors, calibration)
        if isinstance(validation, Split):
            size = inputs_batch(calibration)
            chosen = validation.batches(size, limit=min(limit, len(validation)))
            pairs = [(batch.images, batch.labels) for batch in chosen]
        else:
            pairs = list(_limited(validation, limit))
        if not pairs:
            raise ValueError("the validation data is empty: it takes at least one batch of inputs and targets")
        self.kind = "relative"
        self._batches: list[tuple[Inputs, Any, Reference]] = []
        with evaluating(factors.model), torch.no_grad():
            for place, (inputs, targets) in enumerate(pairs):
                inputs = like_model(inputs, factors.model)
                output = run(factors.model, inputs)
                if place == 0:
                    self.kind = kind_for(output, targets)
                    if isinstance(validation, Split):
                        check_head(output, validation)
                self._batches.append((inputs, targets, Reference.of(output, self.kind)))

    @property
    def scored(self) -> bool:
        """Whether candidates are judged by somebody's own measure."""
        return self._score is not None

    def build(self, config: Mapping[str, Ranks]) -> nn.Module:
        """The compressed network of a configuration, with its layers fitted to the dense ones'.

        It is channels-last: small convolutions run two to five times faster in it on a CPU.
        """
        return reconstruct(laid_out(self.factors.compress(config), channels_last=True), self.targets)

    def screen(self, config: Mapping[str, Ranks]) -> Screening:
        """Compress, reconstruct, evaluate.

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
        if not is_finite(distance):
            raise CandidateFailed(f"the compressed network's outputs are not finite (divergence {distance})")
        factors = self.factors
        seconds = time.perf_counter() - started
        return Screening(accuracy, distance, factors.params(config), factors.flops(config), seconds)

    def distance(self, model: nn.Module) -> float:
        """Mean divergence of a network's outputs from the dense one's, on the screened samples."""
        total, count = 0.0, 0
        with evaluating(model), torch.no_grad():
            for inputs, _, dense in self._batches:
                total += dense.distance(run(model, inputs)) * length(inputs)
                count += length(inputs)
        return total / count

    def score_of(self, model: nn.Module) -> float | None:
        """Accuracy on the screened samples, or the task's own score; None where it has none."""
        return self._evaluate(model)[0]

    def _evaluate(self, model: nn.Module) -> tuple[float | None, float]:
        """Accuracy (or the score, or None where there is neither) and mean divergence."""
        right, asked, distance, count = 0, 0, 0.0, 0
        with evaluating(model), torch.no_grad():
            for inputs, targets, dense in self._batches:
                output = run(model, inputs)
                distance += dense.distance(output) * length(inputs)
                count += length(inputs)
                if self.kind == "kl":
                    found, of = accuracy(output, targets)
                    right, asked = right + found, asked + of
        if self._score is not None:
            return float(self._score(model)), distance / count
        return (right / asked if asked else None), distance / count


def _limited(validation: Iterable[Any], limit: int) -> Iterator[tuple[Inputs, Any]]:
    seen = 0
    for inputs, targets in pairs_of(validation, "validation"):
        size = min(length(inputs), limit - seen)
        yield first(inputs, size), tree_map(lambda t, size=size: t[:size] if hasattr(t, "__getitem__") else t, targets)
        seen += size
        if seen >= limit:
            return
