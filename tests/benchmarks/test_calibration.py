"""Accuracy against the number of calibration images: every draw has a row, and a stopped run goes on."""

import json

import pytest
import torch

from benchmarks import calibration
from benchmarks.cifar_resnet import CifarResNet


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    torch.manual_seed(0)
    torch.save(CifarResNet(1).state_dict(), folder / "resnet8.th")
    arguments = ["--checkpoint", str(folder / "resnet8.th"), "--data", "digits", "--budgets", "0.7", "0.4"]
    arguments += ["--counts", "16", "32", "--seeds", "0", "1", "--reference", "32", "--screen", "32"]
    arguments += ["--out", str(folder / "out")]
    assert calibration.main(arguments) == 0
    return arguments, folder / "out"


def test_every_draw_has_a_row_and_the_ranks_stay(finished):
    content = json.loads((finished[1] / "calibration.json").read_text())
    drawn = {(row["images"], row["seed"], row["budget"]) for row in content["rows"]}
    assert drawn == {(count, seed, budget) for count in (16, 32) for seed in (0, 1) for budget in (0.7, 0.4)}
    assert len(set(content["configs"].values())) == 2
    scores = {row["divergence"] for row in content["rows"] if row["budget"] == 0.4}
    assert len(scores) == 4  # other images, other moments
    text = (finished[1] / "calibration.md").read_text()
    assert "points lost, 70%" in text
    assert "over 2 draws" in text
    assert (finished[1] / "calibration.png").stat().st_size > 1000


def test_a_finished_run_does_nothing_again_and_other_settings_are_refused(finished, monkeypatch, capsys):
    arguments, out = finished
    content = json.loads((out / "calibration.json").read_text())
    monkeypatch.setattr(calibration, "provenance", lambda *_: content["provenance"])
    monkeypatch.setattr(calibration, "rows_of", None)
    assert calibration.main(arguments) == 0
    assert calibration.main([*arguments, "--reference", "64"]) == 2
    assert "another --out" in capsys.readouterr().err
    monkeypatch.setattr(calibration, "provenance", lambda *_: {"git_revision": "other"})
    assert calibration.main(arguments) == 2
    assert "is of revision" in capsys.readouterr().err


@pytest.mark.parametrize(("counts", "said"), [(["1"], "at least 2 images"), (["16", "100000"], "there are")])
def test_absurd_numbers_are_refused(finished, counts, said, tmp_path, capsys):
    arguments = [*finished[0][:6], "--counts", *counts, "--out", str(tmp_path)]
    assert calibration.main(arguments) == 2
    assert said in capsys.readouterr().err
