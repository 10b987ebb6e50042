"""Menus priced by what a layer really costs: its measured time in its fastest execution plan.

With these menus a budget is a share of the dense network's time, so a search aims at a speed-up instead of at FLOPs.
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
from tqdm import tqdm

from ..compress import Factors, ModelFactors
from ..deploy import Measure, Target, choose_plan, deploy, plain_layer, timer
from ..files import write_text
from ..inputs import Inputs
from ..modules import laid_out
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
    cache: Path | None = None,
    progress: bool = True,
) -> MenuTimes:
    """Time every entry of every menu, each layer alone, in its fastest plan; layers of one shape are timed once.

    Let nothing else run at the time.

    Args:
        example: `(N, C, H, W)` images of the batch size and on the device that the network is meant for.
        runtime: "torch" or "onnxruntime".
        cache: a JSON file; times found there are taken as they are, so that a resumed search sees the same prices.
    """
    if cache is not None and cache.exists():
        return MenuTimes(**json.loads(cache.read_text()))
    target = Target(runtime, False, False, threads or torch.get_num_threads())
    dense = deploy(factors.model, example, runtime=runtime, threads=threads, rounds=rounds)
    measure = timer(target.layer_run, rounds=rounds, threads=threads)
    known: dict[tuple, list[float]] = {}
    entries = {}
    for name, menu in tqdm(menus.items(), desc="timing menus", unit="layer", disable=not progress):
        layer = factors.layers[name]
        key = (layer.shape, layer.geometry, layer.bias is None, layer.trace, tuple(entry.ranks for entry in menu))
        if key not in known:
            known[key] = _entry_seconds(layer, menu, _inputs(layer, example), measure)
        entries[name] = known[key]
    times = MenuTimes(dense.measured_seconds, entries)
    if cache is not None:
        write_text(cache, json.dumps(asdict(times), indent=1))
    return times


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
