"""A baseline belongs to what it was made from: data, split, settings, starting weights. Nothing else is reused."""

import json
import threading
from dataclasses import replace

import pytest
import safetensors
import torch
from PIL import Image

from common.data import load
from common.finetune import TrainSettings, baseline, evaluate, given_baseline, train_baseline
from common.finetune.baselines import checkpoint_path
from common.models import load_checkpoint, save_checkpoint

PLAIN = TrainSettings(epochs=1, batch_size=16, learning_rate=0.01, max_batches_per_epoch=1, val_images=16)
MODEL = "squeezenet1_1"


def made(folder, dataset, settings=PLAIN, weights="none"):
    return baseline(MODEL, dataset, settings, weights=weights, folder=folder, progress=False)


@pytest.fixture(scope="module")
def digits():
    return load("digits", image_size=32, train_limit=64)


@pytest.fixture
def first(tmp_path, digits):
    return made(tmp_path, digits)


def test_the_same_again_is_loaded(tmp_path, digits, first):
    again = made(tmp_path, digits)
    assert not again.trained_now
    assert (again.fingerprint, again.checkpoint) == (first.fingerprint, first.checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": replace(PLAIN, max_batches_per_epoch=2)},
        {"settings": replace(PLAIN, seed=1)},
        {"data": {"seed": 1}},
        {"data": {"train_limit": 80}},
        {"data": {"channels": 3, "val_fraction": 0.2}},
    ],
    ids=["longer", "seed", "split seed", "images", "validation"],
)
def test_anything_else_is_trained_and_kept_beside_it(tmp_path, first, change, capsys):
    dataset = load("digits", **{"image_size": 32, "train_limit": 64, **change.get("data", {})})
    other = made(tmp_path, dataset, change.get("settings", PLAIN))
    assert other.trained_now
    assert other.checkpoint != first.checkpoint
    assert other.fingerprint != first.fingerprint
    assert "other data, settings or starting weights" in capsys.readouterr().out
    assert not made(tmp_path, dataset, change.get("settings", PLAIN)).trained_now
    assert not made(tmp_path, load("digits", image_size=32, train_limit=64)).trained_now


def test_starting_weights_count_by_their_content(tmp_path, digits, first):
    start = tmp_path / "start.safetensors"
    model, _ = load_checkpoint(first.checkpoint)
    save_checkpoint(model, start, architecture=MODEL, classes=digits.classes)
    one = made(tmp_path / "own", digits, weights=str(start))
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    save_checkpoint(model, start, architecture=MODEL, classes=digits.classes)
    other = made(tmp_path / "own", digits, weights=str(start))
    assert other.trained_now
    assert other.fingerprint != one.fingerprint


def test_two_folders_of_one_name_have_a_baseline_each(tmp_path):
    for place, shade in (("a", 40), ("b", 200)):
        for part in ("train", "test"):
            for label in ("x", "y"):
                folder = tmp_path / place / "images" / part / label
                folder.mkdir(parents=True)
                for number in range(6):
                    Image.new("RGB", (8, 8), (shade + number, shade, 10 * number)).save(folder / f"{number}.png")
    found = [
        made(tmp_path / "saved", load(f"folder:{tmp_path / place / 'images'}", image_size=32, val_fraction=0.34))
        for place in ("a", "b")
    ]
    assert all(one.trained_now for one in found)
    assert found[0].checkpoint != found[1].checkpoint


def test_a_checkpoint_without_fingerprint_is_taken_where_all_that_it_says_agrees(tmp_path, digits, first):
    strip_fingerprint(first.checkpoint)
    assert not made(tmp_path, digits).trained_now
    assert made(tmp_path, digits, replace(PLAIN, learning_rate=0.02)).trained_now


def test_the_accuracy_of_a_baseline_is_of_all_validation_images(tmp_path, digits, first):
    everything = evaluate(first.model, digits.val).accuracy
    assert first.val_accuracy == everything
    rewritten(first.checkpoint, val_accuracy=0.123)
    assert made(tmp_path, digits).val_accuracy == 0.123
    rewritten(first.checkpoint, without="validated_images", val_accuracy=0.123)
    again = made(tmp_path, digits)
    assert (again.trained_now, again.val_accuracy) == (False, everything)


def strip_fingerprint(path):
    """The checkpoint as earlier versions wrote it."""
    rewritten(path, without="fingerprint")


def rewritten(path, without=None, **other):
    """The checkpoint with other metadata."""
    model, metadata = load_checkpoint(path)
    with safetensors.safe_open(path, framework="pt") as file:
        known = {**json.loads(file.metadata()["metadata"]), **other}
    known.pop(without, None)
    save_checkpoint(model, path, architecture=MODEL, classes=metadata["classes"], metadata=known)


def test_two_at_once_train_one(tmp_path, digits):
    found = []
    threads = [threading.Thread(target=lambda: found.append(made(tmp_path, digits))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.trained_now for one in found) == [False, True]
    assert len({one.checkpoint for one in found}) == 1


def test_the_command_does_not_overwrite_another_baseline(tmp_path, digits, first):
    other = train_baseline(MODEL, digits, replace(PLAIN, seed=3), folder=tmp_path, progress=False)
    assert other.checkpoint != first.checkpoint
    assert first.checkpoint == checkpoint_path(MODEL, "digits", 32, tmp_path)
    assert not made(tmp_path, digits).trained_now


def test_a_trained_network_is_taken_as_it_is(tmp_path, digits, first):
    before = sorted(tmp_path.rglob("*"))
    taken = given_baseline(MODEL, digits, str(first.checkpoint))
    assert sorted(tmp_path.rglob("*")) == before
    assert (taken.checkpoint, taken.trained_now) == (first.checkpoint, False)
    assert taken.test_accuracy == first.test_accuracy
    assert taken.val_accuracy == evaluate(first.model, digits.val).accuracy
    for own, other in zip(taken.model.state_dict().values(), first.model.state_dict().values(), strict=True):
        assert torch.equal(own, other)
    assert taken.fingerprint != first.fingerprint


def test_it_is_known_by_its_weights(tmp_path, digits, first):
    path = tmp_path / "given.pth"
    torch.save(first.model.state_dict(), path)
    one = given_baseline(MODEL, digits, str(path))
    assert given_baseline(MODEL, digits, str(path)).fingerprint == one.fingerprint
    state = first.model.state_dict()
    next(iter(state.values())).mul_(2)
    torch.save(state, path)
    assert given_baseline(MODEL, digits, str(path)).fingerprint != one.fingerprint


def test_what_cannot_be_taken_says_why(tmp_path, digits, first):
    other = tmp_path / "other.safetensors"
    save_checkpoint(first.model, other, architecture=MODEL, classes=list("abcdefghij"))
    with pytest.raises(ValueError, match="other classes than digits has: give epochs"):
        given_baseline(MODEL, digits, str(other))
    with pytest.raises(ValueError, match="no checkpoint at"):
        given_baseline(MODEL, digits, str(tmp_path / "none.safetensors"))
    with pytest.raises(ValueError, match="resnet18 was asked for"):
        given_baseline("resnet18", digits, str(first.checkpoint))
