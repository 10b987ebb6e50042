"""Whole batches and parts timed in turns: rows of both networks in every way, on their own."""

import json

import pytest
import torch

from benchmarks import parts

SMALL = ["--model", "squeezenet1_1", "--config", "uniform:0.5", "--image-size", "32", "--batch", "4", "--rounds", "3"]


def test_every_way_has_a_row_per_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert parts.main([*SMALL, "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "parts.json").read_text())
    ways = ["whole", "parts of 2"]
    assert list(content["seconds"]) == [f"{side}, {way}" for side in ("dense", "compressed") for way in ways]
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in content["seconds"].values())
    assert (tmp_path / "parts.md").read_text() == capsys.readouterr().out
    assert (tmp_path / "parts.png").stat().st_size > 10_000


def test_the_table_tells_the_spread_and_the_ratio_to_the_dense_whole():
    content = {
        "network": "net",
        "image_size": 8,
        "batch": 4,
        "runtime": "onnxruntime",
        "threads": 2,
        "seconds": {"dense, whole": [0.1] * 9, "compressed, whole": [0.01] * 5 + [0.02] * 4},
        "provenance": {"machine": "m", "git_revision": "r", "command": "c"},
    }
    dense, compressed = (line.split("|")[1:-1] for line in parts.table(content).splitlines()[2:4])
    assert [cell.strip() for cell in dense] == ["dense", "whole", "100.00", "100.00 to 100.00", "1.00", "1.00x"]
    assert [cell.strip() for cell in compressed] == ["compressed", "whole", "10.00", "10.00 to 20.00", "2.00", "10.00x"]


def test_what_is_wrong_is_said_in_a_line(tmp_path, capsys):
    assert parts.main([*SMALL, "--config", "none.safetensors", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_runtime_without_parts_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        parts.main([*SMALL, "--runtime", "torch", "--out", str(tmp_path)])
