"""What a forward pass tells about each layer: the sizes of its feature maps, and what a flatten before it hid."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..modules import hooked

_FLATTENING = {torch.flatten, Tensor.flatten, Tensor.view, Tensor.reshape, torch.reshape}
_PASSING_ON = {functional.dropout, functional.relu, torch.relu, Tensor.contiguous, Tensor.clone, Tensor.detach}


@dataclass(frozen=True)
class LayerTrace:
    """Shapes without the batch axis: (C, H, W) of a convolution, (features,) of a linear layer.

    ``unflatten`` is the (C, H, W) that a flatten right before a linear layer took apart, if the map is not 1 x 1.
    ``later_calls`` holds the (input, output) shapes of a shared layer's calls after the first.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    unflatten: tuple[int, int, int] | None = None
    later_calls: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def calls(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """(input shape, output shape) of every call in one pass."""
        return ((self.input_shape, self.output_shape), *self.later_calls)


class FlattenTracker(TorchFunctionMode):
    """While active, remembers which 2-way tensors are flattened 4-way ones, through dropout and the like."""

    def __init__(self) -> None:
        super().__init__()
        # Tensors are kept alive as long as the tracker, so that an id is never handed out twice.
        self._origin: dict[int, tuple[Tensor, tuple[int, int, int]]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        source = args[0] if args else None
        if isinstance(result, Tensor) and isinstance(source, Tensor):
            if func in _FLATTENING and source.ndim == 4 and result.shape == (len(source), source[0].numel()):
                self._origin[id(result)] = (result, tuple(source.shape[1:]))
            elif func in _PASSING_ON and id(source) in self._origin:
                self._origin[id(result)] = (result, self._origin[id(source)][1])
        return result

    def map_shape(self, features: Tensor) -> tuple[int, int, int] | None:
        """(C, H, W) of the feature map that ``features: (N, C H W)`` was flattened from, if it was and H W > 1."""
        _, shape = self._origin.get(id(features), (None, None))
        return shape if shape is not None and shape[1] * shape[2] > 1 else None


def trace_layers(model: nn.Module, example: Tensor) -> dict[str, LayerTrace]:
    """Name -> shapes of every convolution and linear layer that runs on ``example: (N, C, H, W)`` in eval mode.

    The model's parameters, buffers and training flags stay as they were.
    """
    traces: dict[str, LayerTrace] = {}
    tracker = FlattenTracker()

    def observe(name: str):
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            shapes = tuple(inputs[0].shape[1:]), tuple(output.shape[1:])
            if name in traces:
                traces[name] = replace(traces[name], later_calls=(*traces[name].later_calls, shapes))
            else:
                traces[name] = LayerTrace(*shapes, tracker.map_shape(inputs[0]))

        return hook

    with hooked(model, {name: observe(name) for name, _ in decomposable_layers(model)}), tracker:
        model(example)
    return traces


def decomposable_layers(model: nn.Module) -> list[tuple[str, nn.Conv2d | nn.Linear]]:
    """Every two-dimensional convolution and linear layer (exactly these classes) with its dotted name, once each."""
    return [(name, module) for name, module in model.named_modules() if type(module) in (nn.Conv2d, nn.Linear)]
