"""Ways to run a torch module on a given input: as it is, compiled, as a CUDA graph, in onnxruntime or in OpenVINO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_leaves

from ..inputs import Inputs, first, run
from .onnx_export import onnx_bytes, output_structure
from .onnx_graph import onnx_layer
from .onnx_run import onnx_session
from .openvino_run import openvino_model, openvino_session
from .quantise import quantised_onnx, quantised_openvino

RUNTIMES = ("torch", "onnxruntime", "openvino")

Run = Callable[[Inputs], Any]

LAYER_RANGES = 2
"""Samples that a layer timed alone in int8 takes its ranges from: its speed does not depend on them."""


@dataclass(frozen=True)
class Session:
    """A graph in onnxruntime or OpenVINO; calling it runs a batch on all threads.

    Attributes:
        call: what runs it.
        alone: makes what runs a batch on one thread, and may be called from several threads at once.
    """

    call: Run
    alone: Callable[[], Run]

    def __call__(self, inputs: Inputs) -> Any:
        return self.call(inputs)


@dataclass(frozen=True)
class Target:
    """What a network will be run by.

    Attributes:
        runtime: one of RUNTIMES.
        compile: compile the whole network with torch.compile.
        cuda_graph: record it as a CUDA graph.
        threads: CPU threads of onnxruntime and OpenVINO; torch's are the process's.
        bfloat16: of OpenVINO: compute in it.
        int8: quantise to int8, whole networks with ranges from these float32 images on the CPU; None: do not.

    Raises:
        ValueError: an unknown runtime, or options that exclude one another.
    """

    runtime: str
    compile: bool
    cuda_graph: bool
    threads: int
    bfloat16: bool = False
    int8: Inputs | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}; got {self.runtime!r}")
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1; got {self.threads}")
        if self.runtime != "torch" and (self.compile or self.cuda_graph):
            raise ValueError(f"compile and cuda_graph are for the runtime 'torch'; got runtime={self.runtime!r}")
        if self.runtime == "torch" and self.int8 is not None:
            raise ValueError("int8 is for the runtimes onnxruntime and openvino; got runtime='torch'")
        if self.int8 is not None and self.bfloat16:
            raise ValueError("int8 and bfloat16 exclude one another")

    def check(self, example: Inputs) -> None:
        """Raise ValueError unless inputs like this one, on its device and of its type, can be run."""
        if self.cuda_graph and not isinstance(example, Tensor):
            raise ValueError("CUDA graphs take one input tensor; this network has several inputs: use cuda_graph=False")
        for tensor in tree_leaves(example):
            if self.cuda_graph:
                check_cuda(tensor.device)
            wrong_type = tensor.is_floating_point() and tensor.dtype != torch.float32
            if self.runtime != "torch" and (tensor.device.type != "cpu" or wrong_type):
                raise ValueError(
                    f"the runtime {self.runtime!r} is for float32 on the CPU, export_onnx makes files for others; "
                    f"got {tensor.dtype} on {tensor.device}"
                )

    def layer_run(self, layer: nn.Module, inputs: Inputs) -> Run:
        """A plain layer, to be timed alone: never compiled; in int8 with the ranges of these inputs."""
        if self.runtime == "torch":
            return self._torch_run(layer, inputs)
        ranges = None if self.int8 is None else first(inputs, LAYER_RANGES)
        return self._session(onnx_layer(layer, inputs.shape[1:]), ranges)

    def uncompiled_run(self, model: nn.Module, example: Inputs) -> Run | Session:
        """A whole network, run as layers are timed; outside torch a session."""
        if self.runtime == "torch":
            return self._torch_run(model, example)
        return self._session(onnx_bytes(model, example), self.int8, output_structure(model, example))

    def _session(self, graph: bytes, ranges: Inputs | None, structure: TreeSpec | None = None) -> Session:
        """A graph in onnxruntime or OpenVINO, in int8 where there are images to take ranges from."""
        if self.runtime == "onnxruntime":
            graph = graph if ranges is None else quantised_onnx(graph, ranges)
            on_threads = partial(onnx_session, graph, structure=structure)
            return Session(on_threads(self.threads), partial(on_threads, 1))
        read = openvino_model(graph)
        read = read if ranges is None else quantised_openvino(read, ranges)
        session = partial(openvino_session, read, self.threads, structure=structure, bfloat16=self.bfloat16)
        return Session(session(), partial(session, streams=self.threads))

    def run(self, model: nn.Module, example: Inputs) -> Run:
        """A whole network, run as it is deployed."""
        if self.compile:
            return compiled(model, example, cuda_graph=self.cuda_graph)
        return self.uncompiled_run(model, example)

    def _torch_run(self, module: nn.Module, inputs: Inputs) -> Run:
        return cuda_graph(module, inputs) if self.cuda_graph else eager(module)

    def __str__(self) -> str:
        options = {
            "compiled": self.compile,
            "CUDA graph": self.cuda_graph,
            "bfloat16": self.bfloat16,
            "int8": self.int8 is not None,
        }
        return ", ".join([self.runtime, *(name for name, on in options.items() if on)])


def eager(module: nn.Module) -> Run:
    """The module itself, in inference mode."""

    def call(images: Inputs) -> Any:
        with torch.inference_mode():
            return run(module, images)

    return call


def compiled(module: nn.Module, example: Inputs, *, cuda_graph: bool = False) -> Run:
    """The module compiled for the example's shape, weights frozen in; other shapes are compiled when they come.

    cuda_graph: let the compiler record CUDA graphs.

    Raises:
        ValueError: the compiler fails, most often because there is no C++ compiler (CPU) or no Triton (GPU).
    """
    options = {"freezing": True, "triton.cudagraphs": cuda_graph}
    call = eager(torch.compile(module, options=options))
    try:
        call(example)
    except Exception as error:  # dynamo, inductor and the compilers behind them share no base class
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"torch.compile failed ({type(error).__name__}: {reason}); it needs a C++ compiler on a CPU and Triton on "
            "a GPU: install one, or deploy with compile=False"
        ) from error
    return call


def cuda_graph(module: nn.Module, example: Inputs) -> Run:
    """The module recorded once as a CUDA graph and replayed: no launch overhead, one input shape.

    Raises:
        ValueError: the example is not on a CUDA device; when called, an input of another shape or type.
    """
    check_cuda(example.device)
    run_once = eager(module)
    inputs = example.clone()
    side = torch.cuda.Stream(example.device)
    side.wait_stream(torch.cuda.current_stream(example.device))
    with torch.cuda.device(example.device), torch.cuda.stream(side):
        for _ in range(3):  # lazy initialisation must not be recorded
            run_once(inputs)
    torch.cuda.current_stream(example.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(example.device), torch.cuda.graph(graph):
        outputs = run_once(inputs)

    def run(images: Tensor) -> Tensor:
        if images.shape != inputs.shape or images.dtype != inputs.dtype:
            raise ValueError(
                f"this CUDA graph was recorded for {tuple(inputs.shape)} {inputs.dtype}; "
                f"got {tuple(images.shape)} {images.dtype}"
            )
        inputs.copy_(images)
        graph.replay()
        return outputs.clone()  # the next call overwrites what this one returns

    return run


def check_cuda(device: torch.device) -> None:
    """Raise ValueError unless the device can record CUDA graphs."""
    if device.type != "cuda":
        raise ValueError(f"CUDA graphs need a CUDA device; the example is on {device}: use cuda_graph=False")
