"""Batches in every form that people have, read no further than asked."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from common import inputs


def stream(log):
    for number in range(100):
        log.append(number)
        yield torch.full((4, 2), float(number)), torch.zeros(4)


def test_a_sample_reads_no_more_than_it_needs():
    read = []
    found = inputs.sample(stream(read), 10)
    assert found.shape == (10, 2)
    assert read == [0, 1, 2]


@pytest.mark.parametrize(
    "given",
    [
        torch.zeros(6, 3),
        np.zeros((6, 3), np.float32),
        [torch.zeros(2, 3)] * 3,
        [(torch.zeros(2, 3), torch.zeros(2))] * 3,
        DataLoader(TensorDataset(torch.zeros(6, 3), torch.zeros(6)), batch_size=4),
    ],
    ids=["tensor", "array", "batches", "pairs", "loader"],
)
def test_one_input_in_every_form(given):
    assert inputs.joined(inputs.batches_of(given)).shape == (6, 3)


@pytest.mark.parametrize("several", [(torch.zeros(4, 2), torch.ones(4)), {"a": torch.zeros(4, 2), "b": torch.ones(4)}])
def test_several_inputs_alone_or_with_targets(several):
    for given in (several, [(several, torch.zeros(4))] * 2):
        batches = list(inputs.batches_of(given))
        assert type(batches[0]) is type(several)
        assert inputs.length(batches[0]) == 4
    pieces = list(inputs.split(several, 3))
    assert [inputs.length(piece) for piece in pieces] == [3, 1]
    assert [inputs.length(piece) for piece in inputs.split(several, 3, even=True)] == [2, 2]
    assert inputs.length(inputs.first(several, 2)) == 2


def test_a_model_is_called_as_its_inputs_say():
    assert inputs.run(lambda x: x + 1, torch.zeros(1)) == 1
    assert inputs.run(lambda x, y: x - y, (torch.ones(1), torch.ones(1))) == 0
    assert inputs.run(lambda *, left, right: left * right, {"left": torch.ones(1), "right": torch.full((1,), 3.0)}) == 3


@pytest.mark.parametrize("given", [None, 3, ["text"], [None], [torch.tensor(1.0)], {"a": "b"}])
def test_what_is_no_batch_is_named(given):
    with pytest.raises(ValueError, match="photos"):
        inputs.sample(given, 4, "photos")


def test_inputs_of_different_lengths_are_no_batch():
    with pytest.raises(ValueError, match=r"\[4, 3\] samples"):
        inputs.sample((torch.zeros(4, 2), torch.zeros(3)), 4)


@pytest.mark.parametrize("given", [[], torch.zeros(0, 3)])
def test_no_images_at_all_is_an_error(given):
    with pytest.raises(ValueError, match="no calibration images were given"):
        inputs.sample(given, 4)


def test_targets_are_asked_for():
    assert [targets.tolist() for _, targets in inputs.pairs_of([(torch.zeros(2, 1), torch.tensor([1, 2]))])] == [[1, 2]]
    with pytest.raises(ValueError, match="val must yield pairs"):
        list(inputs.pairs_of([torch.zeros(2, 1)], "val"))


def test_whole_numbers_stay_whole_on_the_way_to_the_model():
    model = torch.nn.Linear(2, 2).half()
    found = inputs.like_model({"tokens": torch.ones(2, dtype=torch.long), "image": torch.ones(2)}, model)
    assert found["tokens"].dtype == torch.long
    assert found["image"].dtype == torch.float16
