"""Who proposes the next candidate: the policy as an Optuna sampler, and Optuna's own samplers in its place.

Every sampler is made anew for every candidate, from the seed and the candidate's number, and looks at the finished
trials only. So a search that was killed proposes the same candidates when it goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from .policy import Policy

SAMPLERS = ("policy", "tpe", "random", "nsga2")

UPDATE_FROM = 8
"""Finished trials from which the policy starts to learn from its elite."""

UPDATE_RATE = 0.9
"""Weight of the elite's frequencies in the updated pdf: the prior keeps the rest, so nothing dies out."""

ELITE_SHARE = 0.25
"""Share of the finished trials that are the elite."""

REDRAWS = 64
"""How often the policy draws again when it has drawn a configuration that was tried before; then, as a pdf that has
made up its mind may know nothing new, as often again from the loosened pdf."""

LOOSEN_EVERY = 8
"""Vain draws from the loosened pdf after which it is loosened by one layer more: bringing a draw within the budget can
undo a single departure."""


def search_space(policy: Policy) -> dict[str, IntDistribution]:
    """One integer per layer: the index into its menu."""
    return {name: IntDistribution(0, len(p) - 1) for name, p in policy.probabilities.items()}


class PolicySampler(BaseSampler):
    """Proposes the policy's mode first, then draws from its pdf, which it pulls towards the elite as trials finish.

    Args:
        policy: the prior pdf.
        seed: with the candidate's number it decides every draw.
        number: the candidate's number in the study, from 0.
        seen: how many of the study's results it may learn from, the first ones; None: all that are there.
        update_rate: weight of the elite's frequencies (cross-entropy method); 0 leaves the prior as it is.
    """

    def __init__(
        self, policy: Policy, *, seed: int, number: int, seen: int | None = None, update_rate: float = UPDATE_RATE
    ) -> None:
        self._prior, self._seen = policy, seen
        self._seed, self._number, self._update_rate = seed, number, update_rate
        self._learnt: tuple[tuple, Policy] | None = None
        self._keys: dict[int, tuple] = {}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The whole space: the layers are drawn together, since a sample must meet the budget."""
        return search_space(self._prior)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.draw([t for t in study.get_trials(deepcopy=False) if t.number != trial.number])

    def at(self, number: int, seen: int) -> PolicySampler:
        """This sampler, for another candidate; what it knows of trials that do not change any more it keeps."""
        self._number, self._seen = number, seen
        return self

    def draw(self, trials: Sequence[FrozenTrial]) -> dict[str, int]:
        """The candidate's index into each layer's menu, after all these trials: told ones, and asked ones."""
        # A failure with a record is a result too; one without was cut off, and is to be proposed again.
        results = [t for t in trials if t.state == TrialState.COMPLETE or (t.state.is_finished() and _has_record(t))]
        if self._number == 0:
            return self._prior.mode()
        asked = [
            t for t in trials if t.state == TrialState.RUNNING and t.params.keys() == self._prior.probabilities.keys()
        ]
        tried = {self._key(t) for t in (*results, *asked)}
        policy = self._policy_after(results)
        generator = np.random.default_rng([self._seed, self._number])
        drawn = policy.sample(generator)
        for redraw in range(2 * REDRAWS):
            if _key(drawn) not in tried:
                break
            wider = (redraw - REDRAWS) // LOOSEN_EVERY + 1
            drawn = (policy if redraw < REDRAWS else policy.loosened(wider)).sample(generator)
        return drawn

    def _policy_after(self, results: list[FrozenTrial]) -> Policy:
        """The pdf after those results that may be seen: the same for a whole generation."""
        seen = results[: self._seen]
        last = (len(seen), seen[-1].number if seen else None)
        if self._learnt is None or self._learnt[0] != last:
            self._learnt = last, self.policy([t for t in seen if t.state == TrialState.COMPLETE])
        return self._learnt[1]

    def _key(self, trial: FrozenTrial) -> tuple[tuple[str, int], ...]:
        if trial.number not in self._keys:
            self._keys[trial.number] = _key(trial.params)
        return self._keys[trial.number]

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise ValueError(f"the policy has no menu for {param_name!r}; it knows {', '.join(self._prior.probabilities)}")

    def policy(self, finished: list[FrozenTrial]) -> Policy:
        """The pdf after these finished trials (values are maximised)."""
        if len(finished) < UPDATE_FROM or self._update_rate == 0:
            return self._prior
        ranked = sorted(finished, key=lambda t: (-t.value, t.number))
        elite = ranked[: max(2, round(ELITE_SHARE * len(ranked)))]
        return self._prior.updated([t.params for t in elite], self._update_rate)


def make_sampler(
    kind: str,
    policy: Policy,
    *,
    seed: int,
    number: int,
    seen: int | None = None,
    update_rate: float = UPDATE_RATE,
) -> BaseSampler:
    """The sampler for candidate `number` of a study, of whose results the policy's sees the first `seen`.

    Raises:
        ValueError: an unknown kind.
    """
    own_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    if kind == "policy":
        return PolicySampler(policy, seed=seed, number=number, seen=seen, update_rate=update_rate)
    if kind == "tpe":
        return optuna.samplers.TPESampler(seed=own_seed, n_startup_trials=UPDATE_FROM)
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=own_seed)
    if kind == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=own_seed, population_size=UPDATE_FROM)
    raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; got {kind!r}")


def within_budget(policy: Policy, choice: Mapping[str, int]) -> dict[str, int]:
    """A choice of a sampler that knows no budget, brought within it without any knowledge of sensitivities.

    The layer that costs the most goes one step down its menu, again and again.
    """
    choice, entries = dict(choice), policy.costs.entries
    while policy.costs.of_choice(choice) > policy.budget:
        lowerable = {name: entries[name][index] for name, index in choice.items() if index > 0}
        choice[max(lowerable, key=lowerable.get)] -= 1
    return choice


def _has_record(trial: FrozenTrial) -> bool:
    return "record" in trial.user_attrs


def _key(params: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(params.items()))
