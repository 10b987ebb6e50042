"""Ridge regression of a stage's weight: what it multiplies with at given places, and the correction that fits best."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .geometry import paddings
from .moments import wide

RIDGE = 1e-2
"""Share of the mean variance of what reaches the stage by which its fit is pulled towards the truncated factor."""

FEW = 0.05
"""Unknowns per row up to which a fit cannot be much better on its own rows than on others."""

LARGEST = 1e24
"""Mean square of rows above which their products may not fit into float32."""


def correction(z: Tensor, residual: Tensor) -> Tensor:
    """``D: (C_out, n)`` that minimises ``|residual - z D^T|^2 + ridge |D|^2``; ``(rows, C_out)`` and ``(rows, n)``.

    Where the rows are few, it is shrunk by what it is worth on rows that it was not fitted on (leaving each out once,
    Allen 1974: the residual there is the one at hand over 1 - h, h the row's leverage).
    """
    rows, n = z.shape
    variance, energy = (float(one.square().mean()) for one in (z, residual))
    if variance == 0 or energy == 0:
        return torch.zeros(residual.shape[1], n).to(z)
    if max(variance, energy) > LARGEST:
        size, wanted = (float(one.abs().max()) for one in (z, residual))
        return correction(z / size, residual / wanted) * (wanted / size)
    # Of the two normal equations the smaller one; sums in float32, solved in float64.
    gram = (z.T @ z if n <= rows else z @ z.T).double()
    gram.diagonal().add_(RIDGE * variance * rows)
    factor = torch.linalg.cholesky(gram)
    if n <= rows:
        found = torch.cholesky_solve((z.T @ residual).double(), factor).T.to(z)
    else:
        found = (z.T @ torch.cholesky_solve(residual.double(), factor).to(z)).T
    if n <= FEW * rows:
        return found
    if n <= rows:
        leverage = torch.linalg.solve_triangular(factor, z.T.double(), upper=False).square().sum(0)
    else:  # the diagonal of K (K + ridge)^-1, K = z z^T
        leverage = 1 - RIDGE * variance * rows * torch.cholesky_inverse(factor).diagonal()
    fitted = z @ found.T
    unseen = residual - (residual - fitted) / (1 - leverage).clamp_min(1e-3).to(z)[:, None]
    worth = (residual * unseen).sum() / unseen.square().sum().clamp_min(1e-30)
    return found * worth.clamp(0, 1)


def by_image(features: Tensor, axis: int) -> Tensor:
    """Feature maps or tokens as ``(N, positions, channels)``, the channels being along ``axis`` 1 or -1."""
    if features.ndim == 2:
        return features[:, None]
    return features.movedim(axis, -1).flatten(1, -2)


def at_places(features: Tensor, axis: int, positions: Tensor) -> Tensor:
    """Features of each image at places of its own ``(N, P)``: ``(N, P, C)``, the channels being along ``axis``."""
    if features.ndim == 2:
        return features[:, None]
    images = _numbers(features)
    if axis == -1:
        return features.flatten(1, -2)[images, positions]
    return features[(images, slice(None), *torch.unravel_index(positions, features.shape[2:]))]


def _numbers(features: Tensor) -> Tensor:
    """``(N, 1)``: with places of each image it picks from that image."""
    return torch.arange(len(features), device=features.device)[:, None]


def design_rows(stage: nn.Module, features: Tensor, positions: Tensor) -> Tensor:
    """What the stage multiplies its weight with at these places ``(N, P)`` of its output map: ``(N P, n)``."""
    if isinstance(stage, nn.Linear):
        return wide(at_places(features, -1, positions).flatten(0, 1))
    sizes = [
        (size + left + right - dilation * (window - 1) - 1) // stride + 1
        for size, (left, right), dilation, window, stride in zip(
            features.shape[2:], paddings(stage), stage.dilation, stage.kernel_size, stage.stride, strict=True
        )
    ]
    features = _padded(stage, features)
    images, places = _numbers(features), torch.unravel_index(positions, sizes)
    taps = [
        features[(images, slice(None), *_tap(stage, places, offset))]  # (N, P, C)
        for offset in product(*map(range, stage.kernel_size))
    ]
    return wide(torch.stack(taps, dim=-1).flatten(2).flatten(0, 1))


def _tap(stage: nn.Module, places: tuple[Tensor, ...], offset: tuple[int, ...]) -> Iterator[Tensor]:
    return (
        place * stride + step * dilation
        for place, stride, step, dilation in zip(places, stage.stride, offset, stage.dilation, strict=True)
    )


def _padded(stage: nn.Module, features: Tensor) -> Tensor:
    both = stage._reversed_padding_repeated_twice
    if not any(both):
        return features
    mode = "constant" if stage.padding_mode == "zeros" else stage.padding_mode
    return F.pad(features, both, mode=mode)
