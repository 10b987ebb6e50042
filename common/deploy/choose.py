"""The fastest way to run a network: the plans of all its layers, and a batch whole or in parts, timed together.

What is fastest alone need not be fastest in company: a layer timed by itself does not see what its neighbours' layouts
and caches do for it, and plans that suit a whole batch on all threads need not suit a small part of it on one.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..inputs import Inputs, first, length, run
from ..modules import copy_with, laid_out
from .parts import part_sizes, ways
from .plans import LayerChoice, Measure, choose_plans, first_of_fastest, interleaved, plain_layer, timer
from .runtimes import Run, Session, Target

WHOLE = ("tucker", "dense")
"""Plans that a network is tried in as a whole, besides each layer's fastest: a call fewer than a chain's four; and one
per layer, so that no network is slower than the dense one was."""

Plans = dict[str, LayerChoice]
"""Name of each factorised layer -> the plan chosen for it, with the times of all."""


@dataclass(frozen=True)
class Chosen:
    """What was found: the plans, the network in them, what runs it, and the size of a batch's parts (None: whole)."""

    plans: Plans
    network: nn.Module
    run: Run
    part: int | None = None


@dataclass(frozen=True)
class Chooser:
    """How networks are run and timed while one is chosen.

    Attributes:
        example: a batch of the size to deploy for.
        rounds: timed rounds of each way.
        channels_last: feature maps' layout in torch.
        most: by how much the outputs of parts may differ from the whole's and be the same, see `outputs_differ`.
    """

    target: Target
    example: Inputs
    rounds: int
    channels_last: bool
    most: float | None

    def measured_plans(self, folded: nn.Module) -> list[Plans]:
        """The plans of the layers fastest alone, on a batch and on a part of it; those they came in; those of WHOLE."""
        asked = [(self.target, self.example)]
        floats = replace(self.target, int8=None)
        if self.target.int8 is not None:
            # What a layer costs alone in int8 includes the way there and back, which its neighbours may spare it.
            asked.append((floats, self.example))
        part = self._smallest_part(folded)
        if part is not None:
            # In float32 for the same reason, and since every plan of every layer would be quantised once more.
            asked.append((replace(floats, threads=1), part))
        found = [self.plans(folded, "measure", self._timer(target), inputs) for target, inputs in asked]
        alone = [{name: replace(found[0][name], plan=one.plan) for name, one in plans.items()} for plans in found]
        return alone + _alike(alone[0])

    def _smallest_part(self, folded: nn.Module) -> Inputs | None:
        """The first samples of the example, where a batch may go through in parts and the network takes so few."""
        sizes = part_sizes(length(self.example), self.target.threads) if self.target.runtime != "torch" else []
        if not sizes:
            return None
        part = first(self.example, sizes[0])
        try:
            run(folded, part)
        except (ValueError, RuntimeError):  # made for one batch size, as the export is about to say
            return None
        return part

    def plans(self, folded: nn.Module, how: str, measure: Measure | None = None, inputs: Inputs | None = None) -> Plans:
        """As `choose_plans` finds them on `inputs`, by default on the example."""
        given = self.example if inputs is None else inputs
        timed = measure or self._timer(self.target)
        return choose_plans(folded, given, how, timed, channels_last=self.channels_last)

    def _timer(self, target: Target) -> Measure:
        def prepare(layer: nn.Module, inputs: Tensor) -> Run:
            return target.layer_run(laid_out(layer, self.channels_last), inputs)

        return timer(prepare, rounds=self.rounds, threads=target.threads)

    def fastest(self, folded: nn.Module, alternatives: Sequence[Plans]) -> Chosen:
        """Of a network in several choices of plans, whole and in parts, the fastest.

        An earlier one counts as fastest where it is no slower to speak of, see `first_of_fastest`; parts come before
        the whole, see `ways`.
        """
        distinct: dict[str, Plans] = {}
        for found in alternatives:
            distinct.setdefault(str([one.plan for one in found.values()]), found)
        plans = list(distinct.values())
        networks = [laid_out(in_plans(folded, one), self.channels_last) for one in plans]
        if len(networks) == 1 and self.target.runtime == "torch":
            return Chosen(plans[0], networks[0], self.target.run(networks[0], self.example))
        runs: dict[tuple[int, int | None], Run] = {}
        for place, network in enumerate(networks):
            whole = self.target.uncompiled_run(network, self.example)
            parted = ways(whole, self.example, self.target.threads, self.most) if isinstance(whole, Session) else {}
            runs |= {(place, part): call for part, call in (parted or {None: whole}).items()}
        place, part = self._first_of_fastest(runs)
        call = self.target.run(networks[place], self.example) if self.target.compile else runs[place, part]
        return Chosen(plans[place], networks[place], call, part)

    def _first_of_fastest(self, runs: Mapping[tuple[int, int | None], Run]) -> tuple[int, int | None]:
        if len(runs) == 1:
            return next(iter(runs))
        samples = interleaved(runs, self.example, rounds=self.rounds, threads=self.target.threads)
        return first_of_fastest({way: statistics.median(values) for way, values in samples.items()})


def _alike(plans: Plans) -> list[Plans]:
    """The same layers in the plans that they came in, and each of WHOLE wherever a layer has it."""
    came = {name: replace(choice, plan=choice.before) for name, choice in plans.items()}
    alike = [
        {name: replace(one, plan=plan if plan in one.timings else one.plan) for name, one in plans.items()}
        for plan in WHOLE
    ]
    return [came, *alike]


def in_plans(folded: nn.Module, plans: Mapping[str, LayerChoice]) -> nn.Module:
    """A copy of the network, with its factorised layers in these plans, as torch's own convolutions."""
    layers = {folded.get_submodule(name): choice.plan for name, choice in plans.items()}
    return copy_with(folded, {layer: plain_layer(layer, plan) for layer, plan in layers.items()}).requires_grad_(False)
