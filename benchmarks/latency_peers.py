"""What others would do with the same FLOPs: plain plans everywhere, tensorly-torch's layers, torch-pruning's channels.

The two libraries are optional: where one is missing or fails, the benchmark says so in place of its numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.compress import HTLayer, trace_layers
from common.cost import count_flops
from common.modules import copy_with

STEPS = 12
"""Halvings of the interval in which a peer's one knob is sought."""


@dataclass(frozen=True)
class Subject:
    """What every peer starts from.

    Attributes:
        dense: the network.
        compressed: our compressed copy.
        example: ``(N, C, H, W)`` images of the size in question.
        flops: multiply-accumulates of ``compressed`` for one image, which a peer may use.
    """

    dense: nn.Module
    compressed: nn.Module
    example: Tensor
    flops: int


def in_plan(subject: Subject, plan: str) -> nn.Module:
    """Our compressed network with every layer in one plan, no choice made; a layer that lacks it stays as it is."""
    layers = [module for module in subject.compressed.modules() if isinstance(module, HTLayer)]
    return copy_with(subject.compressed, {m: m.with_plan(plan) for m in layers if plan in m.plans})


def tensorly_torch(subject: Subject) -> nn.Module:
    """Every convolution that we factorised, as a Tucker convolution of tensorly-torch, ranks scaled to our FLOPs."""
    import tltorch

    traces = trace_layers(subject.dense, subject.example[:1])
    names = [name for name, module in subject.compressed.named_modules() if isinstance(module, HTLayer)]
    dense = {name: subject.dense.get_submodule(name) for name in names if name in traces}
    convolutions = {name: m for name, m in dense.items() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)}

    def replaced(share: float, decompose: bool) -> nn.Module:
        layers = {}
        for conv in convolutions.values():
            ranks = (max(1, round(share * conv.out_channels)), max(1, round(share * conv.in_channels)))
            layers[conv] = tltorch.FactorizedConv.from_conv(
                conv,
                rank=(*ranks, *conv.kernel_size),
                factorization="tucker",
                implementation="factorized",
                decompose_weights=decompose,
            )
        # Linear and 1 x 1 layers as in our network, so that the comparison is one of convolutions.
        others = {dense[name]: subject.compressed.get_submodule(name) for name in dense if name not in convolutions}
        return copy_with(subject.dense, {**layers, **others}).eval()

    share = _largest(lambda knob: _flops(replaced(knob, False), subject), subject.flops)
    return replaced(share, True)


def torch_pruning(subject: Subject) -> nn.Module:
    """The dense network with channels pruned by magnitude, all layers by one share, to our FLOPs."""
    import torch_pruning as pruning

    def pruned(kept: float) -> nn.Module:
        model = copy.deepcopy(subject.dense)
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
        pruner = pruning.pruner.MagnitudePruner(
            model,
            subject.example[:1],
            importance=pruning.importance.MagnitudeImportance(),
            pruning_ratio=1 - kept,
            ignored_layers=head,
            round_to=8,
        )
        pruner.step()
        return model.eval()

    with torch.enable_grad():
        return pruned(_largest(lambda kept: _flops(pruned(kept), subject), subject.flops))


PEERS: Mapping[str, Callable[[Subject], nn.Module]] = {
    "chain everywhere": lambda subject: in_plan(subject, "chain"),
    "Tucker-2 everywhere": lambda subject: in_plan(subject, "tucker"),
    "tensorly-torch Tucker": tensorly_torch,
    "torch-pruning": torch_pruning,
}


def _flops(model: nn.Module, subject: Subject) -> int:
    return count_flops(model, tuple(subject.example.shape[1:]))


def _largest(flops_at: Callable[[float], int], allowed: int) -> float:
    """The largest knob in (0, 1] at which the FLOPs, which grow with it, are allowed."""
    low, high = 0.01, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if flops_at(middle) <= allowed else (low, middle)
    return low
