"""Menus priced by measured time: entries slower than dense are dropped, prices survive a restart."""

import json

import pytest
import torch
from torch import nn

from common.compress import factorize
from common.deploy.profile import PROFILED, Kernel
from common.ranks import build_menus
from common.ranks import timed_menus as latency_menus
from common.search import MenuCosts, Policy, proxy_sensitivity


@pytest.fixture(scope="module")
def factors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1)).eval()
    return factorize(model, torch.randn(8, 3, 12, 12))


@pytest.fixture(scope="module")
def menus(factors):
    return build_menus(factors, size=6)


def test_every_entry_is_timed_and_the_times_are_kept(factors, menus, tmp_path):
    cache = tmp_path / "times.json"
    example = torch.randn(2, 3, 12, 12)
    times = latency_menus.time_menus(factors, menus, example, rounds=2, cache=cache, progress=False)
    assert {name: len(seconds) for name, seconds in times.entries.items()} == {n: len(m) for n, m in menus.items()}
    assert all(second > 0 for seconds in times.entries.values() for second in seconds)
    again = latency_menus.time_menus(factors, menus, example, rounds=2, cache=cache, progress=False)
    assert again == times
    assert json.loads(cache.read_text())["dense_network"] == times.dense_network


@pytest.mark.apart
@pytest.mark.parametrize("runtime", PROFILED)
def test_entries_are_timed_in_networks_by_the_kernels_that_hold_their_weights(factors, menus, runtime):
    example = torch.randn(2, 3, 12, 12)
    times = latency_menus.time_menus(factors, menus, example, runtime=runtime, rounds=2, progress=False)
    assert {name: len(seconds) for name, seconds in times.entries.items()} == {n: len(m) for n, m in menus.items()}
    assert all(second > 0 for seconds in times.entries.values() for second in seconds)


def test_a_layer_takes_what_its_stages_take_and_what_goes_on_with_them(menus):
    first, last = menus
    kernels = [
        Kernel("a", f"{first}.0", "Conv", 1.0, 0, 0),
        Kernel("b", f"{first}.1", "Conv", 2.0, 0, 0),
        Kernel("c", first, "Relu", 4.0, 0, 0),
        Kernel("d", last, "Conv", 8.0, 0, 0),
        Kernel("e", "", "Add", 16.0, 0, 0),
        Kernel("f", f"{first}x", "Conv", 32.0, 0, 0),
    ]
    assert latency_menus._by_layer(kernels, menus) == {first: 7.0, last: 8.0}


def test_layers_are_timed_alone_where_a_runtime_does_not_tell_its_kernels_apart(factors, menus, monkeypatch):
    nameless = [Kernel("a", "", "Conv", 1.0, 0, 0)]
    monkeypatch.setattr(latency_menus, "profile", lambda *args, **options: nameless)
    example = torch.randn(2, 3, 12, 12)
    times = latency_menus.time_menus(factors, menus, example, runtime="onnxruntime", rounds=2, progress=False)
    assert all(second > 0 for seconds in times.entries.values() for second in seconds)


def test_entries_that_are_not_faster_than_dense_are_dropped(factors, menus):
    name, menu = next((n, m) for n, m in menus.items() if len(m) > 3)
    seconds = {n: [1.0 + i for i in range(len(m))] for n, m in menus.items()}
    seconds[name][1] = seconds[name][-1] + 1  # slower than dense, whatever its FLOPs say
    priced, cost = latency_menus.MenuTimes(100.0, seconds).priced(factors, menus)
    assert menu[1].ranks not in [entry.ranks for entry in priced[name]]
    assert priced[name][-1].ranks is None
    shares = [cost.of_entry(entry, factors) for entry in priced[name]]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(seconds[name][-1] / 100)


def test_a_budget_is_then_a_share_of_the_dense_time(factors, menus):
    seconds = {n: [0.1 * (i + 1) for i in range(len(m))] for n, m in menus.items()}
    total = sum(values[-1] for values in seconds.values())
    priced, cost = latency_menus.MenuTimes(total, seconds).priced(factors, menus)
    costs = MenuCosts.of(factors, priced, cost)
    policy = Policy.solve(proxy_sensitivity(priced), costs, 0.6)
    chosen = policy.mode()
    assert sum(priced[n][i].seconds for n, i in chosen.items()) <= 0.6 * total * (1 + 1e-9)


def test_latency_as_the_cost_needs_times(factors, menus):
    _, cost = latency_menus.MenuTimes(1.0, {n: [1.0] * len(m) for n, m in menus.items()}).priced(factors, menus)
    with pytest.raises(ValueError, match="not measured"):
        MenuCosts.of(factors, menus, cost)


def test_layers_timed_beside_other_programs_count_by_their_ratios(factors, menus):
    """Their sum is then more than the whole network's time: a budget that ratios allow must stay within reach."""
    seconds = {n: [0.1 * (i + 1) for i in range(len(m))] for n, m in menus.items()}
    total = sum(values[-1] for values in seconds.values())
    priced, cost = latency_menus.MenuTimes(total / 3, seconds).priced(factors, menus)
    alone, cost_alone = latency_menus.MenuTimes(total, seconds).priced(factors, menus)
    assert MenuCosts.of(factors, priced, cost).least == pytest.approx(MenuCosts.of(factors, alone, cost_alone).least)
