"""Which ranks: a menu of good choices per layer, and the classic rules that give every layer its ranks at once.

A menu is the Pareto front of cost against output error over a grid of ranks, computed from the factors alone, without
a single pass of the network. The classic rules (uniform, singular-value energy, VBMF) are what the policy has to beat;
each has one knob, which `meet_budget` turns until the network's FLOPs fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..compress import Factors, ModelFactors
from ..configuration import KernelRanks, MatrixRanks, Ranks

RANK_MULTIPLE = 8
"""Ranks of wide modes are multiples of this: vector units and tensor cores like them."""

NARROW = (1, 2, 4)
"""Ranks of wide modes below RANK_MULTIPLE, for menus that go down to where accuracy breaks: fewer parameters and FLOPs,
hardly less time."""

WIDE_FROM = 64
"""A mode of at least this many channels is wide."""

GRID_RATIO = 1.3
"""Neighbouring ranks of the grid differ by about this factor, so that a menu is as fine at 16 as it is at 256."""

BALANCE = 30.0
"""Pairs of leaf ranks that discard energies more unequal than this are left out: the smaller leaf is then wasted."""


@dataclass(frozen=True)
class MenuEntry:
    """One choice for a layer: its ranks (None: dense), its cost alone, and what it does to the layer's output.

    `error` is the relative squared error of the layer's output, 0 for dense. `seconds` is the layer's measured time per
    batch in its fastest execution plan, None unless `common.ranks.timed_menus` measured it.
    """

    ranks: Ranks | None
    params: int
    flops: int
    error: float
    seconds: float | None = None


@dataclass(frozen=True)
class CostMeasure:
    """What counts as cost: a weighted mix of shares of the dense network's FLOPs and parameters, or its latency.

    `CostMeasure(flops=1)` counts FLOPs, `CostMeasure(flops=0, params=1)` parameters. The weights must not be negative
    nor both zero. With `dense_seconds`, the dense network's time per batch, measured seconds count and nothing else.
    """

    flops: float = 1.0
    params: float = 0.0
    dense_seconds: float | None = None

    def __post_init__(self) -> None:
        if min(self.flops, self.params) < 0 or self.flops + self.params <= 0:
            raise ValueError(f"the weights of a cost must not be negative, nor both 0; got {self}")
        if self.dense_seconds is not None and not self.dense_seconds > 0:
            raise ValueError(f"dense_seconds must be positive; got {self.dense_seconds}")

    def share(self, flops: float, params: float, factors: ModelFactors) -> float:
        """Share of the dense network's FLOPs and parameters: 1 for the whole dense network."""
        mixed = self.flops * flops / factors.dense_flops + self.params * params / factors.dense_params
        return mixed / (self.flops + self.params)

    def of_entry(self, entry: MenuEntry, factors: ModelFactors) -> float:
        """Share of the dense network's cost that this entry keeps.

        Raises:
            ValueError: latency is the cost, and the entry's was not measured.
        """
        if self.dense_seconds is None:
            return self.share(entry.flops, entry.params, factors)
        if entry.seconds is None:
            raise ValueError("latency is the cost, but the menus' times were not measured: see time_menus")
        return entry.seconds / self.dense_seconds


Menus = Mapping[str, tuple[MenuEntry, ...]]


def rank_grid(limit: int, *, narrow: bool = False) -> list[int]:
    """Candidate ranks 1..limit in a roughly geometric grid, multiples of RANK_MULTIPLE where the mode is wide.

    Args:
        narrow: begin a wide mode's grid with NARROW.
    """
    step = RANK_MULTIPLE if limit >= WIDE_FROM else 1
    grid, rank = [*NARROW] if narrow and step > 1 else [], step
    while rank < limit:
        grid.append(rank)
        rank = max(rank + step, round(rank * GRID_RATIO / step) * step)
    return [*grid, limit]


def build_menus(
    factors: ModelFactors, *, cost: CostMeasure | None = None, size: int = 16, narrow: bool = False
) -> dict[str, tuple[MenuEntry, ...]]:
    """Layer name -> its menu of at most `size` entries, from the cheapest to the dense layer.

    Args:
        narrow: also ranks below RANK_MULTIPLE in wide modes; see NARROW.

    Raises:
        ValueError: if size is below 2.
    """
    if size < 2:
        raise ValueError(f"a menu holds at least 2 entries; got size={size}")
    cost = cost or CostMeasure()
    menus = {}
    for name, layer in factors.layers.items():
        entries = [entry for entry in _grid_entries(layer, narrow) if entry.error < 1]
        dense = MenuEntry(None, layer.dense_params, layer.dense_flops, 0.0)
        front = cheaper_front(entries, dense, lambda entry: cost.of_entry(entry, factors))
        menus[name] = (*_thinned(front, size - 1), dense)
    return menus


def cheaper_front(
    entries: Iterable[MenuEntry], dense: MenuEntry, cost: Callable[[MenuEntry], float]
) -> list[MenuEntry]:
    """The entries cheaper than dense that no other beats in both cost and error, from the cheapest on."""
    front: list[MenuEntry] = []
    for entry in sorted(entries, key=lambda e: (cost(e), e.error)):
        if cost(entry) < cost(dense) and (not front or entry.error < front[-1].error):
            front.append(entry)
    return front


def _grid_entries(layer: Factors, narrow: bool) -> Iterator[MenuEntry]:
    if layer.is_matrix:
        errors = layer.output_errors().tolist()
        for rank in rank_grid(layer.full_ranks.rank, narrow=narrow):
            yield _entry(layer, MatrixRanks(rank), errors[rank - 1])
        return
    full = layer.full_ranks
    for rank_in, rank_out in _balanced_pairs(layer, narrow):
        errors = layer.output_errors(rank_in, rank_out).tolist()
        for rank_mid in rank_grid(max(full.rank_in, full.rank_out), narrow=narrow):
            if rank_mid <= len(errors):
                yield _entry(layer, KernelRanks(rank_in, rank_mid, rank_out), errors[rank_mid - 1])


def _entry(layer: Factors, ranks: Ranks, error: float) -> MenuEntry:
    return MenuEntry(ranks, layer.params(ranks), layer.flops(ranks), error)


def _balanced_pairs(layer: Factors, narrow: bool) -> list[tuple[int, int]]:
    """Leaf ranks (in, out) that discard comparable shares of the energy, each at most half of its mode or all of it."""
    tails = {}
    for edge, full in (("in", layer.full_ranks.rank_in), ("out", layer.full_ranks.rank_out)):
        energies = layer.edge_energies(edge)
        tail = (1 - energies.cumsum(0) / energies.sum()).clamp_min(1e-7).tolist()
        grid = rank_grid(full, narrow=narrow)
        tails[edge] = {r: tail[r - 1] for r in grid if r <= max(full // 2, 8) or r == full}
    return [
        (rank_in, rank_out)
        for rank_in, tail_in in tails["in"].items()
        for rank_out, tail_out in tails["out"].items()
        if 1 / BALANCE <= tail_in / tail_out <= BALANCE
        or rank_in == layer.full_ranks.rank_in
        or rank_out == layer.full_ranks.rank_out
    ]


def _thinned(front: list[MenuEntry], size: int) -> list[MenuEntry]:
    """At most `size` entries, evenly spaced in the logarithm of the error (the first and the last are kept)."""
    if len(front) <= size:
        return front
    position = np.log(np.maximum([entry.error for entry in front], 1e-9))
    wanted = np.linspace(position[0], position[-1], size)
    picked = sorted({int(np.abs(position - target).argmin()) for target in wanted})
    return [front[i] for i in picked]
