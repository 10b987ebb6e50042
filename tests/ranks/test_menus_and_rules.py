"""Menus are Pareto fronts of legal entries; a classic rule is legal everywhere and comes up to its budget."""

import itertools

import pytest

from common.compress import factorize
from common.configuration import KernelRanks, MatrixRanks
from common.cost import count_flops, count_params
from common.ranks import (
    RULES,
    CostMeasure,
    build_menus,
    energy,
    meet_budget,
    rank_grid,
    rules,
    uniform,
    vbmf,
    worthwhile,
)
from common.ranks.evbmf import evbmf_from_singular_values
from common.ranks.menus import NARROW, RANK_MULTIPLE, WIDE_FROM

FRACTIONS = (1e-6, 0.03, 0.2, 0.5, 0.77, 1.0)


@pytest.fixture(scope="module")
def weight_only(network):
    return factorize(network, input_shape=(3, 16, 16))


@pytest.mark.parametrize("cost", [CostMeasure(), CostMeasure(flops=0, params=1), CostMeasure(flops=1, params=2)])
def test_a_menu_is_a_pareto_front_that_ends_in_the_dense_layer(factors, cost):
    for name, menu in build_menus(factors, cost=cost).items():
        shares = [cost.share(entry.flops, entry.params, factors) for entry in menu]
        errors = [entry.error for entry in menu]
        assert all(a < b for a, b in itertools.pairwise(shares)), name
        assert all(a > b for a, b in itertools.pairwise(errors)), name
        assert menu[-1].ranks is None
        assert menu[-1].error == 0
        assert all(entry.ranks is not None and 0 <= entry.error < 1 for entry in menu[:-1])


@pytest.mark.parametrize("size", [2, 5, 16])
def test_a_menu_is_no_longer_than_asked_and_keeps_its_cheapest_entry(factors, size):
    longest = build_menus(factors, size=10_000)
    for name, menu in build_menus(factors, size=size).items():
        assert 2 <= len(menu) <= size
        assert set(menu) <= set(longest[name])
        assert menu[0] == longest[name][0]


def test_the_menus_of_this_network_offer_a_choice(menus):
    assert set(menus) == {"0", "4", "7", "9", "13"}
    assert all(len(menus[name]) >= 5 for name in ("4", "7", "9", "13"))


def test_every_entry_costs_what_the_module_built_from_it_costs(factors, menus):
    for name, menu in menus.items():
        for entry in menu:
            config = {} if entry.ranks is None else {name: entry.ranks}
            model = factors.compress(config)
            layer = factors.layers[name]
            assert count_params(model) - factors.dense_params == entry.params - layer.dense_params
            assert count_flops(model, factors.input_shape) - factors.dense_flops == entry.flops - layer.dense_flops


def test_every_entry_states_the_output_error_of_its_ranks(factors, menus):
    for name, menu in menus.items():
        for entry in menu[:-1]:
            assert entry.error == pytest.approx(factors.layers[name].output_error(entry.ranks))


def test_ranks_of_wide_modes_are_multiples_of_eight(factors):
    ranks_out = {e.ranks.rank_out for e in build_menus(factors, size=10_000)["9"] if e.ranks is not None}
    assert len(ranks_out) > 2
    assert all(rank % 8 == 0 for rank in ranks_out)


@pytest.mark.parametrize("limit", [1, 2, 7, WIDE_FROM - 1, WIDE_FROM, 100, 512])
def test_the_grid_rises_from_its_step_to_the_limit(limit):
    grid = rank_grid(limit)
    step = 8 if limit >= WIDE_FROM else 1
    assert grid == sorted(set(grid))
    assert grid[0] == step
    assert grid[-1] == limit
    assert all(rank % step == 0 for rank in grid[:-1])


@pytest.mark.parametrize("limit", [1, 7, WIDE_FROM - 1, WIDE_FROM, 512])
def test_a_narrow_grid_begins_at_one_and_goes_on_as_before(limit):
    assert rank_grid(limit, narrow=True)[0] == 1
    below = [rank for rank in rank_grid(limit, narrow=True) if rank not in rank_grid(limit)]
    assert below == (list(NARROW) if limit >= WIDE_FROM else [])


def test_narrow_menus_go_below_the_smallest_ranks_of_the_others(factors):
    usual, narrow = (build_menus(factors, size=10_000, narrow=wanted) for wanted in (False, True))
    assert narrow["9"][0].flops < usual["9"][0].flops
    assert narrow["9"][0].ranks.rank_out < RANK_MULTIPLE
    assert narrow["4"] == usual["4"]  # no wide mode


@pytest.mark.parametrize("size", [1, 0, -3])
def test_a_menu_of_one_entry_is_no_menu(factors, size):
    with pytest.raises(ValueError, match=f"at least 2 entries; got size={size}"):
        build_menus(factors, size=size)


@pytest.mark.parametrize("weights", [{"flops": 0, "params": 0}, {"flops": -1, "params": 2}])
def test_a_cost_needs_a_weight(weights):
    with pytest.raises(ValueError, match="weights of a cost"):
        CostMeasure(**weights)


def test_a_mixed_cost_lies_between_its_parts(factors):
    whole = CostMeasure(flops=2, params=3).share(factors.dense_flops, factors.dense_params, factors)
    assert whole == pytest.approx(1)
    assert CostMeasure(flops=3, params=1).share(factors.dense_flops, 0, factors) == pytest.approx(0.75)


@pytest.mark.parametrize("rule", [uniform, energy])
@pytest.mark.parametrize("knob", FRACTIONS)
def test_rules_with_a_share_give_every_layer_legal_ranks(factors, weight_only, rule, knob):
    for chooser in (factors, weight_only):
        config = rule(chooser, knob)
        assert set(config) == set(chooser.layers)
        chooser.check(config)


def test_vbmfs_ranks_are_weakened_evenly_to_the_full_ones(factors):
    """Where EVBMF finds nothing in one layer and much in another, neither gets a constant times the same."""
    found, half, full = (vbmf(factors, scale) for scale in (1.0, 1.5, 2.0))
    assert full == factors.full_ranks()
    for name, tight in found.as_tuples().items():
        ends = zip(tight, half.as_tuples()[name], full.as_tuples()[name], strict=True)
        assert all(least <= between <= most for least, between, most in ends)
        leaf = 0 if len(tight) == 3 else -1
        middle = (tight[leaf] + full.as_tuples()[name][leaf]) / 2
        assert abs(half.as_tuples()[name][leaf] - middle) <= 1


@pytest.mark.parametrize("scale", [1e-6, 0.1, 1.0, 1.4, 2.0])
def test_vbmf_gives_every_layer_legal_ranks(factors, weight_only, scale):
    for chooser in (factors, weight_only):
        config = vbmf(chooser, scale)
        assert set(config) == set(chooser.layers)
        chooser.check(config)


def test_uniform_takes_the_fraction_of_each_side(factors):
    config = uniform(factors, 0.5)
    assert config["9"] == KernelRanks(rank_in=20, rank_mid=36, rank_out=36)
    assert config["7"] == MatrixRanks(18)


def test_uniform_at_one_half_costs_more_than_at_one_quarter(factors):
    assert factors.flops(uniform(factors, 0.5)) > factors.flops(uniform(factors, 0.25))


@pytest.mark.parametrize("threshold", [0.3, 0.9, 0.99, 1.0])
def test_energy_keeps_its_threshold_on_the_leaf_edges_with_the_least_ranks(weight_only, threshold):
    for name, kept_ranks in energy(weight_only, threshold).items():
        layer = weight_only.layers[name]
        if isinstance(kept_ranks, MatrixRanks):
            kept = {"mid": kept_ranks.rank}
        else:
            kept = {"in": kept_ranks.rank_in, "out": kept_ranks.rank_out}
        for edge, rank in kept.items():
            energies = layer.edge_energies(edge)
            total = float(energies.sum())
            assert float(energies[:rank].sum()) >= threshold * total - 1e-9 * total
            assert rank == 1 or float(energies[: rank - 1].sum()) < threshold * total


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("budget", [0.4, 0.2])
@pytest.mark.parametrize("cost", [CostMeasure(), CostMeasure(flops=0, params=1)])
def test_a_rule_comes_up_to_its_budget_and_not_beyond(factors, weight_only, rule, budget, cost):
    def share(config):
        return cost.share(factors.flops(config), factors.params(config), factors)

    found = meet_budget(rule, weight_only, budget, cost=cost, priced=factors)
    factors.check(found)
    assert share(found) <= budget
    make, low, high = RULES[rule]
    knobs = [low * (high / low) ** (i / 200) for i in range(201)]
    shares = [share(worthwhile(factors, make(weight_only, knob), cost)) for knob in knobs]
    assert share(found) >= max(s for s in shares if s <= budget) - 0.03


def test_vbmf_looks_at_every_matricization_once_however_often_its_knob_is_turned(monkeypatch, weight_only):
    looked = []

    def counted(values, shape):
        looked.append(shape)
        return evbmf_from_singular_values(values, shape)

    monkeypatch.setattr(rules, "evbmf_from_singular_values", counted)
    rules._vbmf_rank.cache_clear()
    meet_budget("vbmf", weight_only, 0.5)
    edges = sum(1 if layer.is_matrix else 3 for layer in weight_only.layers.values())
    assert 0 < len(looked) <= edges


def test_a_layer_that_would_cost_more_than_dense_is_left_dense(factors):
    full = factors.full_ranks()
    assert worthwhile(factors, full) == {}
    cheap = {name: KernelRanks(1, 1, 1) for name in ("4", "9")}
    assert worthwhile(factors, {**full, **cheap}) == cheap


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: uniform(f, 0), r"fraction must be in \(0, 1\]; got 0"),
        (lambda f: uniform(f, 1.01), r"fraction must be in \(0, 1\]; got 1.01"),
        (lambda f: uniform(f, float("nan")), "got nan"),
        (lambda f: energy(f, 0), r"threshold must be in \(0, 1\]; got 0"),
        (lambda f: energy(f, 2), r"threshold must be in \(0, 1\]; got 2"),
        (lambda f: vbmf(f, 0), "scale must be above 0 and at most 2; got 0"),
        (lambda f: meet_budget("tucker", f, 0.5), "rule must be one of uniform, energy, vbmf; got 'tucker'"),
        (lambda f: meet_budget("uniform", f, 1e-4), r"smallest ranks keep 0\.\d+ of the dense cost, above 0.0001"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_legal(factors, call, message):
    with pytest.raises(ValueError, match=message):
        call(factors)
