"""Checkpoints as the world writes them: dialects load, and what is damaged, packed or altered is refused by name."""

import io
import json
import struct
import zipfile

import pytest
import safetensors.torch
import torch

from common.models import CheckpointError, build_model, load_checkpoint, read_state_dict, save_checkpoint
from common.models.architectures import skeleton

MODEL = "squeezenet1_1"


@pytest.fixture(scope="module")
def dense():
    return build_model(MODEL, 10, seed=0).eval()


def dialects(state):
    return {
        "DataParallel": {f"module.{name}": value for name, value in state.items()},
        "compile in DataParallel": {f"module._orig_mod.{name}": value for name, value in state.items()},
        "wrapped": {"epoch": 3, "state_dict": state},
        "wrapped model": {"model": {f"module.{n}": v for n, v in state.items()}, "optimizer": {"lr": 0.1}},
        "half": {name: value.half() for name, value in state.items()},
        "bfloat16": {name: value.bfloat16() for name, value in state.items()},
    }


@pytest.mark.parametrize("dialect", list(dialects({"a": torch.zeros(1)})))
def test_dialects_load(tmp_path, dense, dialect):
    path = tmp_path / "net.pth"
    torch.save(dialects(dense.state_dict())[dialect], path)
    model, _ = load_checkpoint(path, architecture=MODEL)
    for name, value in dense.state_dict().items():
        assert model.state_dict()[name].dtype == torch.float32
        assert torch.allclose(model.state_dict()[name], value, atol=1e-2)


def test_a_packed_archive_is_refused_unread(tmp_path):
    plain = io.BytesIO()
    torch.save({"classifier.1.weight": torch.zeros(1)}, plain)
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name) if name[-6:] != "data/0" else bytes(50_000_000))
    assert path.stat().st_size < 1_000_000
    with pytest.raises(CheckpointError, match=r"bomb\.pth is packed"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({1: torch.zeros(2)}, "not a state dict"),
        ({}, "not a state dict"),
        ({"a": torch.zeros(2, device="meta")}, "meta"),
        ({"a": torch.full((2,), float("nan"))}, "NaN"),
        ({"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float64)}, "mixes"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
        ({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, "float8"),
    ],
)
def test_what_no_network_can_use_is_refused_by_name(tmp_path, state, message):
    path = tmp_path / "odd.pth"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_state_dict(path)
    assert "odd.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_altered_weight_is_found(tmp_path, dense):
    path = tmp_path / "net.safetensors"
    save_checkpoint(dense, path, architecture=MODEL, classes=[str(number) for number in range(10)])
    load_checkpoint(path)
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"net\.safetensors was altered"):
        load_checkpoint(path)


def test_a_file_without_a_digest_is_read_as_before(tmp_path, dense):
    path = tmp_path / "net.safetensors"
    save_checkpoint(dense, path, architecture=MODEL, classes=[str(number) for number in range(10)])
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])["__metadata__"]
    del header["digest"]
    safetensors.torch.save_file(safetensors.torch.load(raw), path, metadata=header)
    assert load_checkpoint(path)[1]["num_classes"] == 10


@pytest.mark.parametrize("name", ["regnet_y_128gf", "resnet18"])
def test_a_skeleton_takes_no_memory_whatever_the_network(name):
    assert all(parameter.is_meta for parameter in skeleton(name, 10).parameters())
