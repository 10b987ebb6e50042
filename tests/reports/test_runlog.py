"""The text log: what is written is read back, and damage costs only what it hit."""

import json
import math

import pytest

from common.configuration import format_config_str, parse_config_str
from common.reports import RunLog, read_log, to_json
from common.reports.log_format import status_of

EARLIER_LOG = """\
2025-01-01 10:00:00,000 - MainProcess - INFO - Found 3 Conv2D layers in vgg
2025-01-01 10:00:01,000 - MainProcess - INFO - Baseline vgg: params=900, FLOPs=5000, accuracy=0.99, inference_time=0.05s
2025-01-01 10:00:02,000 - MainProcess - INFO - compressed_model:
{
    "config_str": "features.0:(2, 3), features.10:(4, 5)",
    "params": 800,
    "flops": 3000,
    "accuracy": 0.985,
    "inference_time": 0.04,
    "compression_rate": 1.25,
    "accepted": true
}
2025-01-01 10:00:03,000 - MainProcess - ERROR - Error processing config: {'features.0': (2, 3)}. Error: out of memory
2025-01-01 10:00:04,000 - MainProcess - INFO - compressed_model:
{
    "config_str": "features.0:(1, 3), features.10:(4, 2)",
    "params": 500,
    "flops": 2000,
    "accuracy": 0.98,
    "inference_time": 0.03,
    "compression_rate": 2.0,
    "accepted": true
}
"""


def record(trial: int = 0, **changes) -> dict:
    return {
        "config_str": "conv1:(3, 8, 16), layer2.0.downsample.0:(24), fc:(8)",
        "params": 100 + trial,
        "flops": 2000,
        "accuracy": 0.97,
        "inference_time": 0.012,
        "compression_rate": 10.5,
        "accepted": True,
        "trial": trial,
        "status": "fine-tuned",
    } | changes


def write_log(path, records=(), **baseline) -> None:
    values = {"params": 1000, "flops": 50_000, "accuracy": 0.99, "inference_time": 0.05} | baseline
    with RunLog(path) as log:
        log.header({"model": "resnet18", "dataset": "mnist", "image_size": 32, "seed": 0})
        log.baseline("resnet18", **values)
        for item in records:
            log.candidate(item)


def read_text(tmp_path, text: str | bytes):
    path = tmp_path / "sample.log"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_log(path)


def line_of(text: str, needle: str) -> int:
    return text[: text.index(needle)].count("\n") + 1


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("layer1.0.conv1:(16, 24, 8), fc:(8)", {"layer1.0.conv1": (16, 24, 8), "fc": (8,)}),
        ("conv1:(3, 64), layer2.0.downsample.0:(5, 7)", {"conv1": (3, 64), "layer2.0.downsample.0": (5, 7)}),
        ("features.10:(2, 48), classifier.6:()", {"features.10": (2, 48), "classifier.6": ()}),
        ("", {}),
    ],
)
def test_config_str_round_trip_for_every_layer_name_and_number_of_ranks(text, config):
    assert parse_config_str(text) == config
    assert format_config_str(config) == text


@pytest.mark.parametrize("text", ["conv1", "conv1:(3, x)", "conv1:(3, 4", "conv1:(-3)", "a:(1) b:(2)", "a:(1), a:(2)"])
def test_unreadable_config_str_is_refused(text):
    with pytest.raises(ValueError, match="rank configuration"):
        parse_config_str(text)


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "logs" / "run.log"
    header = {"model": "vgg16", "seed": 3, "revision": "123", "versions": {"torch": "2"}, "note": " padded\n"}
    records = [record(0), record(1, status="screened", accuracy=None, inference_time=None, val_accuracy=0.1 + 0.2)]
    with RunLog(path) as log:
        log.header(header)
        log.info("first\nsecond")
        log.baseline("vgg16", 12_345, 67_890, 359 / 360, 0.0123456789)
        for item in records:
            log.candidate(item)
    parsed = read_log(path)
    assert parsed.header == header
    assert parsed.candidates == records
    assert parsed.baseline == {
        "architecture": "vgg16",
        "params": 12_345,
        "flops": 67_890,
        "accuracy": 359 / 360,
        "inference_time": 0.0123456789,
    }
    assert parsed.warnings == []
    assert parsed.counts()["tried"] == 2
    assert json.loads(json.dumps(to_json(parsed), allow_nan=False))["candidates"] == records


def test_event_line_has_the_documented_form(tmp_path):
    with RunLog(tmp_path / "run.log") as log:
        log.warning("careful")
    assert read_log(tmp_path / "run.log").warnings == ["run.log: no line with a Baseline"]
    line = (tmp_path / "run.log").read_text()
    assert line.endswith(" - MainProcess - WARNING - careful\n")
    assert len(line.split(" - ")[0]) == len("2026-11-22 10:00:00,000")


def test_log_of_the_earlier_scripts(tmp_path):
    parsed = read_text(tmp_path, EARLIER_LOG)
    assert [item["params"] for item in parsed.candidates] == [800, 500]
    assert [status_of(item) for item in parsed.candidates] == ["fine-tuned", "fine-tuned"]
    assert parsed.failures == [{"config_str": "features.0:(2, 3)", "reason": "out of memory"}]
    assert {key: parsed.counts()[key] for key in ("tried", "succeeded", "failed")} == {
        "tried": 3,
        "succeeded": 2,
        "failed": 1,
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["accuracy", "loss", "nested"])
def test_a_number_that_is_none_is_written_as_a_failure_in_valid_json(tmp_path, value, place):
    spoilt = {"nested": {"loss": [1.0, value]}} if place == "nested" else {place: value}
    write_log(tmp_path / "run.log", [record(**spoilt)])
    text = (tmp_path / "run.log").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    [read] = read_log(tmp_path / "run.log").candidates
    assert read["status"] == "failed"
    assert place in read["reason"]


def test_nan_in_a_foreign_record_is_kept_as_a_failure_and_named(tmp_path):
    text = EARLIER_LOG.replace("0.985", "NaN")
    parsed = read_text(tmp_path, text)
    assert [status_of(item) for item in parsed.candidates] == ["failed", "fine-tuned"]
    assert parsed.candidates[0]["accuracy"] is None
    [warning] = parsed.warnings
    assert warning.startswith("sample.log:4:")
    assert "accuracy" in warning


@pytest.mark.parametrize(
    "changes",
    [{"accuracy": 97.0}, {"params": 0}, {"inference_time": -1.0}, {"status": "done"}, {"config_str": "a:b"}],
)
def test_writer_refuses_a_record_that_the_reader_would_call_damaged(tmp_path, changes):
    with RunLog(tmp_path / "run.log") as log:
        with pytest.raises(ValueError, match="candidate cannot be logged"):
            log.candidate(record(**changes))
        with pytest.raises(ValueError, match="lacks params"):
            log.candidate({key: value for key, value in record().items() if key != "params"})
        log.candidate({"config_str": "fc:(2)", "status": "failed", "reason": "out of memory"})
        with pytest.raises(ValueError, match="image_size"):
            log.header({"image size": 32})


@pytest.mark.parametrize("continued", [False, True])
def test_a_cut_at_any_byte_keeps_every_block_before_it(tmp_path, continued):
    path = tmp_path / "run.log"
    write_log(path, [record(0), record(1)])
    raw = path.read_bytes()
    ends = [position + 2 for position in range(len(raw)) if raw[position : position + 2] == b"\n}"]
    cut_path = tmp_path / "cut.log"
    for cut in range(len(raw) + 1):
        cut_path.write_bytes(raw[:cut])
        expected = [record(number) for number, end in enumerate(ends) if end <= cut]
        if continued:
            write_log(cut_path, [record(7)])
            expected.append(record(7))
        assert read_log(cut_path).candidates == expected, cut


def test_cut_block_is_named_with_its_line(tmp_path):
    parsed = read_text(tmp_path, EARLIER_LOG[: EARLIER_LOG.index('"flops": 2000')])
    assert [item["params"] for item in parsed.candidates] == [800]
    assert parsed.damaged == parsed.counts()["damaged"] == 1
    [warning] = parsed.warnings
    assert warning.startswith(f"sample.log:{line_of(EARLIER_LOG, 'features.0:(1, 3)') - 1}:")


@pytest.mark.parametrize(
    ("whole", "broken"),
    [
        ('"params": 800,', '"params": 8#0,'),
        ('"params": 800,', '"params": 800'),
        ('    "params": 800,\n', ""),
        ('    "params": 800,\n', '    params": 800,\n'),
        ('"params": 800,', '"params": "800",'),
        ('"params": 800,', '"params": 800, "params": 700,'),
        ('"accuracy": 0.985', '"accuracy": 98.5'),
        ("(2, 3), features", "(2, 3, features"),
        ('    "accepted": true\n}\n2025-01-01 10:00:03', '    "accepted": true\n2025-01-01 10:00:03'),
    ],
)
def test_damaged_block_costs_only_itself(tmp_path, whole, broken):
    assert whole in EARLIER_LOG
    parsed = read_text(tmp_path, EARLIER_LOG.replace(whole, broken, 1))
    assert [item["params"] for item in parsed.candidates] == [500]
    [warning] = parsed.warnings
    assert warning.startswith("sample.log:4: damaged")


def test_invalid_utf8_damages_its_block_only(tmp_path):
    parsed = read_text(tmp_path, EARLIER_LOG.encode().replace(b"features.10:(4, 5)", b"features.10:(4\xff 5)"))
    assert [item["params"] for item in parsed.candidates] == [500]
    assert parsed.damaged == 1


@pytest.mark.parametrize("alien", ["Epoch 1:  50%|#####     |", "2025-01-01 10:00:05,000 - Other - INFO - hello", ""])
def test_alien_line_at_any_place_costs_no_record(tmp_path, alien):
    intact = read_text(tmp_path, EARLIER_LOG).candidates
    lines = EARLIER_LOG.splitlines()
    for place in range(len(lines) + 1):
        parsed = read_text(tmp_path, "\n".join([*lines[:place], alien, *lines[place:]]) + "\n")
        assert parsed.candidates == intact, place
        assert all(warning.startswith(f"sample.log:{place + 1}: alien") for warning in parsed.warnings)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: text.replace("2025-01-01 10:00:02", "10%|#   |\r20%|##  |\r2025-01-01 10:00:02"),
        lambda text: text.rstrip("\n"),
    ],
    ids=["windows", "bom", "progress-bar", "no-last-newline"],
)
def test_line_ends_and_marks_of_other_programs_change_nothing(tmp_path, change):
    intact = read_text(tmp_path, EARLIER_LOG)
    parsed = read_text(tmp_path, change(EARLIER_LOG))
    assert to_json(parsed) == to_json(intact)


def test_empty_log_and_log_without_baseline_say_so(tmp_path):
    parsed = read_text(tmp_path, "")
    assert (parsed.baseline, parsed.candidates) == (None, [])
    assert parsed.warnings == ["sample.log: no line with a Baseline"]
    cut = "\n".join(line for line in EARLIER_LOG.splitlines() if "Baseline" not in line)
    assert len(read_text(tmp_path, cut).candidates) == 2


def test_reason_that_quotes_a_log_line_is_no_event(tmp_path):
    reason = "2025-01-01 10:00:00,000 - MainProcess - INFO - compressed_model:"
    write_log(tmp_path / "run.log", [record(status="failed", reason=reason)])
    assert read_log(tmp_path / "run.log").candidates == [record(status="failed", reason=reason)]


def test_resumed_run_repeats_trials_and_measures_its_baseline_again(tmp_path):
    path = tmp_path / "run.log"
    screened = {"status": "screened", "accuracy": None, "inference_time": None}
    write_log(path, [record(0, **screened), record(0), record(1, status="failed")])
    write_log(path, [record(1), record(2)], inference_time=0.08)
    parsed = read_log(path)
    assert [(item["trial"], item["status"]) for item in parsed.candidates] == [
        (0, "screened"),
        (0, "fine-tuned"),
        (1, "failed"),
        (1, "fine-tuned"),
        (2, "fine-tuned"),
    ]
    counts = parsed.counts()
    assert (counts["tried"], counts["fine_tuned"], counts["screened"], counts["failed"]) == (3, 3, 0, 0)
    assert parsed.baseline["inference_time"] == 0.08
    assert [item.get("baseline_inference_time") for item in parsed.candidates] == [0.05, 0.05, 0.05, None, None]


def test_repeated_trial_counts_once_and_its_last_record_holds(tmp_path):
    write_log(tmp_path / "run.log", [record(0, accuracy=0.5), record(1), record(0, accuracy=0.6)])
    parsed = read_log(tmp_path / "run.log")
    assert [(item["trial"], item["accuracy"]) for item in parsed.candidates] == [(0, 0.6), (1, 0.97)]


def test_second_architecture_in_a_log_is_named_and_ignored(tmp_path):
    path = tmp_path / "run.log"
    write_log(path, [record(0)])
    with RunLog(path) as log:
        log.baseline("vgg16", 1, 1, 0.5, None)
    parsed = read_log(path)
    assert parsed.baseline["architecture"] == "resnet18"
    assert any("vgg16 in a log of resnet18" in warning for warning in parsed.warnings)


def test_starting_anew_empties_the_log(tmp_path):
    path = tmp_path / "run.log"
    write_log(path, [record(0)])
    with RunLog(path, append=False) as log:
        log.info("fresh")
    assert read_log(path).candidates == []
