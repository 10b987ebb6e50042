"""Screening and fine-tuning on Ray's workers: on every GPU or processor of a machine, or of a cluster.

Ray schedules, restarts workers that die and does again what they were at. A worker holds the factors and the images
once; a candidate travels to it as the text of its configuration, and comes back as its record. What is trained stays in
files, so that another worker goes on from the last epoch.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
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
from .finetuning import Finetuning, stem_of
from .records import Record
from .screening import Screener
from .sensitivity import divergences
from .storage import Storage

RETRIES = 20
"""How often a candidate is begun again when its worker dies; then it is recorded as failed."""

KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_TOP_PAD_": str(2**28)}
"""Of a worker's environment: glibc's allocator keeps the memory of feature maps, which it would hand back to the kernel
after every operation, and have cleared and mapped again for the next."""


@dataclass(frozen=True)
class RaySettings:
    """Which workers there are.

    Attributes:
        address: of a running cluster, such as "auto" or "ray://head:10001"; None starts one on this machine.
        workers: how many; None: one per GPU where the network is on one, else as many as a generation fills.
        threads: of each worker; None: its share of the processors. Sums in another number of threads differ in their
            last digits: only workers of the same number come to the very same divergences.
        gpus: share of a GPU that a worker takes, where the network is on one.
        storage: where what is trained is kept between the epochs, as a path or a URL of fsspec's; None: in the run's
            folder, which all workers must see.
    """

    address: str | None = None
    workers: Annotated[int | None, Field(ge=1, le=100_000, description="a number of workers, at least 1")] = None
    threads: Annotated[int | None, Field(ge=1, le=1024, description="a number of threads, at least 1")] = None
    gpus: Annotated[float, Field(gt=0, le=64, description="a positive number of GPUs")] = 1.0
    storage: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.storage is not None:
            Storage(self.storage)


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


class TrainingWorker:
    """What runs on a worker that fine-tunes: what all candidates have in common, and the threads that are its share."""

    def __init__(self, common: Finetuning, storage: Storage | None, threads: int) -> None:
        torch.set_num_threads(threads)
        self._common, self._storage = common, storage

    def process(self) -> int:
        return os.getpid()

    def sees(self, name: str) -> bool:
        return (self._common.folder / name).exists()

    def until(self, record: Record, epoch: int | None) -> tuple[str, dict[str, Any]]:
        if self._storage is None:
            return record["trial"], self._common.until(record, epoch)
        # A folder for each call: a worker is killed in the end, and one that it kept would stay behind.
        with tempfile.TemporaryDirectory(prefix="htd-worker-") as name:
            stem, folder = stem_of(record), Path(name)
            self._storage.fetch(stem, folder)
            found = replace(self._common, folder=folder).until(record, epoch)
            self._storage.send(stem, folder)
        return record["trial"], found


class RayExecutor:
    """Screens and trains on Ray's workers, which it starts when there is something to do, and keeps until it is closed.

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
        self._trainers: list[Any] = []
        self._shared: list[Any] = []  # kept here: a worker that is started again asks for it again
        self._storage = None if settings.storage is None else Storage(settings.storage)

    def _workers(self) -> list[Any]:
        """The actors that screen, started if they are not there."""
        if not self._actors:
            self._actors = self._start(Worker, self._screener, most=self._most)
        return self._actors

    def _start(self, kind: type, shared: Any, *others: Any, most: int) -> list[Any]:
        """Actors of a kind, as many as the settings say and `most` allows; made from (shared, *others, threads)."""
        ray, settings = self._ray, self._settings
        if not ray.is_initialized():
            try:
                ray.init(address=settings.address, log_to_driver=False, logging_level="error")
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ValueError(f"no Ray cluster at {settings.address}: {first_line(error)}") from error
            self._started = True
        on_gpu = tree_leaves(self._screener.targets.images)[0].device.type == "cuda"
        here = ray.cluster_resources()
        count = settings.workers or max(1, int(here.get("GPU", 1) / settings.gpus if on_gpu else here.get("CPU", 1)))
        count = max(1, min(count, most))
        threads = settings.threads or max(1, int(here.get("CPU", 1)) // count)
        options: dict[str, Any] = {
            "max_restarts": -1,
            "max_task_retries": RETRIES,
            "scheduling_strategy": "SPREAD",
            # Processors are divided by threads, not reserved: a worker whose machine is lost goes on wherever there is
            # one left.
            "num_cpus": 0,
            "num_gpus": settings.gpus if on_gpu else 0,
            "runtime_env": {"env_vars": {} if on_gpu else KEEPS_MEMORY},
        }
        self._shared.append(ray.put(shared))
        actor = ray.remote(kind).options(**options)
        return [actor.remote(self._shared[-1], *others, threads) for _ in range(count)]

    def _results(self, actors: list[Any], method: str, jobs: Sequence[tuple]) -> Iterator[tuple[Any, Any]]:
        """(key, what the method returned) of each job, as they are done; then (None, why) if workers died too often."""
        pool, reason = importlib.import_module("ray.util").ActorPool(actors), ""
        for job in jobs:
            pool.submit(lambda actor, item: getattr(actor, method).remote(*item), job)
        while pool.has_next():
            try:
                yield pool.get_next_unordered()
            except self._ray.exceptions.RayTaskError:
                raise  # an error of the network's or of somebody's measure, as it would come in this process
            except self._ray.exceptions.RayError as error:
                reason = first_line(error)
        if reason:
            yield None, f"its worker died {RETRIES + 1} times: {reason}"

    def screen_all(self, configs: Sequence[Configuration]) -> Iterator[tuple[int, dict[str, Any]]]:
        if not configs:
            return
        missing = set(range(len(configs)))
        jobs = [(place, str(config)) for place, config in enumerate(configs)]
        for place, found in self._results(self._workers(), "screen", jobs):
            if place is not None:
                missing.discard(place)
                yield place, found
                continue
            for lost in sorted(missing):
                yield lost, {"status": "failed", "reason": found, "stage": "screen"}

    def finetune_all(
        self, common: Finetuning, records: Sequence[Record], epoch: int | None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        if not records:
            return
        if not self._trainers:
            shared = replace(common, folder=common.folder.resolve(), on_batch=None)
            self._trainers = self._start(TrainingWorker, shared, self._storage, most=len(records))
            if self._storage is None:
                self._check_folder(common.folder)
        missing = {record["trial"]: record for record in records}
        for trial, found in self._results(self._trainers, "until", [(record, epoch) for record in records]):
            if trial is None:
                yield from ((lost, {"failed": found}) for lost in missing)
                continue
            if self._storage is not None:
                self._storage.fetch(stem_of(missing[trial]), common.folder)
            del missing[trial]
            yield trial, found

    def _check_folder(self, folder: Path) -> None:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".workers-see-") as mark:
            seen = self._ray.get([actor.sees.remote(Path(mark.name).name) for actor in self._trainers])
        if not all(seen):
            raise ValueError(f"not all workers see {folder}: give storage=, a place that all of them can write to")

    def divergences(self, menus: Menus, images: Inputs, kind: str, anchors: int) -> dict[str, dict[int, float]]:
        """`common.search.sensitivity.divergences` of the first calibration images, the layers dealt among them.

        images: how many of them, by their number alone: the workers have them.
        """
        actors = self._workers()[: len(menus)]
        parts = [{name: menus[name] for name in names} for names in dealt(list(menus), len(actors))]
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
        """The process numbers of the workers that there are; waits until all of them run."""
        there = [*self._actors, *self._trainers] or self._workers()
        return self._ray.get([actor.process.remote() for actor in there])

    def close(self) -> None:
        """Let go of the workers, and of the cluster if this executor started it."""
        for actors in (self._actors, self._trainers):
            while actors:
                self._ray.kill(actors.pop())
        self._shared.clear()
        if self._started:
            self._ray.shutdown()
            self._started = False


def dealt(layers: Sequence[str], workers: int) -> list[list[str]]:
    """The layers of each worker, dealt forth and back: what lies behind a layer is what it costs, and if every round
    began with the same worker, that one would have the dearest of each."""
    hands: list[list[str]] = [[] for _ in range(workers)]
    for place, layer in enumerate(layers):
        number, seat = divmod(place, workers)
        hands[seat if number % 2 == 0 else workers - 1 - seat].append(layer)
    return hands
