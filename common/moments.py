"""Second moments of what each layer reads and writes, gathered in one pass over calibration images.

They turn "approximate the weights" into "approximate what the layer computes": the input moment says which directions
of the input occur at all, the output covariance which directions of the output carry the signal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.trace import LayerTrace, hooked


@dataclass(frozen=True)
class LayerMoments:
    """Moments of one layer over images and positions, in float64.

    Attributes:
        input_moment: ``E[x x^T]: (C_in, C_in)``; None for matrix layers, whose output covariance says all that matters.
        output_mean: ``E[y]: (C_out,)``.
        output_covariance: ``E[(y - E[y]) (y - E[y])^T]: (C_out, C_out)``.
    """

    input_moment: Tensor | None
    output_mean: Tensor
    output_covariance: Tensor


class _Accumulator:
    """Running moments of the rows of ``(rows, channels)`` matrices.

    Summed about the first batch's mean: the covariance of outputs that hardly vary around a large mean would otherwise
    be the difference of two large numbers, and come out as rounding noise.
    """

    def __init__(self) -> None:
        self.count, self.origin, self.total, self.square = 0, 0.0, 0.0, 0.0

    def add(self, rows: Tensor) -> None:
        if not self.count:
            self.origin = rows.mean(0)
        rows = rows - self.origin
        self.count += len(rows)
        self.total = self.total + rows.sum(0).double()
        self.square = self.square + (rows.T @ rows).double()

    @property
    def mean(self) -> Tensor:
        return self.origin.double() + self.total / self.count

    @property
    def moment(self) -> Tensor:
        return self.covariance + torch.outer(self.mean, self.mean)

    @property
    def covariance(self) -> Tensor:
        shift = self.total / self.count
        return self.square / self.count - torch.outer(shift, shift)


def channels_last_rows(features: Tensor, axis: int = 1) -> Tensor:
    """(N, C, H, W) -> (N H W, C), or (N, ..., C) -> (N ..., C) with the channels' ``axis`` -1; (N, C) stays."""
    return features.movedim(axis, -1).flatten(0, -2)


def gather_moments(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    traces: Mapping[str, LayerTrace],
    *,
    kernels: Iterable[str],
    batch_size: int = 128,
) -> dict[str, LayerMoments]:
    """One pass of ``images: (N, C, H, W)`` (or batches of such) through the model in eval mode.

    Args:
        traces: the layers to observe.
        kernels: those of them whose input moment is wanted.

    Returns:
        layer name -> moments. The model stays as it was.

    Raises:
        ValueError: if there are no images, or an activation is NaN or infinite (naming the layer).
    """
    kernels = set(kernels)
    inputs = {name: _Accumulator() for name in traces if name in kernels}
    outputs = {name: _Accumulator() for name in traces}

    def observe(name: str):
        unflatten = traces[name].unflatten

        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if name in inputs:
                x = arguments[0] if unflatten is None else arguments[0].reshape(-1, *unflatten)
                inputs[name].add(channels_last_rows(x))
            outputs[name].add(channels_last_rows(output, -1 if isinstance(module, nn.Linear) else 1))

        return hook

    seen = 0
    with hooked(model, {name: observe(name) for name in traces}):
        for batch in images.split(batch_size) if isinstance(images, Tensor) else images:
            model(batch)
            seen += len(batch)
    if not seen:
        raise ValueError("no calibration images were given")
    for name, accumulator in outputs.items():
        if not torch.isfinite(accumulator.square).all():
            raise ValueError(f"layer {name}: the calibration pass met NaN or infinite activations")
    return {
        name: LayerMoments(inputs[name].moment if name in inputs else None, output.mean, output.covariance)
        for name, output in outputs.items()
    }
