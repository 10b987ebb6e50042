"""Logs that other programs wrote or touched: encodings, colours, poison, alterations; and reading them stays linear."""

import json
import re
import time

import pytest

import analyze_results
import jsonify_logs
from common.configuration import parse_config_str
from common.reports import RunLog, read_log

RECORD = {
    "config_str": "conv1:(1, 2, 3)", "params": 500, "flops": 900, "accuracy": 0.89, "inference_time": 0.02,
    "compression_rate": 2.0, "status": "fine-tuned", "trial": "0.2-0", "seed": 0,
}  # fmt: skip


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "run.log"
    with RunLog(path) as writer:
        writer.header({"model": "resnet18", "dataset": "mnist", "image_size": 32, "seed": 0})
        writer.baseline("resnet18", 1000, 2000, 0.9, 0.05)
        writer.candidate(RECORD)
        writer.candidate({**RECORD, "trial": "0.2-1"})
    return path


def as_earlier_versions_wrote(text):
    """The log without checksums and without the line that promises them."""
    text = re.sub(r',\n    "checksum": "\w+"', "", text)
    return "".join(line for line in text.splitlines(keepends=True) if "has a checksum" not in line)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n").encode("utf-16"),
        lambda text: text.encode("utf-16-le"),
        lambda text: text.encode("utf-16-be"),
        lambda text: re.sub(r"(?m)^(\d{4}.*)$", "\x1b[32m\\1\x1b[0m", text).encode(),
        lambda text: text.encode("utf-8-sig"),
    ],
    ids=["PowerShell", "UTF-16 little", "UTF-16 big", "colours", "BOM"],
)
def test_encodings_and_colours_change_nothing(log, change):
    expected = read_log(log)
    log.write_bytes(change(log.read_text()))
    found = read_log(log)
    assert (found.candidates, found.baseline, found.header) == (expected.candidates, expected.baseline, expected.header)


@pytest.mark.parametrize("text", ["hello\n", "{}\n", '{"a": 1}\nmore\n', "epoch 1: loss 0.3\n" * 5])
def test_text_that_is_no_log_is_an_error_and_no_empty_success(tmp_path, capsys, text, log):
    other = tmp_path / "other.log"
    other.write_text(text)
    with pytest.raises(ValueError, match=r"other\.log is no log"):
        read_log(other)
    assert jsonify_logs.main([str(other), str(log), "--out", str(tmp_path / "out")]) == 2
    assert "other.log is no log" in capsys.readouterr().err
    assert (tmp_path / "out" / "run.json").exists()  # the good one is converted all the same


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("params", "9" * 400), ("params", "1e999"), ("params", "9" * 5000), ("trial", "[1, 2]"), ("seed", '"x"'),
        ("flops", "true"), ("accuracy", "[" * 3000 + "]" * 3000), ("inference_time", "1e999"), ("params", '"500"'),
    ],
)  # fmt: skip
def test_a_bad_value_costs_its_record_with_file_and_line(log, tmp_path, key, value, capsys):
    text = as_earlier_versions_wrote(log.read_text())
    log.write_text(re.sub(rf'"{key}": [^,\n]*', lambda _: f'"{key}": {value}', text, count=1))
    assert jsonify_logs.main([str(log), "--out", str(tmp_path)]) == 0
    assert "warning: run.log:" in capsys.readouterr().err
    kept = json.loads((tmp_path / "run.json").read_text())["candidates"]
    assert [one["trial"] for one in kept if one.get("status") != "failed"] == ["0.2-1"]


@pytest.mark.parametrize("value", ["1e999", "9" * 5000, "[" * 5000, "NaN"])
def test_a_bad_header_costs_nothing_else(log, tmp_path, value):
    stamp = log.read_text()[:23]
    log.write_text(f"{stamp} - MainProcess - INFO - Header note: {value}\n{log.read_text()}")
    assert jsonify_logs.main([str(log), "--out", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "run.json").read_text())["candidates"]) == 2


def test_an_altered_value_is_named_and_old_logs_have_no_checksum(log):
    text = log.read_text()
    log.write_text(text.replace('"accuracy": 0.89', '"accuracy": 0.98', 1))
    found = read_log(log)
    assert [one["trial"] for one in found.candidates] == ["0.2-1"]
    assert any("was altered" in warning and "run.log:" in warning for warning in found.warnings)
    old = as_earlier_versions_wrote(text)
    assert "checksum" not in old
    log.write_text(old)
    assert read_log(log).candidates == [RECORD, {**RECORD, "trial": "0.2-1"}]


def test_reading_takes_time_in_proportion(tmp_path):
    """Ten times as long a line takes about ten times as long: a quadratic reader would take a hundred times."""

    def seconds(count):
        path = tmp_path / "long.log"
        stamp = "2026-01-01 10:00:00,000"
        path.write_text(f"{stamp} - MainProcess - INFO - x\n" + f"{stamp} - " * count + "\n")
        config = ", ".join(f"layer{number}:(1, 2, 3)" for number in range(count))
        started = time.process_time()
        read_log(path)
        parse_config_str(config)
        return time.process_time() - started

    seconds(100)
    assert seconds(8000) < 60 * max(seconds(800), 0.005)


def test_json_of_a_wrong_kind_is_refused_in_one_line(log, tmp_path, capsys):
    assert jsonify_logs.main([str(log), "--out", str(tmp_path)]) == 0
    good = json.loads((tmp_path / "run.json").read_text())
    capsys.readouterr()
    wrong = {
        "header": [], "baseline": {"params": "many"}, "counts": {"tried": -1}, "candidates": {"a": 1},
        "candidates ": [{"config_str": 3}], "header ": {"image_size": "large"},
    }  # fmt: skip
    for key, value in wrong.items():
        (tmp_path / "run.json").write_text(json.dumps({**good, key.strip(): value}))
        assert analyze_results.main([str(tmp_path / "run.json"), "--out", str(tmp_path), "--no-plots"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "run.json" in line
        assert "run jsonify_logs.py again" in line


def test_a_deleted_log_stops_the_run(log):
    with RunLog(log) as writer:
        log.unlink()
        with pytest.raises(FileNotFoundError, match=r"run\.log was deleted"):
            writer.candidate({**RECORD, "trial": "0.2-2"})
