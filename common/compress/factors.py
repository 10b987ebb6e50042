"""One layer's factors: made once by `common.decompose`, truncated to ranks ever after; costs and errors by formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral

import torch
from torch import Tensor

from ..configuration import KernelRanks, MatrixRanks, Ranks
from .dimension_tree import DimensionTree
from .geometry import Geometry
from .htucker import HTucker
from .layers import PLANS, HTLayer, chain_ranks, merge_stages
from .moments import product
from .trace import LayerTrace

KERNEL_TREE = DimensionTree(((1, 2), (3, 0)))
"""The dimension tree ((in, kh), (kw, out)) over the modes (out, in, kh, kw) of a kernel."""

KERNEL_MODES = ("out", "in", "kh", "kw")

DOUBLE_PRECISION_UP_TO = 1024
"""Gram matrices up to this size are decomposed in float64; larger ones (classifiers, mostly) in float32, which halves
their time and still leaves more digits than a truncation needs."""

CACHED_BASES = 16
"""How many middle bases a layer keeps; each is a square matrix of up to a few hundred rows."""


@dataclass(frozen=True, kw_only=True)
class LayerFactors:
    """What every factorised layer knows about itself.

    Attributes:
        name: dotted name in the model.
        shape: ``(C_out, C_in, k_h, k_w)`` of a kernel, rows and columns of its window whatever its axes (see
            `geometry`); ``(C_out, C_in)`` of a matrix. Of a grouped layer: of one group.
        bias: ``(C_out,)`` or None.
        geometry: stride, padding and so on of the dense layer.
        trace: its input and output shapes.
        dtype: floating type of the dense layer, and of the layers that are made; the factors are in float32 or wider.
        output_mean, output_std: mean and standard deviation of the dense layer's output per channel ``(C_out,)``, the
            targets of `recalibrate`; None without calibration images.
    """

    name: str
    shape: tuple[int, ...]
    bias: Tensor | None = field(repr=False)
    geometry: Geometry = field(repr=False)
    trace: LayerTrace = field(repr=False)
    dtype: torch.dtype = field(repr=False, default=torch.float32)
    output_mean: Tensor | None = field(repr=False, default=None)
    output_std: Tensor | None = field(repr=False, default=None)

    @property
    def dense_params(self) -> int:
        return self.geometry.groups * math.prod(self.shape) + self._bias_params

    @property
    def dense_flops(self) -> int:
        """Multiply-accumulates of the dense layer for one image."""
        return self.geometry.groups * math.prod(self.shape) * self._positions

    @property
    def is_matrix(self) -> bool:
        """Whether the layer has one inner edge, and one rank."""
        return isinstance(self.full_ranks, MatrixRanks)

    @property
    def _bias_params(self) -> int:
        return 0 if self.bias is None else len(self.bias)

    @property
    def _map_sizes(self) -> list[tuple[tuple[int, int], tuple[int, int], int]]:
        """(rows, columns) of the input, of the output, and how many such maps an image comes to, for each call."""
        calls, sides = self.trace.calls, self.geometry.sides_of
        if self.geometry.unflatten is not None:
            return [(self.geometry.unflatten[1:], (1, 1), call.rows) for call in calls]
        if self.geometry.linear:
            return [((1, 1), (1, 1), call.rows) for call in calls]
        return [(sides(call.input_shape[1:]), sides(call.output_shape[1:]), call.rows) for call in calls]

    @property
    def _positions(self) -> int:
        """Where the whole window is applied in one pass: at each output, or at each input of a transposed layer."""
        return sum(
            rows * math.prod(before if self.geometry.transposed else after) for before, after, rows in self._map_sizes
        )

    def layer(self, ranks: Ranks) -> HTLayer:
        """The layer truncated to these ranks, as a new module that shares no tensor with anything.

        Raises:
            ValueError: if a rank is out of range.
        """
        weights = {group: weight.to(self.dtype) for group, weight in self.truncated(ranks).items()}
        return HTLayer(weights, self.bias, self.geometry)

    def _check_rank(self, what: str, value: object, limit: int) -> None:
        if not (isinstance(value, Integral) and 1 <= value <= limit):
            self._refuse(what, value, f"an integer in 1..{limit}")

    def _refuse(self, what: str, value: object, legal: object) -> None:
        raise ValueError(f"layer {self.name}: {what} must be {legal}; got {value!r}")


@dataclass(frozen=True, kw_only=True)
class KernelFactors(LayerFactors):
    """A k_h x k_w convolution, or a linear layer behind a flatten of C x H x W (k_h = H, k_w = W).

    Attributes:
        core: ``(C_in, k_h, k_w, full rank_out)``: the whitened kernel in its leaf bases, in falling order of energy.
        reduce: ``(C_in, C_in)``, whose leading rows are the stage "in": ``U_in^T C^(-1/2)``.
        unwhiten_row, unwhiten_col: ``(k_h, k_h)`` and ``(k_w, k_w)``, ``K^(-1/2)`` of the window's rows and
            columns, whose leaves are full and merged into the stages "row" and "col".
        expand: ``(C_out, full rank_out)``, whose leading columns are the stage "out": ``U_out``, less the gain that the
            core has in each direction.
    """

    core: Tensor = field(repr=False)
    reduce: Tensor = field(repr=False)
    unwhiten_row: Tensor = field(repr=False)
    unwhiten_col: Tensor = field(repr=False)
    expand: Tensor = field(repr=False)
    _cache: dict = field(default_factory=dict, repr=False, compare=False)
    _plans: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def _dtype(self) -> torch.dtype:
        return self.core.dtype

    @property
    def full_ranks(self) -> KernelRanks:
        """The ranks at which the layer is reproduced to rounding."""
        _, c_in, k_h, k_w = self.shape
        full_out = self.expand.shape[1]
        return KernelRanks(c_in, min(c_in * k_h, k_w * full_out), full_out)

    def check(self, ranks: Ranks) -> None:
        """Raise ValueError unless the leaf ranks are in 1..full and 1 <= rank_mid <= min(rank_in k_h, k_w rank_out)."""
        if not isinstance(ranks, KernelRanks):
            self._refuse("ranks", ranks, "KernelRanks(rank_in, rank_mid, rank_out)")
        full, (_, _, k_h, k_w) = self.full_ranks, self.shape
        self._check_rank("rank_in", ranks.rank_in, full.rank_in)
        self._check_rank("rank_out", ranks.rank_out, full.rank_out)
        limit = min(ranks.rank_in * k_h, k_w * ranks.rank_out)
        self._check_rank(f"rank_mid at rank_in {ranks.rank_in} and rank_out {ranks.rank_out}", ranks.rank_mid, limit)

    def truncated(
        self, ranks: KernelRanks, groups: Sequence[tuple[str, ...]] | None = None
    ) -> dict[tuple[str, ...], Tensor]:
        """Stage group -> weight ``(o, i, h, w)``, of the plan of fewest FLOPs at these ranks, or of the given one."""
        return merge_stages(self._chain(ranks), groups or self.groups(ranks))

    def as_htucker(self, ranks: KernelRanks) -> HTucker:
        """The truncated kernel ``(C_out, C_in, k_h, k_w)`` as the hierarchical Tucker tensor that its stages are.

        The leaves of the window are whole (identities), the stages "in" and "out" are leaf bases, "row" and "col" the
        transfer tensors of the two inner nodes; the root's is an identity. Its dense form is the kernel that the layer
        convolves with.

        Raises:
            ValueError: if a rank is out of range.
        """
        stages = [weight.clone() for weight in self._chain(ranks).values()]
        reduce, row, col, expand = stages
        _, _, k_h, k_w = self.shape
        return HTucker(
            KERNEL_TREE,
            bases={
                0: expand.flatten(1),  # (C_out, r_out)
                1: reduce.flatten(1).T,  # (C_in, r_in)
                2: torch.eye(k_h).to(row),
                3: torch.eye(k_w).to(row),
            },
            transfers={
                (1, 2, 3, 0): torch.eye(ranks.rank_mid).to(row)[..., None],  # (r_mid, r_mid, 1)
                (1, 2): row.squeeze(3).permute(1, 2, 0),  # (r_in, k_h, r_mid)
                (3, 0): col.squeeze(2).permute(2, 0, 1),  # (k_w, r_out, r_mid)
            },
            names=KERNEL_MODES,
        )

    def _chain(self, ranks: KernelRanks) -> dict[tuple[str, ...], Tensor]:
        """The four stages of the truncated kernel, none of them merged."""
        self.check(ranks)
        _, _, k_h, k_w = self.shape
        core = self.core[: ranks.rank_in, :, :, : ranks.rank_out].reshape(ranks.rank_in * k_h, -1)
        left, right = self._split(core, ranks)
        row = left.T.reshape(ranks.rank_mid, ranks.rank_in, k_h) @ self.unwhiten_row
        col = right.reshape(ranks.rank_mid, k_w, ranks.rank_out)
        col = torch.einsum("mwo,wv->mov", col, self.unwhiten_col)
        # The root matrix goes half into each side, so that both are of one size when they are trained on.
        scale = (col.flatten(1).norm(dim=1) / row.flatten(1).norm(dim=1)).sqrt()
        scale = torch.where((scale > 1e-6) & (scale < 1e6), scale, torch.ones_like(scale))
        row = row * scale[:, None, None]
        col = (col / scale[:, None, None]).movedim(0, 1)
        return {
            ("in",): self.reduce[: ranks.rank_in, :, None, None],
            ("row",): row[..., None],
            ("col",): col[:, :, None],
            ("out",): self.expand[:, : ranks.rank_out, None, None],
        }

    def _split(self, core: Tensor, ranks: KernelRanks) -> tuple[Tensor, Tensor]:
        """The best ``(rank_in k_h, rank_mid)`` and ``(rank_mid, k_w rank_out)`` whose product stands for the core."""
        if ranks.rank_mid == min(core.shape):
            # Nothing is cut, so the core itself is one of the two: no decomposition, and no digit lost in one.
            whole = torch.eye(ranks.rank_mid).to(core)
            return (whole, core) if len(core) == ranks.rank_mid else (core, whole)
        basis, side = self._middle(ranks.rank_in, ranks.rank_out)
        basis = basis[:, : ranks.rank_mid]
        return (basis, basis.T @ core) if side == "left" else (core @ basis, basis.T)

    def groups(self, ranks: KernelRanks) -> tuple[tuple[str, ...], ...]:
        """The stages that stay apart: of all contractions, which compute the same, the one of fewest FLOPs.

        An edge that is not cut, or hardly, costs more than the two stages beside it in one: Tucker-2, two factors and
        a separable pair are trees with such edges.
        """
        if ranks not in self._plans:
            self._plans[ranks] = min(PLANS.values(), key=lambda groups: self._costs(ranks, groups))
        return self._plans[ranks]

    def _costs(self, ranks: KernelRanks, groups: Sequence[tuple[str, ...]]) -> tuple[int, int, int]:
        return self.flops(ranks, groups), sum(self._group_sizes(ranks, groups)), len(groups)

    def params(self, ranks: KernelRanks) -> int:
        """Parameters of the truncated layer, bias included."""
        return sum(self._group_sizes(ranks, self.groups(ranks))) + self._bias_params

    def flops(self, ranks: KernelRanks, groups: Sequence[tuple[str, ...]] | None = None) -> int:
        """Multiply-accumulates of the truncated layer for one image, in its cheapest plan or in the given one."""
        groups = groups or self.groups(ranks)
        sizes = self._group_sizes(ranks, groups)
        total = 0
        for (height, width), (height_out, width_out), rows in self._map_sizes:
            for group, size in zip(groups, sizes, strict=True):
                before = height * width
                height = height_out if "row" in group else height
                width = width_out if "col" in group else width
                total += rows * size * (before if self.geometry.transposed else height * width)
        return total

    def _group_sizes(self, ranks: KernelRanks, groups: Sequence[tuple[str, ...]]) -> list[int]:
        c_out, c_in, k_h, k_w = self.shape
        edges = [c_in, *chain_ranks(groups, ranks), c_out]
        windows = [(k_h if "row" in group else 1) * (k_w if "col" in group else 1) for group in groups]
        return [a * b * window for a, b, window in zip(edges[:-1], edges[1:], windows, strict=True)]

    def output_error(self, ranks: KernelRanks) -> float:
        """Relative squared error of the output that these ranks cause: discarded over total energy, in 0..1."""
        self.check(ranks)
        return float(self.output_errors(ranks.rank_in, ranks.rank_out)[ranks.rank_mid - 1])

    def output_errors(self, rank_in: int, rank_out: int) -> Tensor:
        """Relative squared errors for rank_mid = 1, 2, ..., its limit, at these leaf ranks."""
        return _lost_shares(self._middle_energies(rank_in, rank_out), self.energy)

    @cached_property
    def energy(self) -> float:
        """Squared norm of the whitened kernel: the output's energy, up to correlations between positions."""
        return float(_energies(self.core, (0, 1, 2, 3)))

    def edge_energies(self, edge: str) -> Tensor:
        """Squared singular values, falling, of the edge "in", "mid" or "out" of the whole whitened kernel."""
        if edge == "mid":
            full = self.full_ranks
            return self._middle_energies(full.rank_in, full.rank_out)
        others = (1, 2, 3) if edge == "in" else (0, 1, 2)
        return _energies(self.core, others).sort(descending=True).values

    def _middle_energies(self, rank_in: int, rank_out: int) -> Tensor:
        """Squared singular values of the middle edge at these leaf ranks, falling. Cached: menus ask repeatedly."""
        key = ("energies", rank_in, rank_out)
        if key not in self._cache:
            gram, _ = self._middle_gram(rank_in, rank_out)
            gram = gram.double() if len(gram) <= DOUBLE_PRECISION_UP_TO else gram
            self._cache[key] = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
        return self._cache[key]

    def _middle(self, rank_in: int, rank_out: int) -> tuple[Tensor, str]:
        """Singular basis of the middle edge at these leaf ranks, on its smaller side, which is named.

        The last few are cached: candidates share most of their leaf ranks, so a search pays for each pair once.
        """
        key = ("basis", rank_in, rank_out)
        if key not in self._cache:
            kept = [known for known in self._cache if known[0] == "basis"]
            if len(kept) >= CACHED_BASES:
                del self._cache[kept[0]]
            gram, side = self._middle_gram(rank_in, rank_out)
            self._cache[key] = falling_eigenbasis(gram)[1].to(self._dtype), side
        return self._cache[key]

    def _middle_gram(self, rank_in: int, rank_out: int) -> tuple[Tensor, str]:
        matrix = self.core[:rank_in, :, :, :rank_out].reshape(rank_in * self.shape[2], -1)
        side = "left" if matrix.shape[0] <= matrix.shape[1] else "right"
        return (gram_matrix(matrix) if side == "left" else gram_matrix(matrix.T)), side


@dataclass(frozen=True, kw_only=True)
class MatrixFactors(LayerFactors):
    """A 1 x 1 convolution or a linear layer: one inner edge.

    Projecting the output on the leading eigenvectors of its covariance is the best approximation of any given rank
    in the mean square of the output (Eckart and Young in the metric of the inputs), so no whitening is needed.

    Attributes:
        reduce: ``(full rank, C_in)``: ``U^T W``, whose leading rows are the stage "in".
        expand: ``(C_out, full rank)``: ``U``, whose leading columns are the stage "out".
        energies: ``(full rank,)`` output variance along each column of U, in falling order.
    """

    reduce: Tensor = field(repr=False)
    expand: Tensor = field(repr=False)
    energies: Tensor = field(repr=False)

    @property
    def _dtype(self) -> torch.dtype:
        return self.reduce.dtype

    @property
    def full_ranks(self) -> MatrixRanks:
        return MatrixRanks(self.reduce.shape[0])

    def check(self, ranks: Ranks) -> None:
        """Raise ValueError unless 1 <= rank <= min(C_out, C_in)."""
        if not isinstance(ranks, MatrixRanks):
            self._refuse("ranks", ranks, "MatrixRanks(rank)")
        self._check_rank("rank", ranks.rank, self.full_ranks.rank)

    def truncated(self, ranks: MatrixRanks) -> dict[tuple[str, ...], Tensor]:
        """Stage -> weight ``(o, i)``, scaled so that both are of one size when they are trained on."""
        self.check(ranks)
        reduce, expand = self.reduce[: ranks.rank], self.expand[:, : ranks.rank]
        scale = (expand.norm() / reduce.norm().clamp_min(1e-12)).sqrt()
        return {("in",): reduce * scale, ("out",): expand / scale}

    def params(self, ranks: MatrixRanks) -> int:
        """Parameters of the truncated layer, bias included."""
        return ranks.rank * sum(self.shape) + self._bias_params

    def flops(self, ranks: MatrixRanks) -> int:
        """Multiply-accumulates of the truncated layer for one image (a stride acts in the first stage)."""
        return ranks.rank * sum(self.shape) * self._positions

    def output_error(self, ranks: MatrixRanks) -> float:
        """Relative squared error of the output that this rank causes: discarded over total variance, in 0..1."""
        self.check(ranks)
        return float(self.output_errors()[ranks.rank - 1])

    def output_errors(self) -> Tensor:
        """Relative squared errors for rank = 1, 2, ..., full."""
        return _lost_shares(self.energies, self.energy)

    @property
    def energy(self) -> float:
        """Variance of the output, summed over the channels."""
        return float(self.energies.sum())

    def edge_energies(self, edge: str = "mid") -> Tensor:
        """Squared singular values of the one edge, in falling order."""
        return self.energies


def falling_eigenbasis(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (falling) and eigenvectors (columns) of ``gram: (n, n)``, in float64 unless n is large."""
    if len(gram) <= DOUBLE_PRECISION_UP_TO:
        gram = gram.double()
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0), vectors.flip(1)


def gram_matrix(matrix: Tensor) -> Tensor:
    """``M M^T``, in float64 where float32 cannot hold it."""
    return product(matrix, matrix.T)


def _energies(core: Tensor, over: tuple[int, ...]) -> Tensor:
    """Squared norms over these axes, in float64."""
    return torch.linalg.vector_norm(core, dim=over, dtype=torch.float64).square()


def _lost_shares(energies: Tensor, total: float) -> Tensor:
    """Share of ``total`` that is lost when only the first 1, 2, ... ``energies`` are kept; 0 of a layer of zeros."""
    if total == 0:
        return torch.zeros_like(energies)
    return (1 - energies.cumsum(0) / total).clamp(0, 1)
