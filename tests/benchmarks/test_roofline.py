"""Where the time goes: every layer of both sides, with the least that it can take; a configuration is enough."""

import json

import pytest

from benchmarks import roofline


def test_both_sides_are_profiled_and_drawn(tmp_path, capsys):
    options = ["--model", "squeezenet1_1", "--config", "uniform:0.25", "--image-size", "64", "--batches", "1"]
    options += ["--runtimes", "onnxruntime", "--rounds", "2", "--out", str(tmp_path)]
    assert roofline.main(options) == 0
    content = json.loads((tmp_path / "roofline.json").read_text())
    assert content["sizes"]["compressed"]["flops"] < content["sizes"]["dense"]["flops"]
    [row] = content["rows"]
    assert all(kernel["limit"] > 0 for kernel in row["kernels"]["compressed"] if kernel["flops"])
    assert (tmp_path / "onnxruntime-batch1.png").stat().st_size > 1000
    assert "squeezenet1_1" in capsys.readouterr().out


def test_in_int8_too(tmp_path, capsys):
    pytest.importorskip("nncf")
    options = ["--model", "squeezenet1_1", "--config", "uniform:0.25", "--image-size", "64", "--batches", "1"]
    assert roofline.main([*options, "--precision", "int8", "--rounds", "1", "--out", str(tmp_path)]) == 0
    [row] = json.loads((tmp_path / "roofline.json").read_text())["rows"]
    assert (row["runtime"], row["precision"]) == ("openvino", "int8")
    assert (tmp_path / "openvino-int8-batch1.png").exists()
    assert "openvino int8" in capsys.readouterr().out


def test_int8_where_kernels_hide_it_ends_before_anything_is_measured(tmp_path, capsys):
    options = ["--model", "squeezenet1_1", "--config", "uniform:0.25", "--image-size", "64", "--out", str(tmp_path)]
    assert roofline.main([*options, "--precision", "int8", "--runtimes", "onnxruntime"]) == 2
    assert "--precision int8 is of openvino alone" in capsys.readouterr().err


def test_a_configuration_that_is_none_is_named(tmp_path, capsys):
    assert roofline.main(["--model", "resnet18", "--config", "no.json:1", "--out", str(tmp_path)]) == 2
    assert "no.json" in capsys.readouterr().err
