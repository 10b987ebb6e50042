"""Sensitivities are zero for dense and fall along the menu; the cache is used exactly where it belongs."""

import copy
import itertools
import json

import pytest
import torch

from common.compress import Targets, factorize, reconstructed_outputs
from common.ranks import build_menus
from common.search import blended_sensitivity, measured_sensitivity, proxy_sensitivity
from common.search import sensitivity as module
from common.search.divergence import Reference, divergence


@pytest.fixture
def passes(monkeypatch):
    """The forward passes that measuring makes, one entry each."""
    made = []
    original = module.reconstructed_outputs

    def counted(*arguments):
        made.append(1)
        return original(*arguments)

    monkeypatch.setattr(module, "reconstructed_outputs", counted)
    return made


def test_it_is_zero_for_dense_and_does_not_rise_along_the_menu(sensitivity, menus):
    assert set(sensitivity) == set(menus)
    for name, values in sensitivity.items():
        assert len(values) == len(menus[name])
        assert values[-1] == 0
        assert all(a >= b >= 0 for a, b in itertools.pairwise(values)), name


def test_the_cheapest_entry_of_a_kernel_hurts(sensitivity):
    assert all(sensitivity[name][0] > 1e-5 for name in ("0", "4", "9"))


def test_the_proxy_is_the_output_error(menus):
    proxy = proxy_sensitivity(menus)
    assert proxy == {name: tuple(entry.error for entry in menu) for name, menu in menus.items()}
    assert all(values[-1] == 0 for values in proxy.values())


def test_the_blended_one_lies_between_the_two(menus, sensitivity):
    blended, proxy = blended_sensitivity(menus, sensitivity), proxy_sensitivity(menus)
    assert set(blended) == set(menus)
    for name, values in blended.items():
        assert values[-1] == 0
        assert all(a >= b for a, b in itertools.pairwise(values)), name
        for value, *pair in zip(values, sensitivity[name], proxy[name], strict=True):
            assert min(pair) <= value * (1 + 1e-12) <= max(pair) * (1 + 1e-9)


def test_anchors_are_the_passes_per_layer(factors, menus, calibration, passes):
    measured_sensitivity(factors, menus, calibration, anchors=3, progress=False)
    assert len(passes) == 3 * len(menus) + 1  # the dense network once, to see that what is kept comes to the same


def test_the_first_entry_is_measured_as_the_divergence_of_that_layer_alone(factors, menus, calibration, sensitivity):
    """By hand: compress the layer, fit it, and compare the outputs, whatever was measured before it."""
    targets = Targets.of(factors, calibration)
    with torch.no_grad():
        dense = torch.log_softmax(factors.model(targets.images).double(), dim=1)
    for name in ("0", "9"):
        found = reconstructed_outputs(factors.compress({name: menus[name][0].ranks}), targets)
        assert sensitivity[name][0] == pytest.approx(divergence(dense, found), rel=1e-3)


def test_the_model_stays_as_it_was_bit_for_bit(factors, menus, calibration):
    state = {name: tensor.clone() for name, tensor in factors.model.state_dict().items()}
    modules, training = dict(factors.model.named_modules()), factors.model.training
    measured_sensitivity(factors, menus, calibration, anchors=2, progress=False)
    after = factors.model.state_dict()
    assert any("running_mean" in name for name in state)
    assert state.keys() == after.keys()
    assert all(torch.equal(state[name], after[name]) for name in state)
    assert dict(factors.model.named_modules()) == modules
    assert factors.model.training == training


def test_a_cached_measurement_needs_no_pass(factors, menus, calibration, tmp_path, passes):
    cache = tmp_path / "run" / "sensitivity.json"
    first = measured_sensitivity(factors, menus, calibration, anchors=2, cache=cache, progress=False)
    passes.clear()
    assert measured_sensitivity(factors, menus, calibration, anchors=2, cache=cache, progress=False) == first
    assert not passes


@pytest.mark.parametrize("change", ["weights", "running statistics", "images", "menus", "anchors"])
def test_a_cache_that_belongs_to_something_else_is_measured_anew(change, factors, menus, calibration, tmp_path, passes):
    cache = tmp_path / "sensitivity.json"
    measured_sensitivity(factors, menus, calibration, anchors=2, cache=cache, progress=False)
    model, anchors = copy.deepcopy(factors.model), 2
    if change == "weights":
        model[9].bias.data[0] += 0.1
    elif change == "running statistics":
        model[1].running_mean[0] += 0.1
    elif change == "images":
        calibration = calibration.flip(0)
    elif change == "anchors":
        anchors = 3
    if change in ("weights", "running statistics"):
        factors = factorize(model, calibration)
    elif change == "menus":
        menus = build_menus(factors, size=4)
    passes.clear()
    found = measured_sensitivity(factors, menus, calibration, anchors=anchors, cache=cache, progress=False)
    assert len(passes) > len(menus)
    assert found == measured_sensitivity(factors, menus, calibration, anchors=anchors, progress=False)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: "\x00\xff" + text,
        lambda text: json.dumps({"fingerprint": json.loads(text)["fingerprint"]}),
        lambda text: json.dumps({"fingerprint": json.loads(text)["fingerprint"], "sensitivity": [1]}),
    ],
    ids=["empty", "cut off", "another type", "not text", "without values", "values of another form"],
)
def test_a_damaged_cache_is_measured_anew_and_mended(damage, factors, menus, calibration, tmp_path):
    cache = tmp_path / "sensitivity.json"
    first = measured_sensitivity(factors, menus, calibration, anchors=2, cache=cache, progress=False)
    cache.write_bytes(damage(cache.read_text()).encode("latin-1"))
    assert measured_sensitivity(factors, menus, calibration, anchors=2, cache=cache, progress=False) == first
    assert json.loads(cache.read_text())["sensitivity"].keys() == first.keys()


def test_an_entry_whose_outputs_are_not_finite_counts_as_the_most_sensitive(factors, menus, calibration, monkeypatch):
    monkeypatch.setattr(Reference, "distance", lambda self, output: float("nan"))
    found = measured_sensitivity(factors, menus, calibration, anchors=2, progress=False)
    assert all(values[0] > 1e30 and values[-1] == 0 for values in found.values())


def test_the_divergence_is_zero_for_equal_outputs_and_positive_otherwise():
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    log_probabilities = torch.log_softmax(logits.double(), dim=1)
    assert divergence(log_probabilities, logits + 3) == pytest.approx(0, abs=1e-6)
    assert divergence(log_probabilities, logits.flip(0)) > 0.1
    two = torch.log_softmax(torch.tensor([[0.0, 0.0]], dtype=torch.float64), dim=1)
    skewed = torch.tensor([[torch.tensor(3.0).log(), 0.0]])  # probabilities 3/4 and 1/4
    expected = 0.5 * torch.tensor([0.5 / 0.75, 0.5 / 0.25], dtype=torch.float64).log().sum()
    assert divergence(two, skewed) == pytest.approx(float(expected), abs=1e-6)
