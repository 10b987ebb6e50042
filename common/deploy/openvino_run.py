"""OpenVINO: run an ONNX graph with Intel's runtime on a CPU (Intel's or not), in float32, bfloat16 or int8."""

from __future__ import annotations

import io
import threading
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
    model: Any,
    threads: int | None = None,
    *,
    structure: TreeSpec | None = None,
    bfloat16: bool = False,
    streams: int = 1,
) -> Callable[[Inputs], Any]:
    """A function of inputs (float32 CPU tensors) that runs a model of `openvino_model` on the CPU.

    It is compiled for the shapes of its inputs when they first come.

    Args:
        threads: None: as many as torch uses in this process.
        structure: what to make of several outputs; None gives a tuple of them, and one output as it is.
        bfloat16: compute in it where the processor has it; inputs and outputs stay float32.
        streams: calls that may run at a time, from threads of their own, each on its share of the threads.

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
            "NUM_STREAMS": streams,
            "PERFORMANCE_HINT": "LATENCY",
            # Left alone, processors that have bfloat16 would round to it unasked.
            "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
        },
    )
    names = [port.any_name for port in model.inputs]
    single = len(model.outputs) == 1 and structure is None
    compiled: dict[tuple, Any] = {}
    compiling, own = threading.Lock(), threading.local()

    def request(feed: Mapping[str, Any]) -> Any:
        """What infers for the calling thread at these shapes."""
        shapes = tuple(value.shape for value in feed.values())
        known = vars(own).setdefault("requests", {})
        if shapes not in known:
            with compiling:
                if shapes not in compiled:
                    shaped = model.clone()
                    shaped.reshape({name: list(value.shape) for name, value in feed.items()})
                    compiled[shapes] = core.compile_model(shaped, "CPU", options)
            known[shapes] = compiled[shapes].create_infer_request()
        return known[shapes]

    def call(inputs: Inputs) -> Any:
        named = inputs if isinstance(inputs, Mapping) else dict(zip(names, tree_leaves(inputs), strict=True))
        feed = {name: named[name].contiguous().numpy() for name in names}
        try:
            found = request(feed).infer(feed, share_inputs=True)
        except RuntimeError as error:
            shapes = [tuple(value.shape) for value in feed.values()]
            raise ValueError(f"OpenVINO cannot run on a batch of {shapes}: {first_line(error)}") from error
        outputs = [torch.from_numpy(value.copy()) for value in found.values()]
        if single:
            return outputs[0]
        return tuple(outputs) if structure is None else structure.unflatten(outputs)

    return call
