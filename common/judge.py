"""How a network is scored: by the user's own measure, or by its accuracy on anything that yields (inputs, targets)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .inputs import length, like_model, pairs_of, run
from .modules import evaluating
from .search import Screener, accuracy, kind_for


@dataclass(frozen=True)
class Judge:
    """A network's score: by the user's measure, or its accuracy on data; None where there is neither.

    It holds nothing of the run, so that it can go where the network is trained.
    """

    data: Any
    evaluate: Callable[[nn.Module], float] | None

    def __call__(self, model: nn.Module) -> float | None:
        if self.evaluate is None:
            return top1(model, self.data)
        with evaluating(model):
            found = self.evaluate(model)
        try:
            return float(found)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"evaluate must return a number, higher is better; got {found!r}") from None


@dataclass(frozen=True)
class Validation:
    """What an epoch is judged by: the score on validation, or the divergence where there is no score."""

    judge: Judge
    screener: Screener

    def __call__(self, model: nn.Module) -> float:
        found = self.judge(model)
        return -self.screener.distance(model) if found is None else found


def top1(model: nn.Module, data: Any) -> float | None:
    """Share of class numbers that the network gets right on everything that yields (inputs, targets).

    None where outputs and targets are not logits and class numbers.
    """
    right, asked = 0, 0
    with evaluating(model), torch.no_grad():
        for inputs, targets in pairs_of(data, "val"):
            if not length(inputs):
                continue
            output = run(model, like_model(inputs, model))
            if kind_for(output, targets) != "kl":
                return None
            found, of = accuracy(output, targets)
            right, asked = right + found, asked + of
    return right / asked if asked else None
