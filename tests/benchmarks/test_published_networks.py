"""Published networks: every method at a budget, without training and with some; a stopped run goes on."""

import json
import sys

import pytest
import torch

from benchmarks import peers, published_networks
from benchmarks import rows as benchmark_rows
from benchmarks.cifar_resnet import CifarResNet
from common.files import SearchBusy

METHODS = ("policy", "uniform", "two-factor SVD", "Tucker-2, VBMF")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    torch.save(CifarResNet(1).state_dict(), folder / "resnet8.th")
    arguments = ["--checkpoints", str(folder / "resnet8.th"), "--data", "digits", "--budgets", "0.5", "--seeds", "0"]
    arguments += ["--methods", *METHODS, "--epochs", "0", "1", "--candidates", "2"]
    arguments += ["--calibration", "64", "--screen", "64", "--out", str(folder / "out")]
    assert published_networks.main(arguments) == 0
    return arguments, folder / "out"


def test_every_method_has_a_row_per_number_of_epochs_and_keeps_its_budget_and_ranks(finished):
    rows = {(row["method"], row["epochs"]): row for row in json.loads((finished[1] / "rows.json").read_text())["rows"]}
    assert set(rows) == {(m, e) for m in METHODS for e in (0, 1)} | {(published_networks.DENSE, 1)}
    for method in METHODS:
        assert rows[method, 0]["flops_kept"] <= 0.5
        assert rows[method, 0]["flops_kept"] > 0.4
        assert rows[method, 0]["config_str"] == rows[method, 1]["config_str"]
        assert rows[method, 0]["divergence"] != rows[method, 1]["divergence"]
    assert rows[published_networks.DENSE, 1]["flops_kept"] == 1
    text = (finished[1] / "table.md").read_text()
    assert "No training." in text
    assert "1 epochs of fine-tuning." in text


def test_what_is_not_trained_may_be_tuned_on_the_calibration_images(finished, tmp_path):
    arguments = [*finished[0], "--epochs", "0", "--methods", "uniform", "--passes", "2", "--out", str(tmp_path)]
    assert published_networks.main(arguments) == 0
    (tuned,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    rows = json.loads((finished[1] / "rows.json").read_text())["rows"]
    (untuned,) = [row for row in rows if (row["method"], row["epochs"]) == ("uniform", 0)]
    assert tuned["config_str"] == untuned["config_str"]
    assert tuned["divergence"] <= untuned["divergence"]
    assert "tuned in 2 passes over the 64 calibration images" in (tmp_path / "table.md").read_text()
    assert published_networks.main([*arguments, "--passes", "3"]) == 2  # rows of other settings


def test_a_finished_run_does_nothing_again_and_other_settings_are_refused(finished, monkeypatch, capsys):
    arguments, out = finished
    content = json.loads((out / "rows.json").read_text())
    monkeypatch.setattr(published_networks, "provenance", lambda *_: content["provenance"])
    monkeypatch.setattr(published_networks, "Bench", None)
    assert published_networks.main(arguments) == 0
    assert published_networks.main([*arguments, "--candidates", "3"]) == 2
    assert "another --out" in capsys.readouterr().err


def test_a_folder_that_another_process_works_in_is_named(finished, capsys, monkeypatch):
    def busy(_folder):
        raise SearchBusy("another process is searching in there")

    monkeypatch.setattr(benchmark_rows, "exclusive", busy)
    assert published_networks.main(finished[0]) == 2
    assert capsys.readouterr().err == "error: another process is searching in there\n"


def test_a_peer_that_is_missing_or_fails_is_a_row_that_says_why(finished, tmp_path, monkeypatch):
    def failing(*_, **__):
        raise IndexError("no such group\nand more")

    monkeypatch.setattr(peers, "torch_pruning", failing)
    monkeypatch.setitem(sys.modules, "tltorch", None)
    arguments, _ = finished
    changed = {"--methods": ["torch-pruning", "tensorly-torch CP"], "--epochs": ["0"], "--out": [str(tmp_path)]}
    for option, values in changed.items():
        start = arguments.index(option) + 1
        end = next((n for n in range(start, len(arguments)) if arguments[n].startswith("--")), len(arguments))
        arguments = [*arguments[:start], *values, *arguments[end:]]
    assert published_networks.main(arguments) == 0
    text = (tmp_path / "table.md").read_text()
    assert "torch-pruning: IndexError: no such group." in text
    assert "tensorly-torch CP: ModuleNotFoundError: tensorly-torch is not installed: pip install" in text


@pytest.mark.parametrize(
    ("method", "package"),
    [("torch-pruning", "torch_pruning"), ("tensorly-torch Tucker", "tltorch"), ("tensorly-torch CP", "tltorch")],
)
def test_peers_come_close_to_the_flops_that_they_may_use(method, package):
    pytest.importorskip(package)
    torch.manual_seed(0)
    model, images = CifarResNet(1).eval(), torch.randn(4, 3, 32, 32)
    allowed = peers.flops_of(model, images) // 2
    if method == "torch-pruning":
        small = peers.torch_pruning(model, images, allowed)
    else:
        small = peers.tensorly_torch(model, images, allowed, factorization=method.rsplit(" ", 1)[1].lower())
    assert 0.8 * allowed < peers.flops_of(small, images) <= allowed
    assert small(images).shape == (4, 10)


@pytest.mark.parametrize("round_to", [None, 4])
def test_pruning_reaches_down_to_the_narrowest_layer(round_to):
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model, images = CifarResNet(1).eval(), torch.randn(4, 3, 32, 32)
    small = peers.torch_pruning(model, images, peers.flops_of(model, images) // 6, round_to=round_to)
    assert small(images).shape == (4, 10)
    with pytest.raises(ValueError, match="cannot be brought to") as caught:
        peers.torch_pruning(model, images, 100, round_to=round_to)
    smallest = int(str(caught.value).rsplit(" ", 1)[1].strip(".").replace(",", ""))
    assert smallest < peers.flops_of(model, images) / (40 if round_to is None else 8)


@pytest.mark.parametrize(("method", "package"), [("torch_pruning", "torch_pruning"), ("tensorly_torch", "tltorch")])
def test_a_peer_that_cannot_be_as_small_says_so_and_passes_nothing_larger_on(method, package):
    pytest.importorskip(package)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="cannot be brought to 100 FLOPs: at its smallest it takes"):
        getattr(peers, method)(CifarResNet(1).eval(), torch.randn(4, 3, 32, 32), 100)
