"""Give back means and scales alone: what `reconstruction` is compared with, and what needs no dense network.

Truncation shifts the mean and the scale of what a layer puts out. Networks with batch norm absorb both by having their
running statistics estimated again; layers with a bias get the dense layer's mean output per channel back, and its
standard deviation: what truncation takes away is variance, and a deep network without norms would fade out layer by
layer.

Statistics are those of all images, and of the network as corrected so far: norms and layers are taken in the order in
which they run, each with a pass of its own up to there. So nothing depends on how the images are batched or ordered; at
full ranks, and on the images that the dense statistics are of, biases and scales stay what they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..inputs import Batches, Inputs, batches_of, joined, length, like_model, run, split
from ..modules import hooked, inputs_batch, unwrapped
from .flow import running_norms
from .geometry import scale_outputs
from .layers import HTLayer
from .moments import channels_last_rows, mean_and_variance, wide

LARGEST_GAIN = 4.0
"""Most that a channel's scale is changed: a channel that is nearly lost would only have its noise amplified."""


def recalibrate(
    model: nn.Module,
    images: Batches,
    output_means: Mapping[str, Tensor] | None = None,
    output_stds: Mapping[str, Tensor] | None = None,
    *,
    batch_size: int | None = None,
) -> nn.Module:
    """Estimate batch-norm statistics again and correct biases, from ``images: (N, C, H, W)``; changes ``model``.

    images: also as batches in any form, see `common.inputs`. Where means are given back, those that they are of: a
        scale that is compared with other images' is changed by their difference too.

    Args:
        output_means: layer name -> the dense layer's mean output ``(C_out,)``. Factorised layers with a bias get it
            back.
        output_stds: likewise its standard deviation; without it, scales are left alone.
        batch_size: how many images go through the network at a time; None takes what suits their size.

    Returns:
        the same model, its training flags as they were.

    Raises:
        ValueError: if there are no images, or a batch norm reads a single value of each channel.
    """
    inside, means, stds = unwrapped(model), output_means or {}, output_stds or {}
    given = list(batches_of(images))
    if not sum(map(length, given)):
        raise ValueError("recalibration needs at least one image")
    inputs = like_model(joined(given), inside)
    batches = list(split(inputs, batch_size or inputs_batch(inputs), even=True))
    layers = [n for n, m in inside.named_modules() if isinstance(m, HTLayer) and m.bias is not None and n in means]
    for name, calls in _calls(inside, [*running_norms(inside), *layers], batches[0]).items():
        module = inside.get_submodule(name)
        mean, variance, rows = _statistics(inside, name, calls, batches)
        if isinstance(module, HTLayer):
            _match(module, mean, variance, means[name], stds.get(name))
        elif rows == 1:
            raise ValueError(f"batch norm {name} reads one value of each channel: give more images")
        else:
            module.running_mean.copy_(mean)
            module.running_var.copy_(variance * rows / (rows - 1))
    return model


def _calls(model: nn.Module, names: Sequence[str], batch: Inputs) -> dict[str, int]:
    """How often each of these modules runs in a pass, in the order in which they begin."""
    found: Counter[str] = Counter()

    def counted(name: str) -> Callable:
        return lambda _module, _inputs: found.update([name])

    with hooked(model, {}, before={name: counted(name) for name in names}):
        run(model, batch)
    return dict(found)


class _Reached(BaseException):
    """Ends a pass where nothing more is wanted of it; no business of the network's own error handling."""


def _statistics(model: nn.Module, name: str, calls: int, batches: Sequence[Inputs]) -> tuple[Tensor, Tensor, int]:
    """Mean and variance per channel ``(C,)`` of a norm's input or a layer's output, over all images and calls, and of
    how many rows. Parts are pooled in float64 (Chan et al. 1983): any batching comes to the same."""
    parts: list[tuple[int, Tensor, Tensor]] = []

    def seen(features: Tensor, axis: int) -> None:
        rows = channels_last_rows(wide(features), axis)
        parts.append((len(rows), *(part.double() for part in mean_and_variance(rows))))
        if len(parts) % calls == 0:
            raise _Reached

    def before(_norm: _BatchNorm, inputs: tuple) -> None:
        seen(inputs[0], 1)

    def after(layer: HTLayer, _inputs: tuple, output: Tensor) -> None:
        seen(output, -1 if layer.geometry.linear else 1)

    is_layer = isinstance(model.get_submodule(name), HTLayer)
    with hooked(model, {name: after} if is_layer else {}, before={} if is_layer else {name: before}):
        for batch in batches:
            try:
                run(model, batch)
            except _Reached:
                continue
    rows = sum(count for count, _, _ in parts)
    mean = torch.stack([count * own for count, own, _ in parts]).sum(0) / rows
    spread = torch.stack([count * (variance + (own - mean).square()) for count, own, variance in parts])
    return mean, spread.sum(0) / rows, rows


@torch.no_grad()
def _match(layer: HTLayer, mean: Tensor, variance: Tensor, target_mean: Tensor, target_std: Tensor | None) -> None:
    """Scale and shift the last stage, so that outputs of this mean and variance get the target's."""
    gain = torch.ones_like(mean) if target_std is None else _gain(target_std.to(mean), variance.sqrt())
    scale_outputs(layer.stages[-1], gain.to(layer.bias))
    layer.bias.copy_((layer.bias - mean) * gain + target_mean.to(mean))


def _gain(target: Tensor, own: Tensor) -> Tensor:
    """Factor from the own to the target's standard deviation; 1 for channels that are silent on either side."""
    gain = target / own
    return torch.where(gain.isfinite() & (gain > 0), gain, 1.0).clamp(1 / LARGEST_GAIN, LARGEST_GAIN)
