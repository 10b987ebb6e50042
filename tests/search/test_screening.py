"""Screening measures a candidate without training it, and says of one that cannot be used why."""

from dataclasses import replace

import pytest
import torch

from common.cost import count_flops, count_params
from common.data import Split
from common.finetune import TrainSettings, evaluate
from common.ranks import uniform
from common.search import CandidateFailed, Screener


def test_full_ranks_say_what_the_dense_network_says(screener, factors, digits):
    found = screener.screen(factors.full_ranks())
    assert found.divergence == pytest.approx(0, abs=1e-6)
    assert found.accuracy == evaluate(factors.model, digits.val, limit=64).accuracy


def test_fewer_ranks_diverge_more(screener, factors):
    distances = [screener.screen(uniform(factors, fraction)).divergence for fraction in (1.0, 0.4, 0.1)]
    assert distances == sorted(distances)
    assert distances[-1] > 10 * distances[0]


def test_it_states_the_counts_of_what_it_built(screener, factors):
    config = uniform(factors, 0.3)
    found, model = screener.screen(config), screener.build(config)
    assert found.params == count_params(model) < factors.dense_params
    assert found.flops == count_flops(model, factors.input_shape) < factors.dense_flops
    assert found.seconds > 0


def test_the_same_configuration_screens_alike(screener, factors):
    first, second = (screener.screen(uniform(factors, 0.3)) for _ in range(2))
    assert replace(first, seconds=0) == replace(second, seconds=0)


def test_it_looks_at_no_more_images_than_asked_and_at_validation_only(factors, calibration, digits, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("search read the test split")

    monkeypatch.setattr(digits.test, "batches", refuse)
    limited = Screener(factors, calibration, digits.val, limit=10)
    assert round(limited.screen(uniform(factors, 0.3)).accuracy * 10, 6) in range(11)
    whole = Screener(factors, calibration, digits.val, limit=10**6)
    assert round(whole.screen(uniform(factors, 0.3)).accuracy * len(digits.val), 6) in range(len(digits.val) + 1)


def test_the_dense_network_stays_as_it_was(screener, factors):
    state = {name: tensor.clone() for name, tensor in factors.model.state_dict().items()}
    screener.screen(uniform(factors, 0.3))
    assert all(torch.equal(state[name], tensor) for name, tensor in factors.model.state_dict().items())


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_fail_the_candidate(screener, factors, monkeypatch, spoilt):
    build = screener.build

    def broken(config):
        model = build(config)
        model[15].bias.data[0] = spoilt
        return model

    monkeypatch.setattr(screener, "build", broken)
    with pytest.raises(CandidateFailed, match="outputs are not finite"):
        screener.screen(uniform(factors, 0.3))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried 2 GiB"), MemoryError()])
def test_running_out_of_memory_fails_the_candidate(screener, factors, monkeypatch, error):
    def exhausted(*arguments):
        raise error

    monkeypatch.setattr(screener, "build", exhausted)
    with pytest.raises(CandidateFailed, match=r"^out of memory") as caught:
        screener.screen(uniform(factors, 0.3))
    assert "\n" not in str(caught.value)


def test_another_error_is_not_taken_for_the_candidates_fault(screener, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr(screener, "build", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        screener.screen({})


def test_a_configuration_that_cannot_be_built_is_refused(screener, factors):
    ranks = replace(factors.full_ranks()["4"], rank_in=13)
    with pytest.raises(ValueError, match=r"layer 4: rank_in must be an integer in 1\.\.12; got 13"):
        screener.screen({"4": ranks})


def test_labels_beyond_the_head_are_refused(factors, calibration, digits):
    labels = digits.val.labels.clone()
    labels[0] = 10
    wrong = Split(digits.val._images, labels, digits.val.format)
    with pytest.raises(ValueError, match="labels up to 10, but the model's head has 10 outputs"):
        Screener(factors, calibration, wrong, limit=64)


def test_a_limit_below_one_image_is_refused(factors, calibration, digits):
    with pytest.raises(ValueError, match="limit must be at least 1"):
        Screener(factors, calibration, digits.val, limit=0)


def test_training_what_was_built_does_not_move_the_dense_network(screener, factors, digits):
    from common.finetune import train

    state = {name: tensor.clone() for name, tensor in factors.model.state_dict().items()}
    train(
        screener.build(uniform(factors, 0.3)), digits, TrainSettings(epochs=1, max_batches_per_epoch=2), progress=False
    )
    assert all(torch.equal(state[name], tensor) for name, tensor in factors.model.state_dict().items())
