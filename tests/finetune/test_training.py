"""Training: the same run bit for bit, interrupted or not; what cannot be trained is refused or recorded."""

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from common import modules
from common.data import load
from common.finetune import (
    StateMismatch,
    TrainingDiverged,
    TrainSettings,
    baseline,
    baselines,
    evaluate,
    predict_logits,
    recipe,
    train,
    train_baseline,
)
from common.finetune.baselines import checkpoint_path
from common.models import load_checkpoint
from common.modules import evaluating, evaluation_batch
from common.provenance import command, provenance
from finetuned.finetune_models import main

SETTINGS = TrainSettings(epochs=3, batch_size=64, learning_rate=0.05, seed=1)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def digits():
    return load("digits", image_size=8, train_limit=400)


def small_network(num_classes: int = 10) -> nn.Module:
    """Batch norm and dropout: the parts that carry state or randomness."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(256, num_classes),
        )


def trained(dataset, settings=SETTINGS, **options):
    model = small_network()
    history = train(model, dataset, settings, progress=False, **options)
    return model, history


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def without_seconds(history):
    return [replace(epoch, seconds=0.0) for epoch in history.epochs]


def test_training_learns(digits):
    model, history = trained(digits, replace(SETTINGS, epochs=8))
    assert history.epochs[-1].train_loss < 0.5 * history.epochs[0].train_loss
    assert history.epochs[-1].val_accuracy == evaluate(model, digits.val).accuracy > 0.8
    assert not model.training


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_same_seed_same_weights_whatever_was_drawn_before(digits, optimizer):
    settings = replace(SETTINGS, optimizer=optimizer, learning_rate=0.01)
    first, history = trained(digits, settings)
    torch.rand(17)
    again, history_again = trained(digits, settings)
    assert same_weights(first, again)
    assert without_seconds(history) == without_seconds(history_again)
    other, _ = trained(digits, replace(settings, seed=2))
    assert not same_weights(first, other)


def test_training_leaves_the_global_generator_alone(digits):
    torch.manual_seed(0)
    trained(digits, replace(SETTINGS, epochs=1))
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("killed_after", [1, 2])
def test_resumed_run_equals_an_uninterrupted_one(digits, tmp_path, optimizer, killed_after):
    settings = replace(SETTINGS, optimizer=optimizer, learning_rate=0.01)
    whole, history = trained(digits, settings)

    def interrupt(record):
        if record.epoch == killed_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(digits, settings, checkpoint=tmp_path / "run.pt", on_epoch=interrupt)
    epochs_run = []
    resumed, history_resumed = trained(
        digits, settings, checkpoint=tmp_path / "run.pt", on_epoch=lambda record: epochs_run.append(record.epoch)
    )
    assert epochs_run == list(range(killed_after + 1, settings.epochs + 1))
    assert same_weights(whole, resumed)
    assert without_seconds(history) == without_seconds(history_resumed)


def test_finished_run_is_loaded_not_repeated(digits, tmp_path):
    first, history = trained(digits, checkpoint=tmp_path / "run.pt")
    again, history_again = trained(digits, checkpoint=tmp_path / "run.pt", on_epoch=pytest.fail)
    assert same_weights(first, again)
    assert history == history_again


def test_checkpoint_of_another_run_is_refused(digits, tmp_path):
    path = tmp_path / "run.pt"
    trained(digits, checkpoint=path)
    with pytest.raises(StateMismatch, match=r"learning_rate = 0\.05, this run has 0\.1"):
        trained(digits, replace(SETTINGS, learning_rate=0.1), checkpoint=path)
    with pytest.raises(StateMismatch, match="training images = 400, this run has 300"):
        trained(load("digits", image_size=8, train_limit=300), checkpoint=path)
    with pytest.raises(StateMismatch, match=r"CRC"):
        trained(load("digits", image_size=8, train_limit=400, seed=9), checkpoint=path)
    with pytest.raises(StateMismatch, match="another model"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), digits, SETTINGS, checkpoint=path, progress=False)


@pytest.mark.parametrize("content", [b"", b"noise", None])
def test_damaged_checkpoint_is_refused(digits, tmp_path, content):
    path = tmp_path / "run.pt"
    trained(digits, replace(SETTINGS, epochs=1), checkpoint=path)
    path.write_bytes(path.read_bytes()[:3000] if content is None else content)
    with pytest.raises(StateMismatch, match=r"run\.pt is damaged"):
        trained(digits, replace(SETTINGS, epochs=1), checkpoint=path)


def test_progress_into_a_file_is_a_few_states_an_epoch(digits, monkeypatch):
    """A run in the background, for hours: a state every batch would fill its log."""
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    history = train(small_network(), digits, replace(SETTINGS, epochs=2, batch_size=4))
    text = sys.stderr.getvalue()
    assert text.count("\r") < 20 < 100 < len(digits.train) // 4 * 2
    assert f"{history.epochs[-1].val_accuracy:.4f}" in text


def test_on_epoch_can_stop(digits):
    _, history = trained(digits, on_epoch=lambda record: record.epoch < 2)
    assert history.stopped
    assert [record.epoch for record in history.epochs] == [1, 2]
    _, history = trained(digits)
    assert not history.stopped


def test_few_validation_images_after_each_epoch_but_all_after_the_last(digits, monkeypatch):
    asked = []

    def noted(model, split, **options):
        asked.append(options["limit"])
        return evaluate(model, split, **options)

    monkeypatch.setattr("common.finetune.training.evaluate", noted)
    model, history = trained(digits, replace(SETTINGS, epochs=2, val_images=16))
    assert asked == [16, None]
    assert history.epochs[-1].val_accuracy == evaluate(model, digits.val).accuracy


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_diverged_loss_names_epoch_and_batch(digits, bad):
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_network()
            self.calls = itertools.count(1)

        def forward(self, images):
            logits = self.inner(images)
            return logits * bad if self.training and next(self.calls) == 9 else logits

    with pytest.raises(TrainingDiverged, match=r"became (nan|inf) in epoch 2, batch 3"):
        train(Breaks(), digits, SETTINGS, progress=False)
    assert issubclass(TrainingDiverged, FloatingPointError)


def test_absurd_learning_rate_diverges_rather_than_passing(digits):
    with pytest.raises(TrainingDiverged):
        trained(digits, replace(SETTINGS, learning_rate=1e30, clip_norm=None))


def test_learning_rate_warms_up_and_falls_to_about_zero():
    settings = replace(SETTINGS, learning_rate=0.1, warmup=0.25)
    rates = [settings.learning_rate_at(step, 100) for step in range(100)]
    assert max(rates) == rates[24] == 0.1
    assert rates[:25] == sorted(rates[:25])
    assert rates[24:] == sorted(rates[24:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert replace(settings, warmup=0.99).learning_rate_at(0, 1) > 0


def test_weight_decay_spares_biases_and_norms(digits):
    settings = replace(SETTINGS, learning_rate=1e-12, weight_decay=1e10, clip_norm=1e-12, epochs=1)
    start, (model, _) = small_network(), trained(digits, settings)
    for (name, before), after in zip(start.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(before, after) == (before.ndim <= 1), name


def test_clipping_bounds_each_step(digits):
    """A step of plain descent is at most learning rate x norm; Nesterov momentum makes the first one 1.9 times that."""
    settings = replace(
        SETTINGS, epochs=1, max_batches_per_epoch=1, warmup=0.0, learning_rate=0.1, clip_norm=1e-3, weight_decay=0.0
    )
    start, (model, _) = small_network(), trained(digits, settings)
    moved = [(b - a).norm() for a, b in zip(start.parameters(), model.parameters(), strict=True)]
    assert 0 < torch.stack(moved).norm() < 1.01 * 1.9 * 0.1 * 1e-3


def test_frozen_parameters_stay(digits):
    model = small_network()
    model[0].weight.requires_grad_(False)
    train(model, digits, replace(SETTINGS, epochs=1), progress=False)
    assert torch.equal(model[0].weight, small_network()[0].weight)
    assert not torch.equal(model[-1].weight, small_network()[-1].weight)


def test_teacher_logits_follow_the_shuffled_images(digits):
    """A lookup table as teacher: only with the right rows does the student learn its (shifted) classes."""
    shifted = (digits.train.labels + 1) % 10
    teacher = 10.0 * nn.functional.one_hot(shifted, 10).float()
    settings = replace(SETTINGS, epochs=8, distill_weight=1.0, distill_temperature=2.0)
    model, _ = trained(digits, settings, teacher_logits=teacher)
    predicted = predict_logits(model, digits.val).argmax(dim=1)
    assert (predicted == (digits.val.labels + 1) % 10).float().mean() > 0.8


def test_distillation_loss_vanishes_at_the_teacher(digits):
    class Student(nn.Module):
        """Gives the teacher's answer, and has a parameter so that there is something to train."""

        def __init__(self):
            super().__init__()
            self.zero = nn.Parameter(torch.zeros(1))

        def forward(self, images):
            return images.flatten(1)[:, :10] + self.zero

    student = Student()
    teacher = predict_logits(student, digits.train)
    settings = replace(SETTINGS, epochs=1, distill_weight=1.0, augment=False)
    history = train(student, digits, settings, teacher_logits=teacher, progress=False)
    assert abs(history.epochs[0].train_loss) < 1e-6


def test_distillation_arguments_must_fit(digits):
    logits = torch.zeros(len(digits.train), 10)
    with pytest.raises(ValueError, match=r"go together, got distill_weight=0.5 and no teacher"):
        trained(digits, replace(SETTINGS, distill_weight=0.5))
    with pytest.raises(ValueError, match=r"go together, got distill_weight=0.0"):
        trained(digits, teacher_logits=logits)
    with pytest.raises(ValueError, match=r"must be \(400, 10\).*got \(399, 10\)"):
        trained(digits, replace(SETTINGS, distill_weight=0.5), teacher_logits=logits[1:])
    with pytest.raises(ValueError, match="give one of them"):
        trained(digits, replace(SETTINGS, distill_weight=0.5), teacher_logits=logits, teacher=small_network())


class Marked(nn.Module):
    """A teacher that says how dark each image is: of an image as it is or as it was changed, which it keeps."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        assert not self.training
        self.seen.append(images.clone())
        return images.flatten(1).mean(1, keepdim=True) * torch.arange(10.0)


def test_a_teacher_is_run_on_the_images_that_the_student_sees(digits):
    teacher, seen = Marked(), []
    model = small_network()
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()) if module.training else None)
    settings = replace(SETTINGS, epochs=1, distill_weight=1.0, augment=True)
    train(model, digits, settings, teacher=teacher.train(), progress=False)
    assert len(seen) == len(teacher.seen) > 1
    assert all(torch.equal(a, b) for a, b in zip(seen, teacher.seen, strict=True))
    assert teacher.training
    as_they_are = torch.cat([batch.images for batch in digits.train.batches(64)]).flatten(1)
    first = seen[0].flatten(1)
    assert (torch.cdist(first, as_they_are).min(1).values > 1e-3).float().mean() > 0.5


def test_evaluation_batches_are_smaller_where_images_are_large():
    assert evaluation_batch(16, 16) == evaluation_batch(64, 64) == 512
    assert 16 <= evaluation_batch(224, 224) <= 64
    assert evaluation_batch(5000, 5000) == 1


def test_predicted_logits_are_in_split_order_for_any_batch_size(digits, monkeypatch):
    model = small_network()
    expected = model.eval()(torch.cat([batch.images for batch in digits.val.batches(1000)]))
    monkeypatch.setattr(modules, "MOST_IMAGES", 37)
    assert torch.allclose(predict_logits(model, digits.val, amp=False), expected, atol=1e-5)


def test_evaluation_counts_by_hand_and_restores_every_flag(digits):
    model = small_network()
    model.train()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    found = evaluate(model, digits.val, batch_size=50, limit=120)
    assert [module.training for module in model.modules()] == flags
    logits = predict_logits(model, digits.val)[:120]
    labels = digits.val.labels[:120]
    assert found.count == 120
    assert found.accuracy == (logits.argmax(dim=1) == labels).double().mean()
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == flags


def test_labels_that_do_not_fit_the_head_are_refused(digits):
    model = small_network(num_classes=4)
    with pytest.raises(ValueError, match=r"labels up to 9, but the model's head has 4 outputs"):
        evaluate(model, digits.val)
    with pytest.raises(ValueError, match=r"labels up to 9, but the model's head has 4 outputs"):
        train(model, digits, SETTINGS, progress=False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"learning_rate": 0.0},
        {"weight_decay": -1.0},
        {"optimizer": "adam"},
        {"warmup": 1.0},
        {"label_smoothing": 1.0},
        {"clip_norm": 0.0},
        {"max_batches_per_epoch": 0},
        {"distill_weight": 1.5},
        {"distill_temperature": 0.0},
    ],
)
def test_settings_out_of_range_are_named(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be .*; got {value!r}"):
        TrainSettings(**wrong)


def test_max_batches_bounds_an_epoch_and_its_schedule(digits):
    model, history = trained(digits, replace(SETTINGS, epochs=1, max_batches_per_epoch=1, warmup=0.0))
    assert len(history.epochs) == 1
    assert model[1].num_batches_tracked == 1


def test_mixed_precision_trains(digits):
    _, history = trained(digits, replace(SETTINGS, amp=True, epochs=8))
    assert history.epochs[-1].val_accuracy > 0.8


def test_networks_without_batch_norm_get_a_recipe_of_their_own():
    assert recipe("vgg16") != recipe("vgg16_bn") == recipe("resnet18")
    assert recipe("resnet18", pretrained=True).learning_rate < recipe("resnet18").learning_rate


@pytest.mark.parametrize("architecture", ["resnet18", "alexnet"])
def test_small_data_sets_get_small_batches(architecture):
    assert recipe(architecture, train_images=1294).batch_size < recipe(architecture, train_images=54000).batch_size
    assert recipe(architecture, train_images=54000) == recipe(architecture)


def test_baseline_trains_once_then_loads(digits, tmp_path, capsys):
    settings = replace(recipe("resnet18"), epochs=1, max_batches_per_epoch=2, batch_size=8)
    first = baseline("resnet", digits, settings, folder=tmp_path, progress=False)
    assert "training resnet18" in capsys.readouterr().out
    again = baseline("resnet", digits, settings, folder=tmp_path, progress=False)
    assert "Loaded resnet18" in capsys.readouterr().out
    assert (first.trained_now, again.trained_now) == (True, False)
    assert (again.val_accuracy, again.test_accuracy) == (first.val_accuracy, first.test_accuracy)
    assert again.test_accuracy == evaluate(again.model, digits.test).accuracy
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert names == {f"resnet18_digits_8.{suffix}" for suffix in ("safetensors", "png", "json")}
    record = json.loads((tmp_path / "resnet18_digits_8.json").read_text())
    assert record["test_accuracy"] == first.test_accuracy
    assert record["epochs"][0]["val_accuracy"] == record["val_accuracy"]
    assert record["provenance"].keys() >= {"machine", "device", "threads", "versions", "git_revision", "command"}


def test_interrupted_baseline_continues_or_starts_afresh(tmp_path, monkeypatch):
    digits = load("digits", image_size=32, train_limit=50)
    settings = replace(recipe("squeezenet1_1"), epochs=2, max_batches_per_epoch=1, batch_size=8)

    def interrupt(record):
        raise KeyboardInterrupt

    monkeypatch.setattr(baselines, "train", partial(train, on_epoch=interrupt))
    with pytest.raises(KeyboardInterrupt):
        train_baseline("squeezenet1_1", digits, settings, folder=tmp_path, progress=False)
    monkeypatch.undo()
    other = replace(settings, learning_rate=0.01)
    with pytest.raises(StateMismatch, match="learning_rate"):
        train_baseline("squeezenet1_1", digits, other, folder=tmp_path, progress=False)
    done = train_baseline("squeezenet1_1", digits, settings, folder=tmp_path, progress=False)
    assert done.checkpoint.exists()
    train_baseline("squeezenet1_1", digits, other, folder=tmp_path, progress=False, fresh=True)


def test_a_baseline_starts_from_one_of_a_smaller_size(tmp_path, capsys):
    common = ["--model", "squeezenet1_1", "--dataset", "digits", "--train-limit", "50", "--batch-size", "25"]
    common += ["--epochs", "1", "--out", str(tmp_path)]
    assert main([*common, "--image-size", "32"]) == 0
    small = checkpoint_path("squeezenet1_1", "digits", 32, tmp_path)
    start = [*common, "--image-size", "40", "--weights", str(small), "--learning-rate", "1e-9"]
    assert main(start) == 0
    large = checkpoint_path("squeezenet1_1", "digits", 40, tmp_path)
    before, after = (load_checkpoint(path)[0].state_dict() for path in (small, large))
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)
    assert json.loads(large.with_suffix(".json").read_text())["weights"] == str(small)
    assert main([*common, "--image-size", "40", "--weights", str(tmp_path / "none.pth")]) == 2
    assert "error: no checkpoint at" in capsys.readouterr().err


def test_checkpoint_names_are_plain():
    name = checkpoint_path("vgg16", "folder:/data/my pets", 64, Path("out"))
    assert name == Path("out/vgg16_my-pets_64.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet99"], "unknown model 'resnet99'"),
        (["--dataset", "numbers"], "unknown data set 'numbers'"),
        (["--model", "all", "--image-size", "32"], "alexnet cannot take 32 x 32"),
        (["--epochs", "0"], "epochs must be at least 1; got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--device", "warp"], "device 'warp' cannot be used"),
        (["--dataset", "folder:nowhere"], "nowhere/train is not a folder"),
    ],
)
def test_bad_command_lines_get_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    code = main(["--dataset", "digits", "--out", str(tmp_path), *arguments])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_ctrl_c_on_the_command_line(tmp_path):
    options = ["--model", "squeezenet1_1", "--dataset", "digits", "--train-limit", "64", "--epochs", "1000"]
    process = subprocess.Popen(
        [sys.executable, "finetuned/finetune_models.py", *options, "--threads", "1", "--out", str(tmp_path)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("*.unfinished.pt")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "Interrupted; the same command continues after the last finished epoch."
    assert "Traceback" not in errors
    assert len(list(tmp_path.glob("*.unfinished.pt"))) == 1


def test_provenance_can_be_written_as_json():
    found = provenance("cpu", seed=4)
    assert json.loads(json.dumps(found)) == found
    assert found["seed"] == 4
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"]
    assert re.fullmatch(r".+ \([\w, ]+\)", found["machine"])
    assert os.sep not in found["command"].split()[0]


def test_the_command_says_what_was_asked_and_not_where_files_lay(monkeypatch):
    words = ["/a/b/run.py", "--data", "folder:/c/d/images", "--out=/e/small", "-x", "logs/here", "/f/g.th", "0.5"]
    monkeypatch.setattr("sys.argv", words)
    assert command() == "run.py --data folder:images --out=small -x logs/here g.th 0.5"
