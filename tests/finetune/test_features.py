"""Feature maps teach: they are compared one by one with the dense network's, and only in training."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from common.compress import factorize
from common.finetune import FeatureMaps, TrainSettings, train
from common.finetune.features import block_names
from common.models import build_model
from common.ranks import uniform

SETTINGS = TrainSettings(epochs=1, batch_size=32, learning_rate=0.01, distill_weight=0.5, augment=False)


class Net(nn.Module):
    """Two convolutions, whose maps ReLUs change in place, and a head."""

    def __init__(self, width=16):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 24, 3, padding=1)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.act(self.two(self.act(self.one(x)))).mean((2, 3)))


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def images():
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def distance(model, teacher, images):
    maps = FeatureMaps.of(model, teacher)
    with maps.watched(model.train(), teacher):
        model(images)
        with torch.no_grad():
            teacher(images)
        return maps.distance()


def test_a_copy_is_at_no_distance_and_another_at_what_the_definition_says(dense, images):
    assert distance(copy.deepcopy(dense), dense, images) == 0
    other = copy.deepcopy(dense)
    with torch.no_grad():
        other.head.bias += 0.5  # the logits' map alone differs, everywhere by a half
    logits = dense(images).detach()
    assert float(distance(other, dense, images).detach()) == pytest.approx(
        0.25 / float(logits.var(correction=0)) / 3, rel=1e-5
    )


def test_blocks_are_compared_and_layers_that_are_in_none():
    assert block_names(Net()) == ["one", "two", "head"]
    names = block_names(build_model("resnet18", 10))
    assert names == ["conv1", *(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)), "fc"]
    vgg = block_names(build_model("vgg11", 10))
    assert len(vgg) == 11
    assert vgg[0] == "features.0"
    assert block_names(build_model("vit_b_16", 10, image_size=224))[1:3] == [
        "encoder.layers.encoder_layer_0.self_attention",
        "encoder.layers.encoder_layer_0",
    ]


def test_a_block_that_puts_out_no_tensor_is_passed_over(images):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.layer(x), x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.last = Pair(), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.last(self.pair(x)[0])

    teacher = Net().eval()
    maps = FeatureMaps.of(teacher, teacher)
    assert maps.names == ("pair", "last")
    assert distance(Net(), teacher, images) > 0


def test_factorised_layers_stand_for_dense_ones(dense, images):
    factors = factorize(dense, images)
    full = factors.compress(factors.full_ranks())
    half = factors.compress(uniform(factors, 0.5))
    assert FeatureMaps.of(half, dense).names == ("one", "two", "head")
    assert distance(full, dense, images) < 1e-8
    found = distance(half, dense, images)
    assert found > 1e-4
    found.backward()
    assert all(p.grad is not None for p in half.parameters())


def test_maps_of_other_shapes_and_of_no_variance_are_harmless(dense, images):
    narrow = Net(width=9)
    assert torch.isfinite(distance(narrow, dense, images))
    assert distance(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), dense, images) == 0.0
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
    assert torch.isfinite(distance(Net(), dense, images))


def test_only_training_is_watched_and_no_hook_is_left(dense, images):
    model = copy.deepcopy(dense)
    maps = FeatureMaps.of(model, dense)
    with maps.watched(model, dense):
        model.eval()(images)
        dense(images)
        assert maps.distance() == 0.0
    assert not any(module._forward_hooks for network in (model, dense) for module in network.modules())


def test_training_with_it_brings_the_maps_together(digits, dense):
    images = digits.train.sample(64, 0)
    factors = factorize(dense, images)
    start = float(distance(factors.compress(uniform(factors, 0.3)), dense, images).detach())
    found = {}
    for weight in (0.0, 10.0):
        model = factors.compress(uniform(factors, 0.3))
        settings = replace(SETTINGS, epochs=2, feature_weight=weight)
        train(model, digits, settings, teacher=dense, progress=False)
        found[weight] = float(distance(model, dense, images).detach())
    assert found[10.0] < 0.7 * min(start, found[0.0])


def test_it_needs_the_network(digits):
    logits = torch.zeros(len(digits.train), 10)
    with pytest.raises(ValueError, match=r"feature_weight=1.0 needs teacher, the network"):
        train(Net(), digits, replace(SETTINGS, feature_weight=1.0), teacher_logits=logits, progress=False)
    with pytest.raises(ValueError, match="0 or more"):
        TrainSettings(feature_weight=-1.0)


def test_it_alone_may_be_what_a_teacher_is_for(digits, dense):
    settings = replace(SETTINGS, distill_weight=0.0, feature_weight=1.0)
    history = train(copy.deepcopy(dense), digits, settings, teacher=dense, progress=False)
    assert len(history.epochs) == 1


def test_what_was_trained_before_there_were_such_maps_keeps_its_name():
    assert "feature_weight" not in TrainSettings().recorded()
    assert TrainSettings(feature_weight=2.0).recorded()["feature_weight"] == 2.0
