"""Anybody's network, anybody's data: one call from a trained model to a file that ships.

run = compress_network(model, train_loader, val_loader, budgets=(0.5, 0.3), folder="runs/mine")
run.table()
small = run.best(max_loss=0.005)
small.save("small.safetensors")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .checked import check_fields, from_text
from .compress import choose_layers, trace_layers
from .deployed_set import INT8_IMAGES
from .finetune import TrainSettings
from .inputs import Inputs, first, like_model, sample
from .judge import Judge, Validation
from .knee import budget_of_speedup
from .knobs import CALIBRATION_IMAGES, SearchKnobs
from .modules import unwrapped
from .reports import plots
from .run import Run, step
from .search import (
    BatchTrainer,
    CalibrationPasses,
    CalibrationTrainer,
    CallbackTrainer,
    Finalist,
    MenuCosts,
    Policy,
    Screener,
    Search,
    Trainer,
    configuration,
    for_tuning,
)
from .take_home import Small

SECOND_AIM = 0.9
"""Share of the budget at which the policy's mode reaches a speed-up that is searched as well: candidates differ."""


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(SearchKnobs):
    """The knobs of `compress_network`; see there and `SearchKnobs`."""

    model: str
    budgets: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...],
        Field(min_length=1, description="shares of the dense cost, at least one, each above 0 and at most 1"),
    ] = (0.5, 0.3)
    speedup: Annotated[float | None, Field(gt=1, le=1000, description="a number above 1, or None")] = None
    leave_dense: tuple[str, ...] = ()
    finetune_epochs: Annotated[int, Field(ge=0, le=10_000, description="a number of epochs, 0 or more")] = 3
    learning_rate: Annotated[float, Field(gt=0, description="a positive number")] = 0.01
    distill_weight: Annotated[float, Field(ge=0, le=1, description="a share in [0, 1]")] = 0.8
    feature_weight: Annotated[float, Field(ge=0, description="a number, 0 or more")] = 0.0
    calibration_passes: Annotated[int, Field(ge=0, le=10_000, description="a number of passes, 0 or more")] = 0
    augment: bool = True
    max_batches_per_epoch: Annotated[int | None, Field(ge=1, description="at least 1 or None")] = None

    def __post_init__(self) -> None:
        for name in ("budgets", "leave_dense"):
            value = from_text(getattr(self, name))
            object.__setattr__(self, name, tuple(value) if isinstance(value, list | tuple) else value)
        check_fields(self)
        self.check_int8()
        if self.calibration_passes and self.finetune_epochs:
            raise ValueError("calibration_passes is in place of epochs: give epochs=0 with it")

    @property
    def trains(self) -> bool:
        """Whether finalists are changed after their fit."""
        return self.finetune_epochs > 0 or self.calibration_passes > 0

    @property
    def name(self) -> str:
        """What the log and the folder of the run's state are called."""
        return f"{self.model}-seed{self.seed}"


@dataclass(frozen=True)
class Task:
    """What the user brings: the network, the data, and how they are trained and judged."""

    model: nn.Module
    train: Any
    val: Any
    test: Any = None
    evaluate: Callable[[nn.Module], float] | None = None
    finetune: Callable[[nn.Module, nn.Module, int], Any] | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


def compress_network(
    model: nn.Module,
    train: Any,
    val: Any,
    *,
    test: Any = None,
    folder: str | Path = "runs/htd",
    budgets: Iterable[float] = (0.5, 0.3),
    speedup: float | None = None,
    max_loss: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    finetune: Callable[[nn.Module, nn.Module, int], Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    epochs: int = 3,
    leave_dense: Iterable[str] = (),
    calibration_images: int = CALIBRATION_IMAGES,
    screen_images: int = 1000,
    details: Mapping[str, Any] | None = None,
    progress: bool = True,
    **knobs: Any,
) -> NetworkRun:
    """Search a network's ranks, fine-tune the best few, and measure them: everything kept in a folder, and resumable.

    Args:
        model: any network that maps a batch (a tensor, or a tuple or dictionary of tensors) to an output; on its
            device, trained. It is never changed.
        train, val: anything that yields (inputs, targets): a DataLoader, a list of batches, one of our splits. What
            is streamed is walked through, never kept whole.
        test: the same, for the final scores; without it they are of `val`, and the log says so.
        folder: where the log, the state and the finished networks go.
        budgets: shares of the dense cost that candidates may keep, the cost being `cost`: flops, params, mix, latency.
        speedup: in place of budgets: how many times faster, measured here.
        max_loss: in place of budgets: the smallest network that loses at most this much of the validation score, found
            by moving the budget; see `common.knee`.
        evaluate: model -> number, higher is better, in place of top-1 accuracy.
        finetune: (model, teacher, epochs) -> None, in place of our training loop.
        loss: (output, targets) -> scalar tensor, in place of cross-entropy.
        epochs: of fine-tuning; 0 for no training at all, or, with `calibration_passes`, for none on the training data.
        leave_dense: names of layers that are not touched.
        calibration_images, screen_images: how many of `train` and of `val` are looked at.
        details: kept in the files, such as {"classes": [...], "mean": [...], "std": [...]}.
        knobs: others of `NetworkSettings`: cost, candidates, sampler, sensitivity, promote, tolerance, learning_rate,
            distill_weight, feature_weight (of the dense network's feature maps in the training, see
            `common.finetune.features`), calibration_passes (with epochs=0: over the calibration images alone, in which
            finalists learn the dense network's maps and outputs, without labels, see `common.search.tuning`; `loss`,
            distill_weight, augment and max_batches_per_epoch have no part in it), augment (of our own splits; others
            are the loader's affair),
            max_batches_per_epoch (of the training: where an epoch is long, or `train` a stream without end),
            latency_batch, runtime, int8, generation, executor, address, workers, threads, storage, seed, layers,
            control.

    Returns:
        the finished run: its table, its best network, its log.

    Raises:
        ValueError: a knob out of its range; a network of which nothing can be factorised; data without targets.
        SearchBusy: another process is at work in the folder.
    """
    if speedup is not None and max_loss is not None:
        raise ValueError("speedup and max_loss are two targets: give one of them")
    if finetune is not None and knobs.get("max_batches_per_epoch") is not None:
        raise ValueError("max_batches_per_epoch is of our own training loop: finetune= decides by itself")
    if finetune is not None and knobs.get("calibration_passes"):
        raise ValueError("calibration_passes is of our own training loop: give it without finetune=")
    dense = unwrapped(model)
    if speedup is not None:
        knobs.setdefault("cost", "latency")
    unknown = set(knobs) - set(NetworkSettings.__dataclass_fields__)
    if unknown:
        known = ", ".join(sorted(NetworkSettings.__dataclass_fields__))
        raise ValueError(f"unknown knob {min(unknown)!r}; there are {known}")
    settings = NetworkSettings(
        model=type(dense).__name__,
        folder=str(folder),
        budgets=budgets if isinstance(budgets, str) else tuple(budgets),
        speedup=speedup,
        max_loss=max_loss,
        leave_dense=tuple(leave_dense),
        finetune_epochs=epochs,
        calibration_images=calibration_images,
        screen_images=screen_images,
        **knobs,
    )
    task = Task(dense, train, val, test, evaluate, finetune, loss, details or {})
    found = NetworkRun(settings, task, progress=progress)
    found.dense_score()  # first of all: a measure that does not work shows now, and not after the search
    found.deploy()
    return found


class NetworkRun(Run):
    """A run on somebody's own network; see `Run` for its steps and `compress_network` for how one is made."""

    settings: NetworkSettings

    def __init__(self, settings: NetworkSettings, task: Task, *, progress: bool = True) -> None:
        super().__init__(settings, progress=progress)
        self.task = task

    # --- what people ask of it -----------------------------------------------------------------------------------

    def table(self) -> pd.DataFrame:
        """The dense network and the finalists: parameters, FLOPs, score, measured speed; failures with their reason."""
        return pd.DataFrame(self.summary()).set_index("network")

    def best(self, max_loss: float | None = None) -> Small:
        """The cheapest finalist that loses at most this much of the validation score (None: of the run's `max_loss`,
        or its tolerance). The test score is for reporting: nothing is chosen by it.

        With a speed-up asked for, the cheapest of those that reach it; where none does, the fastest.

        Raises:
            ValueError: none kept its score, or there is no score; see `pick`.
        """
        limits = (max_loss, self.settings.max_loss, self.settings.tolerance)
        limit = next(one for one in limits if one is not None)
        dense = self.dense_validation()
        if dense is None:
            raise ValueError("this task has no score to choose by: give evaluate=, or take one with pick(trial)")
        kept = self.within(limit)
        if not kept:
            scores = {one.record["trial"]: one.record.get("val_accuracy") for one in self.finetune()}
            raise ValueError(f"no finalist is within {limit} of the dense {dense:.4f}; they have {scores}")
        if self.settings.speedup is not None:
            times = self.deploy()
            fast = [one for one in kept if times.speedup(one.record["trial"]) >= self.settings.speedup]
            kept = fast or [max(kept, key=lambda one: times.speedup(one.record["trial"]))]
        cost = "params" if self.settings.cost == "params" else "flops"
        return self._small(min(kept, key=lambda one: one.record[cost]))

    def pick(self, trial: str) -> Small:
        """The finalist of this name, such as "0.3-17".

        Raises:
            ValueError: there is none of this name, or it failed.
        """
        by_name = {one.record["trial"]: one for one in self.finetune()}
        if trial not in by_name:
            raise ValueError(f"no finalist {trial!r}; there are {', '.join(by_name)}")
        return self._small(by_name[trial])

    def plot(self) -> Any:
        """Screened candidates by divergence, finalists by score, against FLOPs and parameters."""
        factors = self.factorize()
        records = [*self.screen(), *(one.record for one in self.finetune())]
        dense = {"params": factors.dense_params, "flops": factors.dense_flops, "accuracy": self.dense_score() or 0.0}
        return plots.accuracy_cost_scatter(records, dense, tolerance=self.settings.tolerance, title=self.settings.model)

    @property
    def score_name(self) -> str:
        """What the score is: of which data, by which measure."""
        measure = "score" if self.task.evaluate is not None else "accuracy"
        return f"{'test' if self.task.test is not None else 'validation'} {measure}"

    def _small(self, finalist: Finalist) -> Small:
        device = str(tree_leaves(self._example)[0].device)
        model = finalist.load(device)
        deployed = self.deploy().models[finalist.record["trial"]]
        images = first(self.draw_calibration(), INT8_IMAGES)
        return Small(model, deployed, finalist.record, self.task.model, images, dict(self.task.details))

    # --- what the engine asks ------------------------------------------------------------------------------------

    def dense_model(self) -> nn.Module:
        return self.task.model

    @step
    def draw_calibration(self) -> Inputs:
        """The first samples of the training data, on the model's device."""
        with seeded(self.settings.seed):
            drawn = sample(self.task.train, self.settings.calibration_images, "train")
        return like_model(drawn, self.task.model)

    def chosen_layers(self) -> str | list[str]:
        if not self.settings.leave_dense:
            return self.settings.layers
        example = first(self.draw_calibration(), 1)
        chosen, skipped = choose_layers(self.task.model, trace_layers(self.task.model, example), self.settings.layers)
        if unknown := set(self.settings.leave_dense) - set(chosen) - set(skipped):
            raise ValueError(f"leave_dense names {min(unknown)!r}, which is no layer; there are {', '.join(chosen)}")
        return [name for name in chosen if name not in self.settings.leave_dense]

    @step
    def solve_policies(self) -> Search:
        """The search, with its policies solved; for a speed-up at the budgets at which it is measured.

        Raises:
            ValueError: it cannot be reached.
        """
        if self.settings.speedup is not None:
            menus, cost = self.price_menus()
            costs = MenuCosts.of(self.factorize(), menus, cost)
            sensitivity = self.measure_sensitivity()

            def measured(budget: float) -> float:
                choice = Policy.solve(sensitivity, costs, budget).mode()
                return self.measured_speedup(configuration(menus, choice))

            known = self.settings.state_folder / "speedup-budget.json"
            budget = budget_of_speedup(self.settings.speedup, measured, costs.least, known)
            budgets = (budget, max(SECOND_AIM * budget, costs.least))
            self.settings = replace(self.settings, budgets=tuple(dict.fromkeys(budgets)))
        return super().solve_policies()

    @step
    def make_screener(self) -> Screener:
        """What compresses a configuration and says what it is worth."""
        limit = self.settings.screen_images
        score = self.task.evaluate
        factors, calibration = self.factorize(), self.draw_calibration()
        with seeded(self.settings.seed):
            return Screener(factors, calibration, self.task.val, limit=limit, score=score)

    @step
    def dense_score(self) -> float | None:
        """The dense network's score by the user's measure, or its accuracy; None where there is neither."""
        return self.final_score(self.task.model)

    @step
    def validate_dense(self) -> float | None:
        """Of what candidates are judged by: all of validation, or, where nothing is trained, what is screened."""
        if not self.settings.trains:
            return self.make_screener().score_of(self.task.model)
        if self.task.test is None:
            return self.dense_score()  # of validation too
        return Judge(self.task.val, self.task.evaluate)(self.task.model)

    def final_score(self, model: nn.Module) -> float | None:
        return self._final_judge(model)

    @property
    def _final_judge(self) -> Judge:
        return Judge(self.task.val if self.task.test is None else self.task.test, self.task.evaluate)

    @step
    def make_trainer(self) -> Trainer:
        """Trains on the user's batches, by the user's own function, or on the calibration images alone."""
        s, screener = self.settings, self.make_screener()
        has_score = self.dense_score() is not None
        settings = TrainSettings(
            epochs=max(s.finetune_epochs, 1),
            learning_rate=s.learning_rate,
            weight_decay=1e-4,
            distill_weight=s.distill_weight,
            feature_weight=s.feature_weight,
            seed=s.seed,
            augment=s.augment,
            max_batches_per_epoch=s.max_batches_per_epoch,
        )
        kind, batches, more = BatchTrainer, self.task.train, {}
        if s.calibration_passes:
            kind, settings, more = CalibrationTrainer, for_tuning(settings), {"distance": screener.distance}
            batches = CalibrationPasses(self.draw_calibration(), s.calibration_passes, s.seed)
        elif self.task.finetune is not None:
            kind, more = CallbackTrainer, {"finetune": self.task.finetune}
        trainer = kind(
            self.task.model,
            batches,
            settings,
            screener.kind,
            Validation(Judge(self.task.val, self.task.evaluate), screener),
            score=self._final_judge if has_score else None,
            loss=self.task.loss,
            details=self.task.details,
            **more,
        )
        return trainer if s.trains else replace(trainer, untrained=True)

    def header(self) -> dict[str, Any]:
        shapes = [list(leaf.shape[1:]) for leaf in tree_leaves(self.draw_calibration())]
        head = {"model": self.settings.model, "dataset": "own", "input_shapes": shapes, "scored_on": self.score_name}
        return {**head, "metric": "evaluate"} if self.task.evaluate is not None else head


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, a DataLoader that shuffles by torch's global generator does so by this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
