"""What a forward pass tells about each layer: the sizes of its feature maps, and what a flatten before it hid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..inputs import Inputs, length, run
from ..modules import hooked
from .flow import Flow, running_norms
from .geometry import CONVOLUTIONS, TRANSPOSED, Convolution
from .layers import HTLayer

_FLATTENING = {torch.flatten, Tensor.flatten, Tensor.view, Tensor.reshape, torch.reshape}
_PASSING_ON = {functional.dropout, functional.relu, torch.relu, Tensor.contiguous, Tensor.clone, Tensor.detach}


DECOMPOSABLE = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
"""Layers that can be factorised; exactly these classes: others compute who knows what."""


class LayerCall(NamedTuple):
    """One call of a layer in a pass over one image: `rows` inputs of one shape at once."""

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    rows: int = 1


@dataclass(frozen=True)
class LayerTrace:
    """Shapes without the batch axis: (C, H, W) of a convolution, (features,) of a linear layer.

    ``rows`` says how many such maps, or vectors, one image comes to: more than one where patches are folded into the
    batch, or where a linear layer sees tokens or time steps.
    ``unflatten`` is the (C, H, W) that a flatten right before a linear layer took apart, if the map is not 1 x 1.
    ``later_calls`` holds a shared layer's calls after the first. ``normed`` tells that a batch norm reads the output,
    ``batched`` that every input has a batch axis, without which torch's layers run too.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    unflatten: tuple[int, int, int] | None = None
    rows: int = 1
    later_calls: tuple[LayerCall, ...] = ()
    normed: bool = False
    batched: bool = True

    @property
    def calls(self) -> tuple[LayerCall, ...]:
        """Every call in one pass."""
        return (LayerCall(self.input_shape, self.output_shape, self.rows), *self.later_calls)


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


def trace_layers(model: nn.Module, example: Inputs) -> dict[str, LayerTrace]:
    """Name -> shapes of every convolution and linear layer that runs on ``example`` in eval mode, in that order.

    example: inputs of one image, ``(1, C, H, W)`` or whatever the model takes. The model's parameters, buffers and
    training flags stay as they were.
    """
    traces: dict[str, LayerTrace] = {}
    tracker = FlattenTracker()
    images = length(example)

    def observe(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            call = _call(module, inputs[0], output, images)
            flow.put(output, name)
            batched = inputs[0].ndim > len(call.input_shape)
            if name in traces:
                known = traces[name]
                calls = (*known.later_calls, call)
                traces[name] = replace(known, later_calls=calls, batched=known.batched and batched)
            else:
                shapes = call.input_shape, call.output_shape
                traces[name] = LayerTrace(*shapes, tracker.map_shape(inputs[0]), call.rows, batched=batched)

        return hook

    flow = Flow()
    norms = {name: lambda _norm, inputs, name=name: flow.read(name, inputs[0]) for name in running_norms(model)}
    with hooked(model, {name: observe(name) for name, _ in decomposable_layers(model)}, before=norms), tracker:
        run(model, example)
    return {name: replace(trace, normed=name in flow.through) for name, trace in traces.items()}


def _call(module: nn.Module, features: Tensor, output: Tensor, images: int) -> LayerCall:
    """The shapes of one call; a linear layer's leading axes, whatever they mean, are rows."""
    if isinstance(module, nn.Linear):
        rows = features.numel() // max(features.shape[-1], 1)
        return LayerCall((features.shape[-1],), (output.shape[-1],), -(-rows // images))
    rows = len(features) if features.ndim == len(module.kernel_size) + 2 else 1
    spatial = len(module.kernel_size) + 1
    return LayerCall(tuple(features.shape[-spatial:]), tuple(output.shape[-spatial:]), -(-rows // images))


def decomposable_layers(model: nn.Module) -> list[tuple[str, Convolution | nn.Linear]]:
    """Every convolution, plain or transposed, and linear layer (torch's own classes) with its dotted name, once each.

    The stages of a layer that is factorised already are not layers of their own.
    """
    inside = {id(part) for module in model.modules() if isinstance(module, HTLayer) for part in module.modules()}
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in DECOMPOSABLE and id(module) not in inside
    ]
