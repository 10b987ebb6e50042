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

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from ..inputs import Batches, Inputs, batches_of, joined, length, like_model, run, split
from ..modules import Reached, hooked, inputs_batch, unwrapped
from .flow import running_norms
from .geometry import scale_outputs
from .layers import HTLayer
from .moments import Accumulator, channels_last_rows

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
    """Estimate batch-norm statistics again and correct biases, from images; changes ``model``.

    Args:
        images: ``(N, C, H, W)``, or batches in any form, see `common.inputs`. Where means are given back, those that
            they are of: a scale that is compared with other images' is changed by their difference too.
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
        found = _statistics(inside, name, calls, batches)
        variance = found.covariance.diagonal().clamp_min(0)
        if isinstance(module, HTLayer):
            _match(module, found.mean, variance, means[name], stds.get(name))
        elif found.count == 1:
            raise ValueError(f"batch norm {name} reads one value of each channel: give more images")
        else:
            module.running_mean.copy_(found.mean)
            module.running_var.copy_(variance * found.count / (found.count - 1))
    return model


def _calls(model: nn.Module, names: Sequence[str], batch: Inputs) -> dict[str, int]:
    """How often each of these modules runs in a pass, in the order in which they begin."""
    found: Counter[str] = Counter()

    def counted(name: str) -> Callable:
        return lambda _module, _inputs: found.update([name])

    with hooked(model, {}, before={name: counted(name) for name in names}):
        run(model, batch)
    return dict(found)


def _statistics(model: nn.Module, name: str, calls: int, batches: Sequence[Inputs]) -> Accumulator:
    """The moments of a norm's input or a layer's output, over all images and calls."""
    found, runs = Accumulator(), itertools.count(1)

    def observe(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        is_layer = isinstance(module, HTLayer)
        linear = is_layer and module.geometry.linear
        found.add(channels_last_rows(output if is_layer else inputs[0], -1 if linear else 1))
        if next(runs) % calls == 0:
            raise Reached

    with hooked(model, {name: observe}):
        for batch in batches:
            with suppress(Reached):
                run(model, batch)
    return found


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
