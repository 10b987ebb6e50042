"""The trials of one budget: in memory for the samplers, on disk for those who go on and for those who watch.

A study on disk costs a transaction per parameter and attribute, which for a network of 150 layers is a second a
candidate. So samplers work on a study in memory, and a trial goes to disk as one transaction when it is told; what a
generation has come to before that is kept in a plain file, a line per result.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ..configuration import Configuration
from .records import Record, restored, stored
from .samplers import PolicySampler

SHOWN = ("params", "flops", "compression_rate", "val_accuracy", "divergence", "seconds", "status", "reason")
"""Fields of a record that stand with its trial by themselves as well, for those who watch."""


class Trials:
    """What was asked and told for one budget.

    Args:
        name: of the study.
        metric: what its values are called.
        generation: trials that are told together; of a generation that a kill has cut short, those that are on disk
            are asked again as they stand there.
        storage: of the study on disk; None keeps nothing.
    """

    def __init__(self, name: str, metric: str, generation: int, storage: BaseStorage | None) -> None:
        self._memory = optuna.create_study(study_name=name, direction="maximize")
        self._disk = None if storage is None else _study(storage, name, metric)
        known = [] if self._disk is None else [trial for trial in self._disk.get_trials(deepcopy=False) if _done(trial)]
        self._on_disk = len(known)
        whole = self._on_disk - self._on_disk % generation
        self._memory.add_trials(known[:whole])
        self._records = [restored(trial.user_attrs["record"]) for trial in known[:whole]]
        self._cut = known[whole:]

    @property
    def records(self) -> list[Record]:
        """Of the trials that were told, in order."""
        return list(self._records)

    def cut_short(self) -> list[Record]:
        """What is known of the generation that was not told to its end."""
        return [restored(trial.user_attrs["record"]) for trial in self._cut]

    def ask(self, sampler: BaseSampler, space: Mapping[str, BaseDistribution]) -> FrozenTrial:
        """The next trial, not told yet."""
        if self._cut:
            old = self._cut.pop(0)
            return self._add(old.params, old.distributions, old.system_attrs)
        if isinstance(sampler, PolicySampler):  # without Optuna's way from a draw to a trial: slow for many layers
            return self._add(sampler.draw(self._memory.get_trials(deepcopy=False)), space)
        self._memory.sampler = sampler
        number = self._memory.ask(dict(space)).number
        return self._memory.get_trials(deepcopy=False)[number]

    def _add(
        self,
        params: Mapping[str, Any],
        space: Mapping[str, BaseDistribution],
        attributes: Mapping[str, Any] | None = None,
    ) -> FrozenTrial:
        self._memory.add_trial(
            optuna.create_trial(
                state=TrialState.RUNNING,
                params=dict(params),
                distributions=dict(space),
                system_attrs=dict(attributes or {}),
            )
        )
        return self._memory.get_trials(deepcopy=False)[-1]

    def tell(self, trial: FrozenTrial, record: Record, score: Callable[[Mapping[str, Any]], float]) -> None:
        """What a trial came to; trials are told in the order in which they were asked."""
        shown = {key: record[key] for key in SHOWN if key in record}
        for key, value in {"record": stored(record), **shown}.items():
            self._memory._storage.set_trial_user_attr(trial._trial_id, key, value)
        if record["status"] == "failed":
            done = self._memory.tell(trial.number, state=TrialState.FAIL)
        else:
            done = self._memory.tell(trial.number, score(record))
        if self._disk is not None and trial.number >= self._on_disk:
            self._disk.add_trial(done)
        self._records.append(record)


class Notes:
    """Results of a generation that is not told yet, by configuration, in a file of a line each; None: nowhere."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def read(self) -> dict[Configuration, Record]:
        """What was noted; a line that a kill cut short was not."""
        if self._path is None or not self._path.exists():
            return {}
        found = {}
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = restored(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue
            found[record["config"]] = record
        return found

    def add(self, record: Record) -> None:
        """Put a result on disk."""
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(stored(record)))  # whatever a killed process left has a line of its own
            file.flush()
            os.fsync(file.fileno())

    def forget(self) -> None:
        """All of them are told."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _study(storage: BaseStorage, name: str, metric: str) -> Study:
    study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names([metric])
    return study


def _done(trial: FrozenTrial) -> bool:
    """Whether it came to a record, as a result or as a failure."""
    return "record" in trial.user_attrs and trial.state.is_finished()


def unique(configs: Iterable[Configuration], known: Mapping[Configuration, Any]) -> list[Configuration]:
    """Those that are not known, each once, in their order."""
    return [config for config in dict.fromkeys(configs) if config not in known]
