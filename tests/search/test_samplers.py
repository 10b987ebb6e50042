"""A candidate follows from the seed, its number and the finished trials; every sampler runs on the same objective."""

import numpy as np
import optuna
import pytest

from common.search import SAMPLERS, MenuCosts, Policy, make_sampler, search_space, within_budget
from common.search.samplers import UPDATE_FROM, PolicySampler

BUDGET = 0.25


@pytest.fixture(scope="module")
def policy(sensitivity, costs):
    return Policy.solve(sensitivity, costs, BUDGET)


def value(policy: Policy, choice: dict[str, int]) -> float:
    """A stand-in for screening: the sum of the sensitivities, negative, because studies maximise."""
    return -float(sum(policy.sensitivity[name][index] for name, index in choice.items()))


def run(policy: Policy, kind: str, count: int, *, seed: int = 0, study=None, **options) -> optuna.Study:
    """Ask and tell up to `count` candidates, each from a sampler of its own."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = study or optuna.create_study(direction="maximize")
    for number in range(len(study.trials), count):
        study.sampler = make_sampler(kind, policy, seed=seed, number=number, **options)
        trial = study.ask(search_space(policy))
        study.tell(trial, value(policy, within_budget(policy, trial.params)))
    return study


def choices(study: optuna.Study) -> list[dict[str, int]]:
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_the_same_seed_gives_the_same_candidates_and_another_seed_others(policy, kind):
    assert choices(run(policy, kind, 14)) == choices(run(policy, kind, 14))
    assert choices(run(policy, kind, 14)) != choices(run(policy, kind, 14, seed=1))


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("stop", [1, UPDATE_FROM, 11])
def test_a_study_continued_by_fresh_samplers_goes_on_as_if_never_stopped(policy, kind, stop):
    here, there = optuna.storages.InMemoryStorage(), optuna.storages.InMemoryStorage()
    run(policy, kind, stop, study=optuna.create_study(storage=here, study_name="s", direction="maximize"))
    optuna.copy_study(from_study_name="s", from_storage=here, to_storage=there)
    resumed = run(policy, kind, 14, study=optuna.load_study(storage=there, study_name="s"))
    assert choices(resumed) == choices(run(policy, kind, 14))


@pytest.mark.parametrize("kind", SAMPLERS)
def test_trials_that_failed_or_still_run_do_not_change_what_comes_next(policy, kind):
    plain, disturbed = run(policy, kind, 10), run(policy, kind, 10)
    disturbed.tell(disturbed.ask(search_space(policy)), state=optuna.trial.TrialState.FAIL)
    asked = []
    for study in (plain, disturbed):
        study.sampler = make_sampler(kind, policy, seed=0, number=10)
        asked.append(study.ask(search_space(policy)).params)
    assert asked[0] == asked[1]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_every_sampler_draws_from_the_whole_space_and_comes_within_the_budget(policy, costs, kind):
    for choice in choices(run(policy, kind, 12)):
        assert set(choice) == set(costs.entries)
        assert all(0 <= index < len(costs.entries[name]) for name, index in choice.items())
        assert costs.of_choice(within_budget(policy, choice)) <= BUDGET


def test_the_policy_stays_within_the_budget_without_help(policy, costs):
    assert all(costs.of_choice(choice) <= BUDGET for choice in choices(run(policy, "policy", 20)))


def test_the_policy_proposes_its_mode_first(policy):
    assert choices(run(policy, "policy", 1)) == [policy.mode()]


def test_the_policy_does_not_repeat_a_configuration(policy):
    drawn = [tuple(sorted(choice.items())) for choice in choices(run(policy, "policy", 30))]
    assert len(set(drawn)) == len(drawn)


def test_the_policy_tries_every_configuration_of_a_small_space_before_it_repeats_one():
    """Two layers of two entries, of which the budget forbids none but dense twice: three configurations."""
    entries = {"a": np.array([0.1, 0.5]), "b": np.array([0.1, 0.5])}
    small = Policy.solve({"a": (0.02, 0.0), "b": (0.03, 0.0)}, MenuCosts(entries, 0.0), 0.6, temperature=2.0)
    reachable = {tuple(sorted(small.sample(np.random.default_rng(i)).items())) for i in range(200)}
    drawn = [tuple(sorted(choice.items())) for choice in choices(run(small, "policy", len(reachable)))]
    assert len(reachable) > 1
    assert set(drawn) == reachable


def test_the_policy_learns_from_its_elite_once_enough_trials_are_finished(policy):
    sampler = PolicySampler(policy, seed=0, number=0)
    few = run(policy, "policy", UPDATE_FROM - 1).trials
    enough = run(policy, "policy", UPDATE_FROM).trials
    best = max(enough, key=lambda trial: trial.value)
    assert sampler.policy(few) is policy
    learnt = sampler.policy(enough)
    before = sum(np.log(policy.probabilities[name][index]) for name, index in best.params.items())
    after = sum(np.log(learnt.probabilities[name][index]) for name, index in best.params.items())
    assert after > before


def test_an_update_rate_of_zero_keeps_the_prior(policy):
    trials = run(policy, "policy", 12).trials
    assert PolicySampler(policy, seed=0, number=12, update_rate=0).policy(trials) is policy


def test_learning_changes_the_candidates(policy):
    assert choices(run(policy, "policy", 20)) != choices(run(policy, "policy", 20, update_rate=0))


def test_within_budget_leaves_a_choice_that_fits_and_its_argument_alone(policy, costs):
    generator = np.random.default_rng(9)
    for _ in range(30):
        start = {name: int(generator.integers(len(shares))) for name, shares in costs.entries.items()}
        before = dict(start)
        brought = within_budget(policy, start)
        assert start == before
        assert costs.of_choice(brought) <= BUDGET
        assert all(brought[name] <= start[name] for name in start)
        if costs.of_choice(start) <= BUDGET:
            assert brought == start


def test_within_budget_takes_no_step_too_many(policy, costs):
    """The last layer that was lowered would break the budget one step higher."""
    brought = within_budget(policy, {name: len(shares) - 1 for name, shares in costs.entries.items()})
    dearer = [
        costs.of_choice({**brought, name: index + 1})
        for name, index in brought.items()
        if index + 1 < len(costs.entries[name])
    ]
    assert max(dearer) > BUDGET


def test_an_unknown_sampler_is_refused_with_those_that_there_are(policy):
    with pytest.raises(ValueError, match="one of policy, tpe, random, nsga2; got 'annealing'"):
        make_sampler("annealing", policy, seed=0, number=0)


def test_the_policy_has_no_opinion_on_parameters_that_are_no_layer(policy):
    study = optuna.create_study(sampler=PolicySampler(policy, seed=0, number=0))
    with pytest.raises(ValueError, match="no menu for 'learning_rate'; it knows 0, 4"):
        study.ask().suggest_int("learning_rate", 0, 3)
