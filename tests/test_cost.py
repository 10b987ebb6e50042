"""MenuCosts: counts against hand computation and published figures, and the fairness of the timer."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from common import cost
from common.cost import (
    Latency,
    count_flops,
    count_flops_by_layer,
    count_params,
    latency_samples,
    measure_latency,
    summarise,
)
from common.modules import evaluating

# (layer, input (C, H, W), multiply-accumulates): output pixels x output channels x input channels per group x kernel
CONV_CASES = {
    "asymmetric kernel, no padding": (nn.Conv2d(3, 5, (2, 4)), (3, 9, 11), (8 * 8) * 5 * 3 * 8),
    "bias is free": (nn.Conv2d(3, 5, (2, 4), bias=False), (3, 9, 11), (8 * 8) * 5 * 3 * 8),
    "stride": (nn.Conv2d(4, 6, 3, stride=(2, 3)), (4, 13, 15), (6 * 5) * 6 * 4 * 9),
    "padding": (nn.Conv2d(4, 6, (3, 1), padding=(1, 2)), (4, 7, 5), (7 * 9) * 6 * 4 * 3),
    "dilation": (nn.Conv2d(2, 3, 3, dilation=2), (2, 9, 8), (5 * 4) * 3 * 2 * 9),
    "groups": (nn.Conv2d(6, 9, 3, groups=3), (6, 8, 7), (6 * 5) * 9 * 2 * 9),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (6, 8, 7), (8 * 7) * 6 * 1 * 9),
    # every input pixel is multiplied into a whole kernel
    "transposed": (nn.ConvTranspose2d(4, 6, (2, 3), stride=2), (4, 5, 7), (5 * 7) * 4 * 6 * 6),
    "transposed, groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 7), (5 * 7) * 4 * 3 * 9),
    "linear after flatten": (nn.Sequential(nn.Flatten(), nn.Linear(24, 7)), (2, 3, 4), 24 * 7),
    "linear without bias": (nn.Sequential(nn.Flatten(), nn.Linear(24, 7, bias=False)), (2, 3, 4), 24 * 7),
    "linear on rows": (nn.Linear(4, 7), (2, 3, 4), 2 * 3 * 4 * 7),
}


@pytest.mark.parametrize("case", CONV_CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_flops_equal_the_hand_computed_case(case, batch):
    layer, input_shape, expected = CONV_CASES[case]
    assert count_flops(layer, input_shape, batch=batch) == expected


@pytest.mark.parametrize(
    ("name", "flops", "params"),
    [
        ("resnet18", 1_814_073_344, 11_689_512),
        ("alexnet", 714_188_480, 61_100_840),
        ("vgg16", 15_470_264_320, 138_357_544),
    ],
)
def test_published_figures_at_224_px_and_1000_classes(name, flops, params):
    with torch.device("meta"):  # neither count needs the weights' values
        model = getattr(torchvision.models, name)(num_classes=1000)
    assert count_params(model) == params
    assert count_flops(model, (3, 224, 224)) == flops


def test_flops_by_layer_names_every_conv_and_linear_and_sums_to_the_total():
    model = torchvision.models.resnet18(num_classes=10)
    by_layer = count_flops_by_layer(model, (3, 64, 48))
    expected = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert set(by_layer) == expected
    assert sum(by_layer.values()) == count_flops(model, (3, 64, 48))
    assert by_layer["conv1"] == (32 * 24) * 64 * 3 * 49
    assert by_layer["fc"] == 512 * 10


class SharedAndFunctional(nn.Module):
    """One convolution under two names and run twice, and a linear map that has no module of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.again = self.first
        self.weight = nn.Parameter(torch.randn(7, 3))

    def forward(self, images):
        features = self.again(torch.relu(self.first(images))).mean((2, 3))
        return nn.functional.linear(features, self.weight)


def test_shared_modules_and_functional_calls_are_attributed_once():
    model = SharedAndFunctional()
    assert count_params(model) == (3 * 3 * 9 + 3) + 7 * 3
    by_layer = count_flops_by_layer(model, (3, 5, 4))
    assert by_layer == {"": 7 * 3, "first": 2 * (5 * 4) * 3 * 3 * 9}


def test_a_bare_layer_has_the_empty_name():
    assert count_flops_by_layer(nn.Conv2d(2, 3, 1), (2, 4, 5)) == {"": 4 * 5 * 2 * 3}


def test_params_exclude_buffers():
    assert count_params(nn.BatchNorm2d(5)) == 10


def test_counting_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU()).train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    count_flops(model, (3, 8, 9))
    assert [module.training for module in model] == [True, False, True, True]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_double_precision_models_are_counted():
    assert count_flops(nn.Conv2d(3, 4, 1).double(), (3, 5, 6)) == 5 * 6 * 3 * 4


@pytest.mark.parametrize(
    ("model", "input_shape", "message"),
    [
        (nn.ReLU(), (3, 8, 8), "no convolution or linear layer of ReLU"),
        (nn.Conv2d(3, 4, 3), (5, 8, 8), r"Conv2d cannot be counted.*\(1, 5, 8, 8\)"),
        (nn.Conv2d(3, 4, 3), (8, 8), r"must be \(C, H, W\)"),
        (nn.Conv2d(3, 4, 3), (3, 0, 8), r"must be \(C, H, W\)"),
    ],
)
def test_a_count_that_cannot_be_made_raises(model, input_shape, message):
    with pytest.raises(ValueError, match=message):
        count_flops(model, input_shape)


def test_a_failed_count_restores_training_mode_and_hooks():
    model = nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match="cannot be counted"):
        count_flops(model, (5, 8, 8))
    assert model.training
    assert not torch.nn.modules.module._global_forward_hooks


def test_lazy_parameters_have_no_count():
    with pytest.raises(ValueError, match="weight"):
        count_params(nn.LazyConv2d(4, 3))


# --- latency


class Clock:
    """Stands in for the clock of `common.cost`: time passes only while a fake model runs."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def perf_counter(self):
        return self.now

    def model(self, name, seconds):
        def run(_example):
            self.calls.append(name)
            self.now += seconds

        return run


@pytest.fixture
def clock(monkeypatch):
    own = Clock()
    monkeypatch.setattr(cost, "time", own)
    return own


def test_every_round_times_every_model_in_an_order_of_its_own(clock):
    models = {name: clock.model(name, seconds) for name, seconds in (("a", 0.01), ("b", 0.02), ("c", 0.03))}
    samples = latency_samples(models, torch.zeros(2, 3), rounds=40, warmup=2)
    assert {name: len(values) for name, values in samples.items()} == {"a": 40, "b": 40, "c": 40}
    calls = "".join(clock.calls)
    assert calls.startswith("aabbcc")
    rounds = {calls[at : at + 6] for at in range(6, len(calls), 6)}  # each model once untimed and once timed
    assert rounds == {"aabbcc", "aaccbb", "bbaacc", "bbccaa", "ccaabb", "ccbbaa"}
    assert len(calls) == 6 + 6 * 40


def test_what_another_model_leaves_in_the_caches_is_not_counted(clock):
    def model(name):
        def run(_example):
            clock.now += 0.01 if clock.calls[-1:] == [name] else 0.05
            clock.calls.append(name)

        return run

    samples = latency_samples({name: model(name) for name in "abc"}, torch.zeros(1), rounds=9)
    for values in samples.values():
        assert values == pytest.approx([0.01] * 9)


def test_a_model_that_takes_twice_as_long_measures_twice(clock):
    models = {"fast": clock.model("fast", 0.01), "slow": clock.model("slow", 0.02)}
    latency = measure_latency(models, np.zeros((2, 3)), rounds=7)
    assert latency["fast"] == pytest.approx(0.01)
    assert latency["slow"] == pytest.approx(0.02)


def test_short_calls_are_repeated_within_a_sample_and_reported_per_call(clock):
    (sample,) = latency_samples({"short": clock.model("short", 0.0005)}, torch.zeros(1), rounds=1)["short"]
    assert len(clock.calls) == 3 + 1 + 10  # the warm-up, one untimed, and as many as fill five milliseconds
    assert sample == pytest.approx(0.0005)


def test_modules_run_in_eval_and_inference_mode_and_are_restored():
    seen = []

    class Probe(nn.Module):
        def forward(self, images):
            seen.append((self.training, torch.is_inference_mode_enabled(), torch.get_num_threads()))
            return images

    model = nn.Sequential(Probe(), nn.Dropout()).train()
    model[1].eval()
    threads = torch.get_num_threads()
    measure_latency({"probe": model}, torch.zeros(1, 2), rounds=1, threads=1)
    assert set(seen) == {(False, True, 1)}
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert torch.get_num_threads() == threads
    assert not torch.is_inference_mode_enabled()


def test_a_model_that_raises_is_restored_all_the_same():
    model = nn.Linear(3, 2).train()
    with pytest.raises(RuntimeError):
        measure_latency({"broken": model}, torch.zeros(1, 5), threads=1)
    assert model.training


def test_evaluating_restores_submodules_shared_between_models():
    shared = nn.Dropout().train()
    with evaluating(nn.Sequential(shared), nn.Sequential(shared, nn.ReLU())):
        assert not shared.training
    assert shared.training


def test_summary_gives_the_percentiles():
    samples = [7.0, 3.0, 10.0, 0.0, 5.0, 1.0, 9.0, 2.0, 8.0, 4.0, 6.0]
    assert summarise(samples, batch_size=16) == Latency(median=5.0, p10=1.0, p90=9.0, batch_size=16)


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ({}, {}, "no models"),
        ({"number": 3}, {}, "'number' is a int, not callable"),
        ({"relu": nn.ReLU()}, {"rounds": 0}, "rounds must be at least 1; got 0"),
        ({"relu": nn.ReLU()}, {"warmup": 0}, "warmup must be at least 1; got 0"),
        ({"relu": nn.ReLU()}, {"threads": 0}, "threads must be at least 1; got 0"),
    ],
)
def test_bad_measurements_are_refused(models, options, message):
    with pytest.raises(ValueError, match=message):
        measure_latency(models, torch.zeros(1, 2), **options)


def test_a_summary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="got 0 samples"):
        summarise([], batch_size=1)


def test_an_attention_layer_is_counted_on_its_fused_path_too():
    """Evaluation runs a whole encoder layer as one operator; its linear layers are there all the same."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    model = nn.Sequential(nn.Unflatten(1, (1, 5, 32)), nn.Flatten(1, 2), encoder)
    tokens = torch.randn(1, 160)
    projections = 5 * (3 * 32 * 32 + 32 * 32 + 2 * 32 * 64)
    assert count_flops(model, tokens) == projections
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_parameter_that_a_module_is_called_with_is_no_obstacle():
    """Class tokens of transformers: the counter asks for the gradient of every module's inputs."""

    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.mixing = nn.Parameter(torch.zeros(1, 4)), nn.Linear(4, 3)

        def forward(self, x):
            return self.mixing(self.token) + x.mean()

    model = Token()
    assert count_flops(model, (1, 2, 2)) == 12
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_weights_count_as_others_do():
    """torch multiplies rows of several axes by a matrix in one of two ways, by whether it asks for a gradient."""

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(6, 5, bias=False)

        def forward(self, x):
            return self.mix(x.transpose(2, 3))

    model = Rows()
    expected = count_flops(model, (2, 6, 4))
    assert expected == 2 * 4 * 6 * 5
    model.requires_grad_(False)
    assert count_flops(model, (2, 6, 4)) == expected
    assert not any(parameter.requires_grad for parameter in model.parameters())
