"""Graphs of plain layers, written by hand: torch's outputs at every batch size."""

import pytest
import torch
from torch import nn

from common.deploy import onnx_session
from common.deploy.onnx_graph import onnx_layer
from tests.helpers import relative_error


def images(count, shape):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))


LAYERS = {
    "convolution": (nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (6, 9, 11)),
    "same": (nn.Conv2d(6, 8, (3, 5), padding="same", dilation=(1, 2), bias=False), (6, 9, 11)),
    "valid": (nn.Conv2d(6, 8, 3, padding="valid"), (6, 9, 11)),
    "reflect": (nn.Conv2d(6, 8, 3, padding=(1, 2), padding_mode="reflect"), (6, 9, 11)),
    "replicate": (nn.Conv2d(6, 8, 3, padding=(1, 2), padding_mode="replicate"), (6, 9, 11)),
    "circular": (nn.Conv2d(6, 8, 3, padding=(1, 2), padding_mode="circular"), (6, 9, 11)),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2), (6, 9, 11)),
    "linear": (nn.Linear(7, 5), (7,)),
    "linear without bias": (nn.Linear(7, 5, bias=False), (7,)),
    "behind a flatten": (
        nn.Sequential(nn.Unflatten(1, (2, 3, 4)), nn.Conv2d(2, 5, (3, 1)), nn.Flatten(), nn.Linear(20, 3)),
        (24,),
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_hand_written_layers_equal_torch(case):
    layer, shape = LAYERS[case]
    run = onnx_session(onnx_layer(layer, shape), threads=1)
    for batch in (1, 3):
        with torch.no_grad():
            assert relative_error(run(images(batch, shape)), layer(images(batch, shape))) < 1e-5


def test_a_layer_that_has_no_hand_written_graph_is_named():
    with pytest.raises(ValueError, match=r"got BatchNorm2d\(3"):
        onnx_layer(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), (3, 16, 12))
