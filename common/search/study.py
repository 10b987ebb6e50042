"""The search: ask -> compress -> screen -> log, for each budget; resumable at any moment.

Candidates come in generations: those of one are all proposed before any of them is screened, and what they come to is
told in their order. So every candidate follows from the seed, its number and the generations before its own, whoever
screens them, how many at a time, and who was fast.

A search lives in a folder: an Optuna study per budget in an SQLite file, the measured sensitivities, the promoted
candidates' results. Every result is on disk as soon as it is there. So the same command after Ctrl-C or a kill goes on
where it was and comes to the same candidates.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from pydantic import Field
from tqdm import tqdm

from ..checked import check_fields
from ..configuration import Configuration
from ..ranks import CostMeasure, Menus
from ..reports import RunLog, read_log
from .executor import Executor, LocalExecutor
from .policy import TEMPERATURE, MenuCosts, Policy, configuration
from .records import Record, restored, stored
from .samplers import SAMPLERS, UPDATE_RATE, make_sampler, search_space, within_budget
from .screening import Screener

METRIC_NAMES = {"divergence": "minus divergence", "accuracy": "validation accuracy"}
"""What a study's values are called where people watch it."""

SHOWN = ("params", "flops", "compression_rate", "val_accuracy", "divergence", "seconds", "status", "reason")
"""Fields of a record that stand with its trial by themselves as well, for those who watch."""

GENERATION = 8
"""Candidates that are proposed at a time: the policy learns from whole generations."""

OBJECTIVES: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "divergence": lambda record: -record["divergence"],
    "accuracy": lambda record: record["val_accuracy"],
}
"""What a candidate is judged by before training, to be maximised."""


@dataclass(frozen=True)
class SearchSettings:
    """How to search.

    Attributes:
        budgets: shares of the dense cost that candidates may keep, one study each.
        candidates: screened per budget.
        sampler: one of SAMPLERS.
        objective: one of OBJECTIVES; the divergence is the finer measure.
        cost: what the budgets are shares of.
        generation: candidates proposed at a time, and screened side by side where there are several workers.
        temperature, update_rate, use_sensitivity, use_size: of the policy; see `Policy.solve` and `PolicySampler`.
        seed: decides every draw.
    """

    budgets: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...],
        Field(min_length=1, description="shares of the dense cost, at least one, each above 0 and at most 1"),
    ] = (0.30, 0.15, 0.08)
    candidates: Annotated[int, Field(ge=1, description="a number per budget, at least 1")] = 34
    sampler: Annotated[Literal[SAMPLERS], Field(description=f"one of {', '.join(SAMPLERS)}")] = "policy"
    objective: Annotated[Literal[tuple(OBJECTIVES)], Field(description=f"one of {', '.join(OBJECTIVES)}")] = (
        "divergence"
    )
    cost: CostMeasure = field(default_factory=CostMeasure)
    generation: Annotated[int, Field(ge=1, le=10_000, description="a number of candidates, at least 1")] = GENERATION
    temperature: Annotated[float, Field(gt=0, description="a positive number")] = TEMPERATURE
    update_rate: Annotated[float, Field(ge=0, le=1, description="a share in [0, 1]")] = UPDATE_RATE
    use_sensitivity: bool = True
    use_size: bool = True
    seed: Annotated[int, Field(ge=0, description="a whole number, 0 or more")] = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "budgets", tuple(self.budgets))
        check_fields(self)


class Search:
    """Screens candidates for every budget; what it has done before in its folder it does not do again.

    Args:
        screener: for the model at hand.
        menus: of its layers.
        sensitivity: layer -> one number per menu entry.
        settings: see `SearchSettings`.
        folder: where the studies live; None keeps them in memory, for a search that nobody resumes.
        log: every candidate is logged there once, if there is one.
        executor: who screens; None: this process.

    Raises:
        ValueError: a budget that no configuration meets.
    """

    def __init__(
        self,
        screener: Screener,
        menus: Menus,
        sensitivity: Mapping[str, tuple[float, ...]],
        settings: SearchSettings,
        folder: Path | None = None,
        log: RunLog | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.screener, self.menus, self.settings, self._log = screener, menus, settings, log
        self._executor = executor or LocalExecutor(screener)
        costs = MenuCosts.of(screener.factors, menus, settings.cost)
        self.policies = {
            budget: Policy.solve(
                sensitivity,
                costs,
                budget,
                temperature=settings.temperature,
                use_sensitivity=settings.use_sensitivity,
                use_size=settings.use_size,
            )
            for budget in settings.budgets
        }
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._storage = _storage(folder)
        known = read_log(log.path).candidates if log is not None and log.path.exists() else []
        self._logged = {_identity(record) for record in known}

    def run(self, *, progress: bool = True) -> list[Record]:
        """Screen what is left to screen; every candidate's record, of this and of earlier runs, in order."""
        total = self.settings.candidates * len(self.policies)
        studies = {budget: self._study(budget) for budget in self.policies}
        done = sum(len(_recorded(study)) for study in studies.values())
        bar = tqdm(total=total, initial=min(done, total), desc="screening", unit="candidate", disable=not progress)
        records = []
        with bar:
            for budget, study in studies.items():
                own = _records(study)
                for record in own:
                    self.log_once(record)
                while len(own) < self.settings.candidates:
                    own += self._generation(budget, study, own, bar)
                records += own
        return records

    def log_once(self, record: Mapping[str, Any]) -> None:
        """Write a record to the log unless it stands there already."""
        if self._log is not None and _identity(record) not in self._logged:
            self._log.candidate(stored(record))
            self._logged.add(_identity(record))

    def _study(self, budget: float) -> Study:
        settings = self.settings
        name = f"budget {budget} {settings.sampler} seed {settings.seed}"
        study = optuna.create_study(storage=self._storage, study_name=name, direction="maximize", load_if_exists=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([METRIC_NAMES[settings.objective]])
        return study

    def _generation(self, budget: float, study: Study, earlier: list[Record], bar: tqdm) -> list[Record]:
        """Ask for a generation, or for what a killed one lacks; screen it anywhere; tell in order."""
        settings = self.settings
        begin = len(earlier) - len(earlier) % settings.generation
        size = min(begin + settings.generation, settings.candidates) - len(earlier)
        trials: list[Trial | FrozenTrial] = self._unfinished(budget, study)[:size]
        for number in range(len(earlier) + len(trials), len(earlier) + size):
            trials.append(self._ask(budget, study, number, begin))
        heads = [self._head(budget, trial, len(earlier) + place) for place, trial in enumerate(trials)]
        known = [restored(trial.user_attrs["record"]) for trial in trials if "record" in trial.user_attrs]
        results: dict[Configuration, Record] = {record["config"]: record for record in (*known, *earlier)}
        wanted = list(dict.fromkeys(head["config"] for head in heads if head["config"] not in results))

        def note(config: Configuration) -> None:
            for trial, head in zip(trials, heads, strict=True):
                if head["config"] == config:
                    _note(study, trial, {**results[config], **head})

        for config in results.keys() & {head["config"] for head in heads}:
            note(config)
        for place, found in self._executor.screen_all(wanted):
            results[wanted[place]] = found
            note(wanted[place])  # on disk at once, though it is not yet its turn to be told
            bar.update()
            bar.set_postfix_str(_best_so_far(list(results.values()), budget))
        bar.update(len(heads) - len(wanted))
        records = [{**results[head["config"]], **head} for head in heads]
        for trial, record in zip(trials, records, strict=True):
            self._tell(study, trial.number, record)
            self.log_once(record)
        return records

    def _unfinished(self, budget: float, study: Study) -> list[FrozenTrial]:
        """The trials that were asked for and not told, in order: of a generation that a kill has cut short."""
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        space = search_space(self.policies[budget]).keys()
        for trial in running:
            if trial.params.keys() != space:  # killed while it was asked for, which will be done again
                study.tell(trial.number, state=TrialState.FAIL)
        return sorted((t for t in running if t.params.keys() == space), key=lambda trial: trial.number)

    def _ask(self, budget: float, study: Study, number: int, seen: int) -> Trial:
        policy, settings = self.policies[budget], self.settings
        study.sampler = make_sampler(
            settings.sampler, policy, seed=settings.seed, number=number, seen=seen, update_rate=settings.update_rate
        )
        return study.ask(search_space(policy))

    def _head(self, budget: float, trial: Trial | FrozenTrial, number: int) -> dict[str, Any]:
        policy = self.policies[budget]
        choice = trial.params if self.settings.sampler == "policy" else within_budget(policy, trial.params)
        config = configuration(self.menus, choice)
        return {"config": config, "trial": f"{budget:g}-{number}", "budget": budget, "seed": self.settings.seed}

    def _tell(self, study: Study, number: int, record: Mapping[str, Any]) -> None:
        if record["status"] == "failed":
            study.tell(number, state=TrialState.FAIL)
        else:
            study.tell(number, OBJECTIVES[self.settings.objective](record))


def _storage(folder: Path | None) -> optuna.storages.BaseStorage:
    if folder is None:
        return optuna.storages.InMemoryStorage()
    folder.mkdir(parents=True, exist_ok=True)
    return optuna.storages.RDBStorage(f"sqlite:///{(folder / 'study.sqlite3').resolve()}")


def _identity(record: Mapping[str, Any]) -> tuple:
    """What tells the lines of a log apart: a candidate stands there once as screened and once as fine-tuned."""
    return record.get("trial"), record.get("seed"), record.get("status")


def _recorded(study: Study) -> list[FrozenTrial]:
    """The trials that came to a record, as a result or as a failure, in order."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if "record" in trial.user_attrs and trial.state.is_finished()
    ]


def _records(study: Study) -> list[Record]:
    return [restored(trial.user_attrs["record"]) for trial in _recorded(study)]


def _note(study: Study, trial: Trial | FrozenTrial, record: Mapping[str, Any]) -> None:
    """Keep a trial's record with it."""
    attributes = {"record": stored(record), **{key: record[key] for key in SHOWN if key in record}}
    for key, value in attributes.items():
        study._storage.set_trial_user_attr(trial._trial_id, key, value)


def _best_so_far(records: list[Record], budget: float) -> str:
    screened = [record for record in records if record["status"] == "screened"]
    if not screened:
        return f"budget {budget:g}"
    scores = [record["val_accuracy"] for record in screened if record["val_accuracy"] is not None]
    if scores:
        return f"budget {budget:g}, best validation {max(scores):.4f}"
    return f"budget {budget:g}, least divergence {min(record['divergence'] for record in screened):.4g}"
