"""Make a network fast where it will run: fold, choose each layer's execution plan by measurement, compile, export.

In onnxruntime and OpenVINO a batch goes through whole or in parts (`common.deploy.parts`), by measurement as well.

A dense network goes through the same function as a compressed one, so that a comparison of the two is one of networks
and not of how much care each was given.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..compress.proof import output_tensors, outputs_differ
from ..cost import latency_samples, measure_latency
from ..inputs import Inputs, length, like_model, run
from ..modules import evaluating, laid_out, unwrapped
from .choose import Chooser
from .fold import fold_batch_norm
from .plans import LayerChoice, Measure
from .runtimes import Run, Target

MEMORY_FORMATS = ("channels_last", "contiguous")

WRONG_FROM, WRONG_IN_BFLOAT16, WRONG_IN_INT8 = 1e-2, 0.1, 1.0
"""Outputs that differ by more than this, relative to the largest, are not rounding (TF32 included) but a mistake."""


@dataclass(frozen=True)
class Deployed:
    """A network ready to run, and what was chosen on the way. Calling it runs it.

    Attributes:
        model: plain torch modules: batch norm folded, layers in their chosen plans, in eval mode. What `export_onnx`
            and `save_compressed` take. Shares no tensor with the network that was deployed.
        run: images -> outputs in the chosen runtime: the model itself, compiled, a CUDA graph, or in onnxruntime.
        layers: name of each factorised layer -> the choice made for it.
        folded: name of a layer -> the batch norm folded into it.
        batch_size, runtime, device, threads, memory_format: what the times belong to.
        part: samples of the parts that `run` deals to its threads, one thread each; None: a batch goes through whole.
        reference_seconds: median PER BATCH with every layer in the plan that it came in, run as the plans were
            measured (never compiled); None unless plans were measured.
        measured_seconds: median PER BATCH of `run`, interleaved with the reference.
    """

    model: nn.Module = field(repr=False)
    run: Run = field(repr=False)
    layers: Mapping[str, LayerChoice]
    folded: Mapping[str, str]
    batch_size: int
    runtime: str
    device: str
    threads: int
    memory_format: str
    reference_seconds: float | None
    measured_seconds: float
    part: int | None = None

    def __call__(self, images: Inputs) -> Any:
        return self.run(images)

    @property
    def plans(self) -> dict[str, str]:
        """Name of each factorised layer -> its chosen plan."""
        return {name: choice.plan for name, choice in self.layers.items()}

    @property
    def rest_seconds(self) -> float | None:
        """PER BATCH, of all but the factorised layers: the reference less its layers. None without measured plans."""
        if self.reference_seconds is None:
            return None
        return self.reference_seconds - sum(choice.seconds_before for choice in self.layers.values())

    @property
    def predicted_seconds(self) -> float | None:
        """PER BATCH: the chosen plans' times and the rest. A forecast: a layer timed alone finds its input in cache."""
        if self.rest_seconds is None:
            return None
        return self.rest_seconds + sum(choice.seconds for choice in self.layers.values())

    def report(self) -> str:
        """Every layer with its plans' costs and what was chosen, and the totals, as text."""
        lines = [
            f"{self.runtime} on {self.device}, {self.threads} threads, batch {self.batch_size}"
            f"{'' if self.part is None else f' in parts of {self.part}, a thread each'}, {self.memory_format}; "
            f"batch norms folded: {len(self.folded)}"
        ]
        if self.layers:
            measured = all(choice.seconds is not None for choice in self.layers.values())
            lines.append(_layer_table(self.layers))
            lines.append(
                "Each layer alone, milliseconds per batch; * is the plan chosen"
                if measured
                else "MFLOPs (multiply-accumulates) of one image; * is the plan chosen"
            )
            if self.reference_seconds is not None:
                lines.append(
                    f"predicted: {_ms(self.predicted_seconds)} per batch, of which the factorised layers take "
                    f"{_ms(self.predicted_seconds - self.rest_seconds)}; "
                    f"with the plans that they came in: {_ms(self.reference_seconds)}"
                )
        lines.append(f"measured: {_ms(self.measured_seconds)} per batch")
        return "\n".join(lines)


def deploy(
    model: nn.Module,
    example: Inputs,
    *,
    runtime: str = "torch",
    plans: str = "measure",
    compile: bool = False,
    cuda_graph: bool = False,
    memory_format: str | None = None,
    dtype: torch.dtype | None = None,
    int8: Inputs | None = None,
    threads: int | None = None,
    rounds: int = 10,
    measure: Measure | None = None,
) -> Deployed:
    """Make a new model of the same function, as fast as it gets at this batch size on the example's device.

    Args:
        model: dense or compressed; it and its training flags stay as they are.
        example: ``(N, C, H, W)`` images, or several inputs (see `common.inputs`), of the batch size to deploy for, on
            the device to deploy to.
        runtime: "torch", or "onnxruntime" or "openvino" (CPU).
        plans: how each factorised layer's execution plan is chosen: "measure" times them in the runtime, layer by
            layer, and then the whole network in several choices of them (see `Chooser.measured_plans`); "flops" takes
            the plan of fewest FLOPs, "keep" the one that a layer is in.
        compile: torch.compile the result. Plans are measured without, compiling each would take minutes.
        cuda_graph: record the result as a CUDA graph, which takes this batch size alone; plans are measured so too.
        memory_format: of torch's feature maps: "channels_last" (the default), "contiguous", or "measure": the faster.
        dtype: floating type to run in, such as torch.bfloat16, and of the images then; None keeps the model's. OpenVINO
            computes in bfloat16 and takes float32 images all the same.
        int8: calibration images: the result runs in int8, quantised after training with the ranges that they show (see
            `quantise`). For onnxruntime and OpenVINO. Layers are timed in int8, and in float32 as well.
        threads: CPU threads while measuring, and of the other runtimes; None: as many as torch uses in this process.
        rounds: timed rounds of each plan, and of the whole.
        measure: takes the place of the timing of a layer's plans.

    Raises:
        ValueError: an unknown option, options that exclude one another, a device that cannot do what is asked, or a
            network that torch.compile or the ONNX export cannot take.
    """
    model = unwrapped(model)
    bfloat16 = runtime == "openvino" and dtype == torch.bfloat16
    dtype = torch.float32 if bfloat16 else dtype
    if int8 is not None:
        int8 = tree_map(lambda t: t.float().cpu() if t.is_floating_point() else t.cpu(), int8)
    target = Target(runtime, compile, cuda_graph, threads or torch.get_num_threads(), bfloat16, int8)
    leaves = tree_leaves(example)
    example = like_model(example, model)
    folded, pairs = fold_batch_norm(model, example)
    with evaluating(model), torch.inference_mode():
        expected = run(model, example)
    output_tensors(expected)

    # On the device of the given example, which may be another one than the model's.
    device, floating = leaves[0].device, dtype or next(t.dtype for t in tree_leaves(example) if t.is_floating_point())
    example = tree_map(lambda t: t.to(device, floating if t.is_floating_point() else t.dtype), example)
    target.check(example)
    folded = folded.to(device, floating).requires_grad_(False)
    format_name = _memory_format(memory_format, target, folded, example, rounds)
    channels_last = format_name == "channels_last"
    folded = laid_out(folded, channels_last)

    lowered = bfloat16 or floating == torch.bfloat16
    rounding = None if int8 is None and not lowered else WRONG_IN_BFLOAT16
    chooser = Chooser(target, example, rounds, channels_last, rounding)
    timed = plans == "measure" and measure is None
    choices = chooser.measured_plans(folded) if timed else [chooser.plans(folded, plans, measure)]
    found = chooser.fastest(folded, choices)

    runs: dict[str, Run] = {"deployed": found.run}
    most = WRONG_IN_INT8 if int8 is not None else WRONG_IN_BFLOAT16 if lowered else WRONG_FROM
    _check_outputs(expected, runs["deployed"](example), most)
    if plans == "measure" and found.plans and int8 is None:
        runs["reference"] = target.uncompiled_run(folded, example)
    samples = latency_samples(runs, example, rounds=rounds, threads=threads)
    seconds = {name: statistics.median(values) for name, values in samples.items()}
    return Deployed(
        model=found.network,
        run=runs["deployed"],
        layers=found.plans,
        folded=pairs,
        batch_size=length(example),
        runtime=str(target),
        device=str(device),
        threads=target.threads,
        memory_format=format_name,
        reference_seconds=seconds.get("reference"),
        measured_seconds=seconds["deployed"],
        part=found.part,
    )


def _memory_format(asked: str | None, target: Target, model: nn.Module, example: Inputs, rounds: int) -> str:
    """The name in MEMORY_FORMATS of what was asked for, measured on the whole network where that was asked for."""
    if asked not in (None, "measure", *MEMORY_FORMATS):
        raise ValueError(f"memory_format must be one of {', '.join(MEMORY_FORMATS)}, measure; got {asked!r}")
    if target.runtime != "torch":
        if asked not in (None, "contiguous"):
            raise ValueError(
                f"{target.runtime} lays out feature maps by itself: leave memory_format out; got {asked!r}"
            )
        return "contiguous"
    if asked != "measure":
        return asked or "channels_last"
    copies = {name: laid_out(copy.deepcopy(model), name == "channels_last") for name in MEMORY_FORMATS}
    runs = {name: target.uncompiled_run(module, example) for name, module in copies.items()}
    seconds = measure_latency(runs, example, rounds=rounds, threads=target.threads)
    return min(seconds, key=seconds.__getitem__)


def _check_outputs(expected: Any, found: Any, most: float) -> None:
    same_kind = type(expected) is type(found)
    outputs = output_tensors(expected), [one for one in tree_leaves(found) if isinstance(one, Tensor)]
    outputs = outputs[0], [one for one in outputs[1] if one.is_floating_point()]
    if same_kind and len(outputs[0]) == len(outputs[1]):
        problem = outputs_differ(*outputs, most=most)
    else:
        problem = f"in kind, a {type(found).__name__} for a {type(expected).__name__}"
    if problem is not None:
        raise ValueError(
            f"the deployed network's outputs differ from the given one's {problem}: it may choose its way by the data, "
            "or put out NaN; deploy networks of a fixed graph and finite outputs"
        )


def _layer_table(layers: Mapping[str, LayerChoice]) -> str:
    plans = list(dict.fromkeys(plan for choice in layers.values() for plan in choice.timings))

    def cell(choice: LayerChoice, plan: str) -> str:
        timing = choice.timings.get(plan)
        if timing is None:
            return ""
        cost = f"{timing.flops / 1e6:.4g}" if timing.seconds is None else f"{1e3 * timing.seconds:.3g}"
        return cost + (" *" if plan == choice.plan else "")

    rows = [
        [name, " x ".join(map(str, choice.input_shape)), *(cell(choice, plan) for plan in plans)]
        for name, choice in layers.items()
    ]
    return tabulate(rows, headers=["layer", "input", *plans], tablefmt="simple", disable_numparse=True)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
