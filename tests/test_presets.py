"""Presets and overrides: what is asked for is taken, what is wrong is refused by name."""

import pytest

from common.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("model", ["resnet", "vgg", "alexnet"])
def test_every_preset_suits_every_network(name, model):
    settings = preset(name, model)
    assert settings.preset == name
    assert settings.finetune_epochs <= 3
    assert settings.finetune_recipe(train_images=10_000).epochs == settings.finetune_epochs
    assert settings.image_size >= (64 if settings.model == "alexnet" else 32)


def test_overrides_win_and_none_leaves_the_preset():
    settings = preset("quick", "resnet18", candidates=3, image_size=None, seed=7)
    assert (settings.candidates, settings.image_size, settings.seed) == (3, 32, 7)


def test_runs_that_differ_in_what_they_compute_on_have_different_names():
    names = {
        preset("quick", "resnet18", **one).name for one in ({}, {"seed": 1}, {"image_size": 64}, {"dataset": "mnist"})
    }
    names |= {preset("cpu", "resnet18").name, preset("quick", "alexnet").name}
    assert len(names) == 6
    assert "/" not in preset("quick", "resnet18", dataset="folder:/some/where").name


@pytest.mark.parametrize(
    ("name", "model", "overrides", "message"),
    [
        ("fast", "resnet18", {}, "quick, cpu, full"),
        ("quick", "lenet", {}, "lenet"),
        ("quick", "resnet18", {"candidate": 3}, "unknown knob 'candidate'"),
        ("quick", "resnet18", {"finetune_epochs": 4}, "1 to 3 epochs"),
        ("quick", "resnet18", {"candidates": 0}, "candidates"),
        ("quick", "resnet18", {"tolerance": 1.0}, "tolerance"),
        ("quick", "resnet18", {"sensitivity": "guessed"}, "blended, measured, proxy"),
        ("quick", "resnet18", {"cost": "joules"}, "flops, params, mix, latency"),
        ("quick", "resnet18", {"baseline_epochs": 0}, "weights must be its path, got 'none'"),
        ("full", "resnet18", {"baseline_epochs": 0}, "weights must be its path, got 'imagenet'"),
    ],
)
def test_what_is_wrong_is_refused_by_name(name, model, overrides, message):
    with pytest.raises(ValueError, match=message):
        preset(name, model, **overrides)
