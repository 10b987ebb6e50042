"""What a machine can do at best: the limit of a kernel, and how it is measured."""

import pytest

from common.deploy.profile import Kernel
from common.deploy.roofline import Roofline, roofline

pytestmark = pytest.mark.apart


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
        roofline("torch")
    with pytest.raises(ValueError, match="runtime='openvino'"):
        roofline("onnxruntime", int8=True)
