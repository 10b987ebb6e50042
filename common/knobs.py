"""The knobs that every search has, whatever is searched: types and ranges said once, checked at the door."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from .compress.selection import LAYER_SETS
from .deploy.runtimes import RUNTIMES
from .search import EXECUTORS, GENERATION, SAMPLERS

COSTS = ("flops", "params", "mix", "latency")
SENSITIVITIES = ("blended", "measured", "proxy")
CALIBRATION_IMAGES = 1024
"""Where accuracy stops to rise with their number (results/calibration); each costs time in every candidate's fit."""

DEVICES = r"^(auto|cpu|mps|cuda(:\d+)?)$"


def one_of(names: Iterable[str]) -> str:
    return f"one of {', '.join(names)}"


@dataclass(frozen=True, kw_only=True)
class SearchKnobs:
    """The knobs of a search, whatever is searched.

    Attributes:
        layers: which layers are factorised; one of LAYER_SETS.
        budgets: shares of the dense cost that candidates may keep.
        max_loss: in place of budgets: of the validation score, what the smallest network found may lose; None: budgets.
        cost: what the budgets are shares of: flops, params, the mean of the two (mix), or latency (measured, in the
            runtime of the run).
        candidates: screened per budget.
        sampler: policy, tpe, random or nsga2.
        sensitivity: blended, measured or proxy; see `common.search.sensitivity`.
        calibration_images: training images for moments and for the fits of the layers.
        screen_images: validation images that a candidate is screened on.
        promote: candidates fine-tuned per budget, before halving.
        tolerance: accuracy that an accepted candidate may lose.
        control: train the dense network on as long as candidates are, by the same recipe, and count losses from the
            better of the two: what more training alone brings is no merit of a compressed network, nor missing in it.
        latency_batch: images per batch when speed is measured.
        runtime: torch, onnxruntime or openvino; what both sides are deployed to.
        int8: measure both sides quantised to int8 as well, in a runtime that has it.
        generation: candidates proposed at a time, and screened side by side where there are several workers.
        executor: local (this process), or ray (workers on this machine, or on a cluster).
        address, workers, threads, storage: of Ray; see `common.search.RaySettings`.
        device: auto, cpu, cuda.
        seed: of everything random in the search and the fine-tuning.
        folder: where the log and the state of the run go.
    """

    layers: Annotated[Literal[LAYER_SETS], Field(description=one_of(LAYER_SETS))] = "all"
    budgets: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...],
        Field(min_length=1, description="shares of the dense cost, at least one, each above 0 and at most 1"),
    ] = (0.30, 0.15, 0.08)
    max_loss: Annotated[float | None, Field(ge=0, lt=1, description="a share of the score in [0, 1), or None")] = None
    cost: Annotated[Literal[COSTS], Field(description=one_of(COSTS))] = "flops"
    candidates: Annotated[int, Field(ge=1, le=100_000, description="a number per budget, at least 1")] = 34
    sampler: Annotated[Literal[SAMPLERS], Field(description=one_of(SAMPLERS))] = "policy"
    sensitivity: Annotated[Literal[SENSITIVITIES], Field(description=one_of(SENSITIVITIES))] = "blended"
    calibration_images: Annotated[int, Field(ge=1, description="a number of images, at least 1")] = CALIBRATION_IMAGES
    screen_images: Annotated[int, Field(ge=1, description="a number of images, at least 1")] = 2000
    promote: Annotated[int, Field(ge=1, description="a number per budget, at least 1")] = 2
    tolerance: Annotated[float, Field(ge=0, lt=1, description="a share of accuracy in [0, 1)")] = 0.02
    control: bool = False
    latency_batch: Annotated[int, Field(ge=1, le=65_536, description="a number of images, at least 1")] = 16
    runtime: Annotated[Literal[RUNTIMES], Field(description=one_of(RUNTIMES))] = "onnxruntime"
    int8: bool = False
    generation: Annotated[int, Field(ge=1, le=10_000, description="a number of candidates, at least 1")] = GENERATION
    executor: Annotated[Literal[EXECUTORS], Field(description=one_of(EXECUTORS))] = "local"
    address: str | None = None
    workers: Annotated[int | None, Field(ge=1, le=100_000, description="a number of workers, or None")] = None
    threads: Annotated[int | None, Field(ge=1, le=1024, description="a number of threads, or None")] = None
    storage: str | None = None
    device: Annotated[str, Field(pattern=DEVICES, description="auto, cpu, mps, cuda or cuda:N")] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**32, description="a whole number from 0 to 4294967295")] = 0
    folder: str = "logs"

    def check_int8(self) -> None:
        """Raise ValueError where int8 is asked of a runtime that has none."""
        if self.int8 and self.runtime == "torch":
            raise ValueError("int8 is for the runtimes onnxruntime and openvino; got runtime='torch'")

    @property
    def log_path(self) -> Path:
        return Path(self.folder) / f"{self.name}.log"

    @property
    def state_folder(self) -> Path:
        return Path(self.folder) / self.name

    def rows(self) -> list[tuple[str, Any]]:
        """(knob, value) pairs, for display."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]
