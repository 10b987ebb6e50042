"""One command from a checkpoint to a file, for networks of torchvision's and of one's own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compress
from common.models import load_compressed

ROOT = Path(__file__).resolve().parent.parent
NET = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 40, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10),
    )
"""
QUICK = ["--data", "digits", "--train-limit", "64", "--candidates", "2", "--screen-images", "32", "--epochs", "1"]
QUICK += ["--calibration-images", "32", "--latency-batch", "2", "--budgets", "0.6"]


@pytest.fixture
def net(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(NET)
    place = f"{path}:build"
    torch.manual_seed(0)
    model = compress._builder(place)()
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "n.pth"
    )
    return place, tmp_path / "n.pth"


def test_a_network_of_ones_own_becomes_a_file(net, tmp_path, capsys):
    place, checkpoint = net
    out = tmp_path / "small.safetensors"
    given = [
        "--architecture",
        place,
        "--checkpoint",
        str(checkpoint),
        "--out",
        str(out),
        "--onnx",
        "--max-loss",
        "0.99",
    ]
    assert compress.main([*given, "--image-size", "12", "16", *QUICK]) == 0
    said = capsys.readouterr().out
    assert "dense" in said
    assert f"{out}: " in said
    assert out.with_suffix(".onnx").exists()
    model, info = load_compressed(out, model=compress._builder(place))
    assert model(torch.zeros(2, 3, 12, 16)).shape == (2, 10)
    assert info["metadata"]["classes"] == [str(number) for number in range(10)]
    assert info["metadata"]["image_size"] == [12, 16]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--architecture", "resnot"], "unknown model 'resnot'"),
        (["--architecture", "missing.py:build"], "there is no file missing.py"),
        (["--checkpoint", "missing.pth"], "no checkpoint at missing.pth"),
        (["--data", "imagenet"], "unknown data set 'imagenet'"),
        (["--budgets", "2"], "budgets must be shares of the dense cost"),
        (["--architecture", "resnet18"], "does not fit resnet18 with 10 classes"),
        (["--speedup", "0.5"], "speedup must be a number above 1"),
    ],
)
def test_what_is_wrong_is_one_line_and_code_2(net, tmp_path, change, message, capsys):
    place, checkpoint = net
    given = ["--architecture", place, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "s.safetensors"), *QUICK]
    assert compress.main([*given, "--image-size", "16", *change]) == 2
    captured = capsys.readouterr().err.strip().splitlines()
    assert captured[-1].startswith("error: ")
    assert message in captured[-1]


def test_no_network_within_the_loss_is_code_1(net, tmp_path, capsys, monkeypatch):
    place, checkpoint = net
    monkeypatch.setattr("common.own_network.NetworkRun.best", refuse)
    given = ["--architecture", place, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "s.safetensors"), *QUICK]
    assert compress.main([*given, "--image-size", "16"]) == 1
    assert "raise --max-loss" in capsys.readouterr().err


def refuse(self, max_loss=None):
    raise ValueError("no finalist is within it")


def test_help_names_every_option():
    done = subprocess.run(
        [sys.executable, "compress.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for option in ("--speedup", "--max-loss", "--leave-dense", "--onnx", "net.py:build"):
        assert option in done.stdout
