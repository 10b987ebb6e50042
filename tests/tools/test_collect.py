"""Finished runs come home whole: JSON, baseline's log, the smallest accepted network; unfinished ones are refused."""

import json

import pytest

from common.reports import RunLog
from tools import collect_results


@pytest.fixture
def logged(tmp_path):
    """A log of two fine-tuned candidates, of which only the larger one kept its accuracy, and their weights."""
    path = tmp_path / "logs" / "resnet18-mnist-32-cpu-seed4.log"
    versions = {"torch": "2", "onnxruntime": "1"}
    with RunLog(path) as log:
        log.header({"model": "resnet18", "dataset": "mnist", "image_size": 32, "seed": 4, "versions": versions})
        log.baseline("resnet18", 1_000_000, 50_000_000, 0.99, 0.01)
        for trial, params, accuracy in (("0.1-3", 50_000, 0.989), ("0.05-7", 20_000, 0.97)):
            record = {"config_str": "a:(1)", "trial": trial, "seed": 4, "status": "fine-tuned", "budget": 0.1}
            numbers = {"params": params, "flops": 10 * params, "accuracy": accuracy, "inference_time": 0.001}
            log.candidate({**record, **numbers, "compression_rate": 1e6 / params, "accepted": True})
            weights = path.with_suffix("") / f"candidate-{trial}.safetensors"
            weights.parent.mkdir(exist_ok=True)
            weights.write_bytes(trial.encode())
    baselines = tmp_path / "saved_models"
    baselines.mkdir()
    starts = {"resnet18_mnist_32": "saved/resnet18_mnist_24.safetensors", "resnet18_mnist_24": "none"}
    for name, start in starts.items():
        (baselines / f"{name}.json").write_text(json.dumps({"weights": start}))
    return path


def collect(log, tmp_path):
    out = tmp_path / "results"
    return collect_results.main([str(log), "--out", str(out), "--baselines", str(tmp_path / "saved_models")]), out


def test_a_run_comes_home(logged, tmp_path):
    code, out = collect(logged, tmp_path)
    assert code == 0
    folder = out / "mnist-32"
    assert json.loads((folder / f"{logged.stem}.json").read_text())["counts"]["fine_tuned"] == 2
    trained = ["baseline-resnet18.json", "baseline-resnet18_mnist_24.json"]
    assert [path.name for path in sorted(folder.glob("baseline-*"))] == trained
    assert (folder / "resnet18-smallest-seed4.safetensors").read_bytes() == b"0.1-3"
    assert "95.00%" in (folder / "table.md").read_text()
    assert (out / "radar.png").exists()


def test_the_weights_are_of_the_network_that_the_tables_choose(logged, tmp_path):
    with RunLog(logged) as log:  # the same network trained on is much better: the larger one has lost too much
        log.header({"dense_control": {"accuracy": 0.999}})
    code, out = collect(logged, tmp_path)
    assert code == 0
    assert not list((out / "mnist-32").glob("*-smallest-*"))
    assert "none within tolerance" in (out / "mnist-32" / "table.md").read_text()


def test_the_baseline_is_the_one_that_the_log_names(tmp_path):
    """Beside one of the plain name, of other data or settings, a run's own has a name of its own."""
    log, baselines = tmp_path / "logs" / "run.log", tmp_path / "saved_models"
    baselines.mkdir()
    for name in ("alexnet_mnist_224", "alexnet_mnist_224-0123abcd"):
        (baselines / f"{name}.json").write_text(json.dumps({"weights": "none", "name": name}))
    with RunLog(log) as text:
        own = {"baseline_checkpoint": "alexnet_mnist_224-0123abcd.safetensors", "versions": {"torch": "2"}}
        text.header({"model": "alexnet", "dataset": "mnist", "image_size": 224, "seed": 0, **own})
        text.baseline("alexnet", 1_000_000, 50_000_000, 0.99, 0.01)
    folder = collect_results.collect(log, tmp_path / "results", baselines)
    assert json.loads((folder / "baseline-alexnet.json").read_text())["name"] == "alexnet_mnist_224-0123abcd"


def test_baselines_that_start_from_each_other_are_told_once(tmp_path):
    for name, start in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"weights": f"{start}.safetensors"}))
    assert collect_results._trainings(tmp_path / "a.json") == [tmp_path / "a.json", tmp_path / "b.json"]


def test_notebooks_forget_where_they_were_run(tmp_path):
    path = tmp_path / "a.ipynb"
    noted = {"input_path": "htd-resnet-res.ipynb", "output_path": "/somewhere/else/a.ipynb", "duration": 3.0}
    path.write_text(json.dumps({"cells": [], "metadata": {"papermill": noted}}))
    collect_results.forget_paths(path)
    assert json.loads(path.read_text())["metadata"]["papermill"] == {**noted, "output_path": "a.ipynb"}


def test_large_weights_stay_where_they_are(logged, tmp_path, monkeypatch):
    monkeypatch.setattr(collect_results, "LARGEST_WEIGHTS", 3)
    _, out = collect(logged, tmp_path)
    assert not list((out / "mnist-32").glob("*.safetensors"))


def test_a_log_without_a_baseline_is_refused(tmp_path, capsys):
    path = tmp_path / "half.log"
    with RunLog(path) as log:
        log.header({"model": "resnet18", "dataset": "mnist", "image_size": 32, "seed": 0})
    code, _ = collect(path, tmp_path)
    assert code == 2
    assert "is not the log of a whole run" in capsys.readouterr().err
