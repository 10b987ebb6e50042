"""ONNX: the same outputs as torch at every batch size, one file or none, no noise."""

import copy
import warnings

import onnx
import pytest
import torch
from torch import nn

from common.compress import HTLayer, factorize
from common.deploy import deploy, export_onnx, onnx_export, onnx_session
from common.models import build_model
from common.ranks import uniform
from tests.helpers import relative_error

IMAGES = (3, 16, 12)


class Residual(nn.Module):
    """A shortcut, batch norm, a flatten: what the networks are made of, small."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 10, (3, 5), padding=(1, 2), bias=False)
        self.norm = nn.BatchNorm2d(10)
        self.same = nn.Conv2d(10, 10, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d((4, 3))
        self.hidden = nn.Linear(10 * 4 * 3, 14)
        self.head = nn.Linear(14, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = self.pool(x + torch.relu(self.same(x)))
        return self.head(torch.relu(self.hidden(torch.flatten(x, 1))))


@pytest.fixture(scope="module")
def compressed():
    torch.manual_seed(0)
    model = Residual().eval()
    factors = factorize(model, input_shape=IMAGES)
    return factors.compress(uniform(factors, 0.5)).eval()


def images(count, shape=IMAGES):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("deployed", [False, True])
def test_exported_network_gives_torch_outputs_at_every_batch_size(compressed, deployed, tmp_path, capfd):
    model = deploy(compressed, images(1), plans="flops", rounds=1).model if deployed else compressed
    path = tmp_path / "new folder" / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(model, images(1), path)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert capfd.readouterr() == ("", "")
    run = onnx_session(path, threads=1)
    for batch in (1, 2, 7):
        with torch.no_grad():
            assert relative_error(run(images(batch)), model(images(batch))) < 1e-4
    onnx.checker.check_model(path)


def test_resnet18_exports(tmp_path):
    model = build_model("resnet18", 4, seed=0).train()
    before = copy.deepcopy(model.state_dict())
    export_onnx(model, images(2, (3, 32, 32)), tmp_path / "resnet18.onnx")
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    run = onnx_session(tmp_path / "resnet18.onnx")
    with torch.no_grad():
        assert relative_error(run(images(5, (3, 32, 32))), model.eval()(images(5, (3, 32, 32)))) < 1e-4


def test_an_export_with_other_outputs_leaves_the_old_file(compressed, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old one")

    def wrong_session(_path, **_):
        return lambda inputs: compressed(inputs).detach() * 1.001

    monkeypatch.setattr(onnx_export, "onnx_session", wrong_session)
    with pytest.raises(ValueError, match=r"differ from torch's by .* relative at batch 1; at most 1e-04 is allowed"):
        export_onnx(compressed, images(1), path)
    assert path.read_bytes() == b"the old one"
    assert len(list(tmp_path.iterdir())) == 1


class BySign(nn.Module):
    def forward(self, x):
        return x * 2 if bool(x.sum() > 0) else x


def test_a_network_that_cannot_be_exported_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^BySign cannot be exported to ONNX: .*") as caught:
        export_onnx(BySign(), images(1), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"not a graph", None])
def test_a_file_that_is_no_network_is_named(content, tmp_path):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"onnxruntime cannot load .*model\.onnx"):
        onnx_session(path)


def test_no_threads_are_refused(tmp_path):
    with pytest.raises(ValueError, match="threads must be at least 1; got 0"):
        onnx_session(tmp_path / "model.onnx", threads=0)


def test_deployed_to_onnxruntime(compressed):
    deployed = deploy(compressed, images(2), runtime="onnxruntime", threads=1, rounds=2)
    assert set(deployed.plans) == {name for name, m in compressed.named_modules() if isinstance(m, HTLayer)}
    assert all(timing.seconds > 0 for choice in deployed.layers.values() for timing in choice.timings.values())
    assert deployed.predicted_seconds is not None
    with torch.no_grad():
        assert relative_error(deployed(images(3)), compressed(images(3))) < 1e-4
        assert relative_error(deployed.model(images(3)), compressed(images(3))) < 1e-4
    assert "onnxruntime on cpu, 1 threads, batch 2" in deployed.report()
