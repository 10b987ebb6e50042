"""onnxruntime: run an ONNX file or graph on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_leaves

from ..inputs import Inputs
from ..modules import first_line
from .packages import package


def onnx_session(
    model: str | Path | bytes, threads: int | None = None, *, structure: TreeSpec | None = None
) -> Callable[[Inputs], Any]:
    """A function of inputs (CPU tensors) that runs an ONNX file, or a serialised graph, with onnxruntime on the CPU.

    Args:
        threads: inside one operator; None: as many as torch uses in this process.
        structure: what to make of several outputs; None gives a tuple of them, and one output as it is.

    Raises:
        ValueError: not an ONNX file, or fewer than one thread; when called, inputs that the graph cannot take.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1; got {threads}")
    onnxruntime = package("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Otherwise the threads of a session that has just run would go on spinning while the next one is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions have no common base
        what = "the graph" if isinstance(model, bytes) else str(model)
        raise ValueError(f"onnxruntime cannot load {what}: {first_line(error)}") from error
    names = [one.name for one in session.get_inputs()]
    single = len(session.get_outputs()) == 1 and structure is None

    def call(inputs: Inputs) -> Any:
        named = inputs if isinstance(inputs, Mapping) else dict(zip(names, tree_leaves(inputs), strict=True))
        feed = {name: named[name].contiguous().numpy() for name in names}
        try:
            outputs = [torch.from_numpy(value) for value in session.run(None, feed)]
        except Exception as error:
            shapes = [tuple(value.shape) for value in feed.values()]
            raise ValueError(f"onnxruntime cannot run on a batch of {shapes}: {first_line(error)}") from error
        if single:
            return outputs[0]
        return tuple(outputs) if structure is None else structure.unflatten(outputs)

    return call
