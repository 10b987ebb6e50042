"""What the benchmark of scale computes, and one small run of each command that needs no workers."""

import json

import pytest

from benchmarks import scale, scale_tables


def test_jobs_go_in_order_to_whoever_is_free_first():
    assert scale.makespan([3, 1, 1, 1], 2) == 3
    assert scale.makespan([1, 1, 1, 3], 2) == 4
    assert scale.makespan([2, 2], 8) == 2
    assert scale.makespan([], 3) == 0


@pytest.mark.slow
def test_steps_and_a_simulation_end_in_tables(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert scale.main([*out, "steps", "--depths", "1", "--images", "16"]) == 0
    simulation = ["simulate", "--steps", "16", "--generations", "8", "--workers", "1", "8"]
    assert scale.main([*out, "--blocks", "1", *simulation]) == 0
    text = (tmp_path / "scale.md").read_text()
    assert "ResNet-8" in text
    row = json.loads((tmp_path / "simulate.json").read_text())["rows"][0]
    alone, eight = (row["makespan"][count] for count in ("1", "8"))
    assert eight < alone <= 8 * eight


def test_the_table_of_sensitivities_gives_factors_of_medians():
    content = {
        "network": "ResNet-8",
        "layers": 7,
        "images": 16,
        "threads_local": 2,
        "seconds": {"whole passes": [9.0, 8.0, 100.0], "beginnings kept": [3.0, 3.0, 1.0]},
    }
    text = scale_tables._sensitivity(content)
    [line] = [line for line in text.splitlines() if "beginnings kept" in line]
    assert line.split() == ["|", "beginnings", "kept", "|", "3.0", "|", "3.0x", "|"]
