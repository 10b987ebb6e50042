"""The comparison of rank rules: rows in, table, correlations and hypervolume out; and one small run of it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import rank_selection
from benchmarks.rank_selection_report import by_budget, correlations, hypervolume, lead_table, rule_table
from common.reports import RunLog
from common.search import Search, SearchSettings


def row(name, seed, budget, screened, tested):
    return {
        "table": "rules",
        "name": name,
        "seed": seed,
        "budget": budget,
        "val_screened": screened,
        "divergence": 1 - screened,
        "test_accuracy": tested,
        "flops_kept": budget,
        "params_kept": budget / 2,
        "search_seconds": 1.0,
        "status": "fine-tuned",
    }


def test_correlations_follow_the_order_alone():
    rows = [row("a", 0, 0.1, 0.5, 0.90), row("b", 0, 0.1, 0.6, 0.91), row("c", 0, 0.1, 0.99, 0.92)]
    assert correlations(rows) == pytest.approx({"accuracy": 1.0, "divergence": 1.0, "accuracy at 10%": 1.0})
    rows[2]["test_accuracy"] = 0.1
    assert correlations(rows)["accuracy"] == pytest.approx(-0.5)
    assert correlations(rows[:2]) == {}
    failed = {"table": "rules", "status": "failed", "budget": 0.1}
    assert correlations([*rows, failed]) == correlations(rows)


def test_hypervolume_of_a_staircase():
    assert hypervolume([(0.5, 1.0)], floor=0.9) == pytest.approx(0.5)
    assert hypervolume([(0.5, 1.0), (0.8, 0.95)], floor=0.9) == pytest.approx(0.8 * 0.5 + 0.5 * 0.5)
    assert hypervolume([(0.9, 0.8)], floor=0.9) == 0


def test_tables_give_mean_and_spread_over_the_seeds():
    rows = [row("policy", 0, 0.1, 0.8, 0.98), row("policy", 1, 0.1, 0.9, 0.99)]
    assert "0.8500 ± 0.0707" in rule_table(rows, "github", 0.99)
    assert "5.0% ± 0.0%" in by_budget(rows, "params_kept", "kept", "github", "{:.1%}")
    assert "1,512" in rule_table([{**one, "image_passes": 1512} for one in rows], "github", 0.99)


def test_the_lead_is_taken_seed_by_seed():
    rows = [row("policy", 0, 0.1, 0.8, 0.98), row("policy", 1, 0.1, 0.9, 0.99)]
    rows += [
        row("uniform", 0, 0.1, 0.7, 0.97),
        row("uniform", 1, 0.1, 0.8, 0.98),
        row("policy, no update", 0, 0.1, 0.1, 0.1),
    ]
    text = lead_table(rows, "github")
    assert "+10.00 ± 0.00" in text
    assert "+1.00 ± 0.00" in text
    assert "no update" not in text
    without = [one if one["name"] == "policy" else {**one, "test_accuracy": None} for one in rows]
    assert lead_table(without, "github").splitlines()[-1].split("|")[3].strip() == "-"


@pytest.mark.slow
def test_a_small_comparison_runs_and_does_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the baseline's checkpoint goes
    sizes = ["--evaluations", "2", "--batches", "2", "--calibration", "64", "--screen", "64", "--train-limit", "400"]
    command = ["--dataset", "digits", "--budgets", "0.3", "--seeds", "0", "--out", str(tmp_path / "out"), *sizes]
    assert rank_selection.main(command) == 0
    content = json.loads((tmp_path / "out" / "rows.json").read_text())
    names = {row["name"] for row in content["rows"] if row["table"] == "rules"}
    choices = {"uniform", "energy", "vbmf", "policy", "tpe", "random", "nsga2"}
    assert choices | {rank_selection.NO_UPDATE, rank_selection.AS_MANY_PASSES} == names
    passes = {row["name"]: row["image_passes"] for row in content["rows"] if row["table"] == "rules"}
    assert passes["uniform"] == 64 + 64
    assert abs(passes[rank_selection.AS_MANY_PASSES] - passes["policy"]) <= passes["uniform"]
    assert all(row["flops_kept"] <= 0.3 for row in content["rows"] if row["table"] == "rules")
    assert {row["name"] for row in content["rows"] if row["table"] == "ablation"} == set(rank_selection.ABLATIONS)
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"accuracy.png", "screening.png"}
    (checkpoint,) = Path("finetuned/saved_models").glob("*.safetensors")
    given = [*command, "--weights", str(checkpoint)]
    taken = rank_selection.Bench(rank_selection._parser().parse_args(given), 0).dense
    assert (taken.trained_now, taken.test_accuracy) == (False, content["dense_test"])
    assert rank_selection.main(given) == 2  # rows of a baseline that was trained here are not of a given one
    monkeypatch.setattr(rank_selection, "Bench", None)  # of what is there, nothing is made ready either
    assert rank_selection.main(command) == 0
    assert json.loads((tmp_path / "out" / "rows.json").read_text())["rows"] == content["rows"]


def test_rows_of_other_settings_are_not_taken_for_these(tmp_path, capsys):
    (tmp_path / "rows.json").write_text(json.dumps({"provenance": [], "rows": []}))
    assert rank_selection.main(["--dataset", "digits", "--out", str(tmp_path)]) == 2
    assert "has rows of other settings: give another --out" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["policy", "random"])
def test_the_benchmark_searches_as_a_run_does(kind, tmp_path, screener, menus, sensitivity):
    """Same seed and budget: the same candidates, kept in memory or in a folder, and the best of them is the choice."""
    settings = SearchSettings(budgets=(0.4,), candidates=5, sampler=kind, seed=2)
    with RunLog(tmp_path / "run.log") as log:
        run = Search(screener, menus, sensitivity, settings, tmp_path / "state", log).run(progress=False)
    memory = Search(screener, menus, sensitivity, settings).run(progress=False)
    assert [record["config"] for record in memory] == [record["config"] for record in run]
    bench = SimpleNamespace(
        screener=screener, menus=menus, sensitivities={"blended": sensitivity}, seed=2,
        options=SimpleNamespace(evaluations=5),
    )  # fmt: skip
    config, found, evaluations = rank_selection.sampler_choice(bench, kind, 0.4)
    best = min(run, key=lambda record: record["divergence"])
    assert (config, evaluations) == (best["config"], 5)
    assert (found.accuracy, found.divergence) == (best["val_accuracy"], best["divergence"])
