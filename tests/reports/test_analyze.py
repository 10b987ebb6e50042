"""From logs to the table: `jsonify_logs.py` and `analyze_results.py`, run as a user runs them."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import analyze_results
import jsonify_logs
from common.reports import RunLog, caption, choose, family, group_runs, is_accepted, load_runs, read_log, to_json
from common.reports.tables import COLUMNS, NONE_ACCEPTED

ROOT = Path(__file__).resolve().parents[2]
BASELINES = {
    "resnet18": "conv1:(3, 8, 16), layer2.0.downsample.0:(24)",
    "vgg16": "features.10:(4, 6), classifier.6:()",
}


def record(**changes) -> dict:
    return {
        "config_str": "conv1:(3, 8, 16), layer2.0.downsample.0:(24), fc:(8)",
        "params": 100,
        "flops": 2000,
        "accuracy": 0.98,
        "inference_time": 0.02,
        "compression_rate": 10.0,
        "accepted": True,
    } | changes


def write_log(path: Path, records, model: str = "resnet18", baseline: bool = True, **header) -> Path:
    with RunLog(path, append=False) as log:
        log.header({"model": model} | header)
        if baseline:
            log.baseline(model, params=1000, flops=10_000, accuracy=0.99, inference_time=0.05)
        for item in records:
            log.candidate(item)
    return path


def rows_of(*logs: Path, tolerance: float = 0.02, ties: str = "first") -> list[dict[str, str]]:
    groups = group_runs([to_json(read_log(log)) for log in logs])
    choices = [choice for group in groups for choice in choose(group, tolerance, ties)]
    return [dict(zip(COLUMNS, choice.cells(), strict=True)) for choice in choices]


def run_script(name: str, *arguments, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def control_runs(folder, control):
    path = write_log(folder / "run.log", [record(accuracy=0.985)], dense_control=control)
    runs, problems, _ = load_runs([path])
    assert problems == []
    return group_runs(runs)


@pytest.mark.parametrize(("control", "accepted"), [({"accuracy": 0.999}, False), ({"accuracy": 0.97}, True)])
def test_losses_are_counted_from_the_better_of_the_dense_networks(tmp_path, control, accepted):
    groups = control_runs(tmp_path, control)
    assert all((choice.best is not None) == accepted for choice in choose(groups[0], 0.01))
    assert f"trained on as long as the candidates {control['accuracy']:.4f}" in "".join(caption(groups, 0.01))


@pytest.mark.parametrize(
    ("validation", "control", "chosen"),
    [
        (0.980, None, "0.971"),  # the smaller one keeps its validation accuracy: test is what is shown
        (0.980, {"accuracy": 0.99, "val_accuracy": 0.999}, "none within tolerance"),
        (0.980, {"accuracy": 0.99, "val_accuracy": 0.5}, "0.971"),
        (0.999, None, "none within tolerance"),
        ("much", None, "0.985"),  # what is no accuracy is as if it were not there, and test decides
        (7.5, None, "0.985"),
        (True, None, "0.985"),
    ],
)
def test_what_is_chosen_is_chosen_on_validation_where_the_log_has_it(tmp_path, validation, control, chosen):
    records = [
        record(params=500, accuracy=0.985, val_accuracy=0.960),
        record(params=250, accuracy=0.971, val_accuracy=0.975),
    ]
    header = {"dense_val_accuracy": validation} | ({} if control is None else {"dense_control": control})
    runs, problems, _ = load_runs([write_log(tmp_path / "run.log", records, **header)])
    assert problems == []
    groups = group_runs(runs)
    cells = choose(groups[0], 0.01)[0].cells()
    assert chosen in cells
    said = caption(groups, 0.01)[0]
    assert ("Criterion: test accuracy" in said) == (chosen == "0.985")
    assert ("Criterion: validation accuracy (of test is what is shown) at least" in said) == (chosen != "0.985")


def test_logs_with_and_without_validation_in_one_table(tmp_path):
    both = [record(accuracy=0.985, val_accuracy=0.98)]
    paths = [write_log(tmp_path / "a.log", both, dense_val_accuracy=0.98), write_log(tmp_path / "b.log", both)]
    runs, _, _ = load_runs(paths)
    assert (
        "or test accuracy where a log has no other of the dense network, at least" in caption(group_runs(runs), 0.01)[0]
    )


@pytest.mark.parametrize("control", ["all well", [1], {"accuracy": 7.5}, {"accuracy": "0.9"}, {"accuracy": None}, {}])
def test_a_control_that_is_no_accuracy_is_left_out(tmp_path, control):
    groups = control_runs(tmp_path, control)
    assert all(choice.best is not None for choice in choose(groups[0], 0.01))
    assert "trained on" not in "".join(caption(groups, 0.01))


def test_log_to_json_to_table(tmp_path, capsys):
    for model, config in BASELINES.items():
        write_log(
            tmp_path / "logs" / f"{model}.log",
            [
                record(config_str=config, params=250, flops=1234, accuracy=0.9816, trial=0),
                record(config_str=config, params=125, flops=3210, accuracy=0.9756, inference_time=0.008, trial=1),
                record(config_str=config, status="failed", accuracy=float("nan"), trial=2),
                record(config_str=config, accuracy=None, inference_time=None, val_accuracy=0.9, trial=3, params=1),
            ],
            model,
        )
    assert jsonify_logs.main([str(tmp_path / "logs"), "--out", str(tmp_path / "out")]) == 0
    documents = sorted((tmp_path / "out").glob("*.json"))
    assert [path.name for path in documents] == ["resnet18.json", "vgg16.json"]
    assert analyze_results.main([*map(str, documents), "--out", str(tmp_path / "out")]) == 0

    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == [
        "Model", "Criterion", "Params Red.", "FLOPs Red.", "Accuracy", "Speedup", "Parameters", "FLOPs", "Comp. Rate",
    ]  # fmt: skip
    assert table[1:4] == [
        ["Resnet", "Best Params Red.", "87.50%", "67.90%", "0.976", "6.25x", "125", "3,210", "10.00"],
        ["Resnet", "Best FLOPs Red.", "75.00%", "87.66%", "0.982", "2.50x", "250", "1,234", "10.00"],
        ["Resnet", "Best Speedup", "87.50%", "67.90%", "0.976", "6.25x", "125", "3,210", "10.00"],
    ]
    assert [row[0] for row in table[4:]] == ["Vgg"] * 3
    printed = capsys.readouterr().out
    assert "Resnet: 4 tried, 2 fine-tuned, 1 screened only, 1 failed" in printed
    for style in ("txt", "md", "html"):
        text = (tmp_path / "out" / f"table.{style}").read_text()
        assert all(cell in text for row in table for cell in row)
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {
        "radar.png", "resnet-accuracy-cost.png", "resnet-ranks.png", "vgg-accuracy-cost.png", "vgg-ranks.png",
    }  # fmt: skip


def test_logs_and_their_json_give_the_same_table(tmp_path, capsys):
    log = write_log(tmp_path / "a.log", [record()])
    jsonify_logs.main([str(log), "--out", str(tmp_path)])
    capsys.readouterr()
    printed = []
    for source in (log, tmp_path / "a.json", tmp_path):
        assert analyze_results.main([str(source), "--out", str(tmp_path / "out"), "--no-plots"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize(
    ("accuracy", "accepted"), [(0.97, True), (0.97 - 1e-6, False), (1.0, True), (None, False), (0.99 - 0.02, True)]
)
def test_one_acceptance_rule_selects_and_reports(tmp_path, accuracy, accepted):
    assert is_accepted(accuracy, 0.99, 0.02) is accepted
    rows = rows_of(write_log(tmp_path / "a.log", [record(accuracy=accuracy, val_accuracy=0.99)]))
    assert [row["Params Red."] for row in rows] == (["90.00%"] if accepted else [NONE_ACCEPTED]) * 3


def test_acceptance_does_not_hang_on_rounding():
    images = 1000
    for correct in range(800, images + 1):
        for lost in (1, 5, 20, 100, 200):
            tolerance = lost / images
            assert is_accepted((correct - lost) / images, correct / images, tolerance)
            assert not is_accepted((correct - lost - 1) / images, correct / images, tolerance)


@pytest.mark.parametrize("order", [1, -1])
def test_ties_go_to_higher_accuracy_then_to_shorter_time(tmp_path, order):
    records = [
        record(accuracy=0.975, inference_time=0.02),
        record(accuracy=0.985, inference_time=0.04),
        record(accuracy=0.985, inference_time=0.03125),
    ][::order]
    rows = rows_of(write_log(tmp_path / "a.log", records), ties="accuracy")
    assert [(row["Accuracy"], row["Speedup"]) for row in rows] == [
        ("0.985", "1.60x"),
        ("0.985", "1.60x"),
        ("0.975", "2.50x"),
    ]
    in_log_order = rows_of(tmp_path / "a.log")
    assert in_log_order[0]["Speedup"] == {1: "2.50x", -1: "1.60x"}[order]


def test_unmeasured_and_failed_candidates_win_nothing_they_cannot(tmp_path):
    records = [
        record(params=10, flops=10, accuracy=0.99, status="failed", reason="out of memory"),
        record(params=50, flops=60, inference_time=None),
        record(params=500, flops=600, inference_time=0.025),
    ]
    rows = rows_of(write_log(tmp_path / "a.log", records))
    assert [(row["Parameters"], row["Speedup"]) for row in rows] == [
        ("50", "not measured"),
        ("50", "not measured"),
        ("500", "2.00x"),
    ]


def test_nothing_within_tolerance_is_a_row_that_says_so(tmp_path, capsys):
    log = write_log(tmp_path / "a.log", [record(accuracy=0.5)])
    assert analyze_results.main([str(log), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count(NONE_ACCEPTED) == 3
    assert analyze_results.main([str(log), "--out", str(tmp_path), "--tolerance", "0.6", "--no-plots"]) == 0
    assert NONE_ACCEPTED not in capsys.readouterr().out


def test_speedup_is_taken_within_the_run_that_measured_both(tmp_path):
    log = write_log(tmp_path / "a.log", [record(trial=0)])
    with RunLog(log) as again:
        again.baseline("resnet18", params=1000, flops=10_000, accuracy=0.99, inference_time=0.5)
    assert rows_of(log)[0]["Speedup"] == "2.50x"


@pytest.mark.parametrize(
    ("name", "title"),
    [("resnet", "Resnet"), ("resnet18", "Resnet"), ("vgg", "Vgg"), ("vgg16_bn", "Vgg"), ("AlexNet", "Alexnet")],
)
def test_model_names_are_one_family_each(name, title):
    assert family(name) == title


def test_runs_merge_by_family_data_set_and_size(tmp_path):
    logs = [
        write_log(tmp_path / "1.log", [record(params=300)], "resnet18", dataset="mnist", image_size=32, seed=0),
        write_log(tmp_path / "2.log", [record(params=200)], "resnet", dataset="mnist", image_size=32, seed=1),
    ]
    smallest, *others = rows_of(*logs)
    assert (smallest["Model"], smallest["Parameters"]) == ("Resnet", "200")
    assert {row["Model"] for row in others} == {"Resnet"}
    logs.append(write_log(tmp_path / "3.log", [record(params=100)], dataset="fashion-mnist", image_size=32))
    labels = {row["Model"]: row["Parameters"] for row in rows_of(*logs) if row["Criterion"] == "Best Params Red."}
    assert labels == {"Resnet (mnist 32 px)": "200", "Resnet (fashion-mnist 32 px)": "100"}


def test_log_without_baseline_is_named_and_the_others_are_done(tmp_path, capsys):
    bad = write_log(tmp_path / "bad.log", [record()], baseline=False)
    good = write_log(tmp_path / "good.log", [record()])
    assert analyze_results.main([str(bad), str(good), "--out", str(tmp_path), "--no-plots"]) == 2
    captured = capsys.readouterr()
    assert "bad.log has no baseline" in captured.err
    assert "Best Speedup" in captured.out


def test_damaged_block_is_a_warning_and_no_failure(tmp_path, capsys):
    log = write_log(tmp_path / "a.log", [record(params=300), record(params=200)])
    log.write_text(log.read_text().replace('"params": 200,', '"params": 2 0 0,'))
    assert jsonify_logs.main([str(log), "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "warning: a.log:" in captured.err
    assert "1 records" in captured.out
    assert "1 damaged" in captured.out
    assert json.loads((tmp_path / "a.json").read_text())["counts"]["damaged"] == 1


@pytest.mark.parametrize("script", [jsonify_logs, analyze_results], ids=lambda script: script.__name__)
@pytest.mark.parametrize("given", ["missing", "empty-folder"])
def test_bad_input_is_one_clear_line(tmp_path, capsys, script, given):
    (tmp_path / "empty-folder").mkdir()
    assert script.main([str(tmp_path / given), "--out", str(tmp_path / "out")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert given in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"schema": "htd-run", "version": 99}', '{"schema": "htd-run", "version": 1}']
)
def test_foreign_or_broken_json_is_refused_by_name(tmp_path, capsys, text):
    (tmp_path / "other.json").write_text(text)
    assert analyze_results.main([str(tmp_path / "other.json"), "--out", str(tmp_path)]) == 2
    assert "other.json" in capsys.readouterr().err


def test_other_json_in_the_results_folder_is_passed_over(tmp_path, capsys):
    (tmp_path / "other.json").write_text('{"latency": 1}')
    jsonify_logs.main([str(write_log(tmp_path / "a.log", [record()])), "--out", str(tmp_path)])
    assert analyze_results.main([str(tmp_path), "--out", str(tmp_path), "--no-plots"]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("note: ")
    assert "other.json is left aside" in line


def test_two_logs_that_would_share_a_json_file_are_refused(tmp_path, capsys):
    logs = [write_log(tmp_path / folder / "run.log", [record()]) for folder in ("a", "b")]
    assert jsonify_logs.main([*map(str, logs), "--out", str(tmp_path)]) == 2
    assert "run.json" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["2", "-0.1", "nan", "much"])
def test_tolerance_is_a_fraction(value, capsys):
    with pytest.raises(SystemExit) as stop:
        analyze_results.main(["--tolerance", value])
    assert stop.value.code == 2


@pytest.mark.parametrize("module", ["jsonify_logs", "analyze_results", "common.reports", "common.reports.tables"])
def test_scripts_import_nothing_heavy(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'pandas', 'matplotlib', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_scripts_run_with_their_defaults(tmp_path):
    write_log(tmp_path / "logs" / "a.log", [record()])
    assert run_script("jsonify_logs.py", cwd=tmp_path).returncode == 0
    done = run_script("analyze_results.py", "--no-plots", cwd=tmp_path)
    assert done.returncode == 0
    assert "Best Speedup" in done.stdout
    assert (tmp_path / "analysis" / "table.md").exists()
    for script in ("jsonify_logs.py", "analyze_results.py"):
        assert "usage" in run_script(script, "--help").stdout


@pytest.mark.skipif("HTD_EXAMPLE_LOG" not in os.environ, reason="HTD_EXAMPLE_LOG does not name the example log")
def test_example_log_of_the_earlier_scripts_gives_the_table_beside_it():
    """Two of the three printed rows took the earliest of equal candidates: the default rule for ties."""
    log = Path(os.environ["HTD_EXAMPLE_LOG"])
    printed = [
        dict(zip(COLUMNS, (cell.strip() for cell in line.strip("| \n").split("|")), strict=True))
        for line in (log.parent / "README.md").read_text().splitlines()
        if line.startswith("| Alexnet")
    ]
    assert len(printed) == 3
    assert len(read_log(log).candidates) == 204
    assert rows_of(log) == printed
    by_accuracy = rows_of(log, ties="accuracy")
    assert by_accuracy[2] == printed[2]
    assert [(row["Params Red."], row["FLOPs Red."], row["Speedup"]) for row in by_accuracy[:2]] == [
        ("2.01%", "51.85%", "0.45x"),
        ("2.01%", "53.17%", "0.46x"),
    ]
