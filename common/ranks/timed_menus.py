"""Menus priced by what a layer really costs: its measured time in its fastest execution plan.

With these menus a budget is a share of the dense network's time, so a search aims at a speed-up instead of at FLOPs.

A layer that is timed alone finds its input in cache and in the layout that suits it, and pays for no step to its
neighbours. So where a runtime says what each of its kernels takes, entries are timed where they will run: in as many
networks as the longest menu has entries, each with all its layers about as far along their menus.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..compress import Factors, ModelFactors
from ..configuration import Configuration
from ..deploy import Measure, Target, choose_plan, deploy, plain_layer, timer
from ..deploy.profile import PROFILED, Kernel, profile
from ..files import read_json, write_text
from ..inputs import Inputs
from ..modules import laid_out
from ..progress import progress_bar
from .menus import CostMeasure, MenuEntry, Menus, cheaper_front


@dataclass(frozen=True)
class MenuTimes:
    """Median seconds per batch: of the dense network, and per layer of every entry of its menu, dense last."""

    dense_network: float
    entries: Mapping[str, list[float]]

    def priced(self, factors: ModelFactors, menus: Menus) -> tuple[dict[str, tuple[MenuEntry, ...]], CostMeasure]:
        """The menus with their times, less the entries that are not faster than dense; and the cost to solve for."""
        # Layers that take longer one by one than together were timed beside other programs: only ratios count then.
        layers = sum(seconds[-1] for seconds in self.entries.values())
        cost = CostMeasure(dense_seconds=max(self.dense_network, layers))
        priced = {}
        for name, menu in menus.items():
            timed = [replace(e, seconds=s) for e, s in zip(menu, self.entries[name], strict=True)]
            front = cheaper_front(timed[:-1], timed[-1], lambda entry: cost.of_entry(entry, factors))
            priced[name] = (*front, timed[-1])
        return priced, cost


def time_menus(
    factors: ModelFactors,
    menus: Menus,
    example: Inputs,
    *,
    runtime: str = "torch",
    threads: int | None = None,
    rounds: int = 5,
    in_network: bool = True,
    cache: Path | None = None,
    progress: bool = True,
) -> MenuTimes:
    """Time every entry of every menu in its fastest plan. Let nothing else run at the time.

    Args:
        example: `(N, C, H, W)` images of the batch size and on the device that the network is meant for.
        runtime: one of `common.deploy.runtimes.RUNTIMES`.
        in_network: time entries in whole networks, where the runtime says what its kernels take; else, and for
            others, each layer alone, those of one shape once.
        cache: a JSON file; times found there are taken as they are, so that a resumed search sees the same prices.
    """
    if cache is not None and cache.exists():
        return MenuTimes(**read_json(cache))
    dense = deploy(factors.model, example, runtime=runtime, threads=threads, rounds=rounds)
    entries = None
    if in_network and runtime in PROFILED:
        entries = _in_networks(factors, menus, example, runtime, threads, rounds, progress)
    if entries is None:
        target = Target(runtime, False, False, threads or torch.get_num_threads())
        entries = _alone(factors, menus, example, timer(target.layer_run, rounds=rounds, threads=threads), progress)
    times = MenuTimes(dense.measured_seconds, entries)
    if cache is not None:
        write_text(cache, json.dumps(asdict(times), indent=1))
    return times


def _in_networks(
    factors: ModelFactors,
    menus: Menus,
    example: Inputs,
    runtime: str,
    threads: int | None,
    rounds: int,
    progress: bool,
) -> dict[str, list[float]] | None:
    """Layer -> seconds of its entries, each the median over the networks that it is in; None where kernels bear names
    by which a layer cannot be told."""
    found: dict[str, list[list[float]]] = {name: [[] for _ in menu] for name, menu in menus.items()}
    most = max(map(len, menus.values()))
    for step in progress_bar(range(most), desc="timing menus", unit="network", shown=progress):
        # Shorter menus are walked along evenly: each of their entries is met at least once.
        chosen = {name: step * (len(menu) - 1) // max(most - 1, 1) for name, menu in menus.items()}
        ranks = {name: menus[name][place].ranks for name, place in chosen.items()}
        network = factors.compress(Configuration({name: one for name, one in ranks.items() if one is not None}))
        deployed = deploy(network, example, runtime=runtime, threads=threads, rounds=rounds)
        kernels = profile(deployed.model, example, runtime=runtime, threads=threads, rounds=2 * rounds)
        for name, seconds in _by_layer(kernels, menus).items():
            found[name][chosen[name]].append(seconds)
    if not all(all(map(max, entries)) for entries in found.values()):
        return None
    return {name: [statistics.median(seconds) for seconds in entries] for name, entries in found.items()}


def _by_layer(kernels: list[Kernel], menus: Menus) -> dict[str, float]:
    """Seconds of every layer: its stages', and of what goes on with their outputs."""
    seconds = dict.fromkeys(menus, 0.0)
    for kernel in kernels:
        parts = kernel.layer.split(".")
        owners = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        owner = next((name for name in owners if name in menus), None)
        if owner is not None:
            seconds[owner] += kernel.seconds
    return seconds


def _alone(
    factors: ModelFactors, menus: Menus, example: Inputs, measure: Measure, progress: bool
) -> dict[str, list[float]]:
    """Layer -> seconds of its entries, on noise; layers of one shape are timed once."""
    known: dict[tuple, list[float]] = {}
    entries = {}
    for name, menu in progress_bar(menus.items(), desc="timing menus", unit="layer", shown=progress):
        layer = factors.layers[name]
        key = (layer.shape, layer.geometry, layer.bias is None, layer.trace, tuple(entry.ranks for entry in menu))
        if key not in known:
            known[key] = _entry_seconds(layer, menu, _inputs(layer, example), measure)
        entries[name] = known[key]
    return entries


def _entry_seconds(layer: Factors, menu: tuple[MenuEntry, ...], inputs: Tensor, measure: Measure) -> list[float]:
    truncated = [layer.layer(entry.ranks) for entry in menu[:-1]] or [layer.layer(layer.full_ranks)]
    seconds = [choose_plan(one, inputs, "measure", measure).seconds for one in truncated[: len(menu) - 1]]
    # Whatever its ranks, a layer in the plan "dense" is of the dense layer's size.
    dense = measure({"dense": plain_layer(truncated[0], "dense")}, inputs)["dense"]
    return [*seconds, statistics.median(dense)]


def _inputs(layer: Factors, example: Inputs) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    like = tree_leaves(example)[0]
    rows = layer.trace.rows * len(like)
    inputs = torch.randn(rows, *layer.trace.input_shape, generator=generator).to(like.device, layer.dtype)
    return laid_out(inputs, channels_last=True)
