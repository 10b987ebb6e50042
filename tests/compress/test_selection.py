"""factorize proves itself: what cannot be exchanged without changing the network stays dense, with the reason."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from common.compress import HTLayer, factorize, recalibrate
from common.configuration import KernelRanks
from common.cost import count_flops, count_params
from common.deploy import deploy, fold_batch_norm
from common.ranks import uniform
from tests.helpers import relative_error


@pytest.fixture
def images():
    return torch.randn(20, 3, 24, 32, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 48, 3, 2, 1)
        self.head = nn.Linear(48, 40)

    def features(self, x):
        return F.relu(self.second(F.relu(self.first(x))))

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def made(kind=Net):
    torch.manual_seed(0)
    return kind().eval()


def difference(model, small, images):
    with torch.no_grad():
        expected, found = model(images), small.eval()(images)
    return relative_error(found, expected)


def full(model, images):
    factors = factorize(model, images)
    return factors, difference(model, factors.compress(factors.full_ranks()), images)


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward"])
def test_layers_that_something_was_hung_on_stay_dense(images, kind):
    model = made()
    if kind == "hook":
        model.second.register_forward_hook(lambda _module, _inputs, output: 2 * output + 1)
    elif kind == "pre-hook":
        model.second.register_forward_pre_hook(lambda _module, inputs: (F.pad(inputs[0], (2, 2, 2, 2)),))
    else:
        original = model.second.forward
        model.second.forward = lambda x: 3 * original(x)
    factors, error = full(model, images)
    assert error < 1e-4
    assert "hook" in factors.skipped["second"] or "replaced" in factors.skipped["second"]
    assert "first" in factors.layers


class ByClass(Net):
    """Runs its second layer only if that is a convolution of torch's."""

    def features(self, x):
        x = F.relu(self.first(x))
        return F.relu(self.second(x)) if isinstance(self.second, nn.Conv2d) else x.repeat(1, 2, 1, 1)[:, :48]


class Decoder(Net):
    """Hands a layer's weight to something else."""

    def forward(self, x):
        return F.conv_transpose2d(F.relu(self.first(x)), self.first.weight * 1.5, stride=2, padding=1)


class Sizes(Net):
    def forward(self, x):
        x = self.features(x.to(self.first.weight.dtype))
        assert self.second.stride == (2, 2)
        assert self.second.padding == (1, 1)
        return self.head(x.reshape(len(x), self.second.out_channels, -1).mean(2)[:, : self.head.in_features])


@pytest.mark.parametrize("kind", [ByClass, Decoder, Sizes])
def test_networks_that_read_their_layers_go_on_computing_the_same(images, kind):
    factors, error = full(made(kind), images)
    assert error < 1e-4
    if kind is ByClass:
        assert "second" in factors.skipped
        assert "first" in factors.layers


def test_a_factorised_layer_reads_as_the_one_that_it_replaces(images):
    model = made()
    factors = factorize(model, images)
    small = factors.compress(factors.full_ranks())
    for name in ("first", "second", "head"):
        dense, layer = model.get_submodule(name), small.get_submodule(name)
        assert isinstance(layer, HTLayer)
        assert (layer.weight - dense.weight).abs().max() < 1e-4
        for attribute in (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "padding_mode",
        ):
            if hasattr(dense, attribute):
                assert getattr(layer, attribute) == getattr(dense, attribute), (name, attribute)
    assert (small.head.in_features, small.head.out_features) == (48, 40)
    cut = factors.compress({"second": KernelRanks(8, 12, 10)}).second
    assert cut.weight.shape == model.second.weight.shape


def test_layers_that_share_a_weight_stay_dense(images):
    model = made()
    model.third = nn.Conv2d(3, 32, 3, 2, 1)
    model.third.weight = model.first.weight
    factors, error = full(model, images)
    assert error < 1e-4
    assert "shares its weight with third" in factors.skipped["first"]
    config = uniform(factors, 0.3)
    assert factors.params(config) == count_params(factors.compress(config))


class Nothing(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, groups=4)

    def forward(self, x):
        return self.conv(x[:, :1].expand(-1, 4, -1, -1))


def test_nothing_left_to_factorise_is_an_error_that_says_why(images):
    with pytest.raises(ValueError, match=r"no layer of Nothing can be factorised: conv: a depthwise convolution"):
        factorize(made(Nothing), images)


def test_wrapped_networks_are_unwrapped_and_scripted_ones_refused(images):
    model = made()
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert factorize(wrapped, images).model is model
    with pytest.raises(ValueError, match="scripted"):
        factorize(torch.jit.script(model), images)


def test_a_compressed_network_is_not_compressed_again(images):
    model = made()
    small = factorize(model, images, layers=["first"]).compress({"first": KernelRanks(3, 8, 8)})
    factors, error = full(small, images)
    assert error < 1e-4
    assert "factorised already" in factors.skipped["first"]
    assert set(factors.layers) == {"second", "head"}
    deployed = deploy(factors.compress(uniform(factors, 0.5)), images[:2], rounds=1)
    assert deployed(images[:2]).shape == (2, 40)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_types_are_summed_in_wide_ones(images, dtype):
    model = made().to(dtype)
    factors = factorize(model, images.to(dtype))
    small = factors.compress(factors.full_ranks())
    assert small.second.weight.dtype == dtype
    assert factors.layers["second"].core.dtype in (torch.float32, torch.float64)
    assert difference(model, small, images.to(dtype)) < {torch.float64: 1e-8, torch.float16: 3e-2}.get(dtype, 1e-1)


def test_calibration_images_come_in_every_form(images):
    model = made()
    config = uniform(factorize(model, images), 0.4)
    expected = factorize(model, images).compress(config)
    labels = torch.zeros(len(images), dtype=torch.long)
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    for given in (images.numpy(), list(images.split(7)), loader, ((x, y) for x, y in loader)):
        small = factorize(model, given).compress(config)
        assert difference(expected, small, images) < 1e-3
    with pytest.raises(ValueError, match="images"):
        factorize(model, 3)
    with pytest.raises(ValueError, match="images: a batch is a tensor"):
        factorize(model, ["a"])
    small = factorize(model, images).compress(config)
    assert recalibrate(small, loader) is small


class Keeps(Net):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x):
        self.kept = self.features(x)
        return self.head(self.kept.mean((2, 3)))


def test_cached_activations_and_locks_do_not_stop_a_copy(images):
    model = made(Keeps)
    factors = factorize(model, images)
    model(images).sum().backward()
    assert difference(model, factors.compress(factors.full_ranks()), images) < 1e-4


def test_frozen_layers_stay_frozen_and_modes_stay(images):
    model = made().train()
    model.second.requires_grad_(False)
    factors = factorize(model, images)
    assert model.training
    small = factors.compress(factors.full_ranks())
    assert not any(parameter.requires_grad for parameter in small.second.parameters())
    assert all(parameter.requires_grad for parameter in small.first.parameters())


class Rows(nn.Module):
    """Patches in the batch, and tokens before the features."""

    def __init__(self):
        super().__init__()
        self.conv, self.mix, self.head = nn.Conv2d(3, 40, 3, 2, 1), nn.Linear(40, 36), nn.Linear(36, 33)

    def forward(self, x):
        tiles = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 8, 8)
        tokens = self.conv(tiles).flatten(2).transpose(1, 2)
        return self.head(F.relu(self.mix(tokens)).mean(1)).reshape(len(x), -1, 33).mean(1)


def test_costs_count_every_row_that_an_image_comes_to(images):
    model = made(Rows)
    factors = factorize(model, images)
    config = uniform(factors, 0.3)
    assert factors.dense_flops == count_flops(model, (3, 24, 32))
    assert factors.flops(config) == count_flops(factors.compress(config), (3, 24, 32))
    assert factors.layers["mix"].trace.rows == 12 * 16


class NormThenSilu(nn.BatchNorm2d):
    def forward(self, x):
        return F.silu(super().forward(x))


def test_only_torchs_own_norms_are_folded(images):
    model = nn.Sequential(nn.Conv2d(3, 32, 3), NormThenSilu(32), nn.Conv2d(32, 8, 3), nn.BatchNorm2d(8)).eval()
    folded, pairs = fold_batch_norm(model, images[:2])
    assert pairs == {"2": "3"}
    assert difference(model, folded, images) < 1e-5


class TokensAsChannels(nn.Module):
    """As many tokens as features: a norm over the tokens must not be folded into the layer of the features."""

    def __init__(self):
        super().__init__()
        self.mix, self.norm = nn.Linear(32, 32), nn.BatchNorm1d(32)

    def forward(self, x):
        return self.norm(self.mix(x.mean(1)[:, :, :24].repeat(1, 2, 2)[:, :32, :32]))


def test_a_norm_over_tokens_stays(images):
    model = made(TokensAsChannels)
    model.norm.running_var.uniform_(0.5, 2)
    folded, pairs = fold_batch_norm(model, images[:2])
    assert pairs == {}
    assert difference(model, folded, images) < 1e-5


class Named(Net):
    def forward(self, x):
        scores = super().forward(x)
        return {"out": scores, "aux": (scores.softmax(1), x.mean((2, 3)))}


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_outputs_of_any_structure_are_deployed(images, runtime):
    model = made(Named)
    factors = factorize(model, images)
    small = factors.compress(uniform(factors, 0.5)).eval()
    found = deploy(small, images[:4], rounds=1, runtime=runtime)(images[:4])
    with torch.no_grad():
        expected = small(images[:4])
    assert set(found) == {"out", "aux"}
    assert isinstance(found["aux"], tuple)
    assert torch.allclose(found["aux"][0], expected["aux"][0], atol=1e-4)
