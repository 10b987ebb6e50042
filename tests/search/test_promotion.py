"""Fine-tuning of the promoted: resumable, halved after every epoch, test read once, failures recorded."""

import pytest
import torch

from common.finetune import TrainingDiverged, TrainSettings, evaluation
from common.reports import RunLog
from common.search import AcceptanceRule, Finetuning, finetune_with, promotion, split_trainer, train_control
from common.search.executor import LocalExecutor

SETTINGS = TrainSettings(epochs=2, batch_size=64, learning_rate=0.01, distill_weight=0.5)


@pytest.fixture
def saved(monkeypatch):
    """Networks saved during the test by path: the real files hold torchvision's architectures only."""
    networks = {}
    monkeypatch.setattr(promotion, "save_compressed", lambda model, path, **_: networks.__setitem__(path, model))
    return networks


def without_time(record):
    return {key: value for key, value in record.items() if key != "finetune_seconds"}


def run(promoted, screener, digits, folder, progress=False):
    trainer = split_trainer(screener.factors.model, digits, SETTINGS, "small", folder)
    with RunLog(folder / "run.log") as log:
        return finetune_with(promoted, screener, trainer, AcceptanceRule(0.9, 0.02), folder, log, progress=progress)


def test_the_worse_half_of_each_budget_is_given_up(promoted, screener, digits, tmp_path, saved):
    finalists = run(promoted, screener, digits, tmp_path)
    assert sorted(one.record["budget"] for one in finalists) == [0.3, 0.5]
    assert all(one.record["status"] == "fine-tuned" and one.record["epochs"] == 2 for one in finalists)
    assert len(promotion.epoch_seconds(tmp_path)) == 5  # two survivors of two epochs, one given up after its first
    assert all(seconds > 0 for seconds in promotion.epoch_seconds(tmp_path))
    given_up = {"0.5-0", "0.5-1"} - {one.record["trial"] for one in finalists}
    assert f"Gave up {given_up.pop()} after epoch 1" in (tmp_path / "run.log").read_text()


def test_progress_is_told_within_an_epoch_too(promoted, screener, digits, tmp_path, saved, monkeypatch):
    """An epoch may take half an hour."""
    shares = []
    real = promotion.EpochsBar.batch
    monkeypatch.setattr(promotion.EpochsBar, "batch", lambda bar, share: (shares.append(share), real(bar, share)))
    run(promoted, screener, digits, tmp_path, progress=True)
    assert len(shares) > 5
    assert sum(shares) == pytest.approx(5)  # two survivors of two epochs, one given up after its first


def test_the_controls_progress_is_told_likewise(screener, digits, tmp_path, monkeypatch):
    trainer = split_trainer(screener.factors.model, digits, SETTINGS, "small", tmp_path)
    common = Finetuning(screener, trainer, AcceptanceRule(0.9, 0.02), tmp_path)
    shares = []
    monkeypatch.setattr(promotion.EpochsBar, "batch", lambda _bar, share: shares.append(share))
    with RunLog(tmp_path / "run.log") as log:
        assert train_control(common, LocalExecutor(screener), log, progress=False)["epochs"] == 2
    assert sum(shares) == pytest.approx(2)


def test_interrupted_fine_tuning_resumes_to_the_same_weights(promoted, screener, digits, tmp_path, saved, monkeypatch):
    whole = run(promoted, screener, digits, tmp_path / "whole")
    real, calls = promotion.train, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(promotion, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(promoted, screener, digits, tmp_path / "cut")
    monkeypatch.setattr(promotion, "train", real)
    resumed = run(promoted, screener, digits, tmp_path / "cut")
    assert [without_time(one.record) for one in resumed] == [without_time(one.record) for one in whole]
    for one, other in zip(resumed, whole, strict=True):
        mine, theirs = saved[one.path].state_dict(), saved[other.path].state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_test_is_read_once_for_each_survivor_and_never_again(promoted, screener, digits, tmp_path, saved, monkeypatch):
    real, reads = promotion.evaluate, []

    def counted(model, split, **options):
        reads.append(split is digits.test)
        return real(model, split, **options)

    monkeypatch.setattr(promotion, "evaluate", counted)
    finalists = run(promoted, screener, digits, tmp_path)
    assert reads == [True] * len(finalists)
    run(promoted, screener, digits, tmp_path)
    assert len(reads) == len(finalists)


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (TrainingDiverged("the training loss became nan in epoch 1, batch 1"), "nan"),
        (torch.OutOfMemoryError("tried to allocate 2 GiB"), "tried to allocate"),
        (MemoryError(), "out of memory"),
    ],
)
def test_a_candidate_that_cannot_be_trained_is_a_failed_record(
    promoted, screener, digits, tmp_path, saved, monkeypatch, failure, reason
):
    real, calls = promotion.train, []

    def diverging(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise failure
        return real(*arguments, **options)

    monkeypatch.setattr(promotion, "train", diverging)
    finalists = {one.record["trial"]: one for one in run(promoted, screener, digits, tmp_path)}
    failed = finalists["0.3-0"]
    assert failed.record["status"] == "failed"
    assert reason in failed.record["reason"]
    with pytest.raises(ValueError, match="failed"):
        failed.load()
    assert len(finalists) == 2  # the other budget's better one came through


def test_the_teacher_is_asked_once(factors, digits, tmp_path, monkeypatch):
    first = promotion.teacher_logits(factors.model, digits, tmp_path)

    def refuse(*_):
        raise AssertionError("the teacher was asked again")

    monkeypatch.setattr(evaluation, "predict_logits", refuse)
    assert torch.equal(promotion.teacher_logits(factors.model, digits, tmp_path), first)
