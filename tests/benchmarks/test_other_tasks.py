"""Networks that are no image classifiers go through the one call: several inputs, three axes."""

import json

import pytest

from benchmarks import other_tasks


@pytest.mark.parametrize("name", ["comparison", "clips"])
def test_a_task_is_trained_compressed_and_tabled(name, tmp_path, monkeypatch):
    made = other_tasks.TASKS[name]

    def shortened(seed):
        task = made(seed)
        splits = tuple(part[:4] for part in task.splits)
        return other_tasks.Task(task.model, splits, task.loss, task.options)

    monkeypatch.setitem(other_tasks.TASKS, name, shortened)
    given = ["--tasks", name, "--epochs", "1", "--budgets", "0.5", "--out", str(tmp_path), "--folder", str(tmp_path)]
    assert other_tasks.main(given) == 0
    dense, small = json.loads((tmp_path / "other-tasks.json").read_text())["rows"]
    assert dense["task"] == small["task"] == name
    assert small["FLOPs"] <= 0.5 * dense["FLOPs"]
    assert small["layers factorised"] >= 2
    assert name in (tmp_path / "other-tasks.md").read_text()
