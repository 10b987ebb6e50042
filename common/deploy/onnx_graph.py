"""The ONNX graph of a few plain layers, written by hand: choosing execution plans takes hundreds of such graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..compress import CONVOLUTIONS, TRANSPOSED, paddings
from .packages import package

if TYPE_CHECKING:
    import onnx

OPSET = 20
"""Operator set of these graphs; the exporter takes the newest one that it knows."""

_PAD_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def onnx_layer(module: nn.Module, input_shape: Sequence[int]) -> bytes:
    """The graph of a plain layer: a convolution or nn.Linear, or an nn.Sequential of them, Flatten and Unflatten.

    input_shape: without the batch axis, which is dynamic.

    Raises:
        ValueError: another module.
    """
    helper = package("onnx.helper", "onnx")
    graph = _GraphWriter()
    for layer in module if isinstance(module, nn.Sequential) else [module]:
        graph.add(layer)
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(str(next(module.parameters()).dtype).removeprefix("torch.")))
    ends = [
        helper.make_tensor_value_info("images", dtype, ["batch", *input_shape]),
        helper.make_tensor_value_info(graph.last, dtype, None),
    ]
    made = helper.make_graph(graph.nodes, "layer", ends[:1], ends[1:], graph.tensors)
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(made, opset_imports=opset, ir_version=9).SerializeToString()


class _GraphWriter:
    """Nodes in a row: each reads what the one before it gave."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.last = "images"

    def add(self, layer: nn.Module) -> None:
        if isinstance(layer, CONVOLUTIONS):
            self._convolution(layer)
        elif isinstance(layer, TRANSPOSED):
            self._transposed(layer)
        elif isinstance(layer, nn.Linear):
            self._node("Gemm", [self._tensor(layer.weight), *self._bias(layer)], transB=1)
        elif isinstance(layer, nn.Flatten) and layer.start_dim == 1:
            self._node("Flatten", [], axis=1)
        elif isinstance(layer, nn.Unflatten) and layer.dim == 1:
            self._node("Reshape", [self._tensor(torch.tensor([0, *layer.unflattened_size]))])
        else:
            raise ValueError(f"a graph of plain layers has convolutions and linear layers; got {layer}")

    def _convolution(self, layer: nn.Module) -> None:
        before, after = zip(*paddings(layer), strict=True)
        pads = [*before, *after]
        if layer.padding_mode != "zeros":
            axes = len(layer.kernel_size)
            amounts = torch.tensor([0, 0, *pads[:axes], 0, 0, *pads[axes:]])
            self._node("Pad", [self._tensor(amounts)], mode=_PAD_MODES[layer.padding_mode])
            pads = [0] * len(pads)
        self._node("Conv", [self._tensor(layer.weight), *self._bias(layer)], **self._window(layer), pads=pads)

    def _transposed(self, layer: nn.Module) -> None:
        inputs = [self._tensor(layer.weight), *self._bias(layer)]
        pads = [*layer.padding, *layer.padding]
        more = list(layer.output_padding)
        self._node("ConvTranspose", inputs, **self._window(layer), pads=pads, output_padding=more)

    def _window(self, layer: nn.Module) -> dict[str, object]:
        return {
            "kernel_shape": list(layer.kernel_size),
            "strides": list(layer.stride),
            "dilations": list(layer.dilation),
            "group": layer.groups,
        }

    def _node(self, operator: str, inputs: list[str], **attributes: object) -> None:
        output = f"value{len(self.nodes)}"
        self.nodes.append(
            package("onnx.helper", "onnx").make_node(operator, [self.last, *inputs], [output], **attributes)
        )
        self.last = output

    def _tensor(self, tensor: Tensor) -> str:
        name = f"tensor{len(self.tensors)}"
        self.tensors.append(
            package("onnx.numpy_helper", "onnx").from_array(tensor.detach().cpu().contiguous().numpy(), name)
        )
        return name

    def _bias(self, layer: nn.Module) -> list[str]:
        return [] if layer.bias is None else [self._tensor(layer.bias)]
