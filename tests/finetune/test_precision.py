"""bfloat16 where it is right: gradients of convolutions on tiny maps are those of float32, every time."""

import pytest
import torch
from torch import nn

from common.finetune.precision import autocast

CPU = torch.device("cpu")


def weight_gradient(layer, images, wanted):
    layer.zero_grad()
    with autocast(CPU, wanted):
        outputs = layer(images)
    outputs.float().square().sum().backward()
    return layer.weight.grad.clone()


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (5, 5)])
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3), 2), ((1, 3), (1, 2)), ((7, 7), 1), ((3, 3), 1)])
def test_gradients_on_small_maps_are_right(size, kernel, stride):
    torch.manual_seed(0)
    padding = tuple(side // 2 for side in kernel)
    layer = nn.Conv2d(64, 24, kernel, stride, padding, bias=False).to(memory_format=torch.channels_last)
    images = torch.randn(16, 64, *size).contiguous(memory_format=torch.channels_last)
    expected = weight_gradient(layer, images, wanted=False)
    for _ in range(3):
        found = weight_gradient(layer, images, wanted=True)
        assert torch.isfinite(found).all()
        assert (found - expected).norm() <= 0.03 * expected.norm()


@pytest.mark.parametrize(("size", "inside"), [((1, 1), torch.float32), ((8, 8), torch.bfloat16)])
def test_only_convolutions_wider_than_their_map_stay_in_float32(size, inside):
    layer = nn.Conv2d(8, 8, 3, 2, 1)
    with autocast(CPU, True):
        assert layer(torch.randn(2, 8, *size)).dtype == inside
        assert nn.functional.conv2d(input=torch.randn(2, 8, *size), weight=layer.weight, padding=1).dtype == inside
        assert (torch.randn(3, 3) @ torch.randn(3, 3)).dtype == torch.bfloat16
    with autocast(CPU, False):
        assert layer(torch.randn(2, 8, 8, 8)).dtype == torch.float32
