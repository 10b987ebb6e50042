"""The engine of a run: factorise, search, fine-tune, deploy; as verbs that each do their work once.

A verb does what comes before it if that has not been done, and hands out the same result when it is called again. What
a killed run has finished lies in its folder and is not done again. Two fronts feed it: `Experiment` a named network and
data set, `compress_network` anybody's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .compress import ModelFactors, factorize
from .configuration import Configuration
from .cost import count_flops, count_params, measure_latency
from .deploy import Deployed, deploy
from .deployed_set import IN_INT8, DeployedSet, deploy_all
from .files import exclusive
from .inputs import Inputs, first, length
from .knee import seek
from .provenance import provenance
from .ranks import CostMeasure, Menus, build_menus, meet_budget, time_menus
from .reports import RunLog
from .run_folder import claim_folder
from .search import (
    CONTROL,
    AcceptanceRule,
    CandidateFailed,
    Executor,
    Finalist,
    Finetuning,
    LocalExecutor,
    RayExecutor,
    RaySettings,
    Record,
    Screener,
    Screening,
    Search,
    SearchSettings,
    StepClock,
    Trainer,
    blended_sensitivity,
    epoch_seconds,
    finetune_with,
    measured_sensitivity,
    promote,
    proxy_sensitivity,
    search_seconds,
    sensitivity_images,
    train_control,
)

Result = TypeVar("Result")


def step(verb: Callable[[Any], Result]) -> Callable[[Any], Result]:
    """A method of `Run` that does its work at the first call, and hands out what came of it ever after."""

    @wraps(verb)
    def once(self: Run) -> Result:
        if verb.__name__ not in self._done:
            self._done[verb.__name__] = verb(self)
        return self._done[verb.__name__]

    return once


class Run(ABC):
    """The steps of one run; a front says what is compressed, on which images, and how candidates are trained.

    Args:
        settings: the knobs; the front's own beside `SearchKnobs`.
        progress: show progress bars.
    """

    def __init__(self, settings: Any, *, progress: bool = True) -> None:
        self.settings, self.progress = settings, progress
        self._done: dict[str, Any] = {}
        self._held = ExitStack()
        self._edge_sought = False

    # --- what a front says ---------------------------------------------------------------------------------------

    @abstractmethod
    def dense_model(self) -> nn.Module:
        """The dense network, in eval mode, on its device."""

    @abstractmethod
    def draw_calibration(self) -> Inputs:
        """Training inputs for moments, batch norm and biases; never validation or test."""

    @abstractmethod
    def make_screener(self) -> Screener:
        """What compresses a configuration and says what it is worth."""

    @abstractmethod
    def make_trainer(self) -> Trainer:
        """How candidates are trained, tested and kept."""

    @abstractmethod
    def dense_score(self) -> float | None:
        """The dense network's final score; None where there is no metric."""

    @abstractmethod
    def validate_dense(self) -> float | None:
        """The dense network's score on validation, as candidates have theirs; None where there is no metric."""

    @abstractmethod
    def header(self) -> dict[str, Any]:
        """What the log's first lines say beside the knobs and the provenance."""

    @abstractmethod
    def final_score(self, model: nn.Module) -> float | None:
        """A network's final score, as the finalists have theirs; None where there is no metric."""

    def chosen_layers(self) -> str | Iterable[str]:
        """Which layers are factorised; see `factorize`."""
        return self.settings.layers

    # --- the steps -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the log and let go of the folder; both end with the process anyway."""
        if "open_log" in self._done:
            self._done["open_log"].close()
        self._done.clear()
        self._held.close()

    @step
    def factorize(self) -> ModelFactors:
        """The model factorised once, in the metric of what its layers compute. From here on the folder is held.

        Raises:
            SearchBusy: another process is at work in the run's folder.
        """
        self._held.enter_context(exclusive(self.settings.state_folder))
        dense, images = self.dense_model(), self.draw_calibration()
        if self.settings.int8 and self._runtime == "torch":
            raise ValueError("int8 is for runtimes of the CPU: take device='cpu', or int8=False")
        with self._clock.step("factorize"):
            given = images if isinstance(images, Tensor) else [(images, None)]
            return factorize(dense, given, layers=self.chosen_layers())

    @step
    def open_log(self) -> RunLog:
        """The text log, opened with the run's provenance and the baseline's line."""
        s, factors = self.settings, self.factorize()
        claim_folder(s, self.dense_model())
        log = RunLog(s.log_path)
        head = self.header()
        facts = provenance(tree_leaves(self.draw_calibration())[0].device, s.seed)
        settings = {name: value for name, value in s.rows() if name not in head and name not in facts}
        log.header({**head, **facts, **settings, "full_ranks": str(factors.full_ranks())})
        seconds = measure_latency({"dense": self._deployed_dense().run}, self._example)["dense"]
        score = self.dense_score()
        if score is not None:
            log.baseline(head["model"], factors.dense_params, factors.dense_flops, score, seconds)
            log.header({"dense_val_accuracy": self.validate_dense()})
        return log

    def menus(self) -> Menus:
        """Each layer's rank candidates, priced by the run's cost."""
        return self.price_menus()[0]

    @step
    def price_menus(self) -> tuple[Menus, CostMeasure]:
        """Each layer's rank candidates, and the measure of cost that they are priced by.

        A `max_loss` goes down to where accuracy breaks, so that its menus must not end before; where time is the cost,
        ranks narrower than the kernels like save none.
        """
        s, factors = self.settings, self.factorize()
        if s.cost != "latency":
            cost = CostMeasure(flops=s.cost != "params", params=s.cost != "flops")
            return build_menus(factors, cost=cost, narrow=s.max_loss is not None), cost
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
        images = sensitivity_images(calibration)
        cache = self.settings.state_folder / "sensitivity.json"
        kind = self.make_screener().kind
        spread = self._executor().divergences if self.settings.executor == "ray" else None
        with self._clock.step("sensitivity"):
            measured = measured_sensitivity(
                factors, menus, images, kind=kind, cache=cache, progress=self.progress, spread=spread
            )
        return measured if self.settings.sensitivity == "measured" else blended_sensitivity(menus, measured)

    @step
    def solve_policies(self) -> Search:
        """The search, with its policies solved; for a `max_loss` at the budgets that led to it, all of them screened
        and fine-tuned by then."""
        s = self.settings
        if s.max_loss is not None and not self._edge_sought:
            self._edge_sought = True
            try:
                seek(self, s.max_loss)
            except BaseException:
                self._edge_sought = False
                raise
            return self.solve_policies()
        menus, cost = self.price_menus()
        settings = SearchSettings(
            budgets=s.budgets,
            candidates=s.candidates,
            sampler=s.sampler,
            cost=cost,
            generation=s.generation,
            seed=s.seed,
        )
        sensitivity = self.measure_sensitivity()
        return Search(
            self.make_screener(), menus, sensitivity, settings, s.state_folder, self.open_log(), self._executor()
        )

    @step
    def _executor(self) -> Executor:
        """Who screens and trains: started when there is something to do, and let go of when it is done."""
        s, screener = self.settings, self.make_screener()
        if s.executor == "local":
            return LocalExecutor(screener)
        workers = RaySettings(address=s.address, workers=s.workers, threads=s.threads, storage=s.storage)
        executor = RayExecutor(screener, workers, most=min(s.generation, s.candidates))
        self._held.callback(executor.close)
        return executor

    @contextmanager
    def _workers(self) -> Iterator[Executor]:
        """Who screens and trains; afterwards they are let go of: they would slow what comes next, and its timing."""
        executor = self._executor()
        try:
            yield executor
        finally:
            executor.close()

    def use_budgets(self, budgets: tuple[float, ...]) -> None:
        """Go on with other budgets; what was done for those that stay is on disk, and not done again."""
        self.settings = replace(self.settings, budgets=budgets)
        for verb in ("solve_policies", "screen", "finetune", "deploy", "screen_uniform"):
            self._done.pop(verb, None)

    @step
    def screen(self) -> list[Record]:
        """The record of every candidate, screened without training."""
        with self._workers():
            return self.solve_policies().run(progress=self.progress)

    def promote(self) -> list[Record]:
        """The best candidates of each budget."""
        return promote(self.screen(), self.settings.promote, self.solve_policies().settings.objective)

    @step
    def dense_control(self) -> Record | None:
        """The dense network, trained as long as candidates are by the same recipe: its scores; None where the run has
        no such control, or it failed."""
        if not self.settings.control or self.dense_score() is None:
            return None
        trainer = self.make_trainer()
        if not trainer.epochs:
            return None
        rule = AcceptanceRule(self.validate_dense(), self.settings.tolerance)
        common = Finetuning(self.make_screener(), trainer, rule, self.settings.state_folder)
        with self._workers() as workers:
            control = train_control(common, workers, self.open_log(), progress=self.progress)
        if control is not None:
            kept = ("accuracy", "val_accuracy", "epochs", "finetune_seconds")
            self.open_log().header({"dense_control": {key: control[key] for key in kept}})
        return control

    def dense_validation(self) -> float | None:
        """What losses on validation are counted from: the better of the dense network and its control."""
        score, control = self.validate_dense(), self.dense_control()
        return score if control is None else max(score, control["val_accuracy"])

    @step
    def finetune(self) -> list[Finalist]:
        """The promoted candidates that fine-tuning brought to its end, with their final score; and the failed ones."""
        s, promoted, log = self.settings, self.promote(), self.open_log()
        rule = AcceptanceRule(self.dense_validation(), s.tolerance)
        with self._workers() as workers:
            finalists = finetune_with(
                promoted,
                self.make_screener(),
                self.make_trainer(),
                rule,
                s.state_folder,
                log,
                executor=workers,
                progress=self.progress,
            )
        log.header({"search_seconds": self.search_seconds()})
        return finalists

    def search_seconds(self) -> dict[str, float]:
        """What the search has cost so far; see `common.search.clock.search_seconds`."""
        s = self.settings
        return search_seconds(
            self._clock.seconds(), self.screen(), epoch_seconds(s.state_folder), most_epochs=self.make_trainer().epochs
        )

    @step
    def deploy(self) -> DeployedSet:
        """Dense and finalists deployed alike, timed interleaved; each finalist is logged with its time."""
        finalists = self.finetune()
        device = str(tree_leaves(self._example)[0].device)
        trained = {one.record["trial"]: one.load(device) for one in finalists if one.path is not None}
        int8 = self.draw_calibration() if self.settings.int8 else None
        networks = {"dense": self._deployed_dense(), **trained}
        found = deploy_all(
            networks, self._example, self._runtime, int8=int8, score=self.final_score, progress=self.progress
        )
        for finalist in finalists:
            self.solve_policies().log_once(self._timed(finalist, found.seconds))
        for name, score in found.scores.items():
            said = "" if score is None else f"{self.score_name} {score:.4f}, "
            self.open_log().info(f"{name}: {said}{1e3 * found.seconds[name]:.3g} ms per batch")
        return found

    def measured_speedup(self, config: Configuration) -> float:
        """Dense time over that of the network of this configuration, deployed alike and timed interleaved."""
        small = self._deploy(self.factorize().compress(config))
        seconds = measure_latency({"dense": self._deployed_dense().run, "small": small.run}, self._example)
        return seconds["dense"] / seconds["small"]

    @step
    def _deployed_dense(self) -> Deployed:
        return self._deploy(self.dense_model())

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
        """The finalist of fewest FLOPs among those that lose at most `max_loss` (without one, the tolerance) on
        validation.

        Raises:
            ValueError: there is none.
        """
        loss = self.settings.tolerance if self.settings.max_loss is None else self.settings.max_loss
        accepted = self.within(loss)
        if not accepted:
            raise ValueError(f"no finalist kept its accuracy within {loss}: raise a budget")
        return min(accepted, key=lambda one: one.record["flops"])

    def within(self, loss: float) -> list[Finalist]:
        """The finalists that lose at most this much of the validation score; none where there is no score."""
        rule = AcceptanceRule(self.dense_validation(), loss)
        return [one for one in self.finetune() if one.path is not None and rule.accepts(one.record["val_accuracy"])]

    @property
    def score_name(self) -> str:
        """What the finalists are scored by, as a table's column."""
        return "test accuracy"

    def summary(self) -> list[dict[str, Any]]:
        """One row per finalist, the dense network first: what it costs, what it is worth, how fast it runs."""
        factors, deployed = self.factorize(), self.deploy()

        def rows_of(name: str, params: int, flops: int, score: float | None) -> list[dict[str, Any]]:
            scores = {name: score, name + IN_INT8: deployed.scores.get(name + IN_INT8)}
            return [row(one, params, flops, scores[one]) for one in scores if one in deployed.models]

        def row(name: str, params: int, flops: int, score: float | None) -> dict[str, Any]:
            return {
                "network": name,
                "parameters": params,
                "parameters saved": 1 - params / factors.dense_params,
                "FLOPs": flops,
                "FLOPs saved": 1 - flops / factors.dense_flops,
                self.score_name: score,
                "ms per batch": 1e3 * deployed.seconds[name],
                "speed-up": deployed.speedup(name),
            }

        rows = rows_of("dense", factors.dense_params, factors.dense_flops, self.dense_score())
        control = self.dense_control()
        if control is not None:
            rows.append({**rows[0], "network": CONTROL, self.score_name: control["accuracy"]})
        for finalist in self.finetune():
            record = finalist.record
            if finalist.path is None:
                rows.append({"network": record["trial"], "failed": record["reason"]})
            else:
                rows += rows_of(record["trial"], record["params"], record["flops"], record["accuracy"])
        return rows

    def _timed(self, finalist: Finalist, seconds: dict[str, float]) -> Record:
        record = {**finalist.record, "baseline_inference_time": seconds["dense"]}
        if finalist.path is None:
            return record
        model = finalist.load()
        example = first(self._example, 1)
        device = next(model.parameters()).device
        example = example.to(device) if isinstance(example, Tensor) else example
        counted = {"params": count_params(model), "flops": count_flops(model, example)}
        if counted != {key: record[key] for key in counted}:
            raise AssertionError(f"candidate {record['trial']}: counted {counted}, the formulas say {record}")
        return {**record, "inference_time": seconds[record["trial"]], "latency_batch": length(self._example)}

    @property
    def _clock(self) -> StepClock:
        return StepClock(self.settings.state_folder / "seconds.json")

    @property
    def _example(self) -> Inputs:
        return first(self.draw_calibration(), self.settings.latency_batch)

    @property
    def _runtime(self) -> str:
        on_cpu = tree_leaves(self.draw_calibration())[0].device.type == "cpu"
        return self.settings.runtime if on_cpu else "torch"

    def _deploy(self, model: nn.Module) -> Deployed:
        return deploy(model, self._example, runtime=self._runtime)
