"""Kernels of a runtime: which layers they are, what they compute and move, and what the machine could do at best."""

import pytest
import torch
from torch import nn

from benchmarks.roofline import by_layer
from common.compress import factorize
from common.configuration import Configuration
from common.cost import count_flops
from common.deploy import deploy
from common.deploy.profile import PROFILED, Kernel, Roofline, profile, roofline
from common.ranks import uniform

pytestmark = pytest.mark.apart


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 16),
    ).eval()


@pytest.mark.parametrize("runtime", PROFILED)
def test_kernels_do_the_networks_arithmetic_layer_by_layer(runtime):
    pytest.importorskip("openvino" if runtime == "openvino" else "onnxruntime")
    model, images = network(), torch.randn(4, 3, 16, 16)
    kernels = profile(model, images, runtime=runtime, rounds=3)
    work = {name: sum(k.flops for k in kernels if k.layer == name) for name in ("0", "2")}
    # onnxruntime pads channels to what its blocks hold; these fill them but for the images' own three.
    assert work == {"0": 4 * 32 * 27 * 256, "2": 4 * 64 * 32 * 9 * 64}
    assert all(kernel.seconds > 0 and kernel.bytes > 0 for kernel in kernels if kernel.flops)
    least = 4 * (4 * 3 * 256 + 4 * 32 * 256 + 32 * 27)
    assert sum(kernel.bytes for kernel in kernels if kernel.layer == "0") >= least


def test_in_int8_kernels_do_the_same_arithmetic_and_move_a_quarter_of_the_bytes():
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    model, images = network(), torch.randn(4, 3, 16, 16)
    floats = profile(model, images, runtime="openvino", rounds=2)
    small = profile(model, images, runtime="openvino", rounds=2, int8=torch.randn(8, 3, 16, 16))

    def of(kernels, layer):
        return [kernel for kernel in kernels if kernel.layer == layer and kernel.flops]

    for layer in ("0", "2"):
        [one], [other] = of(floats, layer), of(small, layer)
        assert one.flops == other.flops
        assert other.bytes == pytest.approx(one.bytes / 4, rel=0.02)  # biases stay in float32
    assert of(small, "6")


def test_in_int8_a_runtime_that_hides_its_weights_is_named():
    with pytest.raises(ValueError, match="runtime='openvino'"):
        profile(network(), torch.randn(1, 3, 16, 16), runtime="onnxruntime", int8=torch.randn(1, 3, 16, 16))
    with pytest.raises(ValueError, match="runtime='openvino'"):
        roofline("onnxruntime", int8=True)


def test_a_compressed_networks_stages_are_counted_with_their_layer():
    pytest.importorskip("openvino")
    model, images = network(), torch.randn(2, 3, 16, 16)
    factors = factorize(model, images)
    config = Configuration(uniform(factors, 0.5))
    small = deploy(factors.compress(config), images, runtime="onnxruntime", plans="keep", rounds=1)
    kernels = profile(small.model, images, runtime="openvino", rounds=2)
    counted = sum(kernel.flops for kernel in kernels) / 2
    assert counted == count_flops(small.model, images[:1])
    layers = by_layer([vars(kernel) | {"limit": 1.0} for kernel in kernels])
    assert {"0", "2"} <= set(layers) <= {"0", "2", "6"} | {name for name in layers if name.endswith("layout")}


def test_the_limit_is_the_slower_of_arithmetic_and_traffic():
    machine = Roofline(1e9, ((1000, 4e9), (100_000, 1e9)))
    assert machine.seconds(Kernel("a", "", "Conv", 1.0, 10**9, 1000)) == 1.0
    assert machine.seconds(Kernel("a", "", "Conv", 1.0, 1, 100_000)) == 1e-4
    assert machine.bytes_per_second(10) == 4e9
    assert machine.bytes_per_second(10**9) == 1e9
    assert machine.bytes_per_second(10_000) == pytest.approx(2.5e9)


@pytest.mark.parametrize(("runtime", "int8"), [("onnxruntime", False), ("openvino", True)])
def test_a_machines_limits_are_measured(runtime, int8):
    if int8:
        pytest.importorskip("nncf")
    found = roofline(runtime, 1, rounds=1, int8=int8)
    assert 1e8 < found.flops_per_second < 1e13
    assert all(1e8 < speed < 1e13 for _, speed in found.copies)


def test_a_runtime_that_says_nothing_is_named():
    with pytest.raises(ValueError, match="onnxruntime, openvino"):
        profile(network(), torch.randn(1, 3, 16, 16), runtime="torch")
    with pytest.raises(ValueError, match="onnxruntime, openvino"):
        roofline("torch")
