"""A whole run at the smallest size: its steps, its log, its price; runs of several seeds share split and baseline."""

import pytest
import torch

from common.experiment import Experiment
from common.notebook import summary
from common.presets import preset
from common.reports import group_runs, load_runs, read_log
from common.search import CONTROL

TINY = {
    "train_limit": 200,
    "baseline_epochs": 1,
    "candidates": 2,
    "budgets": (0.3,),
    "calibration_images": 64,
    "screen_images": 64,
    "finetune_epochs": 1,
    "latency_batch": 4,
}


def tiny(**overrides):
    return Experiment(preset("quick", "resnet18", **{**TINY, **overrides}), progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where baseline, log and state go
        experiment = tiny()
        rows = summary(experiment)
        yield experiment, rows, folder


def test_a_run_ends_in_rows_that_its_log_repeats(finished):
    experiment, rows, folder = finished
    assert next(row["network"] for row in rows) == "dense"
    log = read_log(folder / experiment.settings.log_path)
    assert log.counts()["tried"] == 2
    tuned = [record for record in log.candidates if record["status"] == "fine-tuned"]
    assert [record["trial"] for record in tuned] == [row["network"] for row in rows[2:]]
    for record, row in zip(tuned, rows[2:], strict=True):
        assert record["flops"] <= 0.3 * experiment.factorize().dense_flops
        assert record["baseline_inference_time"] / record["inference_time"] == pytest.approx(row["speed-up"])


def test_the_dense_network_trained_on_as_long_stands_beside_it(finished):
    experiment, rows, folder = finished
    dense, control = rows[:2]
    assert control["network"] == CONTROL
    assert control["parameters"] == dense["parameters"]
    assert control["test accuracy"] != dense["test accuracy"]
    known = read_log(folder / experiment.settings.log_path).header["dense_control"]
    assert known["accuracy"] == control["test accuracy"]
    assert known["epochs"] == experiment.settings.finetune_epochs
    assert experiment.dense_validation() == max(known["val_accuracy"], experiment.validate_dense())
    assert not list((folder / experiment.settings.state_folder).glob("dense-control*.safetensors"))


def test_a_run_starts_from_a_trained_network_as_it_is(finished, tmp_path, monkeypatch):
    first, _, folder = finished
    monkeypatch.chdir(tmp_path)
    trained = folder / first.prepare_baseline().checkpoint
    experiment = tiny(baseline_epochs=0, weights=str(trained))
    assert experiment.dense_score() == first.dense_score()
    assert experiment.validate_dense() == first.validate_dense()
    assert experiment.header()["baseline_checkpoint"] == trained.name
    assert not list(tmp_path.rglob("*.safetensors"))


def test_validation_decides_who_is_accepted_in_the_run_and_in_its_table(finished):
    experiment, _, folder = finished
    limit = experiment.dense_validation() - experiment.settings.tolerance
    [run], _, _ = load_runs([folder / experiment.settings.log_path])
    [candidate] = group_runs([run])[0].tested()
    assert run["header"]["dense_val_accuracy"] == pytest.approx(experiment.validate_dense())
    assert candidate.record["accepted"] == (candidate.record["val_accuracy"] >= limit)
    assert candidate.is_accepted(experiment.settings.tolerance) == candidate.record["accepted"]
    below = max(limit + experiment.settings.tolerance - candidate.record["val_accuracy"], 0)
    assert candidate.is_accepted(below + 1e-6)


def test_losses_are_counted_from_the_better_of_the_two(finished, monkeypatch):
    experiment, _, _ = finished
    [finalist] = [one for one in experiment.finetune() if one.path is not None]
    own = finalist.record["val_accuracy"]
    monkeypatch.setattr(experiment, "validate_dense", lambda: own)
    for ahead, accepted in ((0.02, False), (-0.02, True)):
        monkeypatch.setattr(experiment, "dense_control", lambda ahead=ahead: {"val_accuracy": own + ahead})
        assert bool(experiment.within(0.01)) == accepted


def test_a_control_is_left_out_where_nobody_asks_for_it(finished):
    experiment, rows, _ = finished
    without = tiny(control=False)
    assert [row["network"] for row in without.summary()] == [
        row["network"] for row in rows if row["network"] != CONTROL
    ]
    without.close()
    assert experiment.settings.control


def test_max_loss_moves_the_budgets_until_accuracy_breaks(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("common.knee.MOST_BUDGETS", 2)
    experiment = tiny(max_loss=0.9, folder=str(tmp_path / "logs"), candidates=1)
    assert experiment.screen()  # any verb seeks first
    assert len(experiment.settings.budgets) == 2
    first, second = experiment.settings.budgets
    assert second < first  # with nine tenths to lose every budget holds
    assert experiment.best().record["budget"] == second
    assert "holds" in next((tmp_path / "logs").glob("*.log")).read_text()
    experiment.close()


def test_the_log_says_what_the_search_cost(finished):
    experiment, _, folder = finished
    seconds = read_log(folder / experiment.settings.log_path).header["search_seconds"]
    assert set(seconds) == {"factorize", "sensitivity", "screen", "finetune", "total", "exhaustive"}
    assert seconds["total"] == pytest.approx(
        sum(seconds[k] for k in ("factorize", "sensitivity", "screen", "finetune"))
    )
    assert min(seconds.values()) > 0


def test_a_second_process_does_nothing_again(finished, monkeypatch):
    first, _rows, _ = finished
    second = tiny()
    monkeypatch.setattr(second.make_screener(), "screen", None)
    monkeypatch.setattr("common.search.promotion.train", None)
    assert second.screen() == first.screen()
    assert [one.record for one in second.finetune()] == [one.record for one in first.finetune()]


def test_seeds_share_the_split_that_their_baseline_was_trained_on(finished):
    first, _, _folder = finished
    other = tiny(seed=1)
    assert torch.equal(other.load_data().val.labels, first.load_data().val.labels)
    assert torch.equal(
        next(iter(other.load_data().val.batches(8))).images, next(iter(first.load_data().val.batches(8))).images
    )
    assert not other.prepare_baseline().trained_now
    assert not torch.equal(other.draw_calibration(), first.draw_calibration())


def test_another_experiment_does_not_get_the_folder(finished):
    with pytest.raises(ValueError, match="was begun with another"):
        tiny(calibration_images=65).open_log()
