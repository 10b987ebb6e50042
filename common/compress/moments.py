"""Second moments of what each layer reads and writes, gathered in one pass over calibration images.

They turn "approximate the weights" into "approximate what the layer computes": the input moment says which directions
of the input occur at all, the output covariance which directions of the output carry the signal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from ..inputs import Batches, batches_of, length, like_model, run, split
from ..modules import hooked
from .geometry import SIDES, TRANSPOSED, Convolution
from .trace import LayerTrace


@dataclass(frozen=True)
class LayerMoments:
    """Moments of one layer over images and positions, in float64.

    Attributes:
        window: covariance of the input along each mode of the layer's window, averaged over the others: of the
            channels ``(C_in, C_in)``, of the rows ``(k_h, k_h)`` and of the columns ``(k_w, k_w)``, the latter two with
            unit mean variance; of two axes on one side, the Kronecker product. None for matrix layers, whose output
            covariance says all that matters.
        output_mean: ``E[y]: (C_out,)``.
        output_covariance: ``E[(y - E[y]) (y - E[y])^T]: (C_out, C_out)``. Of a layer whose mean nothing gives back,
            neither a bias nor a batch norm behind it, these and the channels' are about zero: ``E[y y^T]``.
    """

    window: tuple[Tensor, Tensor, Tensor] | None
    output_mean: Tensor
    output_covariance: Tensor

    def split(self, groups: int) -> list[LayerMoments]:
        """The moments of each group of a grouped layer: its own channels'."""
        means, outputs = self.output_mean.chunk(groups), _diagonal_blocks(self.output_covariance, groups)
        windows = [None] * groups
        if self.window is not None:
            channels, rows, columns = self.window
            windows = [(block, rows, columns) for block in _diagonal_blocks(channels, groups)]
        return [LayerMoments(*moments) for moments in zip(windows, means, outputs, strict=True)]


def _diagonal_blocks(matrix: Tensor, count: int) -> list[Tensor]:
    return [rows.chunk(count, dim=1)[place] for place, rows in enumerate(matrix.chunk(count))]


class Accumulator:
    """Running moments of the rows of ``(rows, channels)`` matrices.

    Summed about the first batch's mean: the covariance of outputs that hardly vary around a large mean would otherwise
    be the difference of two large numbers, and come out as rounding noise.
    """

    def __init__(self) -> None:
        self.count, self.origin, self.total, self.square = 0, 0.0, 0.0, 0.0

    def add(self, rows: Tensor) -> None:
        rows = wide(rows)
        if not self.count:
            self.origin = rows.mean(0)
        rows = rows - self.origin
        self.count += len(rows)
        self.total = self.total + rows.sum(0).double()
        self.square = self.square + _product(rows.T, rows)

    @property
    def mean(self) -> Tensor:
        return self.origin.double() + self.total / self.count

    @property
    def covariance(self) -> Tensor:
        shift = self.total / self.count
        return self.square / self.count - torch.outer(shift, shift)

    @property
    def second_moment(self) -> Tensor:
        return self.covariance + torch.outer(self.mean, self.mean)

    def about(self, *, zero: bool) -> Tensor:
        """The second moment about zero, or about the mean."""
        return self.second_moment if zero else self.covariance


def product(one: Tensor, other: Tensor) -> Tensor:
    """Their matrix or inner product, in float64 where float32 cannot hold it."""
    found = one @ other
    return found if torch.isfinite(found.sum()) else one.double() @ other.double()


def _product(one: Tensor, other: Tensor) -> Tensor:
    """The same, to be added up in float64."""
    return product(one, other).double()


class _WindowAccumulator:
    """Running covariance of a kernel's input along the modes of its window: channels, rows, columns."""

    def __init__(self, layer: Convolution | nn.Linear, trace: LayerTrace) -> None:
        self._unflatten = trace.unflatten
        self._size = trace.unflatten[1:] if trace.unflatten else layer.kernel_size
        self._dilation = (1, 1) if trace.unflatten else layer.dilation
        # What meets in one output of a transposed layer lies apart by the stride, not by one: its window tells nothing.
        self._axes = () if isinstance(layer, TRANSPOSED) else range(len(self._size))
        self._channels = Accumulator()
        self._products = [torch.zeros(size, size, dtype=torch.float64) for size in self._size]
        # Map shape -> images, and their sum: a shared layer may meet maps of several sizes.
        self._maps: dict[torch.Size, tuple[int, Tensor]] = {}

    def add(self, features: Tensor) -> None:
        features = wide(features)
        features = features if self._unflatten is None else features.reshape(-1, *self._unflatten)
        self._channels.add(channels_last_rows(features))
        centred = features - self._per_channel(self._channels.origin)
        for axis in self._axes:
            self._products[axis] += self._along(centred, axis)
        count, total = self._maps.get(features.shape[1:], (0, 0.0))
        self._maps[features.shape[1:]] = count + len(features), total + centred.sum(0).double()

    def _per_channel(self, values: Tensor) -> Tensor:
        """values: (C,), to be combined with a map (C, ...)."""
        return values.reshape(-1, *[1] * len(self._size))

    def _along(self, features: Tensor, axis: int) -> Tensor:
        """Summed products of positions that a window sees together, ``features: (..., spatial)``: (size, size)."""
        features = features.movedim(axis - len(self._size), -1)
        size, step = self._size[axis], self._dilation[axis]
        if self._unflatten is not None:
            rows = features.reshape(-1, size)
            return _product(rows.T, rows).cpu()
        length = features.shape[-1]
        # Summed over fewer positions the larger the lag: a biased estimate of a stationary covariance, but one that is
        # positive semidefinite, and right about zero padding, which takes part in the windows at the border.
        lags = [
            _product(features[..., : length - lag * step].reshape(-1), features[..., lag * step :].reshape(-1))
            if lag * step < length
            else features.new_zeros((), dtype=torch.float64)
            for lag in range(size)
        ]
        distance = (torch.arange(size)[:, None] - torch.arange(size)).abs()
        return torch.stack(lags).cpu()[distance]

    def is_finite(self) -> bool:
        """Whether all that was added were numbers, those that no window reads included."""
        return bool(torch.isfinite(self._channels.square).all())

    def covariances(self, *, zero: bool) -> tuple[Tensor, Tensor, Tensor]:
        channels = self._channels.about(zero=zero)
        along = [_unit_mean_variance(self._recentred(axis)).to(channels.device) for axis in range(len(self._size))]
        one = torch.ones(1, 1, dtype=torch.float64, device=channels.device)
        rows, columns = (reduce(torch.kron, [along[axis] for axis in side], one) for side in SIDES[len(self._size)])
        return channels, rows, columns

    def _recentred(self, axis: int) -> Tensor:
        """The products about the mean over all images, where they were summed about the first batch's."""
        products = self._products[axis]
        if axis not in self._axes:
            return products
        shift = self._per_channel(self._channels.total / self._channels.count)
        for count, total in self._maps.values():
            mean = total / count
            products = products + count * (self._along(mean - shift, axis) - self._along(mean, axis))
        return products


def _unit_mean_variance(products: Tensor) -> Tensor:
    mean = products.diagonal().mean()
    return products / mean if mean > 0 else torch.eye(len(products), dtype=products.dtype)


def wide(tensor: Tensor) -> Tensor:
    """Detached, in float32 or wider: sums and eigenvectors in 16 bits are worth nothing."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def channels_last_rows(features: Tensor, axis: int = 1) -> Tensor:
    """(N, C, H, W) -> (N H W, C), or (N, ..., C) -> (N ..., C) with the channels' ``axis`` -1; (N, C) stays."""
    return features.movedim(axis, -1).flatten(0, -2)


def mean_and_variance(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of each column of ``(rows, channels)``; on a CPU ten times faster than `torch.var_mean`."""
    mean = rows.mean(0)
    return mean, (rows - mean).square_().mean(0)


def gather_moments(
    model: nn.Module,
    images: Batches,
    traces: Mapping[str, LayerTrace],
    *,
    kernels: Iterable[str],
    batch_size: int = 128,
) -> dict[str, LayerMoments]:
    """One pass of ``images: (N, C, H, W)``, or of batches (see `common.inputs`), through the model in eval mode.

    Args:
        traces: the layers to observe.
        kernels: those of them whose input's covariances are wanted.

    Returns:
        layer name -> moments. The model stays as it was.

    Raises:
        ValueError: if there are no images, or an activation is NaN or infinite (naming the layer).
    """
    kernels = set(kernels)
    inputs = {name: _WindowAccumulator(model.get_submodule(name), traces[name]) for name in traces if name in kernels}
    outputs = {name: Accumulator() for name in traces}

    def observe(name: str):
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if name in inputs:
                inputs[name].add(arguments[0])
            outputs[name].add(channels_last_rows(output, -1 if isinstance(module, nn.Linear) else 1))

        return hook

    seen = 0
    with hooked(model, {name: observe(name) for name in traces}):
        for batch in batches_of(images):
            for part in split(like_model(batch, model), batch_size) if length(batch) else ():
                run(model, part)
                seen += length(part)
    if not seen:
        raise ValueError("no calibration images were given")
    for name, accumulator in outputs.items():
        reads = inputs[name].is_finite() if name in inputs else True
        if not torch.isfinite(accumulator.square).all() or not reads:
            raise ValueError(f"layer {name}: the calibration pass met NaN or infinite activations")
    moments = {}
    for name, output in outputs.items():
        zero = model.get_submodule(name).bias is None and not traces[name].normed
        window = inputs[name].covariances(zero=zero) if name in inputs else None
        moments[name] = LayerMoments(window, output.mean, output.about(zero=zero))
    return moments
