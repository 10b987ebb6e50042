"""A run's network beside other methods at its FLOPs: trained alike, timed together, each failure said."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import run_peers
from common.experiment import Experiment
from common.files import read_json
from common.models import load_checkpoint, save_checkpoint
from common.presets import preset
from common.reports import read_log, to_json

TINY = {
    "train_limit": 200,
    "baseline_epochs": 1,
    "candidates": 1,
    "sensitivity": "proxy",
    "control": False,
    "budgets": (0.3,),
    "calibration_images": 64,
    "screen_images": 64,
    "finetune_epochs": 1,
    "latency_batch": 4,
    "runtime": "torch",
    "tolerance": 0.99,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The arguments of a command that is done, the run's own record of its network, and the command's folder."""
    folder = tmp_path_factory.mktemp("run")
    places = {"folder": str(folder / "logs"), "baselines": str(folder)}
    experiment = Experiment(preset("quick", "resnet18", **TINY, **places), progress=False)
    experiment.deploy()
    (finalist,) = experiment.finetune()
    checkpoint = experiment.prepare_baseline().checkpoint
    experiment.close()
    arguments = ["--log", str(experiment.settings.log_path), "--weights", str(checkpoint), "--batches", "2"]
    arguments += ["--rounds", "2", "--runtimes", "torch", "--out", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_peers.peers, "torch_pruning", _fails)
        assert run_peers.main([*arguments, "--methods", "policy", "two-factor SVD", "torch-pruning"]) == 0
    return arguments, finalist.record, folder / "out"


def _fails(*_):
    raise ValueError("cannot be brought to 7 FLOPs")


def rows_of(folder):
    return {row["method"]: row for row in read_json(folder / "rows.json")["rows"]}


def test_every_method_gets_the_flops_of_the_runs_network_and_its_training(finished):
    _, record, folder = finished
    rows = rows_of(folder)
    ours, other = rows["policy"], rows["two-factor SVD"]
    assert (ours["config_str"], ours["flops"]) == (str(record["config"]), record["flops"])
    # The same images, recipe and seed on the same machine: the run's own training over again.
    assert ours["test_accuracy"] == record["accuracy"]
    assert other["flops"] <= record["flops"]
    assert other["untrained_val_accuracy"] != other["val_accuracy"]


def test_a_method_that_cannot_is_a_line_that_says_why_and_all_others_are_timed(finished):
    *_, folder = finished
    text = (folder / "run-peers.md").read_text()
    assert rows_of(folder)["torch-pruning"]["failed"].endswith("cannot be brought to 7 FLOPs")
    assert "\n\ntorch-pruning: ValueError: cannot be brought to 7 FLOPs.\n\n" in text
    (case,) = read_json(folder / "rows.json")["cases"]
    assert [row["method"] for row in case["rows"]] == ["policy", "two-factor SVD"]
    assert all(f"{row['speedup']:.1f}x" in text for row in case["rows"])


def test_a_second_call_adds_what_is_missing_and_times_all_together_again(finished, monkeypatch):
    arguments, _, folder = finished
    before = read_json(folder / "rows.json")
    monkeypatch.setattr(run_peers, "provenance", lambda *_: before["provenance"])
    assert run_peers.main([*arguments, "--methods", "policy", "uniform", "two-factor SVD", "torch-pruning"]) == 0
    after = read_json(folder / "rows.json")
    assert after["rows"][:3] == before["rows"]
    assert [row["method"] for row in after["cases"][0]["rows"]] == ["policy", "two-factor SVD", "uniform"]


def test_another_network_than_the_runs_is_refused(finished, tmp_path, capsys):
    arguments, *_ = finished
    weights = Path(arguments[3])
    model, metadata = load_checkpoint(weights)
    torch.nn.init.zeros_(model.fc.weight)
    kept = {"architecture": metadata["architecture"], "classes": metadata["classes"]}
    save_checkpoint(model, tmp_path / "other.safetensors", **kept)
    assert run_peers.main([*arguments[:3], str(tmp_path / "other.safetensors"), "--out", str(tmp_path)]) == 2
    assert "is not the network that" in capsys.readouterr().err


def test_a_run_that_found_nothing_is_refused(finished, tmp_path, capsys):
    arguments, *_ = finished
    run = to_json(read_log(Path(arguments[1])))
    run["candidates"] = [one for one in run["candidates"] if one["status"] != "fine-tuned"]
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert run_peers.main(["--log", str(tmp_path / "run.json"), *arguments[2:4], "--out", str(tmp_path)]) == 2
    assert "no network of this run lost at most" in capsys.readouterr().err


def test_rows_of_another_network_are_not_taken_up(finished, tmp_path, capsys):
    arguments, _, folder = finished
    content = read_json(folder / "rows.json")
    content["asked"]["network"] = "fc:(1)"
    (tmp_path / "rows.json").write_text(json.dumps(content))
    assert run_peers.main([*arguments[:4], "--rounds", "2", "--out", str(tmp_path)]) == 2
    assert "rows of other settings" in capsys.readouterr().err


def test_a_run_that_was_to_lose_nothing_is_held_to_it(finished, tmp_path, capsys):
    arguments, *_ = finished
    run = to_json(read_log(Path(arguments[1])))
    run["header"] |= {"max_loss": 0.0, "dense_val_accuracy": 1.0}
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert run_peers.main(["--log", str(tmp_path / "run.json"), *arguments[2:4], "--out", str(tmp_path)]) == 2
    assert "no network of this run lost at most 0.0" in capsys.readouterr().err
