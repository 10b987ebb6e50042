"""Layers fitted to the dense network's outputs: nothing changes where nothing was lost, and what is lost shrinks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from common.compress import HTLayer, Targets, factorize, recalibrate, reconstruct, reconstructed_outputs
from common.compress.targets import STATISTICS_ROWS, statistics
from common.configuration import KernelRanks, MatrixRanks
from common.deploy import deploy
from common.modules import copy_with
from common.ranks import uniform
from tests.helpers import halved, relative_error


def images(count: int = 48, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 10, 9, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


class Net(nn.Module):
    """Convolutions with a norm, with a bias, with neither, grouped, transposed; a shared layer; a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.biased = nn.Conv2d(16, 20, (3, 1), padding=(2, 0), padding_mode="reflect")
        self.bare = nn.Conv2d(20, 16, 3, stride=2, padding=1, bias=False)
        self.shared = nn.Conv2d(16, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(24, 8, 3, 2, 1)
        self.hidden, self.head = nn.Linear(8 * 11 * 9, 40), nn.Linear(40, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.biased(self.norm(self.first(x)).relu()).relu()
        x = self.bare(x).relu()
        x = self.shared(self.shared(x).relu()).relu()
        x = self.up(self.grouped(x).relu()).relu()
        return self.head(self.hidden(x.flatten(1)).relu())


LAYERS = ["first", "biased", "bare", "shared", "grouped", "up", "hidden", "head"]


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
        model.norm.weight.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def factors(dense):
    return factorize(dense, images(), layers=LAYERS)


@pytest.fixture(scope="module")
def targets(factors):
    return Targets.of(factors, images())


def lost(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected = dense(x)
        return float((model.eval()(x) - expected).square().sum() / (expected - expected.mean(0)).square().sum())


def difference(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return relative_error(other.eval()(x), one.eval()(x))


def outputs_of(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """What a layer puts out at its first call in a pass."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda *call: seen.append(call[2].clone()))
    with torch.no_grad():
        model.eval()(x)
    handle.remove()
    return seen[0]


def test_at_full_ranks_nothing_changes(dense, factors, targets):
    model = reconstruct(factors.compress(factors.full_ranks()), targets)
    assert difference(dense, model, images(16, seed=9)) < 1e-4
    torch.testing.assert_close(model.norm.running_mean, dense.norm.running_mean, rtol=1e-4, atol=1e-4)


def test_the_order_of_the_images_does_not_matter(factors):
    x = images()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    fitted = [reconstruct(factors.compress(halved(factors)), Targets.of(factors, given)) for given in (x, x[order])]
    assert difference(*fitted, images(16, seed=9)) < 1e-2


def test_a_second_time_changes_next_to_nothing(factors, targets):
    model = reconstruct(factors.compress(halved(factors)), targets)
    again = reconstruct(copy_with(model, {}), targets)
    torch.testing.assert_close(model.norm.running_mean, again.norm.running_mean, rtol=1e-2, atol=1e-2)
    assert difference(model, again, images(16, seed=9)) < 0.05


def test_it_brings_unseen_outputs_nearer_than_truncation_and_recalibration(dense, factors, targets):
    config, unseen = halved(factors), images(64, seed=9)
    truncated = lost(factors.compress(config), dense, unseen)
    matched = recalibrate(factors.compress(config), images(), factors.output_means(), factors.output_stds())
    fitted = lost(reconstruct(factors.compress(config), targets), dense, unseen)
    assert fitted < 0.6 * truncated
    assert fitted < 0.8 * lost(matched, dense, unseen)


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_alone_errs_less_on_what_it_was_fitted_on(dense, factors, name):
    """Ridge regression cannot be worse than the factor that it starts from."""
    x = images()
    ranks = {name: halved(factors)[name]}
    targets = Targets.of(factors, x)
    models = dense, factors.compress(ranks), reconstruct(factors.compress(ranks), targets)
    expected, truncated, fitted = found = [outputs_of(model, name, x) for model in models]
    if name == "first":  # its mean is the batch norm's affair
        expected, truncated, fitted = (one - one.mean((0, 2, 3), keepdim=True) for one in found)
    errors = [float((one - expected).square().sum()) for one in (truncated, fitted)]
    assert errors[1] <= errors[0] * (1 + 1e-4)
    if name != "up":
        assert errors[1] < 0.999 * errors[0]


def test_means_come_back_through_biases_and_norms(dense, factors, targets):
    model = reconstruct(factors.compress(halved(factors)), targets).eval()
    x = images()
    with torch.no_grad():
        for one in ("norm", "biased"):
            expected, found = (outputs_of(network, one, x).mean((0, 2, 3)) for network in (dense, model))
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_a_layer_with_neither_bias_nor_norm_is_fitted_with_its_mean():
    """The centred fit would leave the mean where truncation put it, and nothing behind would give it back."""
    torch.manual_seed(3)
    dense = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32, bias=False)).eval()
    x = torch.randn(512, 64) @ torch.diag(torch.linspace(2, 0.1, 64)) + 3
    factors = factorize(dense, x, layers=["0", "2"])
    config = {"0": MatrixRanks(6), "2": MatrixRanks(16)}
    before, after = factors.compress(config), reconstruct(factors.compress(config), Targets.of(factors, x))
    with torch.no_grad():
        errors = [float((network(x) - dense(x)).mean(0).norm()) for network in (before, after)]
    assert errors[1] < 0.6 * errors[0]


def test_the_outputs_of_the_pass_are_those_of_the_fitted_network(factors, targets):
    model = factors.compress(halved(factors))
    given = reconstructed_outputs(model, targets)
    with torch.no_grad():
        again = model.eval()(targets.images)
    # A shared layer's later calls, and norms, see what was fitted at the first one.
    torch.testing.assert_close(given, again, rtol=1e-3, atol=1e-3)


class Residual(nn.Module):
    """Two blocks of torchvision's kind: the sum is made in place, the first shortcut is a convolution with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.second, self.norm2 = nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.short, self.norm3 = nn.Conv2d(3, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.third, self.fourth = nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.second(self.relu(self.norm1(self.first(x)))))
        out += self.norm3(self.short(x))
        x = self.relu(out)
        x = self.relu(x + self.fourth(self.relu(self.third(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(6)
    model = Residual()
    recalibrate(model.train(), images())
    return model.eval()


def test_a_residual_blocks_last_layer_is_fitted_to_the_sum(residual):
    """The shortcut is cut to one rank: what it loses, the branch beside it gives back as far as it can."""
    names = ["second", "short", "fourth"]
    factors = factorize(residual, images(), layers=names)
    targets = Targets.of(factors, images())
    assert set(targets.sums) == {"second", "fourth"}
    assert set(targets.normed) == {"second", "short"}
    config = {"second": factors.layers["second"].full_ranks, "short": MatrixRanks(1)}
    local = replace(targets, sums={})
    unseen = images(64, seed=9)
    losses = [lost(reconstruct(factors.compress(config), one), residual, unseen) for one in (targets, local)]
    assert losses[0] < 0.9 * losses[1]


def test_a_sum_that_is_right_already_changes_nothing(residual):
    factors = factorize(residual, images(), layers=["first", "second", "short", "third", "fourth"])
    model = reconstruct(factors.compress(factors.full_ranks()), Targets.of(factors, images()))
    assert difference(residual, model, images(16, seed=9)) < 1e-3


class Rectified(nn.Module):
    """The layer's output is changed in place before it enters the sum: the sum is none of the layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.short = nn.Conv2d(3, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.norm(self.first(x)), inplace=True) + self.short(x).relu()


def test_an_output_that_is_rectified_in_place_is_no_part_of_a_linear_sum():
    torch.manual_seed(7)
    model = Rectified().eval()
    assert Targets.of(factorize(model, images(), layers=["first"]), images()).sums == {}


def test_a_norms_variance_follows_by_half_and_the_mean_that_it_hands_on_stays(dense, factors, targets):
    model = reconstruct(factors.compress({"first": KernelRanks(1, 1, 2)}), targets)
    before = [outputs_of(network, "first", images()).var((0, 2, 3), correction=0) for network in (dense, model)]
    change = (model.norm.running_var + 1e-5) / (dense.norm.running_var + 1e-5)
    expected = ((before[1] + 1e-5) / (before[0] + 1e-5)).clamp(0.1, 10).sqrt()
    torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-3)
    means = [outputs_of(network, "norm", images()).mean((0, 2, 3)) for network in (dense, model)]
    torch.testing.assert_close(means[1], means[0], rtol=1e-3, atol=1e-3)


def test_flags_hooks_and_the_dense_network_stay(dense, factors):
    state = {name: value.clone() for name, value in dense.state_dict().items()}
    model = factors.compress(halved(factors)).train()
    reconstruct(model, Targets.of(factors, images()))
    assert all(module.training for module in model.modules())
    assert not any(
        module._forward_pre_hooks or module._forward_hooks for module in (*model.modules(), *dense.modules())
    )
    assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_activations_that_are_not_finite_are_left_for_the_evaluation_to_see(factors, targets):
    model = factors.compress(halved(factors))
    with torch.no_grad():
        model.first.stages[0].weight.fill_(torch.inf)
    assert not torch.isfinite(reconstructed_outputs(model, targets)).all()


def test_layers_that_put_out_nothing_are_no_obstacle(dense, factors):
    model = copy_with(dense, {})
    with torch.no_grad():
        model.biased.weight.zero_()
        model.biased.bias.zero_()
    own = factorize(model, images(), layers=LAYERS)
    fitted = reconstruct(own.compress(own.full_ranks()), Targets.of(own, images()))
    assert difference(model, fitted, images(8, seed=9)) < 1e-3


def test_no_more_images_than_fit_into_memory_go_through_at_once(factors, monkeypatch):
    monkeypatch.setattr("common.compress.targets.MOST_VALUES", 10 * 20 * 12 * 9)
    found = Targets.of(factors, images())
    assert len(found.images) == 10
    assert torch.equal(found.images, images()[:10])


def test_few_rows_are_not_fitted_by_heart():
    """As many unknowns as images: the fit that is perfect on them would be worthless on others."""
    generator = torch.Generator().manual_seed(5)
    spectrum = torch.linspace(2, 0.5, 96)
    torch.manual_seed(5)
    dense = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    x, unseen = (torch.randn(n, 96, generator=generator) * spectrum for n in (48, 512))
    factors = factorize(dense, x, layers=["0", "2"])
    for rank in (16, 40, 60):
        config = {"0": MatrixRanks(rank), "2": MatrixRanks(rank)}
        truncated = lost(factors.compress(config), dense, unseen)
        assert lost(reconstruct(factors.compress(config), Targets.of(factors, x)), dense, unseen) < 1.02 * truncated


def test_half_precision_networks_are_fitted_in_wider_sums():
    torch.manual_seed(4)
    dense = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).to(torch.bfloat16).eval()
    x = images().to(torch.bfloat16)
    factors = factorize(dense, x)
    config = halved(factors)
    plain = lost(factors.compress(config), dense, x)
    assert lost(reconstruct(factors.compress(config), Targets.of(factors, x)), dense, x) < plain
    assert {type(m) for m in factors.compress(config).modules()} >= {HTLayer}


def test_many_images_with_few_places_each_are_no_worse_than_few_images_with_many(monkeypatch):
    """Places are each image's own: the same few in every image would fit layers to what is there alone."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(32, 32, 3, padding=1)).eval()
    # Contrast grows from left to right, so that places differ in what matters there.
    everything = torch.randn(600, 8, 16, 16) * torch.linspace(0.1, 3, 16)
    given, unseen = everything[:500], everything[500:]
    errors = {}
    for count in (16, 500):
        factors = factorize(model, given[:64])
        small = factors.compress(uniform(factors, 0.4))
        monkeypatch.setattr("common.compress.targets.ROWS", 1000)
        reconstruct(small, Targets.of(factors, given[:count]))
        with torch.no_grad():
            errors[count] = float((small(unseen) - model(unseen)).square().mean())
    assert errors[500] < 1.02 * errors[16]


def test_every_image_is_looked_at_in_places_of_its_own(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)).eval()
    inputs = torch.randn(40, 8, 12, 12)
    factors = factorize(model, inputs)
    monkeypatch.setattr("common.compress.targets.ROWS", 200)
    found = Targets.of(factors, inputs)
    for name, [positions] in found.positions.items():
        assert positions.shape == (40, 5)
        assert all(len(set(row.tolist())) == 5 for row in positions)
        assert len({tuple(row.tolist()) for row in positions}) > 30
        dense = model[: int(name) + 1](inputs).flatten(2)
        rows = torch.stack([dense[n][:, place] for n, own in enumerate(positions) for place in own])
        assert torch.allclose(found.outputs[name], rows.to(found.outputs[name]), atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 4), (5, 4, 9), (100, 4, 3, 3), (70, 4, 60, 80), (64, 4, 12, 20, 20)])
def test_a_norms_statistics_are_those_of_all_rows_or_near_them_at_a_fraction(shape):
    generator = torch.Generator().manual_seed(0)
    levels = torch.arange(4.0).reshape(1, 4, *[1] * (len(shape) - 2))
    smooth = torch.randn(shape, generator=generator).cumsum(-1) / shape[-1] ** 0.5 + levels
    rows = smooth.movedim(1, -1).flatten(0, -2)
    _, mean, variance = statistics(smooth)
    few = len(rows) <= STATISTICS_ROWS
    assert torch.allclose(mean, rows.mean(0), atol=1e-5 if few else 0.05)
    assert torch.allclose(variance, rows.var(0, correction=0), rtol=1e-4 if few else 0.1)


class Called(nn.Module):
    """Layers and a norm that see two halves of the inputs at once, one after the other, or image by image."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.map, self.hidden, self.head = nn.Conv2d(32, 48, 5), nn.Linear(48, 40), nn.Linear(40, 4)

    def part(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.head(self.hidden(self.map(x).flatten(1).relu()).relu())

    def forward(self, x: Tensor) -> Tensor:
        left, right = x[:, :3], x[:, 3:]
        if self.way == "by halves":
            return torch.cat([self.part(left), self.part(right)])
        both = torch.cat([left, right])
        return self.part(both) if self.way == "at once" else torch.cat([self.part(one) for one in both.split(1)])


@pytest.mark.parametrize("way", ["by halves", "image by image"])
def test_a_layer_that_runs_more_than_once_is_fitted_to_all_its_calls(way):
    torch.manual_seed(0)
    inputs = torch.randn(60, 6, 5, 5)
    inputs[:, 3:] = 3 * inputs[:, 3:] + 2  # what a call reads is no sample of what the others read
    once, several = Called("at once").eval(), Called(way).eval()
    several.load_state_dict(once.state_dict())
    fitted = []
    for model in (once, several):
        factors = factorize(model, inputs)
        small = reconstruct(factors.compress(halved(factors)), Targets.of(factors, inputs))
        fitted.append(small.state_dict())
    for name, expected in fitted[0].items():
        assert torch.allclose(fitted[1][name], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())), name


def test_at_full_ranks_layers_that_run_more_than_once_stay_what_they_are():
    torch.manual_seed(0)
    model, inputs = Called("by halves").eval(), torch.randn(40, 6, 5, 5)
    factors = factorize(model, inputs)
    whole = reconstruct(factors.compress(factors.full_ranks()), Targets.of(factors, inputs))
    assert difference(whole, model, inputs) < 1e-4


class Named(nn.Module):
    """Calls its layers by position, or names what it hands them, as torch's own layers allow."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.named = named
        self.first, self.norm = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)
        self.second, self.last = nn.Conv2d(12, 40, 3), nn.Linear(40, 36)

    def forward(self, x):
        for layer in (self.first, self.norm, nn.ReLU(), self.second):
            x = layer(input=x) if self.named else layer(x)
        features = x.mean((2, 3))
        return self.last(input=features) if self.named else self.last(features)


def test_layers_whose_input_is_named_are_compressed_like_any_others():
    x = torch.randn(32, 3, 10, 10, generator=torch.Generator().manual_seed(6))
    made = []
    for named in (False, True):
        dense = Named(named).eval()
        factors = factorize(dense, x)
        fitted = reconstruct(factors.compress(halved(factors)), Targets.of(factors, x))
        given_back = recalibrate(factors.compress(halved(factors)), x, factors.output_means())
        with torch.no_grad():
            made.append([dense(x), fitted(x), given_back(x), deploy(fitted, x[:2]).run(x[:2])])
    assert list(factors.layers) == ["first", "second", "last"]
    for by_position, by_name in zip(*made, strict=True):
        assert torch.equal(by_position, by_name)


@pytest.mark.parametrize("bias", [True, False])
def test_values_too_large_to_be_squared_are_fitted_like_any_others(bias):
    torch.manual_seed(7)
    dense = nn.Sequential(nn.Conv2d(3, 12, 3, bias=bias), nn.ReLU(), nn.Conv2d(12, 8, 3, bias=False), nn.ReLU()).eval()
    x, size = images(), 2.0**66  # of which the square is no number in float32
    made = []
    for scale in (1.0, size):
        with torch.no_grad():
            if bias:
                dense[0].bias *= scale
            factors = factorize(dense, x * scale)
            fitted = reconstruct(factors.compress(halved(factors)), Targets.of(factors, x * scale))
            made.append(fitted(x * scale) / scale)
    assert relative_error(made[1], made[0]) < 1e-3
