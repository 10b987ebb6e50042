"""Screening on Ray's workers: on every GPU or processor of a machine, or of a cluster.

Ray schedules, restarts workers that die and does again what they were at. A worker holds the factors and the images
once; a candidate travels to it as the text of its configuration, and comes back as its record.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any

import torch
from pydantic import Field
from torch.utils._pytree import tree_leaves

from ..checked import check_fields
from ..configuration import Configuration
from ..inputs import Inputs, first, length
from ..modules import first_line
from ..ranks import Menus
from .executor import screened
from .screening import Screener
from .sensitivity import divergences

RETRIES = 20
"""How often a candidate is begun again when its worker dies; then it is recorded as failed."""


@dataclass(frozen=True)
class RaySettings:
    """Which workers there are.

    Attributes:
        address: of a running cluster, such as "auto" or "ray://head:10001"; None starts one on this machine.
        workers: how many; None: one per GPU where the network is on one, else as many as a generation fills.
        threads: of each worker; None: its share of the processors. Sums in another number of threads differ in their
            last digits: only workers of the same number come to the very same divergences.
        gpus: share of a GPU that a worker takes, where the network is on one.
    """

    address: str | None = None
    workers: Annotated[int | None, Field(ge=1, le=100_000, description="a number of workers, at least 1")] = None
    threads: Annotated[int | None, Field(ge=1, le=1024, description="a number of threads, at least 1")] = None
    gpus: Annotated[float, Field(gt=0, le=64, description="a positive number of GPUs")] = 1.0

    def __post_init__(self) -> None:
        check_fields(self)


def ray_package() -> ModuleType:
    """Ray, loaded when it is needed.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise ValueError(
            "ray is not installed: pip install 'htd-cnn-compression[ray]', or use executor='local'"
        ) from error


class Worker:
    """What runs on a worker: the screener, and the threads that are its share."""

    def __init__(self, screener: Screener, threads: int) -> None:
        torch.set_num_threads(threads)
        self._screener = screener

    def process(self) -> int:
        return os.getpid()

    def screen(self, place: int, config: str) -> tuple[int, dict[str, Any]]:
        return place, screened(self._screener, Configuration.parse(config))

    def divergences(self, menus: Menus, images: int, kind: str, anchors: int) -> dict[str, dict[int, float]]:
        factors, own = self._screener.factors, first(self._screener.targets.images, images)
        return divergences(factors, menus, own, kind, anchors, progress=False)


class RayExecutor:
    """Screens on Ray's workers, which it starts when there is something to do, and keeps until it is closed.

    Args:
        screener: what every worker gets a copy of.
        settings: see `RaySettings`.
        most: candidates that are screened at a time, at most: no more workers than these.

    Raises:
        ValueError: Ray is not installed; when it starts, there is no cluster at the address.
    """

    def __init__(self, screener: Screener, settings: RaySettings, *, most: int) -> None:
        self._ray = ray_package()
        self._screener, self._settings, self._most = screener, settings, most
        self._started = False
        self._actors: list[Any] = []

    def _workers(self) -> list[Any]:
        """The actors, started if they are not there."""
        if self._actors:
            return self._actors
        ray, screener, settings = self._ray, self._screener, self._settings
        self._started = not ray.is_initialized()
        if self._started:
            try:
                ray.init(address=settings.address, log_to_driver=False, logging_level="error")
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ValueError(f"no Ray cluster at {settings.address}: {first_line(error)}") from error
        on_gpu = tree_leaves(screener.targets.images)[0].device.type == "cuda"
        here = ray.cluster_resources()
        count = settings.workers or max(1, int(here.get("GPU", 1) / settings.gpus if on_gpu else here.get("CPU", 1)))
        count = max(1, min(count, self._most))
        threads = settings.threads or max(1, int(here.get("CPU", 1)) // count)
        options: dict[str, Any] = {
            "max_restarts": -1,
            "max_task_retries": RETRIES,
            "scheduling_strategy": "SPREAD",
            # Processors are divided by threads, not reserved: a worker whose machine is lost goes on wherever there is
            # one left.
            "num_cpus": 0,
            "num_gpus": settings.gpus if on_gpu else 0,
        }
        actor = ray.remote(Worker).options(**options)
        self._shared = ray.put(screener)  # kept here: a worker that is started again asks for it again
        self._actors = [actor.remote(self._shared, threads) for _ in range(count)]
        return self._actors

    def screen_all(self, configs: Sequence[Configuration]) -> Iterator[tuple[int, dict[str, Any]]]:
        if not configs:
            return
        pool = importlib.import_module("ray.util").ActorPool(self._workers())
        for place, config in enumerate(configs):
            pool.submit(lambda actor, item: actor.screen.remote(*item), (place, str(config)))
        missing, reason = set(range(len(configs))), ""
        while pool.has_next():
            try:
                place, found = pool.get_next_unordered()
            except self._ray.exceptions.RayTaskError:
                raise  # an error of the network's or of somebody's measure, as it would come in this process
            except self._ray.exceptions.RayError as error:
                reason = first_line(error)
                continue
            missing.discard(place)
            yield place, found
        for place in sorted(missing):
            said = f"its worker died {RETRIES + 1} times: {reason}"
            yield place, {"status": "failed", "reason": said, "stage": "screen"}

    def divergences(self, menus: Menus, images: Inputs, kind: str, anchors: int) -> dict[str, dict[int, float]]:
        """`common.search.sensitivity.divergences` of the first calibration images, the layers divided evenly.

        images: how many of them, by their number alone: the workers have them.
        """
        names, actors = list(menus), self._workers()[: len(menus)]
        # Every n-th layer to a worker, since what lies behind a layer is what it costs.
        parts = [{name: menus[name] for name in names[start :: len(actors)]} for start in range(len(actors))]
        found = self._ray.get(
            [
                actor.divergences.remote(part, length(images), kind, anchors)
                for actor, part in zip(actors, parts, strict=True)
            ]
        )
        return {name: values for part in found for name, values in part.items()}

    @property
    def workers(self) -> int:
        """How many there are."""
        return len(self._workers())

    def processes(self) -> list[int]:
        """The workers' process numbers; waits until all of them run."""
        return self._ray.get([actor.process.remote() for actor in self._workers()])

    def close(self) -> None:
        """Let go of the workers, and of the cluster if this executor started it."""
        while self._actors:
            self._ray.kill(self._actors.pop())
        if self._started:
            self._ray.shutdown()
            self._started = False
