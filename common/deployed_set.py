"""The dense network and the finalists made ready to run, all alike, and timed interleaved in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map

from .cost import measure_latency
from .deploy import Deployed, deploy
from .inputs import Inputs, first, length
from .progress import progress_bar

INT8_IMAGES = 256
"""Calibration images that the ranges of feature maps are taken from, at most."""

IN_INT8 = " int8"
"""Behind the name of a network: the same in int8."""


@dataclass(frozen=True)
class DeployedSet:
    """The dense network and the finalists, deployed alike and timed interleaved in one run.

    Attributes:
        models: name -> deployed network; "dense" is the baseline, the others are named by their trial, with IN_INT8
            behind it where the network runs in int8.
        seconds: name -> median seconds per batch.
        batch_size: images per batch.
        scores: of the networks in int8: what quantisation leaves of their score; None where there is no metric.
    """

    models: dict[str, Deployed]
    seconds: dict[str, float]
    batch_size: int
    scores: Mapping[str, float | None] = field(default_factory=dict)

    def speedup(self, name: str, of: str = "dense") -> float:
        """How many times faster than the dense network in float32, or than another."""
        return self.seconds[of] / self.seconds[name]


def deploy_all(
    networks: Mapping[str, nn.Module | Deployed],
    example: Inputs,
    runtime: str,
    *,
    int8: Inputs | None = None,
    score: Callable[[nn.Module], float | None] | None = None,
    progress: bool = False,
) -> DeployedSet:
    """Deploy networks by name, and time them in turns; with `int8` (calibration images) each in int8 as well.

    What is deployed already, for just this example and runtime, is taken as it is.
    """
    models = {
        name: network if isinstance(network, Deployed) else deploy(network, example, runtime=runtime)
        for name, network in progress_bar(networks.items(), desc="deploying", unit="network", shown=progress)
    }
    scores: dict[str, float | None] = {}
    if int8 is not None:
        for name in progress_bar(networks, desc="deploying in int8", unit="network", shown=progress):
            # Where the ranks are still at hand, plans are chosen anew: int8 has other favourites.
            given = networks[name]
            given = given.model if isinstance(given, Deployed) else given
            own = deploy(given, example, runtime=runtime, int8=first(int8, INT8_IMAGES))
            models[name + IN_INT8] = own
            scores[name + IN_INT8] = score(AsModule(own)) if score is not None else None
    seconds = measure_latency({name: model.run for name, model in models.items()}, example)
    return DeployedSet(models, seconds, length(example), scores)


class AsModule(nn.Module):
    """A deployed network for whoever evaluates modules: it computes what is deployed, on the CPU and in float32."""

    def __init__(self, deployed: Deployed) -> None:
        super().__init__()
        self.network, self._run = deployed.model, deployed.run

    def forward(self, *inputs: Any, **named: Any) -> Any:
        given = named or (inputs if len(inputs) > 1 else inputs[0])
        return self._run(tree_map(lambda tensor: tensor.detach().cpu(), given))
