"""Choose how each factorised layer is run: time its execution plans where the network will run, take the fastest.

All plans of a layer compute the same function, so this is a choice of speed alone. FLOPs are a poor guide to it: a
1 x k convolution of few channels has few of them and uses little of the machine.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..compress import HTLayer
from ..cost import latency_samples
from ..inputs import Inputs, run
from ..modules import hooked, laid_out

WAYS = ("measure", "flops", "keep")
"""How plans are chosen: the fastest by measurement, the one of fewest FLOPs, or the one that the layer is in."""

SAME_SPEED = 0.02
"""Plans within this share of the fastest one are equally fast: two runs of one program differ by more."""

HOPELESS = 1.5
"""After a first few rounds, plans slower than the fastest by this factor are not timed any further."""

FIRST_ROUNDS = 3

HOPELESS_AT_A_LOOK = 4.0
"""Before those rounds everything is called a few times; what is slower by this factor is left at that one sample. A
dense layer beside its compressed plans takes most of the time of all rounds, and its place is clear at once."""

Samples = Mapping[str, Sequence[float]]
Measure = Callable[[Mapping[str, nn.Module], Tensor], Samples]
"""Times the modules, by name, on one input: seconds PER BATCH of each round."""


@dataclass(frozen=True)
class PlanTiming:
    """One plan of one layer: multiply-accumulates of one image; median seconds PER BATCH and its standard error.

    The times are None where nothing was measured.
    """

    flops: int
    seconds: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class LayerChoice:
    """What was chosen for a layer.

    Attributes:
        input_shape: shape of its input without the batch axis.
        before: the plan that it was in.
        plan: the plan chosen.
        timings: plan -> timing, of every plan that the layer can be run in.
    """

    input_shape: tuple[int, ...]
    before: str
    plan: str
    timings: Mapping[str, PlanTiming]

    @property
    def seconds(self) -> float | None:
        """Of the chosen plan, per batch."""
        return self.timings[self.plan].seconds

    @property
    def seconds_before(self) -> float | None:
        """Of the plan that the layer was in, per batch."""
        return self.timings[self.before].seconds


def choose_plans(
    model: nn.Module,
    example: Inputs,
    how: str,
    measure: Measure,
    *,
    channels_last: bool = False,
) -> dict[str, LayerChoice]:
    """Name -> choice for every factorised layer that runs on ``example: (N, C, H, W)``; the model stays as it is.

    Layers of the same shapes and geometry on inputs of the same shape are measured once, on feature maps laid out with
    their channels last or not.

    Raises:
        ValueError: an unknown way to choose.
    """
    if how not in WAYS:
        raise ValueError(f"plans must be one of {', '.join(WAYS)}; got {how!r}")
    shapes = layer_input_shapes(model, example)
    generator = torch.Generator().manual_seed(0)
    known: dict[tuple, LayerChoice] = {}
    choices = {}
    for name, shape in shapes.items():
        layer = model.get_submodule(name)
        key = (shape, layer.geometry, layer.bias is None, *((g, w.shape) for g, w in layer.weights().items()))
        if key not in known:
            inputs = torch.randn(shape, generator=generator).to(layer.weights()[layer.groups[0]])
            inputs = laid_out(inputs, channels_last)
            known[key] = choose_plan(layer, inputs, how, measure)
        choices[name] = known[key]
    return choices


def layer_input_shapes(model: nn.Module, example: Inputs) -> dict[str, tuple[int, ...]]:
    """Name -> input shape, with all its rows, of every factorised layer that runs on ``example``, in its order."""
    shapes: dict[str, tuple[int, ...]] = {}

    def observe(name: str) -> Callable:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            shapes.setdefault(name, tuple(inputs[0].shape))

        return hook

    layers = [name for name, module in model.named_modules() if isinstance(module, HTLayer)]
    with hooked(model, {name: observe(name) for name in layers}):
        run(model, example)
    return shapes


def choose_plan(layer: HTLayer, inputs: Tensor, how: str, measure: Measure) -> LayerChoice:
    """The choice for one layer on a batch of its inputs; with "measure", `.seconds` is what the layer costs there."""
    shape = tuple(inputs.shape[1:])
    flops = plan_flops(layer, shape)
    timings = {plan: PlanTiming(count) for plan, count in flops.items()}
    if how == "measure":
        samples = measure({plan: plain_layer(layer, plan) for plan in flops}, inputs)
        timings = {plan: PlanTiming(count, *median_and_error(samples[plan])) for plan, count in flops.items()}
    plan = {"measure": fastest, "flops": fewest_flops, "keep": lambda _: layer.plan}[how](timings)
    return LayerChoice(shape, layer.plan, plan, timings)


def fewest_flops(timings: Mapping[str, PlanTiming]) -> str:
    """The plan of fewest multiply-accumulates; of equal ones, the one of fewest stages."""
    # Plans are listed from the finest to the coarsest.
    return min(reversed(timings), key=lambda plan: timings[plan].flops)


def fastest(timings: Mapping[str, PlanTiming]) -> str:
    """The plan of the lowest median; of those that cannot be told from it, the one of fewest FLOPs."""
    best = min(timings.values(), key=lambda timing: timing.seconds)

    def as_fast(timing: PlanTiming) -> bool:
        noise = 2 * math.hypot(timing.error, best.error)
        return timing.seconds - best.seconds <= max(noise, SAME_SPEED * best.seconds)

    return fewest_flops({plan: timing for plan, timing in timings.items() if as_fast(timing)})


def first_of_fastest(seconds: Mapping[Any, float]) -> Any:
    """Of ways in their order of preference the first that is no more than SAME_SPEED behind the fastest."""
    limit = (1 + SAME_SPEED) * min(seconds.values())
    return next(way for way, value in seconds.items() if value <= limit)


def median_and_error(samples: Sequence[float]) -> tuple[float, float]:
    """Median, and its standard error from the spread between the quartiles, which a few outliers do not move."""
    if len(samples) < 2:
        return statistics.median(samples), 0.0
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    # A normal distribution has 1.35 standard deviations between its quartiles; its median's error is 1.25 / sqrt(n).
    return median, 1.25 / 1.35 * (upper - lower) / math.sqrt(len(samples))


def plan_flops(layer: HTLayer, input_shape: Sequence[int]) -> dict[str, int]:
    """Plan -> multiply-accumulates for one image, of every plan that the layer can be run in."""
    empty = {group: torch.empty_like(weight, device="meta") for group, weight in layer.weights().items()}
    shadow = HTLayer(empty, None, layer.geometry)
    image = torch.empty(1, *input_shape, device="meta", dtype=shadow.stages[0].weight.dtype)
    flops = {}
    for plan in layer.plans:
        module = shadow.with_plan(plan)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(image)
        flops[plan] = counter.get_total_flops() // 2
    return flops


def plain_layer(layer: HTLayer, plan: str) -> nn.Module:
    """The layer in a plan, as torch's own convolutions and linear layers; shares no tensor with it.

    Behind a flatten, the stage that covers the last of the feature map, and those after it, become linear layers.
    """
    chosen = layer.with_plan(plan)
    stages = list(chosen.stages)
    unflatten = layer.geometry.unflatten
    if unflatten is not None:
        last_window = max(place for place, group in enumerate(chosen.groups) if {"row", "col"} & set(group))
        linear = [_as_linear(stage) for stage in stages[last_window:]]
        before = [nn.Unflatten(1, unflatten), *stages[:last_window], nn.Flatten()] if last_window else []
        stages = [*before, *linear]
    plain = stages[0] if len(stages) == 1 else nn.Sequential(*stages)
    return plain.train(layer.training)


def _as_linear(stage: nn.Conv2d) -> nn.Linear:
    """A convolution ``(o, i, h, w)`` that sees the whole of its h x w input, as a linear layer on i h w features."""
    weight = stage.weight.detach().flatten(1)
    linear = nn.utils.skip_init(
        nn.Linear, weight.shape[1], weight.shape[0], stage.bias is not None, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        linear.weight.copy_(weight)
        if stage.bias is not None:
            linear.bias.copy_(stage.bias)
    return linear


def timer(prepare: Callable[[nn.Module, Tensor], Callable], *, rounds: int, threads: int | None) -> Measure:
    """A `Measure` of interleaved rounds that gives up on hopeless modules early.

    Args:
        prepare: makes of a module and its input what will be called: the module itself, a session of another runtime.
        rounds: timed rounds of the modules that are in the running; the others have FIRST_ROUNDS or fewer.
        threads: torch's own threads while measuring.
    """

    def measure(modules: Mapping[str, nn.Module], inputs: Tensor) -> Samples:
        ready = {name: prepare(module, inputs) for name, module in modules.items()}
        return interleaved(ready, inputs, rounds=rounds, threads=threads)

    return measure


def interleaved(runs: Mapping[Any, Callable], inputs: Inputs, *, rounds: int, threads: int | None) -> dict[Any, list]:
    """Seconds PER BATCH of each way to run the inputs, by its name, round by round.

    Args:
        rounds: of those in the running; hopeless ones have FIRST_ROUNDS, or one where a look was enough.
        threads: torch's own threads while measuring.
    """
    samples = {}
    if len(runs) > 1 and rounds > 1:
        samples = latency_samples(runs, inputs, rounds=1, warmup=1, threads=threads)
        runs = _in_the_running(runs, samples, HOPELESS_AT_A_LOOK)
    first = min(rounds, FIRST_ROUNDS)
    # A first look comes cold: of what stays in the running it is no sample.
    samples |= latency_samples(runs, inputs, rounds=first, threads=threads)
    runs = _in_the_running(runs, samples, HOPELESS)
    if rounds > first and len(runs) > 1:
        for name, values in latency_samples(runs, inputs, rounds=rounds - first, threads=threads).items():
            samples[name] += values
    return samples


def _in_the_running(runs: Mapping[Any, Callable], samples: Samples, factor: float) -> dict[Any, Callable]:
    """Those no slower than the fastest of all by the factor, in their order."""
    medians = {name: statistics.median(samples[name]) for name in runs}
    limit = factor * min(medians.values())
    return {name: run for name, run in runs.items() if medians[name] <= limit}
