"""OpenVINO gives torch's outputs; int8 gives nearly the same, in less than float32 and nowhere in silence."""

import json

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import processor
from common.compress import factorize
from common.deploy import choose, deploy, export_onnx, onnx_session, quantise, runtimes
from common.deploy import packages as module
from common.deploy.onnx_export import onnx_bytes
from common.deploy.openvino_run import openvino_model, openvino_session
from common.deploy.quantise import quantised_onnx
from common.deploy.runtimes import Target
from common.ranks import uniform
from tests.helpers import fitted, loaders_of, relative_error

pytestmark = pytest.mark.apart

RUNTIMES = ("onnxruntime", "openvino")


class Net(nn.Module):
    """A stem, a residual block with its norms, a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.one, self.two = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.relu(x + self.two(F.relu(self.one(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def images(digits):
    return torch.cat([batch.images for batch in digits.val.batches(64)])


@pytest.fixture(scope="module")
def small(digits):
    torch.manual_seed(0)
    dense = fitted(Net(), loaders_of(digits)[0], epochs=8)
    factors = factorize(dense, next(digits.train.batches(128)).images)
    return factors.compress(uniform(factors, 0.5)).eval()


@pytest.mark.parametrize("plans", ["measure", "keep"])
def test_openvino_gives_torchs_outputs_at_any_batch_size(small, images, plans):
    deployed = deploy(small, images[:8], runtime="openvino", plans=plans, rounds=2)
    assert deployed.runtime == "openvino"
    for batch in (8, 3, 1):
        with torch.no_grad():
            assert relative_error(deployed(images[:batch]), small(images[:batch])) < 1e-4
    assert "openvino on cpu" in deployed.report()


def test_openvino_in_bfloat16_takes_and_gives_float32(small, images):
    deployed = deploy(small, images[:8], runtime="openvino", plans="keep", dtype=torch.bfloat16, rounds=2)
    found = deployed(images[:8])
    assert found.dtype == torch.float32
    with torch.no_grad():
        assert relative_error(found, small(images[:8])) < 0.05
    assert "bfloat16" in deployed.runtime


class Named(nn.Module):
    """Two inputs and outputs by name."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(3, 6)

    def forward(self, left, right):
        total = self.one(left) + self.two(right)
        return {"sum": total, "parts": (total.relu(), total.exp())}


def test_openvino_takes_several_inputs_and_keeps_the_outputs_structure():
    torch.manual_seed(0)
    model, inputs = Named().eval(), {"left": torch.randn(5, 4), "right": torch.randn(5, 3)}
    found = deploy(model, inputs, runtime="openvino", rounds=2)(inputs)
    expected = model(**inputs)
    assert set(found) == {"sum", "parts"}
    assert isinstance(found["parts"], tuple)
    torch.testing.assert_close(found["parts"][1], expected["parts"][1], rtol=1e-4, atol=1e-5)


def test_what_openvino_cannot_do_is_said(small, images):
    session = openvino_session(openvino_model(onnx_bytes(small, images[:2])))
    with pytest.raises(ValueError, match=r"OpenVINO cannot run on a batch of \[\(2, 5, 8, 8\)\]"):
        session(torch.zeros(2, 5, 8, 8))
    with pytest.raises(ValueError, match="OpenVINO cannot read the graph"):
        openvino_model(b"no graph")
    with pytest.raises(ValueError, match="at least 1"):
        openvino_session(openvino_model(onnx_bytes(small, images[:2])), 0)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_int8_nearly_gives_the_same_and_is_no_float32(small, images, digits, runtime):
    deployed = deploy(small, images[:8], runtime=runtime, plans="keep", int8=images[:32], rounds=2)
    with torch.no_grad():
        expected = small(images)
    found = deployed(images)
    assert relative_error(found, expected) > 1e-4
    assert float((expected - found).square().mean() / expected.square().mean()) < 0.05
    assert float((expected.argmax(1) == found.argmax(1)).float().mean()) > 0.8
    assert "int8" in deployed.runtime
    assert deployed.predicted_seconds is None
    with torch.no_grad():  # what is kept is the network as it was
        assert relative_error(deployed.model(images), expected) < 1e-4


@pytest.mark.parametrize("winner", [0, 1])
def test_plans_are_timed_in_int8_and_in_float32_and_the_faster_network_is_taken(small, images, monkeypatch, winner):
    def times(kind):
        """Pretends that in int8 one plan of each layer is the fastest, and in float32 another one."""

        def measure(modules, _inputs):
            best = list(modules)[0 if kind.int8 is not None else -1]
            return {name: [1.0 if name == best else 2.0] * 3 for name in modules}

        return measure

    monkeypatch.setattr(choose.Chooser, "_timer", lambda _, target: times(target))
    monkeypatch.setattr(choose, "interleaved", lambda runs, *_, **__: {way: [float(way[0] != winner)] for way in runs})
    found = deploy(small, images[:4], runtime="onnxruntime", int8=images[:8], rounds=1)
    first = {name: list(choice.timings)[0 if winner == 0 else -1] for name, choice in found.layers.items()}
    assert found.plans == first
    for choice in found.layers.values():
        assert next(iter(choice.timings.values())).seconds == 1.0  # the times are those of int8


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_layer_alone_is_timed_in_int8(images, runtime, monkeypatch):
    quantised = []
    for name in ("quantised_onnx", "quantised_openvino"):
        real = getattr(runtimes, name)
        monkeypatch.setattr(runtimes, name, lambda graph, given, real=real: quantised.append(1) or real(graph, given))
    layer, inputs = nn.Conv2d(3, 8, 3).eval(), images[:4]
    found = Target(runtime, False, False, 1, int8=images[:8]).layer_run(layer, inputs)(inputs)
    assert len(quantised) == 1
    assert 1e-4 < relative_error(found, layer(inputs)) < 0.1
    Target(runtime, False, False, 1).layer_run(layer, inputs)
    assert len(quantised) == 1


def test_a_file_in_int8_is_smaller_checked_and_keeps_its_metadata(small, images, tmp_path):
    plain, quantised = tmp_path / "plain.onnx", tmp_path / "int8.onnx"
    export_onnx(small, images[:4], plain, metadata={"classes": ["a", "b"]})
    export_onnx(small, images[:4], quantised, metadata={"classes": ["a", "b"]}, int8=images[:32])
    graph = onnx.load(quantised)
    assert any(node.op_type == "QuantizeLinear" for node in graph.graph.node)
    assert {one.key: json.loads(one.value) for one in graph.metadata_props if one.key == "classes"} == {
        "classes": ["a", "b"]
    }
    with torch.no_grad():
        assert relative_error(onnx_session(quantised)(images[:3]), small(images[:3])) < 0.4


def largest_weight(graph):
    """In int8, of all weights of a graph."""
    tensors = [onnx.numpy_helper.to_array(one) for one in graph.graph.initializer]
    return max(int(abs(one.astype(int)).max()) for one in tensors if one.dtype == "int8" and one.ndim > 1)


@pytest.mark.parametrize("cut_off", [True, False])
def test_products_of_int8_fit_where_a_processor_would_cut_them_off(small, images, cut_off, monkeypatch, tmp_path):
    monkeypatch.setattr(quantise, "saturates", lambda: cut_off)
    own = onnx.load_from_string(quantised_onnx(onnx_bytes(small, images[:2]), images[:32]))
    assert (largest_weight(own) <= 64) == cut_off
    export_onnx(small, images[:4], tmp_path / "anywhere.onnx", int8=images[:32])
    assert 32 < largest_weight(onnx.load(tmp_path / "anywhere.onnx")) <= 64


@pytest.mark.parametrize(
    ("machine", "known", "cut_off"),
    [
        ("x86_64", {"avx2": True, "avx512_vnni": False}, True),
        ("AMD64", {}, True),
        ("x86_64", {"avx512_f": True, "avx512_vnni": True}, False),
        ("x86_64", {"avx2": True, "avx_vnni": True}, False),
        ("aarch64", {}, False),
    ],
)
def test_processors_that_cut_products_off(machine, known, cut_off, monkeypatch):
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert quantise.saturates() == cut_off


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "torch", "int8": True}, "int8 is for the runtimes onnxruntime and openvino"),
        ({"runtime": "openvino", "int8": True, "dtype": torch.bfloat16}, "exclude one another"),
        ({"runtime": "openvino", "compile": True}, "for the runtime 'torch'"),
        ({"runtime": "openvino", "memory_format": "channels_last"}, "leave memory_format out"),
    ],
)
def test_options_that_exclude_one_another_are_refused(small, images, options, message):
    if "int8" in options:
        options = {**options, "int8": images[:4]}
    with pytest.raises(ValueError, match=message):
        deploy(small, images[:2], **options)


def test_graphs_that_cannot_be_quantised_and_packages_that_are_missing_are_named(images, monkeypatch):
    with pytest.raises(ValueError, match=r"cannot be quantised|Error"):
        quantised_onnx(onnx_bytes(nn.Conv2d(3, 4, 3).eval(), images[:2]), torch.zeros(2, 7))

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(module.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"openvino is not installed: pip install 'htd-cnn-compression\[openvino\]'"):
        openvino_model(b"")
    assert "int8" in str(Target("openvino", False, False, 1, int8=images[:1]))
