"""The policy is a pdf that meets its budget, and both of its heuristics can change what it chooses."""

from dataclasses import replace

import numpy as np
import pytest

from common.search import MenuCosts, Policy, configuration

BUDGETS = (0.5, 0.25, 0.15)


@pytest.fixture(params=BUDGETS, scope="module")
def policy(request, sensitivity, costs):
    return Policy.solve(sensitivity, costs, request.param)


def two_layers(first=(0.4, 0.1, 0.0), second=(0.4, 0.1, 0.0), sizes=(1.0, 1.0)) -> tuple[dict, MenuCosts]:
    """Two layers with menus of three entries that keep 0.2, 0.5 and all of their own cost."""
    whole = sum(sizes)
    entries = {name: np.array([0.2, 0.5, 1.0]) * size / whole for name, size in zip(("a", "b"), sizes, strict=True)}
    return {"a": first, "b": second}, MenuCosts(entries, 0.0)


def every_choice(costs: MenuCosts) -> list[dict[str, int]]:
    names = list(costs.entries)
    return [dict(zip(names, index, strict=True)) for index in np.ndindex(*(len(costs.entries[n]) for n in names))]


def test_each_layers_pdf_sums_to_one(policy):
    for p in policy.probabilities.values():
        assert p.sum() == pytest.approx(1, abs=1e-12)
        assert (p >= 0).all()


def test_the_expected_cost_is_the_budget(policy):
    assert policy.expected_cost() == pytest.approx(policy.budget, abs=1e-4)
    assert policy.expected_cost() <= policy.budget


def test_mode_and_samples_are_legal_and_within_the_budget(policy, costs, menus, factors):
    generator = np.random.default_rng(3)
    for choice in [policy.mode(), *(policy.sample(generator) for _ in range(50))]:
        assert costs.of_choice(choice) <= policy.budget
        factors.check(configuration(menus, choice))


def test_the_cost_of_a_choice_is_the_share_that_its_configuration_keeps(costs, menus, factors):
    generator = np.random.default_rng(5)
    for _ in range(20):
        choice = {name: int(generator.integers(len(menu))) for name, menu in menus.items()}
        share = factors.flops(configuration(menus, choice)) / factors.dense_flops
        assert costs.of_choice(choice) == pytest.approx(share, abs=1e-12)


def test_samples_follow_the_seed(policy, sensitivity, costs):
    warm = Policy.solve(sensitivity, costs, policy.budget, temperature=1.0)

    def draw(seed):
        generator = np.random.default_rng(seed)
        return [warm.sample(generator) for _ in range(12)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize("budget", BUDGETS)
def test_cold_policies_stand_on_the_lagrangian_optimum(sensitivity, costs, budget):
    """Nothing that is as cheap is less sensitive; at most one layer, that lambda leaves open, is still mixed."""
    cold = Policy.solve(sensitivity, costs, budget, temperature=1e-6)
    assert sum(p.max() > 0.999 for p in cold.probabilities.values()) >= len(cold.probabilities) - 1
    optimum = {name: int(p.argmax()) for name, p in cold.probabilities.items()}

    def loss(choice):
        return sum(sensitivity[name][index] for name, index in choice.items())

    as_cheap = [other for other in every_choice(costs) if costs.of_choice(other) <= costs.of_choice(optimum)]
    assert len(as_cheap) > 100
    assert min(map(loss, as_cheap)) == pytest.approx(loss(optimum), rel=1e-9)


def test_heat_raises_the_entropy(sensitivity, costs):
    entropies = [Policy.solve(sensitivity, costs, 0.25, temperature=t).entropy() for t in (1e-4, 0.1, 0.5, 2.0)]
    assert entropies == sorted(entropies)
    assert entropies[0] < 0.2 < 1 < entropies[-1]


def test_the_more_sensitive_of_two_equal_layers_keeps_more():
    policy = Policy.solve(*two_layers(first=(4.0, 1.0, 0.0), second=(0.04, 0.01, 0.0)), 0.6)
    assert policy.mode()["a"] > policy.mode()["b"]
    assert policy.probabilities["a"] @ [0, 1, 2] > policy.probabilities["b"] @ [0, 1, 2]


def test_without_the_sensitivity_heuristic_equal_layers_are_treated_alike():
    policy = Policy.solve(*two_layers(first=(4.0, 1.0, 0.0), second=(0.04, 0.01, 0.0)), 0.6, use_sensitivity=False)
    assert policy.probabilities["a"] == pytest.approx(policy.probabilities["b"])


def test_the_larger_of_two_equally_sensitive_layers_gives_more():
    policy = Policy.solve(*two_layers(sizes=(9.0, 1.0)), 0.4)
    assert policy.probabilities["a"] @ [0, 1, 2] < policy.probabilities["b"] @ [0, 1, 2]


def test_without_the_size_heuristic_equally_sensitive_layers_are_treated_alike():
    policy = Policy.solve(*two_layers(sizes=(9.0, 1.0)), 0.4, use_size=False)
    assert policy.probabilities["a"] == pytest.approx(policy.probabilities["b"])
    assert policy.expected_cost() == pytest.approx(0.4, abs=1e-4)


@pytest.mark.parametrize("switch", ["use_sensitivity", "use_size"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_each_heuristic_changes_the_pdf_of_a_real_network(sensitivity, costs, budget, switch):
    both = Policy.solve(sensitivity, costs, budget)
    one = Policy.solve(sensitivity, costs, budget, **{switch: False})
    assert max(np.abs(both.probabilities[name] - one.probabilities[name]).max() for name in costs.entries) > 0.05


def test_a_repaired_choice_fits_and_leaves_no_step_that_helps(policy, costs):
    generator = np.random.default_rng(7)
    for _ in range(40):
        start = {name: int(generator.integers(len(p))) for name, p in policy.probabilities.items()}
        before = dict(start)
        choice = policy.repaired(start)
        assert start == before
        room = policy.budget - costs.of_choice(choice)
        assert room >= 0
        for name, index in choice.items():
            if index + 1 < len(costs.entries[name]):
                dearer = costs.entries[name][index + 1] - costs.entries[name][index]
                gain = policy.sensitivity[name][index] - policy.sensitivity[name][index + 1]
                assert dearer > room or gain <= 0, (choice, name)


def test_the_update_is_a_pdf_nearer_to_the_elite(policy):
    elite = [policy.sample(np.random.default_rng(seed)) for seed in range(3)]
    before = {name: policy.probabilities[name].copy() for name in policy.probabilities}
    pulled = policy.updated(elite, 0.5)
    for name, p in pulled.probabilities.items():
        target = np.bincount([choice[name] for choice in elite], minlength=len(p)) / len(elite)
        assert p.sum() == pytest.approx(1, abs=1e-12)
        assert np.abs(p - target).sum() == pytest.approx(0.5 * np.abs(before[name] - target).sum(), abs=1e-9)
        assert (policy.probabilities[name] == before[name]).all()


def test_update_rates_of_zero_and_one_are_the_prior_and_the_elite(policy):
    elite = [policy.mode()]
    for name, index in elite[0].items():
        assert policy.updated(elite, 0).probabilities[name] == pytest.approx(policy.probabilities[name])
        assert policy.updated(elite, 1).probabilities[name][index] == pytest.approx(1)
    assert policy.updated([], 0.5) is policy


def test_the_loosened_policy_is_a_pdf_that_knows_every_entry(policy):
    assert all(p.sum() == pytest.approx(1) and p.min() > 0 for p in policy.loosened().probabilities.values())
    assert policy.loosened().entropy() > policy.entropy()


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_update_rates_outside_zero_to_one_are_refused(policy, rate):
    with pytest.raises(ValueError, match=rf"rate must be in \[0, 1\]; got {rate}"):
        policy.updated([policy.mode()], rate)


@pytest.mark.parametrize("budget", [0.0, 1e-3, 1.2, float("nan")])
def test_an_impossible_budget_is_refused_with_the_legal_range(sensitivity, costs, budget):
    with pytest.raises(ValueError, match=rf"between {costs.least:.4f}.* and 1; got {budget}"):
        Policy.solve(sensitivity, costs, budget)


def test_the_least_budget_and_the_whole_network_are_both_possible(sensitivity, costs):
    least = Policy.solve(sensitivity, costs, costs.least)
    assert set(least.mode().values()) == {0}
    whole = Policy.solve(sensitivity, costs, 1.0, temperature=1e-6)
    assert whole.mode() == {name: len(shares) - 1 for name, shares in costs.entries.items()}


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(sensitivity, costs, temperature):
    with pytest.raises(ValueError, match=f"temperature must be positive; got {temperature}"):
        Policy.solve(sensitivity, costs, 0.25, temperature=temperature)


def test_the_policy_prints_as_a_table_of_every_layer(policy):
    head, *rows = str(policy).splitlines()
    assert head.startswith(f"budget {policy.budget:.3f}")
    assert [row.split()[0] for row in rows] == list(policy.probabilities)
    for row, p in zip(rows, policy.probabilities.values(), strict=True):
        assert [float(x) for x in row.split()[-len(p) :]] == pytest.approx(p, abs=0.006)


def test_a_choice_of_dense_entries_only_is_the_dense_network(menus):
    dense = {name: len(menu) - 1 for name, menu in menus.items()}
    assert configuration(menus, dense) == {}
    cheapest = configuration(menus, dict.fromkeys(menus, 0))
    assert cheapest == {name: menu[0].ranks for name, menu in menus.items()}


def test_layers_without_a_menu_count_as_fixed_cost(factors, menus, costs):
    fewer = {name: menu for name, menu in menus.items() if name != "9"}
    share = factors.layers["9"].dense_flops / factors.dense_flops
    assert MenuCosts.of(factors, fewer).fixed == pytest.approx(costs.fixed + share)


def test_an_update_leaves_budget_and_sensitivity_alone(policy):
    pulled = policy.updated([policy.mode()])
    assert replace(pulled, probabilities=policy.probabilities) == policy


def test_without_sensitivity_the_mode_fills_the_budget_all_the_same():
    """The cheapest entries are the mode then; what room is left goes to the layers that keep least of themselves."""
    costs = MenuCosts({"a": np.linspace(0.05, 0.5, 10), "b": np.linspace(0.05, 0.5, 10)}, 0.0)
    sensitivity = {"a": np.linspace(1, 0, 10), "b": np.linspace(0.1, 0, 10)}
    for budget in (0.31, 0.51, 0.81):
        policy = Policy.solve(sensitivity, costs, budget, use_sensitivity=False)
        choice = policy.mode()
        assert budget - 0.06 <= costs.of_choice(choice) <= budget
        assert abs(choice["a"] - choice["b"]) <= 1
