"""Give a truncated network back all that is linear: each layer's last stage fitted to what the dense layer puts out.

Truncation makes every layer err, and the layers behind it see inputs that the dense network never had. So the layers
are taken in the order in which they run, each fed by the network as compressed so far, and the last stage ``A`` of each
is refitted on calibration images by ridge regression (asymmetric reconstruction: Zhang et al. 2016, IEEE TPAMI 38(10),
section 3.2; here of the last stage of a chain):

    min over A, b of  sum over rows |y - A z - b|^2  +  ridge |A - A_0|^2

with y the dense layer's output, z what reaches the last stage, and A_0 the truncated factor, at which the ridge pulls.
Batch norms keep the dense network's statistics; only their means move by what the mean of their input has moved. So at
full ranks nothing changes: y is A_0 z + b already. No gradients, and one pass: a layer is fitted just before its last
stage runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..inputs import Inputs, first, length, run
from ..modules import hooked
from .geometry import TRANSPOSED
from .layers import HTLayer
from .model_factors import ModelFactors
from .moments import channels_last_rows

ROWS = 8192
"""Rows (images times positions) that a layer is fitted on, at least one position of each image: more change nothing."""

RIDGE = 1e-2
"""Share of the mean variance of what reaches the stage by which its fit is pulled towards the truncated factor."""

FEW = 0.05
"""Unknowns per row up to which a fit cannot be much better on its own rows than on others."""

MOST_VALUES = 2**28
"""Of the largest feature map over all images, which go through the network at once: a gigabyte in float32."""


@dataclass(frozen=True)
class Targets:
    """What the dense network puts out on the calibration images, where a fit looks at it.

    Attributes:
        images: the calibration images, or as many of the first as fit into memory at once.
        positions: layer -> the places of its output map, or the tokens, that are looked at: the same in every image.
        outputs: layer -> the dense layer's outputs there ``(images positions, C_out)``.
        offsets: batch norm -> its running mean less the mean of its input on these images ``(C,)``.
        normed: the layers whose output a batch norm reads: means are its affair.
    """

    images: Inputs
    positions: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    offsets: Mapping[str, Tensor]
    normed: frozenset[str]

    @classmethod
    def of(cls, factors: ModelFactors, images: Inputs) -> Targets:
        """One pass of the dense network over ``images: (N, C, H, W)``, or several inputs (see `common.inputs`)."""
        largest = max(
            math.prod(call.output_shape) * call.rows for f in factors.layers.values() for call in f.trace.calls
        )
        images = first(images, max(1, MOST_VALUES // largest))
        found = _DenseOutputs(length(images))
        norms = {name: found.norm(name) for name in _norms(factors.model)}
        with hooked(factors.model, {name: found.layer(name) for name in factors.layers}, before=norms):
            run(factors.model, images)
        return cls(images, found.positions, found.outputs, found.offsets, frozenset(found.normed))


class _DenseOutputs:
    """Hooks that gather what `Targets` holds; of a shared layer, the first call."""

    def __init__(self, images: int) -> None:
        self._per_image = -(-ROWS // images)
        self._generator = torch.Generator().manual_seed(0)
        self._producers: dict[int, tuple[Tensor, str]] = {}  # an output is kept alive, lest its id be another's
        self.positions: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.offsets: dict[str, Tensor] = {}
        self.normed: set[str] = set()

    def layer(self, name: str) -> Callable:
        def hook(module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            if name in self.outputs:
                return
            rows = _by_image(output, -1 if isinstance(module, nn.Linear) else 1)
            every = torch.randperm(rows.shape[1], generator=self._generator)
            self.positions[name] = every[: self._per_image].sort().values.to(rows.device)
            self.outputs[name] = _wide(rows[:, self.positions[name]].flatten(0, 1))
            self._producers[id(output)] = (output, name)

        return hook

    def norm(self, name: str) -> Callable:
        def hook(norm: _BatchNorm, inputs: tuple) -> None:
            self.offsets.setdefault(name, norm.running_mean - channels_last_rows(_wide(inputs[0])).mean(0))
            if id(inputs[0]) in self._producers:
                self.normed.add(self._producers.pop(id(inputs[0]))[1])

        return hook


def reconstruct(model: nn.Module, targets: Targets) -> nn.Module:
    """Fit every factorised layer of a compressed network, in order of execution; changes ``model`` and returns it."""
    reconstructed_outputs(model, targets)
    return model


def reconstructed_outputs(model: nn.Module, targets: Targets) -> Any:
    """The same; returns what the fitted network puts out on the calibration images, which the pass gives for free."""
    stages = {}
    for name, module in model.named_modules():
        if isinstance(module, HTLayer) and name in targets.outputs:
            place = f"{name}.stages.{len(module.stages) - 1}"
            stages[place] = _once(
                _fitting(module, targets.positions[name], targets.outputs[name], name in targets.normed)
            )
    norms = {name: _once(_shifting(targets.offsets[name])) for name in _norms(model) if name in targets.offsets}
    with hooked(model, {}, before=stages | norms):
        return run(model, targets.images)


def _norms(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def _once(hook: Callable) -> Callable:
    """A hook that acts at the first call of its module only: a shared layer is fitted once."""
    ran: list[bool] = []

    def at_first(module: nn.Module, inputs: tuple) -> None:
        if not ran:
            ran.append(True)
            hook(module, inputs[0])

    return at_first


def _shifting(offset: Tensor) -> Callable:
    """A hook that moves a batch norm's running mean by what the mean of its input has moved from the dense one's."""

    def shift(norm: _BatchNorm, features: Tensor) -> None:
        norm.running_mean.copy_(channels_last_rows(_wide(features)).mean(0) + offset)

    return shift


def _fitting(layer: HTLayer, positions: Tensor, outputs: Tensor, normed: bool) -> Callable:
    """A hook that fits the layer's last stage, given what is about to enter it."""

    def fit(stage: nn.Module, features: Tensor) -> None:
        if isinstance(stage, TRANSPOSED):
            return  # a window that spreads out meets other inputs at every place: left as truncated
        design = _rows_of(stage, features, positions)
        if not torch.isfinite(design).all():
            return  # whoever evaluates the network will see it
        groups, with_mean = getattr(stage, "groups", 1), stage.bias is not None
        # Means are given back by a bias or by the batch norm behind; a layer with neither has to fit them as well.
        centre = with_mean or normed
        shape = (groups, stage.weight.shape[0] // groups, -1)
        weight = _wide(stage.weight).reshape(shape)
        fitted, bias = [], []
        for own, z, y in zip(weight, design.chunk(groups, 1), outputs.chunk(groups, 1), strict=True):
            z_mean, y_mean = (z.mean(0), y.mean(0)) if centre else (z.new_zeros(z.shape[1]), y.new_zeros(y.shape[1]))
            own = own + _correction(z - z_mean, (y - y_mean) - (z - z_mean) @ own.T)
            fitted.append(own)
            bias.append(y_mean - own @ z_mean)
        stage.weight.copy_(torch.stack(fitted).reshape(stage.weight.shape))
        if with_mean:
            stage.bias.copy_(torch.cat(bias))

    return fit


def _correction(z: Tensor, residual: Tensor) -> Tensor:
    """``D: (C_out, n)`` that minimises ``|residual - z D^T|^2 + ridge |D|^2``; ``(rows, C_out)`` and ``(rows, n)``.

    Where the rows are few, it is shrunk by what it is worth on rows that it was not fitted on (leaving each out once,
    Allen 1974: the residual there is the one at hand over 1 - h, h the row's leverage).
    """
    rows, n = z.shape
    variance = float(z.square().mean())
    if variance == 0:
        return torch.zeros(residual.shape[1], n).to(z)
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


def _by_image(features: Tensor, axis: int) -> Tensor:
    """Feature maps or tokens as ``(N, positions, channels)``, the channels being along ``axis`` 1 or -1."""
    if features.ndim == 2:
        return features[:, None]
    return features.movedim(axis, -1).flatten(1, -2)


def _rows_of(stage: nn.Module, features: Tensor, positions: Tensor) -> Tensor:
    """What the stage multiplies its weight with at these places of its output map: ``(images positions, n)``."""
    if isinstance(stage, nn.Linear):
        return _wide(_by_image(features, -1)[:, positions].flatten(0, 1))
    sizes = [
        (size + left + right - dilation * (window - 1) - 1) // stride + 1
        for size, (left, right), dilation, window, stride in zip(
            features.shape[2:], _paddings(stage), stage.dilation, stage.kernel_size, stage.stride, strict=True
        )
    ]
    features = _padded(stage, features)
    places = torch.unravel_index(positions, sizes)
    taps = [
        features[(slice(None), slice(None), *_tap(stage, places, offset))]
        for offset in product(*map(range, stage.kernel_size))
    ]
    patches = torch.stack(taps, dim=2)  # (N, C, window, positions)
    return _wide(patches.permute(0, 3, 1, 2).flatten(2).flatten(0, 1))


def _tap(stage: nn.Module, places: tuple[Tensor, ...], offset: tuple[int, ...]) -> Iterator[Tensor]:
    return (
        place * stride + step * dilation
        for place, stride, step, dilation in zip(places, stage.stride, offset, stage.dilation, strict=True)
    )


def _paddings(stage: nn.Module) -> list[tuple[int, int]]:
    """(before, after) along each axis."""
    both = stage._reversed_padding_repeated_twice
    return list(zip(both[0::2], both[1::2], strict=True))[::-1]


def _padded(stage: nn.Module, features: Tensor) -> Tensor:
    both = stage._reversed_padding_repeated_twice
    if not any(both):
        return features
    mode = "constant" if stage.padding_mode == "zeros" else stage.padding_mode
    return F.pad(features, both, mode=mode)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
