"""OpenVINO: run an ONNX graph with Intel's runtime on a CPU (Intel's or not), in float32, bfloat16 or int8."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_leaves

from ..inputs import Inputs
from ..modules import first_line
from .packages import package


def openvino_model(graph: bytes) -> Any:
    """An ONNX graph as OpenVINO's own.

    Raises:
        ValueError: OpenVINO cannot read it.
    """
    openvino = package("openvino", "openvino")
    try:
        return openvino.Core().read_model(io.BytesIO(graph))
    except RuntimeError as error:
        raise ValueError(f"OpenVINO cannot read the graph: {first_line(error)}") from error


def openvino_session(
    model: Any, threads: int | None = None, *, structure: TreeSpec | None = None, bfloat16: bool = False
) -> Callable[[Inputs], Any]:
    """A function of inputs (float32 CPU tensors) that runs a model of `openvino_model` on the CPU.

    It is compiled for the shapes of its inputs when they first come.

    Args:
        threads: None: as many as torch uses in this process.
        structure: what to make of several outputs; None gives a tuple of them, and one output as it is.
        bfloat16: compute in it where the processor has it; inputs and outputs stay float32.

    Raises:
        ValueError: fewer than one thread; when called, inputs that the graph cannot take.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1; got {threads}")
    openvino = package("openvino", "openvino")
    core, options = (
        openvino.Core(),
        {
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            # Left alone, processors that have bfloat16 would round to it unasked.
            "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
        },
    )
    names = [port.any_name for port in model.inputs]
    single = len(model.outputs) == 1 and structure is None
    compiled: dict[tuple, Any] = {}

    def call(inputs: Inputs) -> Any:
        named = inputs if isinstance(inputs, Mapping) else dict(zip(names, tree_leaves(inputs), strict=True))
        feed = {name: named[name].contiguous().numpy() for name in names}
        shapes = tuple(value.shape for value in feed.values())
        try:
            if shapes not in compiled:
                own = model.clone()
                own.reshape({name: list(value.shape) for name, value in feed.items()})
                compiled[shapes] = core.compile_model(own, "CPU", options)
            found = compiled[shapes](feed, share_inputs=True)
        except RuntimeError as error:
            raise ValueError(f"OpenVINO cannot run on a batch of {list(shapes)}: {first_line(error)}") from error
        outputs = [torch.from_numpy(found[port].copy()) for port in compiled[shapes].outputs]
        if single:
            return outputs[0]
        return tuple(outputs) if structure is None else structure.unflatten(outputs)

    return call
