"""A factorised layer as a torch module: a chain of small convolutions (or two linear maps), in any execution plan.

A kernel ``W: (C_out, C_in, k_h, k_w)`` in hierarchical Tucker format with the tree ``((in, kh), (kw, out))`` is a chain

    stage "in"   1 x 1    C_in  -> r_in    leaf basis of the input channels
    stage "row"  k_h x 1  r_in  -> r_mid   transfer tensor of the node (in, kh); the leaf kh is full and merged into it
    stage "col"  1 x k_w  r_mid -> r_out   transfer tensor of the node (kw, out), with the root matrix
    stage "out"  1 x 1    r_out -> C_out   leaf basis of the output channels, and the bias

Two neighbouring stages contract into one without changing the function, which gives the equivalent *execution plans*.
A 1 x 1 convolution or a linear layer has one inner edge and the two stages "in" and "out". A linear layer behind a
flatten of C x H x W is a kernel of size H x W that fits its feature map exactly. Convolutions of one and of three
axes, transposed and grouped ones are chains of the same stages; `geometry` says what rows and columns are there. In a
grouped one every stage has the groups of the layer, and the ranks are those of each group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..configuration import MatrixRanks, Ranks
from .geometry import TRANSPOSED, Geometry, filled, swapped

STAGES = ("in", "row", "col", "out")

PLANS: dict[str, tuple[tuple[str, ...], ...]] = {
    "chain": (("in",), ("row",), ("col",), ("out",)),
    "input-chain": (("in",), ("row",), ("col", "out")),
    "output-chain": (("in", "row"), ("col",), ("out",)),
    "tucker": (("in",), ("row", "col"), ("out",)),
    "separable": (("in", "row"), ("col", "out")),
    "input-pair": (("in",), ("row", "col", "out")),
    "output-pair": (("in", "row", "col"), ("out",)),
    "dense": (STAGES,),
}
"""Execution plans of a kernel: name -> groups of neighbouring stages, each contracted into one convolution."""

MATRIX_PLANS: dict[str, tuple[tuple[str, ...], ...]] = {"pair": (("in",), ("out",)), "dense": (("in", "out"),)}
"""Execution plans of a matrix (1 x 1 convolution, linear layer)."""


class HTLayer(nn.Module):
    """A factorised convolution or linear layer.

    Args:
        weights: stage group -> its weight. Kernels: ``(o, i, h, w)``; matrices: ``(o, i)``. The groups are those of the
            plan, in order, e.g. ``{("in",): ..., ("row", "col"): ..., ("out",): ...}``.
        bias: ``(C_out,)`` or None.
        geometry: stride, padding, dilation of the layer that this one stands for.

    Attributes:
        stages: the modules that run, one per group.
        plan: the name of the execution plan.
        ranks: the sizes of the edges that are left between the groups, for display.
    """

    def __init__(self, weights: Mapping[tuple[str, ...], Tensor], bias: Tensor | None, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.groups = tuple(weights)
        self.plan = plan_name(self.groups)
        self.stages = nn.Sequential(
            *(
                self._stage(group, weight, bias if group is self.groups[-1] else None)
                for group, weight in weights.items()
            )
        )

    def _stage(self, group: tuple[str, ...], weight: Tensor, bias: Tensor | None) -> nn.Module:
        if weight.ndim == 4:
            return self.geometry.convolution(weight, bias, rows="row" in group, columns="col" in group)
        if not self.geometry.linear:
            # A 1 x 1 convolution: striding first is exact and cheapest, and spreading out last where it is transposed.
            strides = ("out" if self.geometry.transposed else "in") in group
            return self.geometry.convolution(weight[:, :, None, None], bias, rows=strides, columns=strides)
        layer = nn.utils.skip_init(
            nn.Linear, weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype
        )
        return filled(layer, weight, bias)

    def forward(self, input: Tensor) -> Tensor:
        """Same shapes, and the same name, as of the layer this one stands for: (N, C_in, H, W) or (N, features)."""
        if self.geometry.unflatten is None:
            return self.stages(input)
        return self.stages(input.reshape(-1, *self.geometry.unflatten)).flatten(1)

    @property
    def bias(self) -> nn.Parameter | None:
        return self.stages[-1].bias

    @property
    def weight(self) -> Tensor:
        """The one weight that all stages come to, in the shape that the dense layer's has: composed at every reading.

        Together with the sizes below it lets code that reads a layer from outside go on working.
        """
        groups = self.geometry.groups
        (whole,) = merge_stages(self._weights(), [sum(self.groups, ())], groups).values()
        if self.geometry.linear:
            return whole.flatten(1)
        whole = whole.reshape(*whole.shape[:2], *self.kernel_size)
        return swapped(whole, groups) if self.geometry.transposed else whole

    @property
    def in_channels(self) -> int:
        return self.stages[0].in_features if self._is_linear(self.stages[0]) else self.stages[0].in_channels

    @property
    def out_channels(self) -> int:
        return self.stages[-1].out_features if self._is_linear(self.stages[-1]) else self.stages[-1].out_channels

    @property
    def in_features(self) -> int:
        return self.in_channels * math.prod(self.kernel_size)

    @property
    def out_features(self) -> int:
        return self.out_channels

    @property
    def kernel_size(self) -> tuple[int, ...]:
        windows = [stage.kernel_size for stage in self.stages if not self._is_linear(stage)]
        return tuple(math.prod(sizes) for sizes in zip(*windows, strict=True)) or (1, 1)

    @property
    def stride(self) -> tuple[int, ...]:
        return self.geometry.stride

    @property
    def padding(self) -> tuple[int, ...] | str:
        return self.geometry.padding

    @property
    def output_padding(self) -> tuple[int, ...]:
        return self.geometry.output_padding or (0,) * self.geometry.axes

    @property
    def dilation(self) -> tuple[int, ...]:
        return self.geometry.dilation

    @property
    def padding_mode(self) -> str:
        return self.geometry.padding_mode

    @staticmethod
    def _is_linear(stage: nn.Module) -> bool:
        return isinstance(stage, nn.Linear)

    def _kernel_form(self, stage: nn.Module) -> Tensor:
        """A stage's weight: ``(o, i, h, w)`` of a kernel, ``(o, i)`` of a matrix; i is of one group."""
        if self._is_linear(stage):
            return stage.weight
        weight = self.geometry.kernel_form(stage.weight, transposed=isinstance(stage, TRANSPOSED))
        return weight.flatten(1) if "row" not in sum(self.groups, ()) else weight

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self._kernel_form(stage).shape[0] // self.geometry.groups for stage in self.stages[:-1])

    @property
    def plans(self) -> tuple[str, ...]:
        """The plans this layer can be switched to: those that only contract what is still apart."""
        return tuple(name for name, groups in _plans_of(self.groups).items() if _coarsens(groups, self.groups))

    def weights(self) -> dict[tuple[str, ...], Tensor]:
        """Stage group -> detached weight: ``(o, i, h, w)`` for a kernel, ``(o, i)`` for a matrix."""
        return {group: weight.detach() for group, weight in self._weights().items()}

    def _weights(self) -> dict[tuple[str, ...], Tensor]:
        return dict(zip(self.groups, map(self._kernel_form, self.stages), strict=True))

    def with_plan(self, plan: str) -> HTLayer:
        """The same function as a new layer in another execution plan; shares no tensor with this one.

        Raises:
            ValueError: if the plan is unknown, or needs stages apart that are contracted here.
        """
        if plan not in self.plans:
            raise ValueError(f"a layer in plan {self.plan!r} can be run as {', '.join(self.plans)}; got {plan!r}")
        bias = None if self.bias is None else self.bias.detach()
        weights = merge_stages(self.weights(), _plans_of(self.groups)[plan], self.geometry.groups)
        layer = HTLayer(weights, bias, self.geometry)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"plan={self.plan}, ranks={self.ranks}"


def plan_name(groups: Sequence[tuple[str, ...]]) -> str:
    """The name of the plan with these groups of stages."""
    for name, known in _plans_of(groups).items():
        if known == tuple(groups):
            return name
    raise ValueError(f"no execution plan has the stages {list(groups)}")


def _plans_of(groups: Sequence[tuple[str, ...]]) -> dict[str, tuple[tuple[str, ...], ...]]:
    return PLANS if "row" in sum(groups, ()) else MATRIX_PLANS


def _coarsens(coarse: Sequence[tuple[str, ...]], fine: Sequence[tuple[str, ...]]) -> bool:
    return all(any(set(group) <= set(whole) for whole in coarse) for group in fine)


def merge_stages(
    weights: Mapping[tuple[str, ...], Tensor], groups: Sequence[tuple[str, ...]], channel_groups: int = 1
) -> dict[tuple[str, ...], Tensor]:
    """Contract neighbouring stages until only ``groups`` are left; see :func:`compose`."""
    merged = {}
    for group in groups:
        parts = [weight for part, weight in weights.items() if set(part) <= set(group)]
        weight = parts[0]
        for following in parts[1:]:
            weight = compose(weight, following, channel_groups)
        merged[group] = weight
    return merged


def compose(first: Tensor, second: Tensor, channel_groups: int = 1) -> Tensor:
    """The one weight that does what ``first`` and then ``second`` do.

    Matrices ``(m, i)`` and ``(o, m)`` give ``(o, i)``. Kernels ``(m, i, h1, w1)`` and ``(o, m, h2, w2)`` give
    ``(o, i, h1 h2, w1 w2)``, where per axis at most one of the two is wider than one: their windows never overlap, so
    the composition is a sum over the middle channels alone. With groups of channels, each group's by itself.
    """
    if channel_groups > 1:
        pairs = zip(first.chunk(channel_groups), second.chunk(channel_groups), strict=True)
        return torch.cat([compose(one, other) for one, other in pairs])
    if first.ndim == 2:
        return second @ first
    kernel = torch.einsum("omab,micd->oiacbd", second, first)
    return kernel.flatten(4, 5).flatten(2, 3)


def chain_ranks(groups: Sequence[tuple[str, ...]], ranks: Ranks) -> list[int]:
    """The ranks of the edges that a plan leaves, in order: (r_in, r_mid, r_out) less the contracted ones."""
    if isinstance(ranks, MatrixRanks):
        return [ranks.rank] * (len(groups) - 1)
    edge = {("in", "row"): ranks.rank_in, ("row", "col"): ranks.rank_mid, ("col", "out"): ranks.rank_out}
    return [edge[left[-1], right[0]] for left, right in pairwise(groups)]
