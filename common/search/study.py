"""The search: ask -> compress -> screen -> log, for each budget; resumable at any moment.

Candidates come in generations: those of one are all proposed before any of them is screened, and what they come to is
told in their order. So every candidate follows from the seed, its number and the generations before its own, whoever
screens them, how many at a time, and who was fast.

A search lives in a folder: an Optuna study per budget in a journal, the measured sensitivities, the promoted
candidates' results. Every result is on disk as soon as it is there. So the same command after Ctrl-C or a kill goes on
where it was and comes to the same candidates.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from pydantic import Field
from tqdm import tqdm

from ..checked import check_fields
from ..progress import progress_bar
from ..ranks import CostMeasure, Menus
from ..reports import RunLog, read_log
from .executor import Executor, LocalExecutor
from .policy import TEMPERATURE, MenuCosts, Policy, configuration
from .records import Record, stored
from .samplers import SAMPLERS, UPDATE_RATE, PolicySampler, make_sampler, search_space, within_budget
from .screening import Screener
from .trials import Notes, Trials, unique

METRIC_NAMES = {"divergence": "minus divergence", "accuracy": "validation accuracy"}
"""What a study's values are called where people watch it."""

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
        self._policy_samplers = {
            budget: PolicySampler(policy, seed=settings.seed, number=0, update_rate=settings.update_rate)
            for budget, policy in self.policies.items()
        }
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._storage = _storage(folder)
        self._notes = {
            budget: Notes(None if folder is None else folder / f"screened-{budget}.jsonl") for budget in self.policies
        }
        known = read_log(log.path).candidates if log is not None and log.path.exists() else []
        self._logged = {_identity(record) for record in known}

    def run(self, *, progress: bool = True) -> list[Record]:
        """Screen what is left to screen; every candidate's record, of this and of earlier runs, in order."""
        total = self.settings.candidates * len(self.policies)
        studies = {budget: self._trials(budget) for budget in self.policies}
        bar = progress_bar(total=total, desc="screening", unit="candidate", shown=progress)
        with bar:
            for budget, trials in studies.items():
                for record in trials.records:
                    self.log_once(record)
                bar.update(len(trials.records))
                while len(trials.records) < self.settings.candidates:
                    self._generation(budget, trials, bar)
        return [record for trials in studies.values() for record in trials.records]

    def log_once(self, record: Mapping[str, Any]) -> None:
        """Write a record to the log unless it stands there already."""
        if self._log is not None and _identity(record) not in self._logged:
            self._log.candidate(stored(record))
            self._logged.add(_identity(record))

    def _trials(self, budget: float) -> Trials:
        settings = self.settings
        name = f"budget {budget} {settings.sampler} seed {settings.seed}"
        return Trials(name, METRIC_NAMES[settings.objective], settings.generation, self._storage)

    def _generation(self, budget: float, trials: Trials, bar: tqdm) -> None:
        """Ask for a generation; screen it anywhere, but for what an earlier process has screened; tell in order."""
        settings, earlier, notes = self.settings, trials.records, self._notes[budget]
        begin = len(earlier)
        results = {record["config"]: record for record in (*earlier, *trials.cut_short())} | notes.read()
        size = min(settings.generation, settings.candidates - begin)
        asked = [self._ask(budget, trials, begin + place, begin) for place in range(size)]
        heads = [self._head(budget, trial, begin + place) for place, trial in enumerate(asked)]
        wanted = unique((head["config"] for head in heads), results)
        for place, found in self._executor.screen_all(wanted):
            results[wanted[place]] = found
            notes.add({**found, "config": wanted[place]})  # on disk, though it is not yet its turn to be told
            bar.update()
            bar.set_postfix_str(_best_so_far(list(results.values()), budget))
        for trial, head in zip(asked, heads, strict=True):
            record = {**results[head["config"]], **head}
            trials.tell(trial, record, OBJECTIVES[settings.objective])
            self.log_once(record)
        notes.forget()

    def _ask(self, budget: float, trials: Trials, number: int, seen: int) -> FrozenTrial:
        policy, settings = self.policies[budget], self.settings
        if settings.sampler == "policy":
            sampler = self._policy_samplers[budget].at(number, seen)
        else:
            sampler = make_sampler(settings.sampler, policy, seed=settings.seed, number=number)
        return trials.ask(sampler, search_space(policy))

    def _head(self, budget: float, trial: FrozenTrial, number: int) -> dict[str, Any]:
        policy = self.policies[budget]
        choice = trial.params if self.settings.sampler == "policy" else within_budget(policy, trial.params)
        config = configuration(self.menus, choice)
        return {"config": config, "trial": f"{budget:g}-{number}", "budget": budget, "seed": self.settings.seed}


def _storage(folder: Path | None) -> optuna.storages.BaseStorage | None:
    """Where a folder's studies are: in a journal; in SQLite, thirty times slower, where an older search began there."""
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / "study.sqlite3"
    if begun.exists():
        return optuna.storages.RDBStorage(f"sqlite:///{begun.resolve()}")
    journal = folder / "study.journal"
    if journal.exists():
        content = journal.read_bytes()
        if not content.endswith(b"\n"):  # killed while it was written: the next line would be damaged as well
            os.truncate(journal, content.rfind(b"\n") + 1)
    return optuna.storages.JournalStorage(JournalFileBackend(str(journal)))


def _identity(record: Mapping[str, Any]) -> tuple:
    """What tells the lines of a log apart: a candidate stands there once as screened and once as fine-tuned."""
    return record.get("trial"), record.get("seed"), record.get("status")


def _best_so_far(records: list[Record], budget: float) -> str:
    screened = [record for record in records if record["status"] == "screened"]
    if not screened:
        return f"budget {budget:g}"
    scores = [record["val_accuracy"] for record in screened if record["val_accuracy"] is not None]
    if scores:
        return f"budget {budget:g}, best validation {max(scores):.4f}"
    return f"budget {budget:g}, least divergence {min(record['divergence'] for record in screened):.4g}"
