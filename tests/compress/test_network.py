"""Whole models: full ranks change nothing, nothing is shared, and every count is the count of what was built."""

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from common.compress import HTLayer, factorize, recalibrate
from common.compress.selection import LAYER_SETS
from common.configuration import Configuration, KernelRanks, MatrixRanks, parse_config_str
from common.cost import count_flops, count_params
from tests.helpers import relative_error


def randomised(model: nn.Module, shape: tuple[int, int, int], seed: int = 0) -> nn.Module:
    """Batch norm as in a trained network, instead of statistics 0 and 1; in eval mode.

    The statistics are about those of the activations, so that the signal of the image survives to the last layer:
    a network whose output is a constant would be reproduced by anything.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(norm: nn.BatchNorm2d) -> Tensor:
        return torch.randn(norm.num_features, generator=generator)

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_((0.2 * noise(norm)).exp())
            norm.bias.copy_(0.1 * noise(norm))
        recalibrate(model, torch.randn(8, *shape, generator=generator))
        for norm in norms:
            norm.running_mean += 0.1 * norm.running_var.sqrt() * noise(norm)
            norm.running_var *= (0.2 * noise(norm)).exp()
    return model.eval()


def torchvision_net(name: str, **options) -> nn.Module:
    torch.manual_seed(1)
    return randomised(getattr(torchvision.models, name)(num_classes=10, **options), (3, 64, 64))


SMALL_SHAPE = (3, 8, 9)


def small_net() -> nn.Sequential:
    """One layer of every kind, each with its own number of channels."""
    torch.manual_seed(2)
    return randomised(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 34, (1, 5), stride=2),
            nn.Conv2d(34, 36, 1),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(36 * 4 * 3, 40),
            nn.ReLU(),
            nn.Linear(40, 33),
        ),
        SMALL_SHAPE,
    )


def images(shape: tuple[int, int, int] = SMALL_SHAPE, count: int = 4, seed: int = 3) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def random_config(factors, seed: int) -> dict:
    """Legal ranks, drawn uniformly; about one layer in four stays dense."""
    generator = torch.Generator().manual_seed(seed)

    def draw(limit: int) -> int:
        return int(torch.randint(1, limit + 1, (1,), generator=generator))

    config = {}
    for name, full in factors.full_ranks().items():
        if draw(4) == 1:
            continue
        if isinstance(full, MatrixRanks):
            config[name] = MatrixRanks(draw(full.rank))
        else:
            rank_in, rank_out = draw(full.rank_in), draw(full.rank_out)
            k_h, k_w = factors.layers[name].shape[2:]
            config[name] = KernelRanks(rank_in, draw(min(rank_in * k_h, k_w * rank_out)), rank_out)
    return config


def spread(outputs: Tensor) -> float:
    """How much the outputs (N, classes) differ from image to image, relative to their size."""
    return relative_error(outputs, outputs.mean(0, keepdim=True).expand_as(outputs))


def storages(module: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers()) if t.numel()}


def factor_storages(factors) -> set[int]:
    tensors = [
        value for layer in factors.layers.values() for value in vars(layer).values() if isinstance(value, Tensor)
    ]
    return {t.untyped_storage().data_ptr() for t in tensors}


# --- full ranks -------------------------------------------------------------------------------------------------------

NETWORKS = ["resnet18", "resnet50", "googlenet", "densenet121", "mobilenet_v2", "squeezenet1_1", "alexnet", "vgg16"]


def narrow_classifier(model):
    """AlexNet and VGG16 with 96 hidden features for 4096: eigenvectors of 4096 x 4096 matrices take half a minute."""
    if isinstance(classifier := getattr(model, "classifier", None), nn.Sequential):
        wide = [name for name, layer in classifier.named_children() if isinstance(layer, nn.Linear)]
        for place, name in enumerate(wide if len(wide) == 3 else []):
            features = 96 if place else classifier[int(name)].in_features
            layer = nn.Linear(features, 96 if place < 2 else 10)
            nn.init.kaiming_normal_(layer.weight, generator=torch.Generator().manual_seed(place))
            nn.init.zeros_(layer.bias)
            classifier.set_submodule(name, layer)
    return model.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_full_ranks_reproduce_torchvisions_networks(name):
    options = {"init_weights": False} if name == "googlenet" else {}
    model, x = narrow_classifier(torchvision_net(name, **options)), images((3, 64, 64), count=2)
    factors = factorize(model, input_shape=(3, 64, 64))
    compressed = factors.compress(factors.full_ranks())
    assert len(factors.full_ranks()) >= 5
    with torch.no_grad():
        assert spread(model(x)) > 0.01
        assert relative_error(compressed(x), model(x)) < 1e-4


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1"])
def test_data_aware_full_ranks_reproduce_networks_on_images_that_were_not_seen(name, count):
    """Two images leave most directions of the deep layers unseen; their whitening is undone all the same."""
    model, x = torchvision_net(name), images((3, 64, 64), count=2)
    factors = factorize(model, images((3, 64, 64), count, seed=4))
    with torch.no_grad():
        assert relative_error(factors.compress(factors.full_ranks())(x), model(x)) < 2e-5


def test_full_ranks_reproduce_a_network_with_linear_layers_on_channels_last_maps():
    torch.manual_seed(5)
    model = ConvNeXt([CNBlockConfig(32, 36, 1), CNBlockConfig(36, None, 1)], num_classes=5, layer_scale=1.0).eval()
    x = images((3, 32, 40))
    factors = factorize(model, x)
    assert "features.1.0.block.3" in factors.layers
    full, config = factors.full_ranks(), random_config(factors, seed=0)
    with torch.no_grad():
        assert relative_error(factors.compress(full)(x), model(x)) < 1e-4
    assert factors.flops(config) == count_flops(factors.compress(config), (3, 32, 40))


@pytest.mark.parametrize("bases", ["weight", "input", "both"])
def test_full_ranks_reproduce_the_small_network_in_double_precision(bases):
    model, x = small_net().double(), images().double()
    factors = factorize(model, x, bases=bases)
    with torch.no_grad():
        assert relative_error(factors.compress(factors.full_ranks())(x), model(x)) < 1e-10


def test_the_empty_configuration_is_a_copy():
    model, x = small_net(), images()
    compressed = factorize(model, x).compress({})
    assert compressed is not model
    assert not storages(compressed) & storages(model)
    assert torch.equal(compressed(x), model(x))


# --- what is left as it was -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_dense_model_stays_as_it_was_bit_for_bit(calibrated):
    model = small_net().train()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    pointers = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    before = copy.deepcopy(model.state_dict())
    factors = factorize(model, images() if calibrated else None, input_shape=SMALL_SHAPE)
    compressed = factors.compress(random_config(factors, seed=1))
    for parameter in compressed.parameters():
        parameter.data.zero_()
    assert [module.training for module in model.modules()] == flags
    assert [t.data_ptr() for t in (*model.parameters(), *model.buffers())] == pointers
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_model_is_restored_when_it_raises():
    model = small_net().train()
    for calibration in (images((3, 4, 3)), [images(), images((3, 4, 3))]):
        with pytest.raises(RuntimeError):
            factorize(model, calibration)
        assert all(module.training for module in model.modules())
        assert not any(module._forward_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_nothing_shares_storage_with_anything():
    model = small_net()
    factors = factorize(model, images())
    first, second = (factors.compress(config) for config in (random_config(factors, 2), factors.full_ranks()))
    groups = [storages(model), factor_storages(factors), storages(first), storages(second)]
    assert sum(map(len, groups)) == len(set.union(*groups))


def test_training_a_compressed_model_moves_no_other():
    model, x = small_net(), images()
    factors = factorize(model, x)
    config = random_config(factors, seed=3)
    trained, other = factors.compress(config).train(), factors.compress(config)
    dense_before, other_before = (copy.deepcopy(m.state_dict()) for m in (model, other))
    optimizer = torch.optim.SGD(trained.parameters(), lr=1)
    trained(x).square().sum().backward()
    optimizer.step()
    for module, before in ((model, dense_before), (other, other_before), (factors.compress(config), other_before)):
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
def test_the_copy_has_the_training_flags_of_the_dense_model(training):
    model = small_net().train(training)
    factors = factorize(model, images())
    compressed = factors.compress(factors.full_ranks())
    assert {module.training for module in compressed.modules()} == {training}


# --- which layers -----------------------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """Layers that can be factorised beside all kinds that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 4, 3, padding=1, groups=2)
        self.transposed = nn.ConvTranspose2d(4, 5, 2)
        self.signal = nn.Conv1d(5, 5, 1)
        self.unused = nn.Linear(3, 3)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(5, 6, 3))
        self.hooked = nn.utils.spectral_norm(nn.Conv2d(6, 6, (3, 1)))
        self.hidden = nn.Linear(6, 40)
        self.head = nn.Linear(40, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.depthwise(self.plain(x)))
        x = self.transposed(x)
        x = self.hooked(self.normed(self.signal(x.flatten(2)).reshape(x.shape)))
        return self.head(self.hidden(x.mean((2, 3))))


def test_layers_that_stay_dense_are_listed_with_the_reason():
    factors = factorize(Mixture().eval(), images())
    assert list(factors.layers) == ["plain", "transposed"]
    reasons = {
        "depthwise": "depthwise",
        "grouped": "fewer than 8 channels per group",
        "signal": "a side shorter than 32",
        "unused": "does not run",
        "normed": "weight is computed from other parameters",
        "hooked": "weight is computed from other parameters",
        "hidden": "a side shorter than 32",
        "head": "a side shorter than 32",
    }
    assert set(factors.skipped) == set(reasons)
    for name, word in reasons.items():
        assert word in factors.skipped[name]


class InPlace(nn.Module):
    """It changes the caller's images before its first layer."""

    def __init__(self, change) -> None:
        super().__init__()
        self.change, self.layer = change, nn.Conv2d(3, 32, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.change(x)
        return self.layer(x).mean((2, 3))


def test_a_network_that_changes_its_images_from_pass_to_pass_is_refused():
    with pytest.raises(ValueError, match=r"changes its input in place.*x\.clone\(\)"):
        factorize(InPlace(lambda x: x.sub_(0.5).div_(0.3)).eval(), images())


def test_a_rectifier_in_place_changes_nothing_the_next_time():
    assert list(factorize(InPlace(Tensor.relu_).eval(), images()).layers) == ["layer"]


def test_a_network_without_weights_is_named():
    with pytest.raises(ValueError, match=r"meta device.*load its weights"):
        factorize(nn.Sequential(nn.Conv2d(3, 32, 3)).to("meta"), images())


class OneByOne(nn.Module):
    """A loop over images that are given to the layers without a batch axis, as torch's own layers take them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)
        self.vector, self.head = nn.Linear(32, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.head(self.vector(self.conv(one).mean((1, 2))).relu()) for one in self.stem(x)])


def test_layers_without_a_batch_axis_stay_dense():
    model, x = OneByOne().eval(), images()
    factors = factorize(model, x)
    assert list(factors.layers) == ["stem"]
    assert all("no batch axis" in factors.skipped[name] for name in ("conv", "vector"))
    with torch.no_grad():
        assert relative_error(factors.compress(factors.full_ranks())(x), model(x)) < 1e-4


def test_a_network_with_layers_that_stay_dense_is_reproduced():
    model, x = Mixture().eval(), images()
    factors = factorize(model, x)
    with torch.no_grad():
        assert relative_error(factors.compress(factors.full_ranks())(x), model(x)) < 1e-4


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("all", ["0", "3", "4", "7", "9"]),
        ("convs", ["0", "3", "4"]),
        ("kernels", ["0", "3"]),
        (["7", "3"], ["3", "7"]),
        ((name for name in ("0", "9")), ["0", "9"]),
    ],
)
def test_the_set_of_layers_is_an_option(layers, names):
    factors = factorize(small_net(), images(), layers=layers)
    assert list(factors.layers) == names
    assert set(factors.skipped) == {"0", "3", "4", "7", "9"} - set(names)


def test_a_small_matrix_is_factorised_if_it_is_named():
    model, x = Mixture().eval(), images()
    factors = factorize(model, x, layers=["plain", "hidden", "head"])
    assert list(factors.layers) == ["plain", "hidden", "head"]
    with torch.no_grad():
        assert relative_error(factors.compress(factors.full_ranks())(x), model(x)) < 1e-4


def test_a_convolution_that_is_used_twice_is_replaced_in_both_places():
    torch.manual_seed(6)
    shared = nn.Conv2d(3, 3, (3, 1), padding=(1, 0))
    model, x = nn.Sequential(shared, nn.MaxPool2d(2), shared, nn.ReLU()).eval(), images()
    factors = factorize(model, x)
    assert list(factors.layers) == ["0"]
    compressed = factors.compress(config := {"0": KernelRanks(2, 1, 2)})
    assert isinstance(compressed[0], HTLayer)
    assert compressed[2] is compressed[0]
    assert factors.params(config) == count_params(compressed)
    assert factors.flops(config) == count_flops(compressed, SMALL_SHAPE)
    with torch.no_grad():
        assert relative_error(factors.compress(factors.full_ranks())(x), model(x)) < 1e-4


def test_a_model_that_is_one_convolution():
    torch.manual_seed(7)
    model, x = nn.Conv2d(3, 5, (3, 2), stride=2).eval(), images()
    factors = factorize(model, x)
    with torch.no_grad():
        assert relative_error(factors.compress(factors.full_ranks())(x), model(x)) < 1e-4
    config = {"": KernelRanks(2, 3, 4)}
    compressed = factors.compress(config)
    assert isinstance(compressed, HTLayer)
    assert (factors.params(config), factors.flops(config)) == (
        count_params(compressed),
        count_flops(compressed, SMALL_SHAPE),
    )


# --- counts and names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_formulas_equal_the_counters(seed):
    factors = factorize(small_net(), input_shape=SMALL_SHAPE)
    config = random_config(factors, seed)
    compressed = factors.compress(config)
    assert factors.params(config) == count_params(compressed)
    assert factors.flops(config) == count_flops(compressed, SMALL_SHAPE)


def test_formulas_equal_the_counters_on_a_residual_network():
    factors = factorize(torchvision_net("resnet18"), input_shape=(3, 40, 56))
    assert (factors.params({}), factors.flops({})) == (factors.dense_params, factors.dense_flops)
    config = random_config(factors, seed=0)
    compressed = factors.compress(config)
    assert factors.params(config) == count_params(compressed)
    assert factors.flops(config) == count_flops(compressed, (3, 40, 56))


def test_costs_belong_to_the_size_of_the_images():
    model = torchvision_net("squeezenet1_1")
    assert factorize(model, images((3, 64, 48), count=1)).dense_flops == count_flops(model, (3, 64, 48))
    assert factorize(nn.Conv2d(1, 2, 3)).input_shape == (1, 224, 224)


@pytest.mark.parametrize("seed", range(4))
def test_a_configuration_survives_the_log(seed):
    factors = factorize(small_net(), input_shape=SMALL_SHAPE)
    config = random_config(factors, seed)
    as_tuples = {
        name: (ranks.rank,) if isinstance(ranks, MatrixRanks) else (ranks.rank_in, ranks.rank_mid, ranks.rank_out)
        for name, ranks in config.items()
    }
    assert parse_config_str(str(Configuration(config))) == as_tuples


def test_a_configuration_prints_in_the_form_of_the_log():
    assert str(Configuration({"a.b": KernelRanks(16, 24, 8), "fc": MatrixRanks(4)})) == "a.b:(16, 24, 8), fc:(4)"
    assert str(Configuration()) == ""


def test_output_means_are_those_of_the_dense_model():
    model, x = small_net(), images()
    means = factorize(model, x).output_means()
    assert list(means) == ["0", "3", "4", "7", "9"]
    with torch.no_grad():
        torch.testing.assert_close(means["9"], model(x).mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(means["0"], model[0](x).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert factorize(model, input_shape=SMALL_SHAPE).output_means() == {}


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"conv1": KernelRanks(1, 1, 1)}, r"no layer 'conv1' was factorised; there are 0, 3, 4, 7, 9"),
        ({"1": MatrixRanks(1)}, r"no layer '1' was factorised"),
        ({"0": KernelRanks(4, 1, 1)}, r"layer 0: rank_in must be .*1\.\.3; got 4"),
        ({"0": KernelRanks(2, 7, 5)}, r"layer 0: rank_mid .* must be .*1\.\.6; got 7"),
        ({"4": MatrixRanks(35)}, r"layer 4: rank must be .*1\.\.34; got 35"),
        ({"9": KernelRanks(1, 1, 1)}, r"layer 9: ranks must be MatrixRanks"),
        ({"9": MatrixRanks(2), "3": (2, 2, 2)}, r"layer 3: ranks must be KernelRanks.*; got \(2, 2, 2\)"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(config, message):
    factors = factorize(small_net(), input_shape=SMALL_SHAPE)
    for use in (factors.check, factors.compress):
        with pytest.raises(ValueError, match=message):
            use(config)


def test_ranks_for_a_layer_that_stays_dense_are_refused_with_the_reason():
    factors = factorize(Mixture().eval(), input_shape=SMALL_SHAPE)
    with pytest.raises(ValueError, match="layer depthwise stays dense: a depthwise convolution"):
        factors.compress({"depthwise": KernelRanks(1, 1, 1)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "conv"}, f"layers must be one of {', '.join(LAYER_SETS)} or a list of names; got 'conv'"),
        ({"layers": ["0", "conv1"]}, "layer 'conv1' cannot be factorised: the model has no such layer"),
        ({"bases": "inputs"}, "bases must be one of weight, input, both; got 'inputs'"),
        ({"images": []}, "no calibration images"),
        ({"images": torch.empty(0, *SMALL_SHAPE)}, "no calibration images"),
        ({"images": torch.full((2, *SMALL_SHAPE), torch.nan)}, "layer 0: .*NaN or infinite"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        factorize(small_net(), **{"input_shape": SMALL_SHAPE, **options})


def test_a_named_layer_that_cannot_be_factorised_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="layer 'depthwise' cannot be factorised: a depthwise convolution"):
        factorize(Mixture().eval(), images(), layers=["plain", "depthwise"])
