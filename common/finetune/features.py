"""Distil what a network computes inside: its feature maps, held to the dense network's (FitNets, Romero et al. 2015,
arXiv:1412.6550).

A compressed network has the blocks of the dense one, and their outputs have the same shapes: the two are compared map
by map, with nothing to adapt between them. In few epochs the logits alone tell a network little of what went wrong, and
where. Blocks, and not the layers within: what a residual block puts out is what the rest of the network sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from ..compress.trace import DECOMPOSABLE

ROWS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

SMALLEST_VARIANCE = 1e-12
"""Of a dense map: one that is constant tells nothing, and must not divide by zero."""


def block_names(model: nn.Module) -> list[str]:
    """For every convolution and linear layer the smallest module around it that is more than a row of others; the
    layer itself where there is none, as in VGG. In their order, each once."""
    modules = dict(model.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, DECOMPOSABLE)]
    return list(dict.fromkeys(_block_of(name, modules) for name in layers))


def _block_of(layer: str, modules: Mapping[str, nn.Module]) -> str:
    around = layer
    while around := around.rpartition(".")[0]:
        if not isinstance(modules[around], ROWS):
            return around
    return layer


class FeatureMaps:
    """The maps of a network in training and of its teacher, from their latest passes; each is compared once.

    Args:
        names: of the modules whose outputs are compared.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self._own: dict[str, Tensor] = {}
        self._dense: dict[str, Tensor] = {}

    @classmethod
    def of(cls, model: nn.Module, teacher: nn.Module | None) -> FeatureMaps:
        """Of the teacher's blocks that the network has as well; of layers that are in no block, of these. None where
        nobody teaches."""
        own = {name for name, _ in model.named_modules()}
        return cls(name for name in (block_names(teacher) if teacher is not None else ()) if name in own)

    @contextmanager
    def watched(self, model: nn.Module, teacher: nn.Module | None) -> Iterator[FeatureMaps]:
        """Inside, the maps of the network in training mode, and of the teacher after it, are noted as they pass."""
        handles = []
        try:
            for name in self.names:
                handles.append(model.get_submodule(name).register_forward_hook(self._noting(name)))
                handles.append(teacher.get_submodule(name).register_forward_hook(self._comparing(name)))
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._own.clear()
            self._dense.clear()

    def distance(self) -> Tensor | float:
        """The mean over the maps of ``|own - dense|^2 / |dense - mean(dense)|^2``; 0 where there is none to compare.

        Maps whose shapes differ, as of a pruned network, are passed over.
        """
        pairs = [(own, self._dense[name]) for name, own in self._own.items() if name in self._dense]
        terms = [_relative(own.float(), dense.float()) for own, dense in pairs if own.shape == dense.shape]
        self._own.clear()
        self._dense.clear()
        return sum(terms) / len(terms) if terms else 0.0

    def _noting(self, name: str) -> Callable:
        def hook(module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            # An evaluation in between is nothing to learn from.
            if module.training and isinstance(output, Tensor):
                self._own[name] = output

        return hook

    def _comparing(self, name: str) -> Callable:
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            if name in self._own and isinstance(output, Tensor):
                self._dense[name] = output

        return hook


def _relative(own: Tensor, dense: Tensor) -> Tensor:
    return F.mse_loss(own, dense) / dense.var(correction=0).clamp_min(SMALLEST_VARIANCE)
