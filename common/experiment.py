"""One run from a trained network to deployed compressed ones, as verbs that each do their work once.

    experiment = Experiment(preset("quick", "resnet18"))
    experiment.prepare_baseline()
    experiment.factorize()
    experiment.screen()
    experiment.finetune()
    experiment.deploy()

A verb does what comes before it if that has not been done, and hands out the same result when it is called again. What
a killed run has finished lies in its folder and is not done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .compress import ModelFactors, factorize
from .cost import count_flops, count_params, measure_latency
from .data import Dataset, load
from .deploy import Deployed, deploy
from .files import exclusive, write_text
from .finetune import Baseline, baseline, recipe
from .presets import RunSettings
from .provenance import provenance
from .ranks import CostMeasure, Menus, build_menus, meet_budget, time_menus
from .reports import RunLog
from .search import (
    CandidateFailed,
    Finalist,
    FinetuneSettings,
    Record,
    Screener,
    Screening,
    Search,
    SearchSettings,
    StepClock,
    blended_sensitivity,
    epoch_seconds,
    finetune_promoted,
    measured_sensitivity,
    promote,
    proxy_sensitivity,
    search_seconds,
)

Result = TypeVar("Result")

MOST_SENSITIVITY_IMAGES = 256
"""Measured sensitivities are averaged over a quarter of the calibration images, but no more than these; there is one
pass per measured menu entry."""


MAY_CHANGE = (
    "candidates",
    "promote",
    "tolerance",
    "latency_batch",
    "runtime",
    "folder",
    "baselines",
    "data_root",
    "device",
)
"""Knobs that a run may be continued with another value of: the candidates that it has stay what they are."""


@dataclass(frozen=True)
class DeployedSet:
    """The dense network and the finalists, deployed alike and timed interleaved in one run.

    Attributes:
        models: name -> deployed network; "dense" is the baseline, the others are named by their trial.
        seconds: name -> median seconds per batch.
        batch_size: images per batch.
    """

    models: dict[str, Deployed]
    seconds: dict[str, float]
    batch_size: int

    def speedup(self, name: str) -> float:
        """Dense time / this network's time."""
        return self.seconds["dense"] / self.seconds[name]


def step(verb: Callable[[Experiment], Result]) -> Callable[[Experiment], Result]:
    """A method of `Experiment` that does its work at the first call, and hands out what came of it ever after."""

    @wraps(verb)
    def once(self: Experiment) -> Result:
        if verb.__name__ not in self._done:
            self._done[verb.__name__] = verb(self)
        return self._done[verb.__name__]

    return once


class Experiment:
    """The steps of one run.

    Args:
        settings: see `RunSettings`.
        progress: show progress bars.
    """

    def __init__(self, settings: RunSettings, *, progress: bool = True) -> None:
        self.settings, self.progress = settings, progress
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
        self.device = torch.device(chosen)
        self._done: dict[str, Any] = {}
        self._held = ExitStack()

    def close(self) -> None:
        """Close the log and let go of the folder; both end with the process anyway."""
        if "open_log" in self._done:
            self._done["open_log"].close()
        self._done.clear()
        self._held.close()

    @step
    def load_data(self) -> Dataset:
        """The splits, on the device."""
        s = self.settings
        return load(
            s.dataset,
            s.data_root,
            image_size=s.image_size,
            seed=s.split_seed,
            device=self.device,
            train_limit=s.train_limit,
        )

    @step
    def prepare_baseline(self) -> Baseline:
        """The trained dense network: loaded, or trained now if there is no checkpoint (it says which)."""
        s, dataset = self.settings, self.load_data()
        train = recipe(s.model, pretrained=s.weights != "none", train_images=len(dataset.train))
        train = replace(train, epochs=s.baseline_epochs, val_images=s.val_images, seed=s.split_seed)
        return baseline(s.model, dataset, train, weights=s.weights, folder=Path(s.baselines), progress=self.progress)

    @step
    def draw_calibration(self) -> Tensor:
        """Training images `(N, C, H, W)` for moments, batch norm and biases; never validation or test."""
        train = self.load_data().train
        return train.sample(min(self.settings.calibration_images, len(train)), self.settings.seed)

    @step
    def factorize(self) -> ModelFactors:
        """The model factorised once, in the metric of what its layers compute. From here on the folder is held.

        Raises:
            SearchBusy: another process is at work in the run's folder.
        """
        self._held.enter_context(exclusive(self.settings.state_folder))
        dense, images = self.prepare_baseline().model, self.draw_calibration()
        with self._clock.step("factorize"):
            return factorize(dense, images, layers=self.settings.layers)

    @step
    def open_log(self) -> RunLog:
        """The text log, opened with the run's provenance and the baseline's line."""
        s, factors = self.settings, self.factorize()
        self._claim_folder()
        log = RunLog(s.log_path)
        facts = provenance(self.device, s.seed)
        head = {"model": s.model, "dataset": s.dataset, "image_size": s.image_size, "preset": s.preset}
        settings = {name: value for name, value in s.rows() if name not in head and name not in facts}
        used = {"baseline_fingerprint": self.prepare_baseline().fingerprint, "full_ranks": str(factors.full_ranks())}
        log.header({**head, **facts, **settings, **used})
        seconds = measure_latency({"dense": self._deploy_dense().run}, self._example)["dense"]
        accuracy = self.prepare_baseline().test_accuracy
        log.baseline(s.model, factors.dense_params, factors.dense_flops, accuracy, seconds)
        return log

    def menus(self) -> Menus:
        """Each layer's rank candidates, priced by the run's cost."""
        return self.price_menus()[0]

    @step
    def price_menus(self) -> tuple[Menus, CostMeasure]:
        """Each layer's rank candidates, and the measure of cost that they are priced by."""
        s, factors = self.settings, self.factorize()
        if s.cost != "latency":
            cost = CostMeasure(flops=s.cost != "params", params=s.cost != "flops")
            return build_menus(factors, cost=cost), cost
        menus = build_menus(factors)
        cache = s.state_folder / "menu-times.json"
        times = time_menus(factors, menus, self._example, runtime=self._runtime, cache=cache, progress=self.progress)
        return times.priced(factors, menus)

    @step
    def measure_sensitivity(self) -> dict[str, tuple[float, ...]]:
        """What each menu entry does to the network's output; kept beside the run."""
        factors, menus, calibration = self.factorize(), self.menus(), self.draw_calibration()
        if self.settings.sensitivity == "proxy":
            return proxy_sensitivity(menus)
        images = calibration[: min(MOST_SENSITIVITY_IMAGES, -(-len(calibration) // 4))]
        cache = self.settings.state_folder / "sensitivity.json"
        with self._clock.step("sensitivity"):
            measured = measured_sensitivity(factors, menus, images, cache=cache, progress=self.progress)
        return measured if self.settings.sensitivity == "measured" else blended_sensitivity(menus, measured)

    @step
    def make_screener(self) -> Screener:
        """What compresses a configuration and says what it is worth."""
        factors, calibration = self.factorize(), self.draw_calibration()
        return Screener(factors, calibration, self.load_data().val, limit=self.settings.screen_images)

    @step
    def solve_policies(self) -> Search:
        """The search, with its policies solved and nothing screened yet."""
        s = self.settings
        menus, cost = self.price_menus()
        settings = SearchSettings(budgets=s.budgets, candidates=s.candidates, sampler=s.sampler, cost=cost, seed=s.seed)
        sensitivity = self.measure_sensitivity()
        return Search(self.make_screener(), menus, sensitivity, settings, s.state_folder, self.open_log())

    @step
    def screen(self) -> list[Record]:
        """The record of every candidate, screened without training."""
        return self.solve_policies().run(progress=self.progress)

    def promote(self) -> list[Record]:
        """The best candidates of each budget."""
        return promote(self.screen(), self.settings.promote, self.solve_policies().settings.objective)

    @step
    def finetune(self) -> list[Finalist]:
        """The promoted candidates that fine-tuning brought to its end, evaluated once on test, and the failed ones."""
        s, dataset, promoted, log = self.settings, self.load_data(), self.promote(), self.open_log()
        training = s.finetune_recipe(len(dataset.train))
        settings = FinetuneSettings(training, s.model, self.prepare_baseline().test_accuracy, tolerance=s.tolerance)
        finalists = finetune_promoted(
            promoted, self.make_screener(), dataset, settings, s.state_folder, log, progress=self.progress
        )
        log.header({"search_seconds": self.search_seconds()})
        return finalists

    def search_seconds(self) -> dict[str, float]:
        """What the search has cost so far; see `common.search.clock.search_seconds`."""
        s = self.settings
        return search_seconds(
            self._clock.seconds(), self.screen(), epoch_seconds(s.state_folder), most_epochs=s.finetune_epochs
        )

    @step
    def deploy(self) -> DeployedSet:
        """Dense and finalists deployed alike, timed interleaved; each finalist is logged with its time."""
        finalists = self.finetune()
        models = {"dense": self._deploy_dense()}
        for finalist in finalists:
            if finalist.path is not None:
                models[finalist.record["trial"]] = self._deploy(finalist.load(str(self.device)))
        seconds = measure_latency({name: model.run for name, model in models.items()}, self._example)
        for finalist in finalists:
            self.solve_policies().log_once(self._timed(finalist, seconds))
        return DeployedSet(models, seconds, len(self._example))

    @step
    def screen_uniform(self) -> dict[float, Screening | str]:
        """Budget -> what uniform ranks of the same cost screen at, on the same images; or why there are none.

        A latency cost has no formula, so uniform ranks are then taken at that share of the FLOPs.
        """
        factors, screener = self.factorize(), self.make_screener()
        cost = CostMeasure() if self.settings.cost == "latency" else self.price_menus()[1]
        found: dict[float, Screening | str] = {}
        for budget in self.settings.budgets:
            try:
                found[budget] = screener.screen(meet_budget("uniform", factors, budget, cost=cost))
            except (CandidateFailed, ValueError) as reason:
                found[budget] = str(reason)
        return found

    def best(self) -> Finalist:
        """The finalist of fewest FLOPs among those that lose at most the tolerance on test.

        Raises:
            ValueError: there is none.
        """
        accepted = [one for one in self.finetune() if one.path is not None and one.record["accepted"]]
        if not accepted:
            raise ValueError(f"no finalist kept its accuracy within {self.settings.tolerance}: raise a budget")
        return min(accepted, key=lambda one: one.record["flops"])

    def _timed(self, finalist: Finalist, seconds: dict[str, float]) -> dict[str, Any]:
        record = {**finalist.record, "baseline_inference_time": seconds["dense"]}
        if finalist.path is None:
            return record
        model = finalist.load()
        counted = {"params": count_params(model), "flops": count_flops(model, self.load_data().example_shape)}
        if counted != {key: record[key] for key in counted}:
            raise AssertionError(f"candidate {record['trial']}: counted {counted}, the formulas say {record}")
        return {**record, "inference_time": seconds[record["trial"]], "latency_batch": len(self._example)}

    @property
    def _clock(self) -> StepClock:
        return StepClock(self.settings.state_folder / "seconds.json")

    @property
    def _example(self) -> Tensor:
        return self.draw_calibration()[: self.settings.latency_batch]

    @property
    def _runtime(self) -> str:
        return "torch" if self.device.type == "cuda" else self.settings.runtime

    def _deploy(self, model: torch.nn.Module) -> Deployed:
        return deploy(model, self._example, runtime=self._runtime)

    def _deploy_dense(self) -> Deployed:
        return self._deploy(self.prepare_baseline().model)

    def _claim_folder(self) -> None:
        """Refuse a folder that was begun with another baseline or other settings: its candidates would not compare.

        Raises:
            ValueError: naming the folder and what differs.
        """
        own = {name: value for name, value in self.settings.rows() if name not in MAY_CHANGE}
        own["baseline"] = _weights_digest(self.prepare_baseline().model)
        own = json.loads(json.dumps(own))
        path = self.settings.state_folder / "settings.json"
        if not path.exists():
            write_text(path, json.dumps(own, indent=1))
            return
        known = json.loads(path.read_text())
        differing = sorted(name for name in own if name in known and known[name] != own[name])
        if differing:
            raise ValueError(
                f"{self.settings.state_folder} was begun with another {', '.join(differing)}: "
                "delete it, or give the run another folder or seed"
            )


def _weights_digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
