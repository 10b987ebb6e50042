"""Published networks: every method at a budget, without training and with some; a stopped run goes on."""

import json

import pytest
import torch

from benchmarks import published_networks
from benchmarks.cifar_resnet import CifarResNet


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    torch.save(CifarResNet(1).state_dict(), folder / "resnet8.th")
    arguments = ["--checkpoints", str(folder / "resnet8.th"), "--data", "digits", "--budgets", "0.5", "--seeds", "0"]
    arguments += ["--methods", "policy", "uniform", "two-factor SVD", "--epochs", "0", "1", "--candidates", "2"]
    arguments += ["--calibration", "64", "--screen", "64", "--out", str(folder / "out")]
    assert published_networks.main(arguments) == 0
    return arguments, folder / "out"


def test_every_method_has_a_row_per_number_of_epochs_and_keeps_its_budget_and_ranks(finished):
    rows = {(row["method"], row["epochs"]): row for row in json.loads((finished[1] / "rows.json").read_text())["rows"]}
    methods = ("policy", "uniform", "two-factor SVD")
    assert set(rows) == {(m, e) for m in methods for e in (0, 1)} | {(published_networks.DENSE, 1)}
    for method in methods:
        assert rows[method, 0]["flops_kept"] <= 0.5
        assert rows[method, 0]["config_str"] == rows[method, 1]["config_str"]
        assert rows[method, 0]["divergence"] != rows[method, 1]["divergence"]
    assert rows[published_networks.DENSE, 1]["flops_kept"] == 1
    text = (finished[1] / "table.md").read_text()
    assert "No training." in text
    assert "1 epochs of fine-tuning." in text


def test_a_finished_run_does_nothing_again_and_other_settings_are_refused(finished, monkeypatch, capsys):
    arguments, out = finished
    content = json.loads((out / "rows.json").read_text())
    monkeypatch.setattr(published_networks, "provenance", lambda *_: content["provenance"])
    monkeypatch.setattr(published_networks, "Bench", None)
    assert published_networks.main(arguments) == 0
    assert published_networks.main([*arguments, "--candidates", "3"]) == 2
    assert "another --out" in capsys.readouterr().err
