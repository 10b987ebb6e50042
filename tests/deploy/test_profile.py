"""Kernels of a runtime: which layers they are, what they compute and move, and when they are timed."""

import pytest
import torch
from torch import nn

from benchmarks.roofline import by_layer
from common.compress import factorize
from common.configuration import Configuration
from common.cost import count_flops, measure_latency
from common.deploy import deploy
from common.deploy import profile as profiling
from common.deploy.onnx_export import onnx_bytes
from common.deploy.openvino_run import openvino_model, openvino_session
from common.deploy.profile import PROFILED, SETTLING_BATCHES, SETTLING_SECONDS, _mean_since, _run_for, profile
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


def test_a_network_settles_before_its_kernels_are_timed(monkeypatch):
    """The first batches after a start take several times as long as all that follow."""
    clock = [0.0]
    monkeypatch.setattr("common.deploy.profile.time.perf_counter", lambda: clock[0])

    def batches_of(seconds, rounds):
        return _run_for(lambda: clock.__setitem__(0, clock[0] + seconds), rounds)

    assert batches_of(SETTLING_SECONDS / 4, rounds=1) == 4
    assert batches_of(SETTLING_SECONDS / 4, rounds=20) == 20
    assert batches_of(2 * SETTLING_SECONDS, rounds=2) == 2
    assert batches_of(0.0, rounds=1) == SETTLING_BATCHES


def test_the_first_batches_are_not_in_onnxruntimes_times(monkeypatch):
    pytest.importorskip("onnxruntime")
    runs, timed = [], []
    run_for = profiling._run_for

    def counted(batch, rounds):
        runs.append(run_for(batch, rounds))
        return runs[-1]

    monkeypatch.setattr(profiling, "_run_for", counted)
    monkeypatch.setattr(profiling.statistics, "median", lambda values: timed.append(len(values)) or 1.0)
    profile(network(), torch.randn(1, 3, 16, 16), runtime="onnxruntime", rounds=3)
    settling, measured = runs
    assert settling > 3 < measured
    assert timed == [measured] * len(timed) != []


def test_the_first_batches_are_taken_out_of_openvinos_means():
    """It tells a kernel's mean since its start."""
    seconds = [9.0, 5.0, 1.0, 1.0, 2.0, 2.0]  # two slow ones, then four whose mean is 1.5
    first, every = sum(seconds[:2]) / 2, sum(seconds) / 6
    assert _mean_since((2, first), (4, every)) == pytest.approx(1.5)
    assert _mean_since((300, 0.0), (300, 0.0)) > 0  # less than a microsecond is told as none
    assert _mean_since((300, 2e-6), (300, 1e-6)) > 0  # means are cut to whole ones


def test_openvinos_kernels_take_together_what_a_batch_takes():
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(8))).eval()
    images = torch.randn(8, 32, 16, 16)
    inside = sum(kernel.seconds for kernel in profile(model, images, runtime="openvino", threads=1, rounds=3))
    run = openvino_session(openvino_model(onnx_bytes(model, images)), 1)
    whole = measure_latency({"whole": run}, images, rounds=20, threads=1)["whole"]
    assert whole / 3 < inside < 3 * whole


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


def test_a_runtime_that_says_nothing_is_named():
    with pytest.raises(ValueError, match="onnxruntime, openvino"):
        profile(network(), torch.randn(1, 3, 16, 16), runtime="torch")
