"""What the dense network puts out on calibration images, where a fit looks at it: per layer, per norm, per sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from ..inputs import Inputs, first, length, run
from ..modules import hooked
from .flow import Flow, running_norms
from .model_factors import ModelFactors
from .moments import channels_last_rows, mean_and_variance, wide
from .ridge import at_places, by_image

STATISTICS_ROWS, STATISTICS_IMAGES = 2**14, 64
"""Rows that a batch norm's statistics are taken of, and images at least, whose maps are then read in a coarser grid."""

ROWS = 2**14
"""Rows (images times positions) that a layer is fitted on, at least one position of each image."""

MOST_VALUES = 2**28
"""Of the largest feature map over all images, which go through the network at once: a gigabyte in float32."""

ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}


class Statistics(NamedTuple):
    """So many rows, and their mean and variance per channel ``(C,)``."""

    rows: int
    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class NormInput:
    """The mean and the variance of what a batch norm reads per channel ``(C,)`` in all its calls, how many these are,
    and its running statistics."""

    mean: Tensor
    variance: Tensor
    calls: int
    running_mean: Tensor
    running_variance: Tensor


@dataclass(frozen=True)
class Targets:
    """What the dense network puts out on the calibration images.

    Attributes:
        images: the calibration images, or as many of the first as fit into memory at once.
        positions: layer -> of each of its calls the places of its output map, or the tokens, that are looked at
            ``(N, positions)``: in every image others, since the same few would fit a layer to what is at these places.
        outputs: layer -> the dense layer's outputs there, of all calls ``(images positions, C_out)``.
        sums: layer -> there, the sum that its output enters, behind its batch norm if it has one: a residual block's;
            not of a layer that runs more than once.
        norms: batch norm -> the statistics of its input.
        normed: the layers whose output a batch norm reads: means are its affair.
    """

    images: Inputs
    positions: Mapping[str, Sequence[Tensor]]
    outputs: Mapping[str, Tensor]
    sums: Mapping[str, Tensor]
    norms: Mapping[str, NormInput]
    normed: frozenset[str]

    @classmethod
    def of(cls, factors: ModelFactors, images: Inputs) -> Targets:
        """One pass of the dense network over ``images: (N, C, H, W)``, or several inputs (see `common.inputs`)."""
        calls = [call for layer in factors.layers.values() for call in layer.trace.calls]
        images = first(images, max(1, MOST_VALUES // max(math.prod(call.output_shape) * call.rows for call in calls)))
        found = _DenseOutputs(factors, length(images))
        norms = running_norms(factors.model)
        after = {name: found.layer(name) for name in factors.layers} | {name: found.normalised(name) for name in norms}
        with hooked(factors.model, after, before={name: found.norm(name) for name in norms}), found.watch:
            run(factors.model, images)
        sums = {name: rows for name, rows in found.sums.items() if len(found.positions[name]) == 1}
        norms = {name: found.norm_input(factors.model.get_submodule(name), name) for name in found.read}
        return cls(images, found.positions, found.outputs(), sums, norms, frozenset(found.flow.through))


class Sums(TorchFunctionMode):
    """While active, calls ``before(layer, own, other)`` and ``after(layer, own, total)`` of sums of two tensors of one
    shape, one of which is a layer's output; of two such, the layer of more weights."""

    def __init__(
        self, flow: Flow, sizes: Mapping[str, int], *, before: Callable | None = None, after: Callable | None = None
    ) -> None:
        super().__init__()
        self._flow, self._sizes, self._before, self._after = flow, sizes, before, after

    def __torch_function__(self, func, types, args=(), kwargs=None):
        layer = own = None
        if func in ADDITIONS and len(args) == 2 and not kwargs and self._alike(*args):
            owned = [(name, tensor) for tensor in args if (name := self._flow.layer_of(tensor)) in self._sizes]
            if owned:
                layer, own = max(owned, key=lambda pair: self._sizes[pair[0]])
                other = args[1] if own is args[0] else args[0]
                if self._before is not None:
                    self._before(layer, own, other)
        result = func(*args, **(kwargs or {}))
        if layer is not None and self._after is not None:
            self._after(layer, own, result)
        if args and result is args[0]:
            self._flow.drop(result)  # changed in place, or about to be another's
        return result

    @staticmethod
    def _alike(one: Any, other: Any) -> bool:
        return isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape and one.ndim > 1


class _DenseOutputs:
    """Hooks that gather what `Targets` holds; of a shared layer and norm, all calls."""

    def __init__(self, factors: ModelFactors, images: int) -> None:
        sizes = {name: math.prod(layer.shape) for name, layer in factors.layers.items()}
        self._places = {
            name: -(-ROWS // (images * len(layer.trace.calls))) for name, layer in factors.layers.items()
        }  # of each image, in each call
        self._generator = torch.Generator().manual_seed(0)
        self._axes: dict[str, int] = {}
        self.flow = Flow()
        self.watch = Sums(self.flow, sizes, after=self._sum)
        self.positions: dict[str, list[Tensor]] = {}
        self._outputs: dict[str, list[Tensor]] = {}
        self.sums: dict[str, Tensor] = {}
        self.read: dict[str, list[Statistics]] = {}

    def layer(self, name: str) -> Callable:
        def hook(module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            self._axes[name] = -1 if isinstance(module, nn.Linear) else 1
            places = by_image(output, self._axes[name]).shape[1]
            drawn = self._draw(len(output), places, self._places[name])
            self.positions.setdefault(name, []).append(drawn.to(output.device))
            self._outputs.setdefault(name, []).append(self._rows(name, output))
            self.flow.put(output, name)

        return hook

    def outputs(self) -> dict[str, Tensor]:
        return {name: rows[0] if len(rows) == 1 else torch.cat(rows) for name, rows in self._outputs.items()}

    def _draw(self, images: int, places: int, most: int) -> Tensor:
        """Places of each image ``(images, positions)``: some drawn at random, moved on from image to image."""
        some = torch.randperm(places, generator=self._generator)[:most]
        moved = torch.randint(places, (images, 1), generator=self._generator)
        return ((some + moved) % places).sort(1).values

    def norm(self, name: str) -> Callable:
        def hook(norm: _BatchNorm, inputs: tuple) -> None:
            self.read.setdefault(name, []).append(statistics(inputs[0]))
            self.flow.read(name, inputs[0])

        return hook

    def norm_input(self, norm: _BatchNorm, name: str) -> NormInput:
        mean, variance = pooled(self.read[name])
        return NormInput(mean, variance, len(self.read[name]), norm.running_mean.clone(), norm.running_var.clone())

    def normalised(self, name: str) -> Callable:
        def hook(_norm: _BatchNorm, inputs: tuple, output: Tensor) -> None:
            if (layer := self.flow.layer_of(inputs[0])) is not None and self.flow.through.get(layer) == name:
                self.flow.put(output, layer)

        return hook

    def _rows(self, name: str, features: Tensor) -> Tensor:
        return rows_at(features, self._axes[name], self.positions[name][-1])

    def _sum(self, layer: str, _own: Tensor, total: Tensor) -> None:
        if layer not in self.sums:
            self.sums[layer] = self._rows(layer, total)


def rows_at(features: Tensor, axis: int, positions: Tensor) -> Tensor:
    """Features at these places ``(N, P)`` of the images ``(N P, C)``, the channels being along ``axis``."""
    return wide(at_places(features, axis, positions).flatten(0, 1))


def statistics(features: Tensor) -> Statistics:
    """Of a norm's input ``(N, C, ...)``, from some rows of its first images."""
    places, axes = math.prod(features.shape[2:]), features.ndim - 2
    some = features[: max(STATISTICS_IMAGES, STATISTICS_ROWS // places)]
    if axes:
        step = max(1, int((len(some) * places / STATISTICS_ROWS) ** (1 / axes)))
        some = some[(slice(None), slice(None), *[slice(step // 2, None, step)] * axes)]
    rows = channels_last_rows(wide(some))
    return Statistics(len(rows), *mean_and_variance(rows))


def pooled(calls: Sequence[Statistics]) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel ``(C,)`` of the rows of all calls."""
    if len(calls) == 1:
        return calls[0].mean, calls[0].variance
    rows = sum(one.rows for one in calls)
    mean = sum(one.mean * (one.rows / rows) for one in calls)
    variance = sum((one.variance + (one.mean - mean).square()) * (one.rows / rows) for one in calls)
    return mean, variance
