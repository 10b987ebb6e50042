"""What others would do with the same FLOPs: plain plans everywhere, tensorly-torch's layers, torch-pruning's channels.

The two libraries are optional: where one is missing or fails, the benchmark says so in place of its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from benchmarks import peers
from common.compress import HTLayer, trace_layers
from common.modules import copy_with


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
    traces = trace_layers(subject.dense, subject.example[:1])
    names = [name for name, module in subject.compressed.named_modules() if isinstance(module, HTLayer)]
    dense = {name: subject.dense.get_submodule(name) for name in names if name in traces}
    # Linear and 1 x 1 layers as in our network, so that the comparison is one of convolutions.
    others = {
        module: subject.compressed.get_submodule(name)
        for name, module in dense.items()
        if not isinstance(module, nn.Conv2d) or module.kernel_size == (1, 1)
    }
    return peers.tensorly_torch(subject.dense, subject.example, subject.flops, others=others)


def torch_pruning(subject: Subject) -> nn.Module:
    """The dense network with channels pruned by magnitude, all layers by one share, to our FLOPs.

    In multiples of the eight that kernels like, unless so small a network can be made only without.
    """
    try:
        return peers.torch_pruning(subject.dense, subject.example, subject.flops, round_to=8)
    except ValueError:
        return peers.torch_pruning(subject.dense, subject.example, subject.flops)


PEERS: Mapping[str, Callable[[Subject], nn.Module]] = {
    "chain everywhere": lambda subject: in_plan(subject, "chain"),
    "Tucker-2 everywhere": lambda subject: in_plan(subject, "tucker"),
    "tensorly-torch Tucker": tensorly_torch,
    "torch-pruning": torch_pruning,
}
