"""Where the time of a deployed network goes: every kernel that a runtime executes, with its arithmetic and its traffic.

What the machine could do at best stands in `roofline`.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..inputs import Inputs
from .onnx_export import onnx_bytes
from .openvino_run import openvino_model
from .packages import package
from .quantise import quantised_openvino

PROFILED = ("onnxruntime", "openvino")

IN_INT8 = ("openvino",)
"""Of these, the runtimes whose kernels say what weights they hold in int8."""

SETTLING_SECONDS, SETTLING_BATCHES = 0.3, 1000
"""For so long, or so many batches, a network runs before its kernels are timed, and again while they are: a quick one's
few rounds are over before threads and caches are as they stay."""

UNTOLD_SECONDS = 5e-7
"""Of a kernel that OpenVINO says took 0 microseconds."""

ARITHMETIC = re.compile("conv|gemm|matmul|fullyconnected", re.IGNORECASE)
"""Kinds of kernels that multiply."""

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Kernel:
    """One step of a runtime.

    Attributes:
        layer: the module whose weights it holds, or whose output it goes on with; "" for none.
        kind: of operation, as the runtime says.
        seconds: PER BATCH: the median, in OpenVINO the mean.
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
    """What a runtime says of a kernel; `others`: names of what it stands for as well; `seconds`: as in `Kernel`."""

    name: str
    others: Sequence[str]
    kind: str
    inputs: Sequence[_Moved]
    outputs: Sequence[_Moved]
    seconds: float


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
        rounds: batches that are timed, after the first ones; more of a quick network.
        int8: calibration images: of the network in int8, quantised with their ranges, in OpenVINO.

    Raises:
        ValueError: a runtime that says nothing of its kernels, or of their weights in int8, or that cannot quantise
            the network.
    """
    check_runtime(runtime, int8 is not None)
    graph = onnx_bytes(model, example)
    layers = _layers_of(graph)
    if runtime == "onnxruntime":
        measured = _onnxruntime(graph, example, threads, rounds)
    else:
        measured = _openvino(openvino_graph(graph, int8), example, threads, rounds)
    return [
        Kernel(
            one.name,
            next((layers[name] for name in _names(one) if name in layers), ""),
            one.kind,
            one.seconds,
            _flops(one),
            sum(moved.bytes for moved in (*one.inputs, *one.outputs)),
        )
        for one in measured
    ]


def check_runtime(runtime: str, int8: bool) -> None:
    """Raise ValueError for a runtime that says nothing of its kernels, or of their weights in int8."""
    if runtime not in PROFILED:
        raise ValueError(f"runtime must be one of {', '.join(PROFILED)}; got {runtime!r}")
    if int8 and runtime not in IN_INT8:
        raise ValueError(f"in int8 {runtime} says nothing of its kernels' weights; use runtime={IN_INT8[0]!r}")


def openvino_graph(graph: bytes, int8: Inputs | None) -> Any:
    """OpenVINO's model of an ONNX graph, in int8 where calibration images are given."""
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
        settling = _run_for(lambda: session.run(None, feed), rounds=2)
        _run_for(lambda: session.run(None, feed), rounds)
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
            statistics.median(times[name][settling:]),
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

    def run(rounds: int) -> tuple[int, dict[str, float]]:
        done = _run_for(lambda: request.infer(feed, share_inputs=True), rounds)
        return done, {one.node_name: one.real_time.total_seconds() for one in request.profiling_info}

    before, after = run(rounds=2), run(rounds)
    found = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = node.get_rt_info()
        kind = str(facts["layerType"].astype(str))
        times = [(runs, means.get(node.friendly_name, 0.0)) for runs, means in (before, after)]
        if not (times[1][1] or ARITHMETIC.search(kind)):
            continue  # a constant, or what takes no time
        inputs, outputs = (
            [_Moved(tuple(port.get_partial_shape().to_shape()), port.get_element_type().size) for port in ports]
            for ports in (node.inputs(), node.outputs())
        )
        others = str(facts["originalLayersNames"].astype(str)).split(",")
        found.append(_Observed(node.friendly_name, others, kind, inputs, outputs, _mean_since(*times)))
    return found


def _mean_since(before: tuple[int, float], after: tuple[int, float]) -> float:
    """Seconds a batch of the later runs, from (runs, mean seconds) of the first ones and of all.

    OpenVINO tells a kernel's mean since its start, the slow first batches included, in whole microseconds.
    """
    (first, early), (later, late) = before, after
    seconds = ((first + later) * late - first * early) / later
    return max(seconds, UNTOLD_SECONDS)


def _run_for(batch: Callable[[], object], rounds: int) -> int:
    """Run a batch as often as asked, and more often for as long as a network settles; how often that was."""
    began, done = time.perf_counter(), 0
    while done < rounds or (done < SETTLING_BATCHES and time.perf_counter() - began < SETTLING_SECONDS):
        batch()
        done += 1
    return done


def _flops(kernel: _Observed) -> int:
    """Multiply-accumulates: each element of the output takes its channel's share of the weight."""
    if not ARITHMETIC.search(kernel.kind) or len(kernel.inputs) < 2:
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
