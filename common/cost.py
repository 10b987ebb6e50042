"""What a network costs: parameters, FLOPs, latency.

FLOPs here are multiply-accumulates (MACs) of convolutions and linear layers for ONE image. Latency is in seconds
PER BATCH, whatever the batch size. Nothing in this module changes the model that it measures.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .inputs import Inputs, length, run
from .modules import differentiated, evaluating

# One timed sample repeats the call until it lasts about this long, so that the clock's own jitter is far below it.
MIN_SAMPLE_SECONDS = 5e-3


def count_params(model: nn.Module) -> int:
    """Number of scalars in the parameters of `model`, each shared parameter once; buffers are not counted.

    Raises:
        ValueError: a lazy module has not seen its input yet, so its size is unknown.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter '{name}' has no shape yet: run the lazy module once, then count")
    return sum(parameter.numel() for parameter in model.parameters())


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def count_flops(model: nn.Module, input_shape: Sequence[int] | Inputs, *, batch: int = 1) -> int:
    """Multiply-accumulates of the convolutions and linear layers of `model` for one image, by torch's own counter.

    Grouped and transposed convolutions are included; bias, normalisation, activations, pooling and batched matrix
    products (attention scores, `einsum` between activations) are not.

    Args:
        model: run once, on its own device and in eval mode (restored afterwards), on a batch of zeros.
        input_shape: (C, H, W) of one image; or inputs of one or more samples, in any form that `common.inputs` knows,
            for networks that zeros do not fit.
        batch: images in the counting pass, for networks that cannot run on one; the result is still per image.

    Raises:
        ValueError: the pass fails at this shape, or nothing was counted. A count is never 0.
    """
    return sum(count_flops_by_layer(model, input_shape, batch=batch).values())


def count_flops_by_layer(model: nn.Module, input_shape: Sequence[int] | Inputs, *, batch: int = 1) -> dict[str, int]:
    """The FLOPs of `count_flops` by the name of the innermost module that spends them, in order of execution.

    Modules without FLOPs are left out, so the values sum to `count_flops`. A module that runs several times has
    their sum, under the first of its names; FLOPs of the root's own forward have the name "".

    Raises:
        ValueError: as `count_flops`.
    """
    if isinstance(input_shape, Tensor | Mapping) or any(isinstance(part, Tensor) for part in input_shape):
        images = input_shape
        batch = length(images)
    else:
        images = _zero_images(model, input_shape, batch)
    # With gradients, or a product with a frozen matrix may run as a batched one, which nobody counts, and the counter,
    # which hangs a hook on whatever a module is called with, stumbles over a class token.
    with evaluating(model), differentiated(model), FlopCounterMode(display=False) as counter:
        own_macs = _run_with_attribution(model, images, counter)
    if not any(own_macs.values()):
        raise ValueError(
            f"no convolution or linear layer of {type(model).__name__} was seen in a pass over {_shapes(images)}: "
            "quantised and foreign operators cannot be counted, count the plain module instead"
        )
    for name, macs in own_macs.items():
        if macs % batch:
            raise ValueError(f"layer '{name}': {macs} multiply-accumulates do not divide by batch={batch}; use batch=1")
    return {name: macs // batch for name, macs in own_macs.items() if macs}


def _zero_images(model: nn.Module, input_shape: Sequence[int], batch: int) -> Tensor:
    """Zeros: (batch, C, H, W), on the device and in the floating type of the model's first floating parameter."""
    shape = tuple(input_shape)
    if len(shape) != 3 or any(size < 1 for size in shape):
        raise ValueError(f"input_shape must be (C, H, W) of one image, all positive; got {shape}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1; got {batch}")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros((batch, *shape), dtype=like.dtype, device=like.device)


def _shapes(images: Inputs) -> str:
    return " and ".join(str(tuple(leaf.shape)) for leaf in tree_leaves(images))


def _run_with_attribution(model: nn.Module, images: Inputs, counter: FlopCounterMode) -> dict[str, int]:
    """One forward pass; the MACs of each module less those of the modules that it called, by module name."""
    names = {module: name for name, module in model.named_modules()}
    own_macs: dict[str, int] = {}
    running: list[list[int]] = []  # per module being executed: [counter at its start, MACs of its callees]

    def enter(module: nn.Module, _inputs: Any) -> None:
        if module in names:
            own_macs.setdefault(names[module], 0)
            running.append([_macs_so_far(counter), 0])

    def leave(module: nn.Module, _inputs: Any, _output: Any) -> None:
        if module in names:
            start, in_callees = running.pop()
            inclusive = _macs_so_far(counter) - start
            own_macs[names[module]] += inclusive - in_callees
            if running:
                running[-1][1] += inclusive

    # Global hooks, because hooks on the modules themselves would be a change to the model.
    hooks = (register_module_forward_pre_hook(enter), register_module_forward_hook(leave))
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole attention layer, which nobody can count
    try:
        run(model, images)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        attempt = f"its pass over {_shapes(images)} failed: {reason}"
        raise ValueError(f"the FLOPs of {type(model).__name__} cannot be counted, {attempt}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for hook in hooks:
            hook.remove()
    return own_macs


def _macs_so_far(counter: FlopCounterMode) -> int:
    """Half of torch's FLOPs (2 per multiply-accumulate) of convolutions and plain matrix products."""
    flops = counter.get_flop_counts().get("Global", {})
    counted = sum(n for operator, n in flops.items() if _is_conv_or_linear(str(operator)))
    return counted // 2


def _is_conv_or_linear(operator: str) -> bool:
    return operator in ("aten.mm", "aten.addmm") or "conv" in operator


# --- latency ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latency:
    """Spread of the latency samples of one model: seconds PER BATCH of `batch_size` images."""

    median: float
    p10: float
    p90: float
    batch_size: int


def summarise(samples: Sequence[float], batch_size: int) -> Latency:
    """Median, 10th and 90th percentile of `samples` (seconds PER BATCH of `batch_size` images)."""
    if len(samples) == 0 or batch_size < 1:
        raise ValueError(f"need samples and a batch size of at least 1; got {len(samples)} samples, {batch_size}")
    p10, median, p90 = (float(value) for value in np.percentile(samples, [10, 50, 90]))
    return Latency(median=median, p10=p10, p90=p90, batch_size=batch_size)


def measure_latency(
    models: Mapping[str, Callable[[Any], Any]],
    example: Any,
    *,
    rounds: int = 20,
    warmup: int = 3,
    threads: int | None = None,
) -> dict[str, float]:
    """Median latency of each model in seconds PER BATCH (`example` is the batch); arguments as `latency_samples`."""
    samples = latency_samples(models, example, rounds=rounds, warmup=warmup, threads=threads)
    return {name: statistics.median(values) for name, values in samples.items()}


def latency_samples(
    models: Mapping[str, Callable[[Any], Any]],
    example: Any,
    *,
    rounds: int = 20,
    warmup: int = 3,
    threads: int | None = None,
) -> dict[str, list[float]]:
    """Latency of each model, measured interleaved: one sample per round, in seconds PER BATCH.

    Every round times all models, in an order of its own, so that a slow minute of the machine falls on all alike. A
    sample is of a model that runs again and again, as a deployed one does: its first call, which finds in the caches
    what another model has left there, is not timed. (A network of a few milliseconds takes half as long again behind a
    dense one.) A sample repeats the call until it lasts a few milliseconds and is the mean of the repetitions. Runs in
    inference mode; modules are put in eval mode and restored.

    Args:
        models: modules, or any functions of `example` (an onnxruntime session wrapped in one, say).
        example: what each model is called with: (N, C, H, W) images, already on the models' device.
        warmup: calls of each model before the first round, at least 1: they also set its number of repetitions.
        threads: torch's own CPU threads during the measurement (restored); None leaves them. Other runtimes have
            their own setting.

    Raises:
        ValueError: no models, or `rounds`, `warmup` or `threads` below 1.
    """
    _check_measurement(models, rounds=rounds, warmup=warmup, threads=threads)
    synchronise = _synchroniser(example)
    names = list(models)
    samples: dict[str, list[float]] = {name: [] for name in names}
    modules = [model for model in models.values() if isinstance(model, nn.Module)]
    with evaluating(*modules), _torch_threads(threads), torch.inference_mode():
        repetitions = {
            name: _repetitions(min(_time(model, example, 1, synchronise) for _ in range(warmup)))
            for name, model in models.items()
        }
        for round_index in range(rounds):
            for name in random.Random(round_index).sample(names, len(names)):
                models[name](example)
                samples[name].append(_time(models[name], example, repetitions[name], synchronise))
    return samples


def _check_measurement(models: Mapping[str, Any], **counts: int | None) -> None:
    if not models:
        raise ValueError("no models to measure: pass {name: model} with at least one entry")
    for name, model in models.items():
        if not callable(model):
            raise ValueError(f"model '{name}' is a {type(model).__name__}, not callable: wrap it in a function")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1; got {count}")


def _time(model: Callable[[Any], Any], example: Any, repetitions: int, synchronise: Callable[[], None]) -> float:
    """Mean seconds of one call over `repetitions` calls in a row, the device idle before and after."""
    synchronise()
    start = time.perf_counter()
    for _ in range(repetitions):
        model(example)
    synchronise()
    return (time.perf_counter() - start) / repetitions


def _repetitions(seconds_per_call: float) -> int:
    return max(1, math.ceil(MIN_SAMPLE_SECONDS / max(seconds_per_call, 1e-7)))


def _synchroniser(example: Any) -> Callable[[], None]:
    """A function that waits until the device of `example` has finished its queued work."""
    device = example.device if isinstance(example, Tensor) else torch.device("cpu")
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device.type == "mps":
        return torch.mps.synchronize
    return lambda: None


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
