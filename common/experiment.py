"""One run from a trained network to deployed compressed ones, as a chain of steps that each run once.

    experiment = Experiment(preset("quick", "resnet18"))
    experiment.baseline, experiment.factors, experiment.screened, experiment.finalists, experiment.deployed

A step does the steps before it if they have not been done. What a killed run has finished lies in its folder and is not
done again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from common import data
from common.compress import ModelFactors, factorize
from common.cost import count_flops, count_params, measure_latency
from common.deploy import Deployed, deploy
from common.files import write_text
from common.latency_menus import time_menus
from common.plots import pareto_front
from common.presets import RunSettings
from common.promotion import Finalist, Finetuning, epoch_seconds, finetune_promoted
from common.provenance import provenance
from common.ranks import Cost, Menus, build_menus
from common.runlog import RunLog
from common.screening import Screener
from common.search import Search, SearchSettings, exclusive, promote
from common.search_cost import StepClock, search_seconds
from common.sensitivity import blended_sensitivity, measured_sensitivity, proxy_sensitivity
from common.train_settings import recipe
from finetuned.finetune_models import Baseline, baseline

MOST_SENSITIVITY_IMAGES = 256
"""Measured sensitivities are averaged over a quarter of the calibration images, but no more than these; there is one
pass per measured menu entry."""


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


class Experiment:
    """The steps of one run, as attributes that are computed when first asked for.

    Args:
        settings: see `RunSettings`.
        progress: show progress bars.
    """

    def __init__(self, settings: RunSettings, *, progress: bool = True) -> None:
        self.settings, self.progress = settings, progress
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
        self.device = torch.device(chosen)

    @cached_property
    def dataset(self) -> data.Dataset:
        """The splits, on the device."""
        s = self.settings
        return data.load(
            s.dataset,
            s.data_root,
            image_size=s.image_size,
            seed=s.split_seed,
            device=self.device,
            train_limit=s.train_limit,
        )

    @cached_property
    def baseline(self) -> Baseline:
        """The trained dense network: loaded, or trained now if there is no checkpoint (it says which)."""
        s = self.settings
        train = recipe(s.model, pretrained=s.weights != "none", train_images=len(self.dataset.train))
        train = replace(train, epochs=s.baseline_epochs, val_images=s.val_images, seed=s.split_seed)
        return baseline(s.model, self.dataset, train, weights=s.weights, progress=self.progress)

    @cached_property
    def log(self) -> RunLog:
        """The text log, opened with the run's provenance and the baseline's line."""
        s, factors = self.settings, self.factors
        self._claim_folder()
        log = RunLog(s.log_path)
        facts = provenance(self.device, s.seed)
        head = {"model": s.model, "dataset": s.dataset, "image_size": s.image_size, "preset": s.preset}
        settings = {name: value for name, value in s.rows() if name not in head and name not in facts}
        log.header({**head, **facts, **settings})
        seconds = measure_latency({"dense": self._deploy_dense().run}, self._example)["dense"]
        log.baseline(s.model, factors.dense_params, factors.dense_flops, self.baseline.test_accuracy, seconds)
        return log

    @cached_property
    def calibration(self) -> Tensor:
        """Training images `(N, C, H, W)` for moments, batch norm and biases; never validation or test."""
        count = min(self.settings.calibration_images, len(self.dataset.train))
        return self.dataset.train.sample(count, self.settings.seed)

    @cached_property
    def factors(self) -> ModelFactors:
        """The model factorised once, in the metric of what its layers compute."""
        dense, images = self.baseline.model, self.calibration
        with self._clock.step("factorize"):
            return factorize(dense, images, layers=self.settings.layers)

    @cached_property
    def menus(self) -> Menus:
        """Each layer's rank candidates, priced by the run's cost."""
        return self._priced_menus[0]

    @cached_property
    def _priced_menus(self) -> tuple[Menus, Cost]:
        s = self.settings
        if s.cost != "latency":
            cost = Cost(flops=s.cost != "params", params=s.cost != "flops")
            return build_menus(self.factors, cost=cost), cost
        menus = build_menus(self.factors)
        cache = s.state_folder / "menu-times.json"
        times = time_menus(
            self.factors, menus, self._example, runtime=self._runtime, cache=cache, progress=self.progress
        )
        return times.priced(self.factors, menus)

    @cached_property
    def sensitivity(self) -> dict[str, tuple[float, ...]]:
        """What each menu entry does to the network's output; kept beside the run."""
        if self.settings.sensitivity == "proxy":
            return proxy_sensitivity(self.menus)
        images = self.calibration[: min(MOST_SENSITIVITY_IMAGES, -(-len(self.calibration) // 4))]
        cache = self.settings.state_folder / "sensitivity.json"
        factors, menus = self.factors, self.menus
        with self._clock.step("sensitivity"):
            measured = measured_sensitivity(factors, menus, images, cache=cache, progress=self.progress)
        return measured if self.settings.sensitivity == "measured" else blended_sensitivity(self.menus, measured)

    @cached_property
    def screener(self) -> Screener:
        return Screener(self.factors, self.calibration, self.dataset.val, limit=self.settings.screen_images)

    @cached_property
    def search(self) -> Search:
        """The search, with its policies solved and nothing screened yet."""
        s = self.settings
        settings = SearchSettings(
            budgets=s.budgets, candidates=s.candidates, sampler=s.sampler, cost=self._priced_menus[1], seed=s.seed
        )
        return Search(self.screener, self.menus, self.sensitivity, settings, s.state_folder, self.log)

    @cached_property
    def screened(self) -> list[dict[str, Any]]:
        """The record of every candidate, screened without training."""
        search = self.search
        with exclusive(self.settings.state_folder):
            return search.run(progress=self.progress)

    @cached_property
    def promoted(self) -> list[dict[str, Any]]:
        """The best candidates of each budget."""
        return promote(self.screened, self.settings.promote, self.search.settings.objective)

    @cached_property
    def finalists(self) -> list[Finalist]:
        """The promoted candidates that fine-tuning brought to its end, evaluated once on test, and the failed ones."""
        s = self.settings
        plan = Finetuning(
            s.finetuning(len(self.dataset.train)), s.model, self.baseline.test_accuracy, tolerance=s.tolerance
        )
        promoted = self.promoted
        with exclusive(s.state_folder):
            finalists = finetune_promoted(
                promoted, self.screener, self.dataset, plan, s.state_folder, self.log, progress=self.progress
            )
        self.log.header({"search_seconds": self.search_seconds})
        return finalists

    @property
    def search_seconds(self) -> dict[str, float]:
        """What the search has cost so far; see `common.search_cost.search_seconds`."""
        s = self.settings
        return search_seconds(
            self._clock.seconds(), self.screened, epoch_seconds(s.state_folder), most_epochs=s.finetune_epochs
        )

    @cached_property
    def deployed(self) -> DeployedSet:
        """Dense and finalists deployed alike, timed interleaved; each finalist is logged with its time."""
        finished = [finalist for finalist in self.finalists if finalist.path is not None]
        models = {"dense": self._deploy_dense()}
        for finalist in finished:
            models[finalist.record["trial"]] = self._deploy(finalist.load(str(self.device)))
        seconds = measure_latency({name: model.run for name, model in models.items()}, self._example)
        for finalist in self.finalists:
            self.search.log_once(self._timed(finalist, seconds))
        return DeployedSet(models, seconds, len(self._example))

    def summary(self) -> list[dict[str, Any]]:
        """One row per finalist, the dense network first: what it costs, what it is worth, how fast it runs."""
        factors, times = self.factors, self.deployed
        rows = [self._row("dense", factors.dense_params, factors.dense_flops, self.baseline.test_accuracy, times)]
        for finalist in self.finalists:
            record = finalist.record
            if finalist.path is None:
                rows.append({"network": record["trial"], "failed": record["reason"]})
            else:
                rows.append(self._row(record["trial"], record["params"], record["flops"], record["accuracy"], times))
        return rows

    def front(self) -> list[dict[str, Any]]:
        """The screened candidates that no other beats in FLOPs and validation accuracy."""
        screened = [record for record in self.screened if record["status"] == "screened"]
        picked = pareto_front([r["flops"] for r in screened], [r["val_accuracy"] for r in screened])
        return [screened[i] for i in picked]

    def _row(self, name: str, params: int, flops: int, accuracy: float, times: DeployedSet) -> dict[str, Any]:
        return {
            "network": name,
            "parameters": params,
            "parameters saved": 1 - params / self.factors.dense_params,
            "FLOPs": flops,
            "FLOPs saved": 1 - flops / self.factors.dense_flops,
            "test accuracy": accuracy,
            "ms per batch": 1e3 * times.seconds[name],
            "speed-up": times.speedup(name),
        }

    def _timed(self, finalist: Finalist, seconds: dict[str, float]) -> dict[str, Any]:
        record = {**finalist.record, "baseline_inference_time": seconds["dense"]}
        if finalist.path is None:
            return record
        model = finalist.load()
        counted = {"params": count_params(model), "flops": count_flops(model, self.dataset.example_shape)}
        if counted != {key: record[key] for key in counted}:
            raise AssertionError(f"candidate {record['trial']}: counted {counted}, the formulas say {record}")
        return {**record, "inference_time": seconds[record["trial"]], "latency_batch": len(self._example)}

    @property
    def _clock(self) -> StepClock:
        return StepClock(self.settings.state_folder / "seconds.json")

    @cached_property
    def _example(self) -> Tensor:
        return self.calibration[: self.settings.latency_batch]

    @property
    def _runtime(self) -> str:
        return "torch" if self.device.type == "cuda" else self.settings.runtime

    def _deploy(self, model: torch.nn.Module) -> Deployed:
        return deploy(model, self._example, runtime=self._runtime)

    def _deploy_dense(self) -> Deployed:
        return self._deploy(self.baseline.model)

    def _claim_folder(self) -> None:
        """Refuse a folder that was begun with another baseline or other settings: its candidates would not compare.

        Raises:
            ValueError: naming the folder and what differs.
        """
        grows = ("candidates", "promote", "tolerance", "latency_batch", "runtime", "folder", "data_root", "device")
        own = {name: value for name, value in self.settings.rows() if name not in grows}
        own["baseline"] = _weights_digest(self.baseline.model)
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
