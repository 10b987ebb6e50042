"""Other people's ways to compress a network, as they are offered, brought to a number of FLOPs by their one knob.

tensorly-torch's factorised convolutions (Tucker and CP), torch-pruning's channels (DepGraph, Fang et al. 2023,
arXiv:2301.12900), and Tucker-2 of the weights alone with ranks from variational Bayes (Kim et al. 2016,
arXiv:1511.06530). The libraries are the extra `peers`; a peer that is missing or fails says so.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from common.compress import Factors, HTLayer, ModelFactors
from common.compress.layers import PLANS
from common.configuration import Configuration, KernelRanks, Ranks
from common.cost import count_flops
from common.modules import copy_with
from common.ranks import vbmf

STEPS = 12
"""Halvings of the interval in which a peer's one knob is sought."""

PACKAGES = {"torch-pruning": "torch_pruning", "tensorly-torch": "tltorch"}
"""Distribution -> what it is imported as."""


def package(distribution: str) -> ModuleType:
    """A peer's package.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        return importlib.import_module(PACKAGES[distribution])
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{distribution} is not installed: pip install 'htd-cnn-compression[peers]'"
        ) from error


def versions() -> dict[str, str]:
    """Of the peers' packages, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def tensorly_torch(
    dense: nn.Module,
    example: Tensor,
    flops: int,
    *,
    factorization: str = "tucker",
    others: Mapping[nn.Module, nn.Module] | None = None,
) -> nn.Module:
    """All convolutions of more than one tap as tensorly-torch's, of one share of their full ranks, within the FLOPs.

    Args:
        example: ``(N, C, H, W)``; one image is counted.
        flops: multiply-accumulates of one image that may be used.
        factorization: tucker (all modes), or cp.
        others: modules of `dense` -> what stands in their place.

    Raises:
        ValueError: its smallest takes more FLOPs.
    """
    library = package("tensorly-torch")
    chosen = [
        module
        for module in dense.modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1) and module.groups == 1
    ]

    def ranks(conv: nn.Conv2d, share: float) -> Any:
        if factorization == "tucker":
            own = max(1, round(share * conv.out_channels)), max(1, round(share * conv.in_channels))
            return (*own, *conv.kernel_size)
        # What a CP of this many terms costs, against the kernel: a convolution is cheaper from about half its channels.
        return max(1, round(share * conv.weight.numel() / sum(conv.weight.shape)))

    def replaced(share: float, decompose: bool) -> nn.Module:
        layers = {}
        for conv in chosen:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # tensorly's, of ranks above a mode's size
                layers[conv] = library.FactorizedConv.from_conv(
                    conv,
                    rank=ranks(conv, share),
                    factorization=factorization,
                    implementation="factorized",
                    decompose_weights=decompose,
                )
        return copy_with(dense, {**layers, **(others or {})}).eval()

    share = largest(lambda knob: flops_of(replaced(knob, False), example), flops)
    return _allowed(replaced(share, True), example, flops)


def torch_pruning(dense: nn.Module, example: Tensor, flops: int, *, round_to: int | None = None) -> nn.Module:
    """The network with groups of channels pruned by their magnitude, all layers by one share, within the FLOPs.

    Args:
        round_to: channels are kept in multiples of it.

    Raises:
        ValueError: its smallest takes more: a group is never pruned to its last channel.
    """
    library = package("torch-pruning")
    widths = [len(module.weight) for module in dense.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    # Below it the package leaves the narrowest layers whole, since nothing of them would stay.
    least = (1 + 1e-6) * (round_to or 1) / min(widths[:-1])

    def pruned(kept: float) -> nn.Module:
        model = copy.deepcopy(dense)
        pruner = library.pruner.MagnitudePruner(
            model,
            example[:1],
            importance=library.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=1 - kept,
            ignored_layers=[module for module in model.modules() if isinstance(module, nn.Linear)][-1:],
            round_to=round_to,
        )
        pruner.step()
        return model.eval()

    with torch.enable_grad():
        kept = largest(lambda share: flops_of(pruned(share), example), flops, least)
        return _allowed(pruned(kept), example, flops)


def tucker2_ranks(weights: ModelFactors, budget: float) -> Configuration:
    """Ranks of a Tucker-2 from variational Bayes, all scaled by the largest common factor that meets the budget.

    weights: factorised without data. A layer that would cost more than dense stays dense.

    Raises:
        ValueError: no factor meets it.
    """

    def of_scale(scale: float) -> Configuration:
        found = vbmf(weights, scale)
        return Configuration({name: _without_middle(weights.layers[name], found[name]) for name in found})

    return _within(weights, budget, of_scale, "tucker", 1e-3, 2.0)


def two_factor_ranks(factors: ModelFactors, budget: float) -> Configuration:
    """Every layer cut at the same share of its output's energy, the largest share that meets the budget.

    A layer cut this way is a k x k convolution to r channels and a 1 x 1 one: the singular value decomposition of the
    kernel whitened by its input, which is the projection on the output covariance's leading eigenvectors.

    Raises:
        ValueError: no share meets it.
    """

    def of_share(kept: float) -> Configuration:
        config = {}
        for name, layer in factors.layers.items():
            energies = layer.edge_energies("mid" if layer.is_matrix else "out")
            rank = int((energies.cumsum(0) < (1 - 1e-9 / kept) * energies.sum()).sum()) + 1
            config[name] = _two_factor_of(layer, min(rank, len(energies)))
        return Configuration(config)

    return _within(factors, budget, of_share, "output-pair", 1e-9, 1.0)


def _within(
    factors: ModelFactors, budget: float, make: Callable[[float], Configuration], plan: str, low: float, high: float
) -> Configuration:
    """The configuration of the largest knob whose FLOPs, kernels in one plan, meet the budget; by bisection."""

    def attempt(knob: float) -> tuple[Configuration, int]:
        config, total = {}, factors.dense_flops
        for name, ranks in make(knob).items():
            layer = factors.layers[name]
            flops = layer.flops(ranks) if layer.is_matrix else layer.flops(ranks, PLANS[plan])
            if flops < layer.dense_flops:
                config[name], total = ranks, total + flops - layer.dense_flops
        return Configuration(config), total

    best, least = attempt(low)
    if least > budget * factors.dense_flops:
        raise ValueError(f"the smallest ranks keep {least / factors.dense_flops:.3f} of the FLOPs, above {budget}")
    for _ in range(60):
        middle = (low * high) ** 0.5
        config, total = attempt(middle)
        if total <= budget * factors.dense_flops:
            best, low = config, middle
        else:
            high = middle
    return best


def _two_factor_of(layer: Factors, rank: int) -> Ranks:
    full = layer.full_ranks
    if layer.is_matrix:
        return type(full)(rank)
    _, c_in, k_h, k_w = layer.shape
    return KernelRanks(c_in, min(c_in * k_h, k_w * rank), rank)


def _without_middle(layer: Factors, ranks: Ranks) -> Ranks:
    """The same outer ranks, with all that the edge between the two halves of the window can hold."""
    if layer.is_matrix:
        return ranks
    _, _, k_h, k_w = layer.shape
    return KernelRanks(ranks.rank_in, min(ranks.rank_in * k_h, k_w * ranks.rank_out), ranks.rank_out)


def in_plan(factors: ModelFactors, config: Mapping[str, Ranks], plan: str) -> nn.Module:
    """The compressed network with every kernel in one plan."""
    model = factors.compress(config)
    layers = {}
    for name, ranks in config.items():
        layer = factors.layers[name]
        if not layer.is_matrix:
            chain = layer.truncated(ranks, PLANS[plan])
            layers[model.get_submodule(name)] = HTLayer(chain, layer.bias, layer.geometry)
    return copy_with(model, layers)


def _allowed(network: nn.Module, example: Tensor, flops: int) -> nn.Module:
    """The network as it is.

    Raises:
        ValueError: it takes more multiply-accumulates than these, since the peer's knob reaches no further.
    """
    found = flops_of(network, example)
    if found > flops:
        raise ValueError(f"cannot be brought to {flops:,} FLOPs: at its smallest it takes {found:,}")
    return network


def flops_of(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one image."""
    return count_flops(model, tuple(example.shape[1:]))


def largest(flops_at: Callable[[float], int], allowed: int, least: float = 0.01) -> float:
    """The largest knob from `least` to 1 at which the FLOPs, which grow with it, are allowed; `least` where none is."""
    low, high = least, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if flops_at(middle) <= allowed else (low, middle)
    return low
