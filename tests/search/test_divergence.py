"""Class numbers that the outputs get right, and targets that are no class."""

import pytest
import torch

from common.search import accuracy
from common.search.divergence import IGNORED


def outputs(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("void", [255, 5, IGNORED, -1])
def test_positions_of_no_class_are_not_asked(void):
    logits = outputs(4, 5, 6, 7)
    classes = logits.argmax(1)
    classes[:, :2] = (classes[:, :2] + 1) % 5  # two rows of six wrong
    assert accuracy(logits, classes) == (4 * 4 * 7, 4 * 6 * 7)
    classes[:, 1:4] = void  # of the rows left one is wrong
    assert accuracy(logits, classes) == (4 * 2 * 7, 4 * 3 * 7)


def test_samples_that_torchs_losses_leave_out_are_not_asked():
    logits = outputs(6, 5)
    classes = logits.argmax(1)
    classes[:2] = IGNORED
    assert accuracy(logits, classes) == (4, 4)


@pytest.mark.parametrize("strange", [5, 255, -1])
def test_a_class_that_the_network_does_not_know_is_named(strange):
    classes = torch.tensor([0, strange, 2])
    with pytest.raises(ValueError, match=f"class {strange}, but the network's 5 outputs"):
        accuracy(outputs(3, 5), classes)
