"""Tuning on the calibration images: what they are handed out as, and that a network comes nearer to the dense one."""

from dataclasses import replace

import pytest
import torch

from common.finetune import TrainSettings
from common.search import CalibrationPasses, CalibrationTrainer, for_tuning
from common.search.tuning import BATCH, MAPS_WEIGHT
from tests.helpers import halved


def test_every_pass_has_each_sample_once_in_another_order():
    batches = [inputs for inputs, targets in CalibrationPasses(torch.arange(2 * BATCH), 3, seed=0) if targets is None]
    assert len(batches) == len(CalibrationPasses(torch.arange(2 * BATCH), 3, seed=0)) == 6
    passes = [torch.cat(batches[place : place + 2]).tolist() for place in (0, 2, 4)]
    assert all(sorted(one) == list(range(2 * BATCH)) for one in passes)
    assert passes[0] != passes[1] != passes[2]


def test_the_order_follows_from_the_seed():
    drawn = [[batch.tolist() for batch, _ in CalibrationPasses(torch.arange(40), 2, seed)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("number", "batches", "size"), [(2, 1, 2), (BATCH - 1, 1, BATCH - 1), (2 * BATCH + 1, 2, BATCH)]
)
def test_batches_are_whole(number, batches, size):
    """A last batch of one sample would stop a batch norm."""
    found = [len(inputs) for inputs, _ in CalibrationPasses(torch.zeros(number, 3), 1, seed=0)]
    assert found == [size] * batches


def test_several_inputs_stay_together():
    numbers = torch.arange(40)
    for inputs, _ in CalibrationPasses({"left": numbers, "right": -numbers[:, None]}, 2, seed=0):
        assert torch.equal(inputs["left"], -inputs["right"][:, 0])


def test_a_single_sample_is_refused():
    with pytest.raises(ValueError, match="at least 2 calibration images"):
        CalibrationPasses(torch.zeros(1, 3), 1, seed=0)


def test_settings_ask_for_maps_and_for_no_targets():
    found = for_tuning(TrainSettings(epochs=3, distill_weight=0.5, learning_rate=0.01, max_batches_per_epoch=7))
    assert (found.epochs, found.distill_weight, found.max_batches_per_epoch) == (1, 1.0, None)
    assert (found.feature_weight, found.learning_rate) == (MAPS_WEIGHT, 0.01)
    assert for_tuning(replace(found, feature_weight=3.0)).feature_weight == 3.0


def test_a_fitted_network_comes_nearer_to_the_dense_one(screener, factors, calibration, network, tmp_path):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    small = screener.build(halved(factors))
    fitted = screener.distance(small)
    trainer = CalibrationTrainer(
        network, CalibrationPasses(calibration, 8, 0), for_tuning(TrainSettings(learning_rate=0.01)), screener.kind,
        lambda model: -screener.distance(model), distance=screener.distance,
    )  # fmt: skip
    told = []
    (epoch,) = trainer.train(small, tmp_path / "state.pt", told.append)
    assert told == [epoch]
    assert -epoch.val_accuracy == pytest.approx(screener.distance(small))
    assert screener.distance(small) < 0.9 * fitted
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert trainer.facts["calibration_passes"] == 8
    assert trainer.facts["calibration_images"] == len(calibration)


def test_what_is_farther_from_the_dense_network_than_before_is_not_kept(
    screener, factors, calibration, network, tmp_path
):
    """At full ranks there is nothing to gain, and every step only leads away."""
    small = screener.build(factors.full_ranks())
    fitted = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    few = CalibrationPasses(calibration[:8], 3, seed=0)
    trainer = CalibrationTrainer(
        network, few, for_tuning(TrainSettings(learning_rate=0.5)), screener.kind, screener.score_of,
        distance=screener.distance,
    )  # fmt: skip
    (epoch,) = trainer.train(small, tmp_path / "state.pt", lambda done: None)
    assert epoch.val_accuracy == screener.score_of(small)
    assert all(torch.equal(fitted[name], tensor) for name, tensor in small.state_dict().items())
