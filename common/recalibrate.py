"""Bring a compressed network's statistics back to where the dense network's were, without any training.

Truncation shifts the mean and the scale of what a layer puts out. Networks with batch norm absorb both by having their
running statistics estimated again; layers with a bias get the dense layer's mean output per channel back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.layers import HTLayer
from common.moments import channels_last_rows
from common.trace import hooked


def recalibrate(
    model: nn.Module,
    images: Tensor,
    output_means: Mapping[str, Tensor] | None = None,
    *,
    batch_size: int = 256,
) -> nn.Module:
    """Correct biases, then re-estimate batch-norm statistics, both from ``images: (N, C, H, W)``; changes ``model``.

    Args:
        output_means: layer name -> the dense layer's mean output ``(C_out,)``. Factorised layers with a bias get it
            back, in the order in which they run, each seeing the corrected layers before it.

    Returns:
        the same model, its training flags as they were.

    Raises:
        ValueError: if there are no images.
    """
    if not len(images):
        raise ValueError("recalibration needs at least one image")
    correct_biases(model, images.split(batch_size)[0], output_means or {})
    reestimate_batch_norm(model, images.split(batch_size))
    return model


def correct_biases(model: nn.Module, images: Tensor, output_means: Mapping[str, Tensor]) -> None:
    """Shift every named factorised layer's bias so that its mean output on ``images`` is the given one, in one pass."""

    def shift_to(target: Tensor):
        def hook(module: HTLayer, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            shift = target.to(output) - channels_last_rows(output).mean(0)
            module.bias += shift
            return output + shift.reshape(1, -1, *(1,) * (output.ndim - 2))

        return hook

    layers = {name: module for name, module in model.named_modules() if isinstance(module, HTLayer)}
    hooks = {
        name: shift_to(mean) for name, mean in output_means.items() if name in layers and layers[name].bias is not None
    }
    if hooks:
        with hooked(model, hooks):
            model(images)


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace every running mean and variance by the average over ``batches``, normalised by its own."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with hooked(model, {}):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            norm.train()
        try:
            for batch in batches:
                if len(batch) > 1 or batch.shape[-1] > 1:
                    model(batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
