"""Runtimes and precisions: a row each, both sides, with the accuracy beside the time."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import runtimes
from common.compress import factorize
from common.models import build_model, save_checkpoint, save_compressed
from common.ranks import uniform

pytestmark = pytest.mark.apart


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runtimes")
    dense = build_model("resnet18", 10, seed=0).eval()
    factors = factorize(dense, input_shape=(3, 32, 32))
    config = uniform(factors, 0.2)
    save_checkpoint(dense, folder / "dense.safetensors", architecture="resnet18", classes=list("0123456789"))
    options = {"architecture": "resnet18", "num_classes": 10, "image_size": 32, "config": config}
    save_compressed(factors.compress(config), folder / "small.safetensors", **options)
    return folder


def test_each_way_is_a_row_with_both_sides(files, capsys):
    ways = ["onnxruntime float32", "openvino float32", "openvino int8"]
    given = ["--dense", str(files / "dense.safetensors"), "--compressed", str(files / "small.safetensors")]
    given += ["--data", "digits", "--image-size", "32", "--batches", "2", "--ways", *ways, "--rounds", "2"]
    assert runtimes.main([*given, "--test-images", "20", "--out", str(files / "out")]) == 0
    content = json.loads((files / "out" / "runtimes.json").read_text())
    assert [row["way"] for row in content["rows"]] == ways
    for row in content["rows"]:
        assert row["dense"]["median"] > 0 < row["compressed"]["median"]
        assert 0 <= row["accuracy"]["compressed"] <= 1
    assert content["sizes"]["compressed"]["flops"] < 0.25 * content["sizes"]["dense"]["flops"]
    text = (files / "out" / "runtimes.md").read_text()
    best = min(row["dense"]["median"] for row in content["rows"][:2])
    assert f"{best / content['rows'][2]['compressed']['median']:.2f}x" in text
    assert runtimes.main(["--dense", "missing.safetensors", *given[2:]]) == 2
    assert "no checkpoint at missing.safetensors" in capsys.readouterr().err


def test_accuracy_is_of_all_test_images_and_found_once_in_the_largest_batch(files, monkeypatch):
    batches = []

    def pieces(_model, batch):
        batches.append(batch)

    found = SimpleNamespace(accuracy=0.5)
    monkeypatch.setattr(runtimes, "_on_batches", pieces)
    monkeypatch.setattr(runtimes, "evaluate", lambda _m, _s, limit, **_: found if limit is None else None)
    given = ["--compressed", str(files / "small.safetensors"), "--data", "digits", "--image-size", "32"]
    given += ["--batches", "1", "2", "--ways", "torch float32", "--rounds", "1", "--out", str(files / "all")]
    assert runtimes.main(given) == 0
    assert batches == [2]
    content = json.loads((files / "all" / "runtimes.json").read_text())
    assert [(row["batch"], row["accuracy"]["compressed"]) for row in content["rows"]] == [(1, 0.5), (2, 0.5)]
    assert f"Accuracy of all {content['test_images']:,} test images" in (files / "all" / "runtimes.md").read_text()
    assert runtimes.main([*given, "--test-images", "0"]) == 2


def test_sides_without_weights_are_timed_and_show_no_accuracy(files, capsys):
    given = ["--data", "digits", "--image-size", "32", "--batches", "2", "--ways", "onnxruntime float32"]
    given += ["--rounds", "2", "--test-images", "20", "--out", str(files / "random")]
    assert runtimes.main(["--compressed", str(files / "small.safetensors"), *given]) == 0
    row = json.loads((files / "random" / "runtimes.json").read_text())["rows"][0]
    assert row["accuracy"]["dense"] is None
    assert 0 <= row["accuracy"]["compressed"] <= 1
    assert runtimes.main(["--model", "resnet18", "--compressed", "uniform:0.2", *given]) == 0
    row = json.loads((files / "random" / "runtimes.json").read_text())["rows"][0]
    assert row["accuracy"] == {"dense": None, "compressed": None}
    assert row["dense"]["median"] > 0
    text = (files / "random" / "runtimes.md").read_text()
    assert "Of random weights, so that no accuracy is shown: dense and compressed." in text
    capsys.readouterr()
    assert runtimes.main(["--compressed", "uniform:0.2", *given]) == 2
    assert "--model is needed" in capsys.readouterr().err
    assert runtimes.main(["--model", "alexnet", "--compressed", str(files / "small.safetensors"), *given]) == 2
    assert "holds a resnet18, but alexnet was asked for" in capsys.readouterr().err


def test_ways_take_turns_in_blocks_of_both_sides(monkeypatch):
    seen = []

    def samples(runs, _example, *, rounds):
        seen.append([*runs])
        return {key: [1.0] * rounds for key in runs}

    monkeypatch.setattr(runtimes, "latency_samples", samples)
    ways = ["torch float32", "onnxruntime int8"]
    deployed = {(side, way): SimpleNamespace(run=None) for side in runtimes.SIDES for way in ways}
    found = runtimes._in_blocks(deployed, SimpleNamespace(ways=ways, rounds=7), None)
    assert seen == [[("dense", way), ("compressed", way)] for way in ways] * runtimes.BLOCKS
    assert {len(values) for values in found.values()} == {9}
