"""What to count in a search: networks found for FLOPs and for time, on noise."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import latency_search
from benchmarks.cifar_resnet import CifarResNet
from common.ranks.timed_menus import MenuTimes


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "small.th"
    torch.save({"state_dict": {f"module.{k}": v for k, v in CifarResNet(1).state_dict().items()}}, path)
    return path


@pytest.fixture
def folder(tmp_path):
    noise = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for label in range(10):
            place = tmp_path / "data" / part / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / f"{number}.png")
    return tmp_path / "data"


def test_networks_of_every_cost_are_found_deployed_and_compared(checkpoint, folder, tmp_path, monkeypatch, capsys):
    def times(factors, menus, example, **options):
        seconds = {name: [entry.flops / 1e6 + 1e-3 * i for i, entry in enumerate(menu)] for name, menu in menus.items()}
        return MenuTimes(sum(s[-1] for s in seconds.values()), seconds)

    monkeypatch.setattr(latency_search, "time_menus", times)
    out = tmp_path / "out"
    options = ["--checkpoint", str(checkpoint), "--data", f"folder:{folder}", "--image-size", "32", "--batch", "2"]
    options += ["--budgets", "0.7", "0.001", "--candidates", "2", "--calibration", "16", "--screen", "8"]
    options += ["--rounds", "2", "--runtime", "torch", "--out", str(out)]
    assert latency_search.main(options) == 0
    content = json.loads((out / "latency-search.json").read_text())
    assert [(row["cost"], row["budget"]) for row in content["rows"]] == [(c, 0.7) for c in latency_search.COSTS]
    assert all(row["speedup"] > 0 and row["flops"] < content["dense_flops"] for row in content["rows"])
    assert (out / "latency-search.png").stat().st_size > 1000
    printed = capsys.readouterr()
    assert "ResNet-8, 32 px, torch, batch 2" in printed.out
    assert "time alone, 0.001: " in printed.err  # a budget that nothing meets is named, the others go on


def test_the_speed_at_a_divergence_lies_between_the_points():
    curve = [(1.0, 0.1), (2.0, 0.3), (4.0, 0.5)]
    assert latency_search.speed_at(curve, 0.2) == pytest.approx(1.5)
    assert latency_search.speed_at(curve, 0.4) == pytest.approx(3.0)
    assert latency_search.speed_at(curve, 0.6) is None


def test_a_file_that_is_no_checkpoint_is_named(tmp_path, folder, capsys):
    (tmp_path / "no.th").write_bytes(b"nothing")
    assert latency_search.main(["--checkpoint", str(tmp_path / "no.th"), "--data", f"folder:{folder}"]) == 2
    assert "no.th" in capsys.readouterr().err
