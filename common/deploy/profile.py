"""Where the time of a deployed network goes: every kernel that a runtime executes, with its arithmetic and its traffic.

Beside them stands what the machine can do at best, measured: the roofline of Williams et al. 2009
(doi:10.1145/1498765.1498785). No kernel can be faster than its arithmetic at the peak of large convolutions, or its
traffic at the speed of copies of that size.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import tempfile
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..cost import measure_latency
from ..inputs import Inputs
from .onnx_export import onnx_bytes
from .onnx_run import onnx_session
from .openvino_run import openvino_model, openvino_session
from .packages import package
from .quantise import quantised_openvino

PROFILED = ("onnxruntime", "openvino")

IN_INT8 = ("openvino",)
"""Of these, the runtimes whose kernels say what weights they hold in int8."""

FLOAT_BYTES = 4

COPIED_BYTES = tuple(2**power for power in range(14, 29, 2))
"""Sizes of the copies that are timed, read and written bytes together: from what fits into a core's cache to memory."""


@dataclass(frozen=True)
class Kernel:
    """One step of a runtime.

    Attributes:
        layer: the module whose weights it holds, or whose output it goes on with; "" for none.
        kind: of operation, as the runtime says.
        seconds: PER BATCH, median.
        flops: multiply-accumulates of a batch, padding included that the runtime adds.
        bytes: read and written, weights included, in the precision that they are in, if each is moved once.
    """

    name: str
    layer: str
    kind: str
    seconds: float
    flops: int
    bytes: int


@dataclass(frozen=True)
class _Moved:
    """A tensor that a kernel reads or writes."""

    shape: tuple[int, ...]
    element_bytes: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.element_bytes


@dataclass(frozen=True)
class _Observed:
    """What a runtime says of a kernel; `others`: names of what it stands for as well."""

    name: str
    others: Sequence[str]
    kind: str
    inputs: Sequence[_Moved]
    outputs: Sequence[_Moved]
    seconds: Sequence[float]


@dataclass(frozen=True)
class Roofline:
    """What a machine can do at best, in one runtime, with a number of threads.

    Attributes:
        flops_per_second: multiply-accumulates, of the fastest of some large convolutions.
        copies: (bytes read and written, bytes per second) of copies, by size.
    """

    flops_per_second: float
    copies: tuple[tuple[int, float], ...]

    def seconds(self, kernel: Kernel) -> float:
        """The least that a kernel can take."""
        return max(kernel.flops / self.flops_per_second, kernel.bytes / self.bytes_per_second(kernel.bytes))

    def bytes_per_second(self, size: int) -> float:
        """Of a copy of this many bytes: between measured sizes, along the logarithm."""
        sizes = [one for one, _ in self.copies]
        place = bisect_left(sizes, size)
        if place in (0, len(sizes)):
            return self.copies[min(place, len(sizes) - 1)][1]
        (low, slow), (high, fast) = self.copies[place - 1], self.copies[place]
        share = math.log(size / low) / math.log(high / low)
        return slow + share * (fast - slow)


def profile(
    model: nn.Module,
    example: Inputs,
    *,
    runtime: str = "onnxruntime",
    threads: int | None = None,
    rounds: int = 20,
    int8: Inputs | None = None,
) -> list[Kernel]:
    """The kernels that a runtime executes for a batch, in its order.

    Args:
        model: plain modules, as `deploy(...).model`.
        example: a batch, float32 on the CPU.
        runtime: one of PROFILED.
        threads: None: as many as torch uses in this process.
        rounds: batches whose median is taken.
        int8: calibration images: of the network in int8, quantised with their ranges, in OpenVINO.

    Raises:
        ValueError: a runtime that says nothing of its kernels, or of their weights in int8, or that cannot quantise
            the network.
    """
    _check(runtime, int8 is not None)
    graph = onnx_bytes(model, example)
    layers = _layers_of(graph)
    if runtime == "onnxruntime":
        measured = _onnxruntime(graph, example, threads, rounds)
    else:
        measured = _openvino(_openvino_graph(graph, int8), example, threads, rounds)
    return [
        Kernel(
            one.name,
            next((layers[name] for name in _names(one) if name in layers), ""),
            one.kind,
            statistics.median(one.seconds),
            _flops(one),
            sum(moved.bytes for moved in (*one.inputs, *one.outputs)),
        )
        for one in measured
    ]


def roofline(runtime: str, threads: int | None = None, *, rounds: int = 10, int8: bool = False) -> Roofline:
    """Measure the peak of large convolutions in a runtime, in float32 or int8, and the speed of copies of all sizes.

    Raises:
        ValueError: a runtime that `profile` does not take.
    """
    _check(runtime, int8)
    threads = threads or torch.get_num_threads()
    peak = 0.0
    for channels, side, window in ((128, 56, 3), (256, 28, 3), (512, 14, 3), (512, 28, 1)):
        layer = nn.Conv2d(channels, channels, window, padding=window // 2, bias=False).requires_grad_(False)
        images = torch.randn(8, channels, side, side)
        graph = onnx_bytes(layer.eval(), images)
        if runtime == "onnxruntime":
            run = onnx_session(graph, threads)
        else:
            run = openvino_session(_openvino_graph(graph, images if int8 else None), threads)
        seconds = measure_latency({"peak": run}, images, rounds=rounds, threads=threads)["peak"]
        peak = max(peak, layer.weight.numel() * 8 * side**2 / seconds)
    return Roofline(peak, tuple((size, _copy_speed(size, threads, rounds)) for size in COPIED_BYTES))


def _check(runtime: str, int8: bool) -> None:
    if runtime not in PROFILED:
        raise ValueError(f"runtime must be one of {', '.join(PROFILED)}; got {runtime!r}")
    if int8 and runtime not in IN_INT8:
        raise ValueError(f"in int8 {runtime} says nothing of its kernels' weights; use runtime={IN_INT8[0]!r}")


def _copy_speed(size: int, threads: int, rounds: int) -> float:
    source = torch.randn(size // (2 * FLOAT_BYTES))
    target = torch.empty_like(source)
    repeats = max(1, 2**22 // size)  # one call of torch's costs microseconds

    def copies(given: Tensor) -> Tensor:
        for _ in range(repeats):
            target.copy_(given)
        return target

    return repeats * size / measure_latency({"copy": copies}, source, rounds=rounds, threads=threads)["copy"]


def _openvino_graph(graph: bytes, int8: Inputs | None) -> Any:
    model = openvino_model(graph)
    return model if int8 is None else quantised_openvino(model, int8)


def _onnxruntime(graph: bytes, example: Inputs, threads: int | None, rounds: int) -> list[_Observed]:
    onnxruntime = package("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads or torch.get_num_threads(), 1
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        feed = {
            one.name: leaf.contiguous().numpy()
            for one, leaf in zip(session.get_inputs(), tree_leaves(example), strict=True)
        }
        for _ in range(rounds + 2):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[str, list[float]] = defaultdict(list)
    facts: dict[str, Mapping[str, Any]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            times[name].append(event["dur"] / 1e6)
            facts[name] = event["args"]

    def moved(entries: Sequence[Mapping[str, list[int]]]) -> list[_Moved]:
        return [_Moved(tuple(shape), FLOAT_BYTES) for entry in entries for shape in entry.values()]

    return [
        _Observed(
            name,
            (),
            fact["op_name"],
            moved(fact["input_type_shape"]),
            moved(fact["output_type_shape"]),
            times[name][2:],
        )
        for name, fact in facts.items()
    ]


def _openvino(model: Any, example: Inputs, threads: int | None, rounds: int) -> list[_Observed]:
    openvino = package("openvino", "openvino")
    feed = {
        port.any_name: leaf.contiguous().numpy() for port, leaf in zip(model.inputs, tree_leaves(example), strict=True)
    }
    model.reshape({name: list(value.shape) for name, value in feed.items()})
    options = {"PERF_COUNT": True, "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(), "NUM_STREAMS": 1}
    options |= {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(model, "CPU", options)
    request = compiled.create_infer_request()
    times: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 2):
        request.infer(feed, share_inputs=True)
        if number >= 2:
            for one in request.profiling_info:
                if str(one.status).endswith(".EXECUTED"):
                    times[one.node_name].append(one.real_time.total_seconds())
    found = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        if node.friendly_name not in times:
            continue
        facts = node.get_rt_info()
        inputs, outputs = (
            [_Moved(tuple(port.get_partial_shape().to_shape()), port.get_element_type().size) for port in ports]
            for ports in (node.inputs(), node.outputs())
        )
        kind = str(facts["layerType"].astype(str))
        others = str(facts["originalLayersNames"].astype(str)).split(",")
        found.append(_Observed(node.friendly_name, others, kind, inputs, outputs, times[node.friendly_name]))
    return found


def _flops(kernel: _Observed) -> int:
    """Multiply-accumulates: each element of the output takes its channel's share of the weight."""
    if not re.search("conv|gemm|matmul|fullyconnected", kernel.kind, re.IGNORECASE) or len(kernel.inputs) < 2:
        return 0
    output, weight = kernel.outputs[0].shape, kernel.inputs[1].shape
    channels = output[1] if len(output) > 2 else output[-1]
    return math.prod(output) * math.prod(weight) // channels


def _layers_of(graph: bytes) -> dict[str, str]:
    """Names of an ONNX graph's nodes and of their outputs -> the module whose weight they use, or go on with."""
    onnx = package("onnx", "onnx")
    content = onnx.load_from_string(graph)
    weights = {one.name for one in content.graph.initializer}
    layers: dict[str, str] = {}
    for node in content.graph.node:
        own = [name.rsplit(".", 1)[0] for name in node.input if name in weights and name.endswith((".weight", ".bias"))]
        before = [layers[name] for name in node.input if name in layers]
        layer = next(iter([*own, *before]), "")
        layers |= dict.fromkeys((node.name, *node.output), layer)
    return layers


def _names(kernel: _Observed) -> list[str]:
    """What a kernel may be called in the graph: runtimes add to the names of nodes and of outputs."""
    ends = r"(_nchwc|_token_\d+|/WithoutBiases|/DequantizationMultiply|_kernel_time)+$"
    return [re.sub(ends, "", one) for one in (kernel.name, *kernel.others)]
