"""ONNX: export a network with a dynamic batch axis, checked against torch before the file exists; run it.

`onnx_layer` writes the graph of a few plain layers itself, in a millisecond: choosing execution plans takes hundreds.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from ..files import atomic_path
from ..modules import evaluating

TOLERANCE = 1e-4
"""Largest difference between torch's outputs and onnxruntime's that an export may have, relative to the largest."""

OPSET = 20
"""Operator set of hand-written graphs; the exporter takes the newest one that it knows."""

_PAD_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def export_onnx(model: nn.Module, example: Tensor, path: str | Path) -> None:
    """Write the model as one ONNX file with a dynamic batch axis, input "images" and output "logits".

    Args:
        model: runs in eval mode; it and its training flags stay as they are. Any device: the export is made on the CPU.
        example: ``(N, C, H, W)`` images. The file takes any N.
        path: written in one step, after onnxruntime gave torch's outputs, within TOLERANCE, at two batch sizes.

    Raises:
        ValueError: the model cannot be exported, or does not give the same outputs there.
    """
    images = example.detach().cpu()
    with evaluating(model), atomic_path(path) as temporary, torch.no_grad():
        on_cpu = model if _on_cpu(model) else copy.deepcopy(model).cpu()
        # A batch of 1 would be taken for a constant.
        _export(on_cpu, images[:1].expand(2, *images.shape[1:]).contiguous(), temporary)
        run = onnx_session(temporary)
        for batch in (1, max(3, len(images))):
            inputs = _resized_batch(images, batch)
            _check_outputs(on_cpu(inputs), run(inputs), batch)


def onnx_session(model: str | Path | bytes, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """A function of an images tensor (CPU) that runs an ONNX file, or a serialised graph, with onnxruntime on the CPU.

    Args:
        threads: inside one operator; None: as many as torch uses in this process.

    Raises:
        ValueError: not an ONNX file, not one of one input and one output, or fewer than one thread.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1; got {threads}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Otherwise the threads of a session that has just run would go on spinning while the next one is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions have no common base
        what = "the graph" if isinstance(model, bytes) else str(model)
        raise ValueError(f"onnxruntime cannot load {what}: {_first_line(error)}") from error
    if len(session.get_inputs()) != 1 or len(session.get_outputs()) != 1:
        raise ValueError(
            f"a network of one input and one output is needed; this one has {len(session.get_inputs())} and "
            f"{len(session.get_outputs())}"
        )
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.contiguous().numpy()})[0])

    return run


def onnx_bytes(model: nn.Module, example: Tensor) -> bytes:
    """The graph of a whole network, unchecked, exported as by `export_onnx`."""
    buffer = io.BytesIO()
    with evaluating(model), torch.no_grad():
        _export(model, example[:1].expand(2, *example.shape[1:]).contiguous(), buffer)
    return buffer.getvalue()


def onnx_layer(module: nn.Module, input_shape: Sequence[int]) -> bytes:
    """The graph of a plain layer: an nn.Conv2d or nn.Linear, or an nn.Sequential of them, Flatten and Unflatten.

    input_shape: without the batch axis, which is dynamic.

    Raises:
        ValueError: another module.
    """
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
        if isinstance(layer, nn.Conv2d):
            self._convolution(layer)
        elif isinstance(layer, nn.Linear):
            self._node("Gemm", [self._tensor(layer.weight), *self._bias(layer)], transB=1)
        elif isinstance(layer, nn.Flatten) and layer.start_dim == 1:
            self._node("Flatten", [], axis=1)
        elif isinstance(layer, nn.Unflatten) and layer.dim == 1:
            self._node("Reshape", [self._tensor(torch.tensor([0, *layer.unflattened_size]))])
        else:
            raise ValueError(f"a graph of plain layers has convolutions and linear layers; got {layer}")

    def _convolution(self, layer: nn.Conv2d) -> None:
        # As torch pads for functional.pad: (left, right, top, bottom).
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        pads = [top, left, bottom, right]
        if layer.padding_mode != "zeros":
            amounts = torch.tensor([0, 0, top, left, 0, 0, bottom, right])
            self._node("Pad", [self._tensor(amounts)], mode=_PAD_MODES[layer.padding_mode])
            pads = [0, 0, 0, 0]
        self._node(
            "Conv",
            [self._tensor(layer.weight), *self._bias(layer)],
            kernel_shape=list(layer.kernel_size),
            strides=list(layer.stride),
            dilations=list(layer.dilation),
            group=layer.groups,
            pads=pads,
        )

    def _node(self, operator: str, inputs: list[str], **attributes: object) -> None:
        output = f"value{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, [self.last, *inputs], [output], **attributes))
        self.last = output

    def _tensor(self, tensor: Tensor) -> str:
        name = f"tensor{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(tensor.detach().cpu().contiguous().numpy(), name))
        return name

    def _bias(self, layer: nn.Module) -> list[str]:
        return [] if layer.bias is None else [self._tensor(layer.bias)]


def _export(model: nn.Module, images: Tensor, target: Path | io.BytesIO) -> None:
    batch = torch.export.Dim("batch")
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                (images,),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: batch},),
                dynamo=True,
                verbose=False,
            )
        if isinstance(target, io.BytesIO):
            program.save(target, external_data=False)
        else:
            program.save(str(target), external_data=False)
    except Exception as error:  # the exporter raises what it likes, from five libraries
        raise ValueError(f"{type(model).__name__} cannot be exported to ONNX: {_first_line(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its progress and the future of its own parts; neither helps who calls it."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_outputs(expected: Tensor, found: Tensor, batch: int) -> None:
    if expected.shape != found.shape:
        raise ValueError(
            f"the exported network gives {tuple(found.shape)} at batch {batch}, torch {tuple(expected.shape)}"
        )
    error = float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not error <= TOLERANCE:
        raise ValueError(
            f"the exported network's outputs differ from torch's by {error:.1e} relative at batch {batch}; "
            f"at most {TOLERANCE:.0e} is allowed"
        )


def _resized_batch(images: Tensor, batch: int) -> Tensor:
    repeats = -(-batch // len(images))
    return images.repeat(repeats, 1, 1, 1)[:batch].contiguous()


def _on_cpu(model: nn.Module) -> bool:
    return all(tensor.device.type == "cpu" for tensor in model.state_dict().values())


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
