"""Speed of published networks' rows: the same layers, deployed alike; methods compared where they lose as much."""

import json

import pytest
import torch

from benchmarks import published_networks, published_speed
from benchmarks.cifar_resnet import CifarResNet
from benchmarks.peers import flops_of
from common.cost import count_params

METHODS = ("policy", "two-factor SVD")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    torch.save(CifarResNet(1).state_dict(), folder / "resnet8.th")
    shared = ["--data", "digits", "--calibration", "64", "--out", str(folder)]
    rows = ["--checkpoints", str(folder / "resnet8.th"), "--budgets", "0.6", "0.5", "--seeds", "0", "--screen", "64"]
    assert published_networks.main([*rows, *shared, "--methods", *METHODS, "--candidates", "2"]) == 0
    arguments = ["--checkpoint", str(folder / "resnet8.th"), *shared, "--batches", "2", "--rounds", "2"]
    assert published_speed.main([*arguments, "--runtimes", "onnxruntime"]) == 0
    return arguments, folder


def test_every_row_is_timed_in_every_case_and_a_second_call_adds_what_is_missing(finished, monkeypatch):
    arguments, folder = finished
    first = json.loads((folder / "speed.json").read_text())
    (case,) = first["cases"]
    assert {(row["method"], row["budget"]) for row in case["rows"]} == {(m, b) for m in METHODS for b in (0.6, 0.5)}
    assert all(row["seconds"] > 0 and row["speedup"] > 0 for row in case["rows"])
    monkeypatch.setattr(published_speed, "provenance", lambda *_: first["provenance"])
    assert published_speed.main([*arguments, "--runtimes", "onnxruntime", "torch"]) == 0
    cases = json.loads((folder / "speed.json").read_text())["cases"]
    assert cases[0] == case
    assert [one["runtime"] for one in cases] == ["onnxruntime", "torch"]
    text = (folder / "speed.md").read_text()
    assert "torch, batch 2" in text
    assert "losing no more" in text
    assert (folder / "speed.png").stat().st_size > 0


def test_times_of_other_rows_are_not_taken_up(finished, tmp_path, monkeypatch, capsys):
    arguments, folder = finished
    speed, content = (json.loads((folder / name).read_text()) for name in ("speed.json", "rows.json"))
    (tmp_path / "speed.json").write_text(json.dumps(speed))
    (tmp_path / "rows.json").write_text(json.dumps({**content, "rows": content["rows"][1:]}))
    monkeypatch.setattr(published_speed, "provenance", lambda *_: speed["provenance"])
    assert published_speed.main([*arguments, "--out", str(tmp_path)]) == 2
    assert "rows of other settings" in capsys.readouterr().err


def test_what_is_timed_has_the_layers_of_the_row(finished):
    arguments, folder = finished
    content = json.loads((folder / "rows.json").read_text())
    model = published_networks.from_checkpoint(arguments[1])
    dataset = published_networks.data.load("digits", image_size=32)
    shapes = published_networks.Shapes(model, dataset.train.sample(64, 0))
    for row in content["rows"]:
        network = shapes.of(row)
        assert flops_of(network, shapes.images) == pytest.approx(row["flops_kept"] * shapes.factors.dense_flops)
        # A fit gives biases to layers that had none, and no layer more than that.
        least = count_params(network) / shapes.factors.dense_params
        assert least <= row["params_kept"] < least + 0.02


def case_of(**speeds):
    rows = [
        {"method": method, "budget": budget, "speedup": speedup, "seconds": 1 / speedup}
        for method, found in speeds.items()
        for budget, speedup in found.items()
    ]
    return {"runtime": "r", "batch": 1, "dense_seconds": 1.0, "load_average": 0.0, "rows": rows}


def content_of(**losses):
    networks = [
        {"method": method, "budget": budget, "lost": lost, "flops_kept": budget}
        for method, found in losses.items()
        for budget, lost in found.items()
    ]
    facts = {"machine": "m", "threads": 1, "git_revision": "r"}
    return {"networks": networks, "network": "n", "epochs": 3, "provenance": facts}


def test_a_network_is_compared_with_the_fastest_of_ours_that_loses_no_more():
    content = content_of(policy={0.5: 0.5, 0.35: 1.5}, uniform={0.7: 0.2, 0.5: 1.0, 0.35: 3.0})
    case = case_of(policy={0.5: 2.0, 0.35: 4.0}, uniform={0.7: 1.1, 0.5: 1.6, 0.35: 2.0})
    # Losing 1.0 and 3.0: ours that lose no more are 2 and 4 times as fast as dense. None of ours loses only 0.2.
    found = published_speed.losing_no_more(content, case)
    assert found == {"uniform": [pytest.approx(2.0 / 1.6), pytest.approx(4.0 / 2.0)]}
    assert "1.25x to 2.00x" in published_speed.table(content | {"cases": [case]})


def test_losses_are_counted_from_the_better_dense_network_and_failed_rows_are_left_out():
    row = {"network": "n", "seed": 0, "budget": 0.5, "epochs": 3, "method": "policy", "test_accuracy": 0.9}
    rows = [
        row,
        {**row, "method": "uniform", "failed": "why"},
        {**row, "method": published_networks.DENSE, "test_accuracy": 0.95},
        {**row, "epochs": 0, "test_accuracy": 0.1},
    ]
    (found,) = published_speed.trained_rows({"dense": {"n": 0.92}, "rows": rows}, "n")
    assert found["lost"] == pytest.approx(5.0)
    with pytest.raises(ValueError, match="no rows of m"):
        published_speed.trained_rows({"dense": {}, "rows": rows}, "m")
