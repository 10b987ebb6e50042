"""Give back statistics alone: what `reconstruction` is compared with, and batch norm estimated anew.

Truncation shifts the mean and the scale of what a layer puts out. Networks with batch norm absorb both by having their
running statistics estimated again; layers with a bias get the dense layer's mean output per channel back, and its
standard deviation: what truncation takes away is variance, and a deep network without norms would fade out layer by
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..inputs import Batches, Inputs, batches_of, joined, length, like_model, run, split
from ..modules import hooked, inputs_batch, unwrapped
from .geometry import scale_outputs
from .layers import HTLayer
from .moments import channels_last_rows, mean_and_variance

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
    """Correct biases, then re-estimate batch-norm statistics, both from ``images: (N, C, H, W)``; changes ``model``.

    images: also as batches in any form, see `common.inputs`.

    Args:
        output_means: layer name -> the dense layer's mean output ``(C_out,)``. Factorised layers with a bias get it
            back, in the order in which they run, each seeing the corrected layers before it.
        output_stds: likewise its standard deviation; without it, scales are left alone.
        batch_size: None takes what suits the size of the images.

    Returns:
        the same model, its training flags as they were.

    Raises:
        ValueError: if there are no images.
    """
    model_inside = unwrapped(model)
    given = list(batches_of(images))
    if not sum(map(length, given)):
        raise ValueError("recalibration needs at least one image")
    inputs = like_model(joined(given), model_inside)
    # Batches of one size: a lone last image would have no statistics of its own where the map is 1 x 1.
    batches = list(split(inputs, batch_size or inputs_batch(inputs), even=True))
    correct_biases(model_inside, batches[0], output_means or {}, output_stds)
    reestimate_batch_norm(model_inside, batches)
    return model


def correct_biases(
    model: nn.Module,
    images: Inputs,
    output_means: Mapping[str, Tensor],
    output_stds: Mapping[str, Tensor] | None = None,
) -> None:
    """Shift every named factorised layer's bias so that its mean output on ``images`` is the given one, in one pass;
    with ``output_stds`` scale its last stage too.

    Batch norm normalises by the statistics of ``images``, as it will once it is re-estimated: a bias behind it would
    otherwise be corrected for inputs that it is never going to see.
    """
    if _corrections(model, output_means, output_stds):
        calibrated_outputs(model, images, output_means, output_stds)


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Inputs]) -> None:
    """Replace every running mean and variance by its average over ``batches``, each weighted by its images."""
    seen = 0
    with hooked(model, {}), _batch_statistics(model) as norms:
        for norm in norms:
            norm.reset_running_stats()
        for batch in batches if norms else ():
            seen += length(batch)
            for norm in norms:
                norm.momentum = length(batch) / seen
            run(model, batch)


def calibrated_outputs(
    model: nn.Module,
    images: Inputs,
    output_means: Mapping[str, Tensor] | None = None,
    output_stds: Mapping[str, Tensor] | None = None,
) -> Any:
    """What the model would say to ``images: (N, C, H, W)`` if it were recalibrated on them, in a single pass.

    Batch norm normalises by the statistics of ``images``, its running statistics are left alone. Biases of the
    factorised layers named in ``output_means`` are corrected for good.
    """
    with hooked(model, _corrections(model, output_means or {}, output_stds)), _batch_statistics(model) as norms:
        saved = [{key: buffer.clone() for key, buffer in norm.named_buffers()} for norm in norms]
        try:
            return run(model, images)
        finally:
            for norm, buffers in zip(norms, saved, strict=True):
                norm.load_state_dict(buffers, strict=False)


def _corrections(
    model: nn.Module, output_means: Mapping[str, Tensor], output_stds: Mapping[str, Tensor] | None = None
) -> dict[str, Callable]:
    """Name -> hook that corrects the last stage, for the named layers that are factorised and have a bias."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, HTLayer)}
    return {
        name: _match(mean, (output_stds or {}).get(name))
        for name, mean in output_means.items()
        if name in layers and layers[name].bias is not None
    }


def _match(target_mean: Tensor, target_std: Tensor | None) -> Callable:
    def hook(module: HTLayer, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        axis = -1 if module.geometry.linear else 1
        mean, variance = mean_and_variance(channels_last_rows(output, axis))
        target = target_mean.to(output)
        gain = torch.ones_like(mean) if target_std is None else _gain(target_std.to(output), variance.sqrt())
        scale_outputs(module.stages[-1], gain)
        module.bias.copy_((module.bias - mean) * gain + target)
        # In place: at 224 px a copy of one of VGG16's first maps would cost more than the convolution.
        output.movedim(axis, -1).mul_(gain).add_(target - mean * gain)
        return output

    return hook


def _gain(target: Tensor, own: Tensor) -> Tensor:
    """Factor from the own to the target's standard deviation; 1 for channels that are silent on either side."""
    gain = target / own
    return torch.where(gain.isfinite() & (gain > 0), gain, 1.0).clamp(1 / LARGEST_GAIN, LARGEST_GAIN)


@contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[list[_BatchNorm]]:
    """Inside, the batch norms (which are handed out) normalise by their batch; their momentum is restored."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.train()
    try:
        yield norms
    finally:
        for norm, (momentum, training) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.train(training)
