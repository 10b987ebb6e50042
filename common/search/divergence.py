"""How far a compressed network's output is from the dense one's: what candidates are ranked by before any training.

For logits the KL divergence of the class probabilities, in nats; for any other tensors their squared difference
relative to the dense outputs' square, so that a network can be searched before any metric is written for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compress.proof import output_tensors

KINDS = ("kl", "relative")

IGNORED = -100
"""The target that torch's losses leave out."""


def kind_for(output: Any, targets: Any) -> str:
    """`kl` for one tensor of logits (N, C, ...) and targets of class numbers (N, ...), else `relative`."""
    if (
        isinstance(output, Tensor)
        and isinstance(targets, Tensor)
        and output.ndim >= 2
        and output.shape[1] > 1
        and not targets.is_floating_point()
        and targets.shape == (len(output), *output.shape[2:])
    ):
        return "kl"
    return "relative"


@dataclass(frozen=True)
class Reference:
    """The dense network's output on one batch, ready to be compared with."""

    kind: str
    tensors: list[Tensor]

    @classmethod
    def of(cls, output: Any, kind: str) -> Reference:
        """
        Raises:
            ValueError: an unknown kind, or an output that holds no floating tensor.
        """
        if kind not in KINDS:
            raise ValueError(f"the divergence must be one of {', '.join(KINDS)}; got {kind!r}")
        tensors = [tensor.double() for tensor in output_tensors(output)]
        return cls(kind, [F.log_softmax(tensors[0], dim=1)] if kind == "kl" else tensors)

    def distance(self, output: Any) -> float:
        """Mean divergence of another network's output on the same batch."""
        tensors = [tensor.double() for tensor in output_tensors(output)]
        if self.kind == "kl":
            return divergence(self.tensors[0], tensors[0])
        difference = sum(float((a - b).square().sum()) for a, b in zip(self.tensors, tensors, strict=True))
        size = sum(float(a.square().sum()) for a in self.tensors)
        return difference / max(size, 1e-30)


def divergence(dense_log_probabilities: Tensor, logits: Tensor) -> float:
    """Mean KL divergence KL(dense || compressed) in nats, over all but the class axis; both ``(N, classes, ...)``."""
    compressed = F.log_softmax(logits.double(), dim=1)
    total = F.kl_div(compressed, dense_log_probabilities, reduction="sum", log_target=True)
    return float(total) * compressed.shape[1] / compressed.numel()


def accuracy(logits: Tensor, targets: Tensor) -> tuple[int, int]:
    """How many of the class numbers ``(N, ...)`` the logits ``(N, C, ...)`` get right, and how many there are.

    Not asked are targets of IGNORED and, of a map's positions, those that belong to no class, as border pixels do.

    Raises:
        ValueError: a whole sample's class is none that the network knows.
    """
    targets = targets.to(logits.device)
    known = (targets >= 0) & (targets < logits.shape[1])
    if targets.ndim == 1 and not (known | (targets == IGNORED)).all():
        strange = int(targets[~known & (targets != IGNORED)][0])
        raise ValueError(f"a target is class {strange}, but the network's {logits.shape[1]} outputs count from 0")
    return int(((logits.argmax(1) == targets) & known).sum()), int(known.sum())


def is_finite(distance: float) -> bool:
    """Whether a divergence can rank anything."""
    return bool(torch.isfinite(torch.tensor(distance)))
