"""The classic rules, which give every layer its ranks at once: uniform, singular-value energy, VBMF.

They are what the policy has to beat; each has one knob, which `meet_budget` turns until the network's cost fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import astuple
from functools import lru_cache

import numpy as np
import torch

from ..compress import Factors, ModelFactors
from ..configuration import Configuration, KernelRanks, MatrixRanks, Ranks
from .evbmf import evbmf_from_singular_values
from .menus import CostMeasure


def uniform(factors: ModelFactors, fraction: float) -> Configuration:
    """Every layer's ranks as the same fraction of its channels: (f C_in, f max(C_in, C_out), f C_out).

    Raises:
        ValueError: unless 0 < fraction <= 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1]; got {fraction}")

    def wanted(layer: Factors) -> tuple[float, ...]:
        c_out, c_in = layer.shape[:2]
        if layer.is_matrix:
            return (fraction * min(c_out, c_in),)
        return (fraction * c_in, fraction * max(c_in, c_out), fraction * c_out)

    return Configuration({name: _legal(layer, wanted(layer)) for name, layer in factors.layers.items()})


def energy(factors: ModelFactors, threshold: float) -> Configuration:
    """The smallest ranks whose singular values keep `threshold` of the squared norm on every edge.

    Raises:
        ValueError: unless 0 < threshold <= 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1]; got {threshold}")

    def kept(layer: Factors, edge: str) -> int:
        energies = layer.edge_energies(edge)
        return int((energies.cumsum(0) < threshold * energies.sum()).sum()) + 1

    ranks = {
        name: _legal(layer, tuple(kept(layer, edge) for edge in _edges(layer)))
        for name, layer in factors.layers.items()
    }
    return Configuration(ranks)


def vbmf(factors: ModelFactors, scale: float = 1.0) -> Configuration:
    """The ranks that EVBMF finds on every edge's matricization, weakened or scaled down to meet a budget.

    At scale 1 they are as found; up to 2 they go evenly to the full ranks, as those who use them weaken them where they
    are too tight; below 1 they are shares of what was found.

    Source: Nakajima et al., JMLR 14 (2013); Kim et al., ICLR 2016, use it to choose Tucker ranks; Gusak et al., ICCV
    workshops 2019, weaken them.

    Raises:
        ValueError: unless 0 < scale <= 2.
    """
    if not 0 < scale <= 2:
        raise ValueError(f"scale must be above 0 and at most 2; got {scale}")

    def wanted(layer: Factors) -> tuple[float, ...]:
        found, full = _vbmf_ranks(layer), astuple(layer.full_ranks)
        if scale <= 1:
            return tuple(scale * rank for rank in found)
        return tuple(rank + (scale - 1) * (most - rank) for rank, most in zip(found, full, strict=True))

    return Configuration({name: _legal(layer, wanted(layer)) for name, layer in factors.layers.items()})


def _vbmf_ranks(layer: Factors) -> tuple[int, ...]:
    ranks = []
    for edge in _edges(layer):
        values = layer.edge_energies(edge).sqrt().to("cpu", torch.float64).numpy()
        ranks.append(max(1, _vbmf_rank(values.tobytes(), _edge_shape(layer, edge))))
    return tuple(ranks)


@lru_cache(maxsize=4096)
def _vbmf_rank(singular_values: bytes, shape: tuple[int, int]) -> int:
    """The rank of one matricization: whoever turns the rule's knob asks for the same ones again and again.

    singular_values: (min(shape),) in float64, as bytes, which can be looked up.
    """
    return evbmf_from_singular_values(np.frombuffer(singular_values, dtype=np.float64), shape).rank


def _edges(layer: Factors) -> tuple[str, ...]:
    return ("mid",) if layer.is_matrix else ("in", "mid", "out")


def _edge_shape(layer: Factors, edge: str) -> tuple[int, int]:
    """(rows, columns) of the edge's matricization."""
    if layer.is_matrix:
        return layer.shape[0], layer.shape[1]
    c_out, c_in, k_h, _ = layer.shape
    rows = {"in": c_in, "mid": c_in * k_h, "out": c_out}[edge]
    return rows, math.prod(layer.shape) // rows


def _legal(layer: Factors, wanted: tuple[float, ...]) -> Ranks:
    """The nearest ranks that the layer allows: a rule's formula knows nothing of the tree's limits."""

    def near(value: float, limit: int) -> int:
        return min(max(1, round(value)), limit)

    full = layer.full_ranks
    if isinstance(full, MatrixRanks):
        return MatrixRanks(near(wanted[0], full.rank))
    rank_in, rank_out = near(wanted[0], full.rank_in), near(wanted[2], full.rank_out)
    limit = min(rank_in * layer.shape[2], layer.shape[3] * rank_out)
    return KernelRanks(rank_in, near(wanted[1], limit), rank_out)


RULES: Mapping[str, tuple[Callable[[ModelFactors, float], Configuration], float, float]] = {
    "uniform": (uniform, 1e-3, 1.0),
    "energy": (energy, 1e-3, 1.0),
    "vbmf": (vbmf, 1e-3, 2.0),
}
"""Classic rule -> (function of factors and knob, least knob, largest knob). FLOPs grow with the knob."""


def meet_budget(
    rule: str,
    chooser: ModelFactors,
    budget: float,
    *,
    cost: CostMeasure | None = None,
    priced: ModelFactors | None = None,
    steps: int = 24,
) -> Configuration:
    """The largest configuration of a classic rule whose share of the dense cost is at most `budget`, by bisection.

    A layer that would cost more than dense at its ranks stays dense. The last layers to be afforded are not patched:
    rules are compared as they are, at the same budget.

    Args:
        chooser: the factors whose singular values the rule looks at (classic rules look at the weights').
        priced: the factors that are compressed with; the same by default.

    Raises:
        ValueError: an unknown rule, or a budget below what the rule's smallest ranks cost.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}; got {rule!r}")
    priced, cost = priced or chooser, cost or CostMeasure()
    make, low, high = RULES[rule]

    def attempt(knob: float) -> tuple[Configuration, float]:
        config = worthwhile(priced, make(chooser, knob), cost)
        return config, cost.share(priced.flops(config), priced.params(config), priced)

    best, least = attempt(low)
    if least > budget:
        raise ValueError(f"rule {rule}: its smallest ranks keep {least:.3f} of the dense cost, above {budget}")
    for _ in range(steps):
        middle = math.sqrt(low * high)
        config, share = attempt(middle)
        if share <= budget:
            best, low = config, middle
        else:
            high = middle
    return best


def worthwhile(factors: ModelFactors, config: Mapping[str, Ranks], cost: CostMeasure | None = None) -> Configuration:
    """The configuration without the layers that cost at least as much as dense at their ranks."""
    cost = cost or CostMeasure()

    def cheaper(name: str, ranks: Ranks) -> bool:
        layer = factors.layers[name]
        own = cost.share(layer.flops(ranks), layer.params(ranks), factors)
        return own < cost.share(layer.dense_flops, layer.dense_params, factors)

    return Configuration({name: ranks for name, ranks in config.items() if cheaper(name, ranks)})
