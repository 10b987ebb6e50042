"""Give a truncated network back all that is linear: each layer's last stage fitted to what the dense layer puts out.

Truncation makes every layer err, and the layers behind it see inputs that the dense network never had. So the layers
are taken in the order in which they run, each fed by the network as compressed so far, and the last stage ``A`` of each
is refitted on calibration images by ridge regression (asymmetric reconstruction: Zhang et al. 2016, IEEE TPAMI 38(10),
section 3.2; here of the last stage of a chain):

    min over A, b of  sum over rows |y - A z - b|^2  +  ridge |A - A_0|^2

with y the dense layer's output, z what reaches the last stage, and A_0 the truncated factor, at which the ridge pulls.
A layer whose output enters a sum, as the last of a residual block does, is then fitted to what the *sum* should be: it
takes upon itself what the other branch has lost (He et al. 2017, arXiv:1707.06168, section 3.3).

Batch norms keep the dense network's statistics, moved by what those of their input have moved: the mean whole, since
nothing else gives it back, the variance by half (in the logarithm), since the fit has brought back part of what it is.
So at full ranks nothing changes: y is A_0 z + b already. No gradients, and one pass: a layer is fitted just before its
last stage runs. A layer that runs more than once is fitted on the rows of all its calls, which take a pass of their own
up to the last of them; so does a norm's change.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..inputs import run
from ..modules import Reached, hooked
from .flow import Flow
from .geometry import TRANSPOSED
from .layers import HTLayer
from .moments import wide
from .ridge import correction, design_rows
from .targets import NormInput, Sums, Targets, pooled, rows_at, statistics

_T = TypeVar("_T")

VARIANCE_EXPONENT = 0.5
"""How much of a change of a norm's input variance its running variance follows: 0 none, 1 all of it."""

LARGEST_CHANGE = 10.0
"""Of a running variance, either way: a channel that is nearly lost would only have its noise amplified."""

SILENT = 1e-3
"""A norm's channels of less than this share of its largest scale hand nothing on: no fit behind them is inverted."""


def reconstruct(model: nn.Module, targets: Targets) -> nn.Module:
    """Fit every factorised layer of a compressed network, in order of execution; changes ``model`` and returns it."""
    reconstructed_outputs(model, targets)
    return model


def reconstructed_outputs(model: nn.Module, targets: Targets) -> Any:
    """The same; returns what the fitted network puts out on the calibration images, which the pass gives for free."""
    fits = _Fits(model, targets)
    with hooked(model, fits.after, before=fits.before), fits.watch:
        return run(model, targets.images)


@dataclass
class _Fitted:
    """A layer's last stage as it was fitted, and what it takes to correct it once more behind its batch norm."""

    stage: nn.Module
    features: Tensor
    design: Tensor
    norm: _BatchNorm | None = None


class _Fits:
    """The hooks of one pass; all is fitted at a layer's or norm's first call."""

    def __init__(self, model: nn.Module, targets: Targets) -> None:
        self._model, self._targets, self._flow = model, targets, Flow()
        self._looking_ahead = False
        self._waiting: dict[str, _Fitted] = {}  # layers whose sum is still to come
        self.before: dict[str, Callable] = {}
        self.after: dict[str, Callable] = {}
        self._axes: dict[str, int] = {}
        modules = dict(model.named_modules())
        for name, layer in modules.items():
            if isinstance(layer, HTLayer) and name in targets.outputs:
                self._axes[name] = -1 if layer.geometry.linear else 1
                stage = f"{name}.stages.{len(layer.stages) - 1}"
                self.before[stage] = self._at_first(self._fit(name, stage))
                self.after[name] = self._ran(name)
        norms = [name for name in targets.norms if name in modules]
        self.before |= {name: self._at_first(self._follow(name, targets.norms[name])) for name in norms}
        self.after |= dict.fromkeys(norms, self._normalised)
        # Of a sum's two operands the dense pass has chosen the one to fit: no other counts here.
        self.watch = Sums(self._flow, dict.fromkeys(targets.sums, 1), before=self._sum)

    def _at_first(self, hook: Callable) -> Callable:
        """A hook that acts at the first call of its module only, and not while looking ahead."""
        ran: list[bool] = []

        def at_first(module: nn.Module, inputs: tuple) -> None:
            if not (ran or self._looking_ahead):
                ran.append(True)
                hook(module, inputs[0])

        return at_first

    def _all_calls(self, name: str, calls: int, features: Tensor, look: Callable[[Tensor, int], _T]) -> list[_T]:
        """What `look` sees in the features that a module reads, call by call, in the network as fitted so far.

        features: of the first call, which is at hand. For the others the network runs up to them.
        """
        if calls == 1:
            return [look(features, 0)]
        found: list[_T] = []

        def ahead(_module: nn.Module, inputs: tuple) -> None:
            found.append(look(inputs[0], len(found)))
            if len(found) == calls:
                raise Reached

        self._looking_ahead = True
        try:
            with hooked(self._model, {}, before={name: ahead}), suppress(Reached):
                run(self._model, self._targets.images)
        finally:
            self._looking_ahead = False
        return found

    def _fit(self, name: str, stage_name: str) -> Callable:
        outputs, positions = self._targets.outputs[name], self._targets.positions[name]

        def fit(stage: nn.Module, features: Tensor) -> None:
            if isinstance(stage, TRANSPOSED):
                return  # a window that spreads out meets other inputs at every place: left as truncated
            calls = self._all_calls(
                stage_name, len(positions), features, lambda read, call: design_rows(stage, read, positions[call])
            )
            design = calls[0] if len(calls) == 1 else torch.cat(calls)
            if not _finite(design) or len(design) != len(outputs):
                return  # whoever evaluates the network will see it; or it runs the layer less often than it did
            residual = outputs - _applied(stage, design)
            shift = _refit(stage, design, residual, centre=stage.bias is not None or name in self._targets.normed)
            if stage.bias is not None:
                stage.bias += shift.to(stage.bias)
            if name in self._targets.sums:
                self._waiting[name] = _Fitted(stage, features, design)

        return fit

    def _ran(self, name: str) -> Callable:
        def hook(_layer: HTLayer, _inputs: tuple, output: Tensor) -> None:
            self._flow.put(output, name)

        return hook

    def _follow(self, name: str, dense: NormInput) -> Callable:
        """A hook that lets a batch norm's running statistics follow those of its input."""

        def follow(norm: _BatchNorm, features: Tensor) -> None:
            calls = self._all_calls(name, dense.calls, features, lambda read, _call: statistics(read))
            mean, variance = pooled(calls)
            change = ((variance + norm.eps) / (dense.variance + norm.eps)).clamp_(1 / LARGEST_CHANGE, LARGEST_CHANGE)
            running = dense.running_variance * change.pow_(VARIANCE_EXPONENT)
            norm.running_var.copy_(running)
            # The mean that it hands on stays what it was, in units of the new deviation.
            ratio = running.add_(norm.eps).div_(dense.running_variance + norm.eps).sqrt_()
            norm.running_mean.copy_(mean - (dense.mean - dense.running_mean) * ratio)
            if (layer := self._flow.layer_of(features)) in self._waiting:
                self._waiting[layer].norm = norm

        return follow

    def _normalised(self, norm: _BatchNorm, inputs: tuple, output: Tensor) -> None:
        layer = self._flow.layer_of(inputs[0])
        if layer in self._waiting and self._waiting[layer].norm is norm:
            self._flow.put(output, layer)

    def _sum(self, name: str, own: Tensor, other: Tensor) -> None:
        """Fit a layer to what the sum should be, and let its output be what it is then."""
        fitted = None if self._looking_ahead else self._waiting.pop(name, None)
        if fitted is None:
            return
        axis, [positions] = self._axes[name], self._targets.positions[name]
        residual = self._targets.sums[name] - rows_at(other, axis, positions) - rows_at(own, axis, positions)
        if not _finite(residual):
            return
        stage, norm = fitted.stage, fitted.norm
        if norm is not None:
            scale = _scale(norm)
            residual = torch.where(scale.abs() > SILENT * scale.abs().max(), residual / scale, 0.0)
        shift = _refit(stage, fitted.design, residual, centre=stage.bias is not None or norm is not None)
        if stage.bias is not None:
            stage.bias += shift.to(stage.bias)
        elif norm is not None:
            norm.running_mean -= shift.to(norm.running_mean)
        again = stage(fitted.features)
        own.copy_(again if norm is None else norm(again))


def _finite(rows: Tensor) -> bool:
    """Whether rows can be fitted on. By their sum, which is twenty times faster than to ask each value."""
    return bool(torch.isfinite(rows.sum()))


def _scale(norm: _BatchNorm) -> Tensor:
    scale = torch.rsqrt(wide(norm.running_var) + norm.eps)
    return scale if norm.weight is None else scale * wide(norm.weight)


def _grouped(stage: nn.Module) -> tuple[Tensor, int]:
    """A stage's weight as ``(groups, C_out of one, n)``, and the number of groups."""
    groups = getattr(stage, "groups", 1)
    return wide(stage.weight).reshape(groups, stage.weight.shape[0] // groups, -1), groups


def _applied(stage: nn.Module, design: Tensor) -> Tensor:
    """What the stage makes of design rows ``(rows, C_out)``."""
    weight, groups = _grouped(stage)
    made = torch.cat([z @ own.T for own, z in zip(weight, design.chunk(groups, 1), strict=True)], dim=1)
    return made if stage.bias is None else made + wide(stage.bias)


def _refit(stage: nn.Module, design: Tensor, residual: Tensor, *, centre: bool) -> Tensor:
    """Correct a stage's weight so that its outputs change by the residual ``(rows, C_out)``, as far as they can.

    centre: means are left to a bias or a batch norm; returns what is to be added there ``(C_out,)``.
    """
    weight, groups = _grouped(stage)
    changes, shifts = [], []
    for z, wanted in zip(design.chunk(groups, 1), residual.chunk(groups, 1), strict=True):
        z_mean, mean = (z.mean(0), wanted.mean(0)) if centre else (torch.zeros_like(z[0]), torch.zeros_like(wanted[0]))
        changes.append(correction(z - z_mean, wanted - mean))
        shifts.append(mean - changes[-1] @ z_mean)
    stage.weight.copy_((weight + torch.stack(changes)).reshape(stage.weight.shape))
    return torch.cat(shifts)
