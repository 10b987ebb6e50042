"""The search: ask -> compress -> screen -> log, for each budget; resumable at any moment.

A search lives in a folder: an Optuna study per budget in an SQLite file, the measured sensitivities, the promoted
candidates' results. Everything that is done is on disk before the next thing starts, and every candidate follows from
the seed, its number and the finished trials before it. So the same command after Ctrl-C or a kill goes on where it was
and comes to the same candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from common.compress import config_str
from common.layers import KernelRanks, MatrixRanks, Ranks
from common.logreader import read_log
from common.policy import TEMPERATURE, Costs, Policy, configuration
from common.ranks import Cost, Menus
from common.runlog import RunLog, parse_config_str
from common.samplers import SAMPLERS, UPDATE_RATE, make_sampler, search_space, within_budget
from common.screening import CandidateFailed, Screener

OBJECTIVES: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "divergence": lambda record: -record["divergence"],
    "accuracy": lambda record: record["val_accuracy"],
}
"""What a candidate is judged by before training, to be maximised."""


class SearchBusy(RuntimeError):
    """Another process is working in the same folder."""


@dataclass(frozen=True)
class SearchSettings:
    """How to search.

    Attributes:
        budgets: shares of the dense cost that candidates may keep, one study each.
        candidates: screened per budget.
        sampler: one of SAMPLERS.
        objective: one of OBJECTIVES; the divergence is the finer measure.
        cost: what the budgets are shares of.
        temperature, update_rate, use_sensitivity, use_size: of the policy; see `Policy.solve` and `PolicySampler`.
        seed: decides every draw.
    """

    budgets: tuple[float, ...] = (0.30, 0.15, 0.08)
    candidates: int = 34
    sampler: str = "policy"
    objective: str = "divergence"
    cost: Cost = field(default_factory=Cost)
    temperature: float = TEMPERATURE
    update_rate: float = UPDATE_RATE
    use_sensitivity: bool = True
    use_size: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.budgets or not all(0 < budget <= 1 for budget in self.budgets):
            raise ValueError(f"budgets are shares in (0, 1], at least one; got {self.budgets}")
        if self.candidates < 1:
            raise ValueError(f"candidates must be at least 1 per budget; got {self.candidates}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; got {self.sampler!r}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {self.objective!r}")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder for one process; the hold ends with the process, however it ends.

    Raises:
        SearchBusy: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise SearchBusy(f"another process is searching in {folder}: wait for it, or use another folder") from None
    try:
        yield
    finally:
        lock.release()


class Search:
    """Screens candidates for every budget; what it has done before in its folder it does not do again.

    Args:
        screener: for the model at hand.
        menus: of its layers.
        sensitivity: layer -> one number per menu entry.
        settings: see `SearchSettings`.
        folder: where the studies live.
        log: every candidate is logged there once.

    Raises:
        ValueError: a budget that no configuration meets.
    """

    def __init__(
        self,
        screener: Screener,
        menus: Menus,
        sensitivity: Mapping[str, tuple[float, ...]],
        settings: SearchSettings,
        folder: Path,
        log: RunLog,
    ) -> None:
        self.screener, self.menus, self.settings, self._log = screener, menus, settings, log
        costs = Costs.of(screener.factors, menus, settings.cost)
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
        folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._storage = optuna.storages.RDBStorage(f"sqlite:///{(folder / 'study.sqlite3').resolve()}")
        known = read_log(log.path).candidates if log.path.exists() else []
        self._logged = {(record.get("trial"), record.get("seed"), record.get("status")) for record in known}

    def run(self, *, progress: bool = True) -> list[dict[str, Any]]:
        """Screen what is left to screen; every candidate's record, of this and of earlier runs, in order."""
        total = self.settings.candidates * len(self.policies)
        studies = {budget: self._study(budget) for budget in self.policies}
        done = sum(len(_recorded(study)) for study in studies.values())
        bar = tqdm(total=total, initial=min(done, total), desc="screening", unit="candidate", disable=not progress)
        with bar:
            for budget, study in studies.items():
                for trial in _recorded(study):
                    self.log_once(trial.user_attrs["record"])
                while len(_recorded(study)) < self.settings.candidates:
                    self._one(budget, study)
                    bar.update()
                    bar.set_postfix_str(_best_so_far(study, budget))
        return [t.user_attrs["record"] for study in studies.values() for t in _recorded(study)]

    def log_once(self, record: Mapping[str, Any]) -> None:
        """Write a record to the log unless it stands there already."""
        key = (record.get("trial"), record.get("seed"), record.get("status"))
        if key not in self._logged:
            self._log.candidate(record)
            self._logged.add(key)

    def _study(self, budget: float) -> Study:
        """The budget's study; a trial that a kill left unfinished is given up and will be done again."""
        settings = self.settings
        name = f"budget {budget} {settings.sampler} seed {settings.seed}"
        study = optuna.create_study(storage=self._storage, study_name=name, direction="maximize", load_if_exists=True)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._tell(study, trial.number, trial.user_attrs.get("record"))
        return study

    def _one(self, budget: float, study: Study) -> None:
        policy, settings = self.policies[budget], self.settings
        number = len(_recorded(study))
        study.sampler = make_sampler(
            settings.sampler, policy, seed=settings.seed, number=number, update_rate=settings.update_rate
        )
        trial = study.ask(search_space(policy))
        choice = trial.params if settings.sampler == "policy" else within_budget(policy, trial.params)
        record = self._screened(configuration(self.menus, choice), f"{budget:g}-{number}", budget, study)
        trial.set_user_attr("record", record)
        self._tell(study, trial.number, record)
        self.log_once(record)

    def _tell(self, study: Study, number: int, record: Mapping[str, Any] | None) -> None:
        if record is None or record["status"] == "failed":
            study.tell(number, state=TrialState.FAIL)
        else:
            study.tell(number, OBJECTIVES[self.settings.objective](record))

    def _screened(self, config: Mapping[str, Ranks], trial: str, budget: float, study: Study) -> dict[str, Any]:
        head = {"config_str": config_str(config), "trial": trial, "budget": budget, "seed": self.settings.seed}
        for earlier in _recorded(study):
            if earlier.user_attrs["record"]["config_str"] == head["config_str"]:
                return {**earlier.user_attrs["record"], **head}
        dense = self.screener.factors.dense_params
        try:
            found = self.screener.screen(config)
        except CandidateFailed as failure:
            return {**head, "status": "failed", "reason": str(failure), "stage": "screen"}
        return {
            **head,
            "params": found.params,
            "flops": found.flops,
            "accuracy": None,
            "inference_time": None,
            "compression_rate": dense / found.params,
            "accepted": False,
            "status": "screened",
            "val_accuracy": found.accuracy,
            "divergence": found.divergence,
            "seconds": found.seconds,
        }


def promote(records: list[dict[str, Any]], count: int, objective: str = "divergence") -> list[dict[str, Any]]:
    """The best `count` screened candidates of each budget, without those that another of them beats in every respect.

    Two candidates with the same configuration count once. Cheapest budget last, best first within a budget.
    """
    score = OBJECTIVES[objective]
    picked: list[dict[str, Any]] = []
    for budget in sorted({record["budget"] for record in records}, reverse=True):
        screened = [r for r in records if r["budget"] == budget and r["status"] == "screened"]
        distinct = {r["config_str"]: r for r in screened}
        picked += sorted(distinct.values(), key=score, reverse=True)[:count]

    def beaten(one: dict[str, Any]) -> bool:
        return any(
            score(other) >= score(one)
            and other["flops"] <= one["flops"]
            and other["params"] <= one["params"]
            and (score(other), other["flops"], other["params"]) != (score(one), one["flops"], one["params"])
            for other in picked
        )

    return [record for record in picked if not beaten(record)]


def parse_config(text: str) -> dict[str, Ranks]:
    """A configuration from the string that logs hold; the inverse of `common.compress.config_str`.

    Raises:
        ValueError: the text is not a configuration, or a layer has neither three ranks nor one.
    """
    config: dict[str, Ranks] = {}
    for name, ranks in parse_config_str(text).items():
        if len(ranks) not in (1, 3):
            raise ValueError(f"layer {name}: a configuration has three ranks or one per layer; got {ranks}")
        config[name] = KernelRanks(*ranks) if len(ranks) == 3 else MatrixRanks(*ranks)
    return config


def _recorded(study: Study) -> list[FrozenTrial]:
    """The trials that came to a record, as a result or as a failure, in order."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if "record" in trial.user_attrs and trial.state.is_finished()
    ]


def _best_so_far(study: Study, budget: float) -> str:
    records = [t.user_attrs["record"] for t in _recorded(study)]
    accuracies = [record["val_accuracy"] for record in records if record["status"] == "screened"]
    return f"budget {budget:g}, best validation {max(accuracies):.4f}" if accuracies else f"budget {budget:g}"
