"""Convolutions of one, two and three axes, transposed and grouped ones: factorised as torch's own layers compute."""

import json

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from common.compress import CONVOLUTIONS, TRANSPOSED, HTLayer, factorize, recalibrate
from common.compress.layers import MATRIX_PLANS, PLANS
from common.configuration import Configuration, KernelRanks, MatrixRanks
from common.cost import count_flops, count_params
from common.deploy import deploy, fold_batch_norm
from common.models import load_compressed, save_compressed
from common.models.specs import build, describe
from common.ranks import build_menus, uniform
from tests.helpers import relative_error

# torch itself warns that an even window with padding="same" is padded on one side only, which is what is wanted here.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

SIZES = {1: (17,), 2: (9, 8), 3: (6, 7, 8)}
"""Axes -> the size of the inputs."""


@st.composite
def convolutions(draw):
    """Any convolution with torch's settings, in float64, random weights; its input has SIZES."""
    axes, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(axes))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    padding = tuple(draw(st.integers(0, 2)) for _ in range(axes))
    options = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if transposed:
        options["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    else:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        if draw(st.booleans()) and stride == (1,) * axes:
            options["padding"] = "same"
    torch.manual_seed(draw(st.integers(0, 99)))
    kind = (TRANSPOSED if transposed else CONVOLUTIONS)[axes - 1]
    channels = groups * draw(st.integers(2, 4)), groups * draw(st.integers(2, 4))
    return kind(*channels, kernel, dtype=torch.float64, **options)


def inputs_of(layer, count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        count, layer.in_channels, *SIZES[len(layer.kernel_size)], generator=generator, dtype=torch.float64
    )


def factors_of(layer, images=None):
    net = nn.Sequential(layer)
    shape = None if images is not None else (layer.in_channels, *SIZES[len(layer.kernel_size)])
    return factorize(net, images, layers=["0"], input_shape=shape)


def truncations(full):
    """The full ranks, and some smaller ones."""
    yield full
    if isinstance(full, MatrixRanks):
        yield MatrixRanks(max(1, full.rank // 2))
    else:
        yield KernelRanks(max(1, full.rank_in // 2), 1, max(1, full.rank_out - 1))


@settings(max_examples=150, deadline=None)
@given(convolutions(), st.booleans())
def test_full_ranks_reproduce_every_convolution_and_every_plan_its_truncation(layer, data_aware):
    images = inputs_of(layer)
    try:
        expected = layer(images)
    except RuntimeError:
        assume(False)  # torch refuses it: a window larger than its input, padding wider than the map
    assume(expected.numel() and 0 not in expected.shape)
    factors = factors_of(layer, images if data_aware else None)
    one = factors.layers["0"]
    assert relative_error(one.layer(one.full_ranks)(images), expected) < 1e-6
    for ranks in truncations(one.full_ranks):
        small = one.layer(ranks)
        whole = small(images)
        for plan in small.plans:
            assert relative_error(small.with_plan(plan)(images), whole) < 1e-9, plan
        # The composed weight, in the shape of torch's own, put into torch's own layer.
        clone = nn.Sequential(layer)[0].__class__(
            layer.in_channels, layer.out_channels, layer.kernel_size, stride=layer.stride, padding=layer.padding,
            dilation=layer.dilation, groups=layer.groups, bias=layer.bias is not None, dtype=torch.float64,
            padding_mode=layer.padding_mode,
            **({"output_padding": layer.output_padding} if type(layer) in TRANSPOSED else {}),
        )  # fmt: skip
        clone.load_state_dict({"weight": small.weight} | ({"bias": layer.bias} if layer.bias is not None else {}))
        assert relative_error(clone(images), whole) < 1e-9
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode"):
            assert getattr(small, name) == getattr(layer, name), name


@settings(max_examples=80, deadline=None)
@given(convolutions())
def test_costs_are_those_of_the_layer_that_is_built(layer):
    images = inputs_of(layer, 1)
    try:
        layer(images)
    except RuntimeError:
        assume(False)
    factors = factors_of(layer)
    one = factors.layers["0"]
    assert one.dense_params == count_params(layer)
    assert one.dense_flops == count_flops(nn.Sequential(layer), images)
    for ranks in truncations(one.full_ranks):
        small = nn.Sequential(one.layer(ranks))
        assert one.params(ranks) == count_params(small)
        assert one.flops(ranks) == count_flops(small, images)


class Audio(nn.Module):
    """Raw sound: strided and grouped convolutions of one axis."""

    classes, shape = 5, (1, 400)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(1, 32, 9, 2, 4)
        self.norm = nn.BatchNorm1d(32)
        self.grouped = nn.Conv1d(32, 48, 5, padding=2, groups=2)
        self.point = nn.Conv1d(48, 64, 1)
        self.depthwise = nn.Conv1d(64, 64, 3, padding=1, groups=64)
        self.head = nn.Linear(64, self.classes)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = self.depthwise(self.point(self.grouped(x).relu()).relu())
        return self.head(x.mean(-1))


class Video(nn.Module):
    """Clips: convolutions of three axes."""

    classes, shape = 4, (3, 6, 16, 16)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(3, 24, 3, (1, 2, 2), 1, bias=False)
        self.norm = nn.BatchNorm3d(24)
        self.second = nn.Conv3d(24, 40, (3, 3, 3), 1, 1)
        self.point = nn.Conv3d(40, 40, 1)
        self.head = nn.Linear(40, self.classes)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head(self.point(self.second(x).relu()).relu().mean((2, 3, 4)))


class UNet(nn.Module):
    """One level down and up again, with transposed convolutions and a skip."""

    classes, shape = 2, (3, 16, 20)

    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 48, 3, 2, 1)
        self.up = nn.ConvTranspose2d(48, 24, 3, 2, 1, output_padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.out = nn.Conv2d(48, self.classes, 3, padding=1)

    def forward(self, x):
        skip = self.down1(x).relu()
        x = self.norm(self.up(self.down2(skip).relu())).relu()
        return self.out(torch.cat([skip, x], 1))


NETWORKS = [Audio, Video, UNet]


def made(kind):
    torch.manual_seed(0)
    model = kind()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return model.eval(), torch.randn(24, *kind.shape)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_whole_network_is_reproduced_and_its_counts_are_right(kind):
    model, images = made(kind)
    factors = factorize(model, images)
    assert set(factors.skipped) <= {"depthwise", "head", "stem"}, factors.skipped
    with torch.no_grad():
        assert relative_error(factors.compress(factors.full_ranks())(images), model(images)) < 1e-3
    config = uniform(factors, 0.5)
    small = factors.compress(config)
    assert factors.params(config) == count_params(small)
    assert factors.flops(config) == count_flops(small, images[:1])
    for name, menu in build_menus(factors).items():
        errors = [entry.error for entry in menu]
        assert len(menu) > 2, name
        assert errors == sorted(errors, reverse=True), name


@pytest.mark.parametrize("kind", NETWORKS)
def test_it_is_recalibrated_deployed_in_both_runtimes_saved_and_loaded(kind, tmp_path):
    model, images = made(kind)
    factors = factorize(model, images)
    small = factors.compress(uniform(factors, 0.5))
    recalibrate(small, images, factors.output_means(), factors.output_stds())
    with torch.no_grad():
        expected = small.eval()(images[:4])
    for runtime in ("torch", "onnxruntime"):
        deployed = deploy(small, images[:4], runtime=runtime, rounds=2)
        assert relative_error(deployed(images[:4]), expected) < 1e-3, runtime
    folded, pairs = fold_batch_norm(small, images[:1])
    assert len(pairs) == 1
    save_compressed(small, tmp_path / "small.safetensors")
    loaded, _ = load_compressed(tmp_path / "small.safetensors", model=kind)
    with torch.no_grad():
        assert relative_error(folded(images[:4]), expected) < 1e-3
        assert relative_error(loaded(images[:4]), expected) < 1e-6


def test_data_aware_ranks_lose_less_than_weights_alone():
    """On inputs of few directions, half the ranks of the data-aware factors lose much less."""
    torch.manual_seed(1)
    basis = torch.randn(4, 24)
    for layer in (nn.Conv1d(24, 32, 3, padding=1), nn.ConvTranspose1d(24, 32, 4, 2, 1), nn.Conv1d(24, 32, 5, groups=2)):
        images = torch.einsum("nrt,rc->nct", torch.randn(64, 4, 30), basis)
        errors = {}
        for bases in ("weight", "both"):
            factors = factorize(nn.Sequential(layer), images, layers=["0"], bases=bases)
            full = factors.layers["0"].full_ranks
            ranks = KernelRanks(4, 4, min(12, full.rank_out))
            small = factors.compress({"0": ranks})
            with torch.no_grad():
                expected = layer(images)
                errors[bases] = float((small(images) - expected).square().sum() / (expected**2).sum())
        assert errors["both"] < 0.5 * errors["weight"], (layer, errors)


def test_what_has_too_few_channels_per_group_stays_dense_with_the_reason():
    model = nn.Sequential(nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 64, 3, groups=16), nn.Conv2d(64, 64, 3))
    factors = factorize(model.eval(), input_shape=(64, 12, 12))
    assert factors.skipped == {
        "0": "a depthwise convolution",
        "1": "a grouped convolution of fewer than 8 channels per group",
    }
    assert list(factors.layers) == ["2"]


def test_the_plans_are_the_same_whatever_the_axes():
    for kind, size in zip((*CONVOLUTIONS, *TRANSPOSED), [1, 2, 3] * 2, strict=True):
        layer = kind(6, 8, 3, dtype=torch.float64)
        one = factors_of(layer).layers["0"]
        assert set(one.layer(one.full_ranks).plans) <= set(PLANS)
        point = factors_of(kind(6, 8, 1, dtype=torch.float64)).layers["0"]
        assert set(point.layer(point.full_ranks).plans) == set(MATRIX_PLANS), size


@pytest.mark.parametrize(
    ("spoiled", "what"),
    [
        ({"groups": 5}, "multiple of 5 groups"),
        ({"stride": [1, 1, 1, 1]}, "stride"),
        ({"window": [3, 3]}, "window"),
        ({"window": [3, 3, 2]}, "window"),
        ({"transposed": "yes"}, "transposed"),
    ],
)
def test_a_file_that_says_nonsense_about_a_layer_is_refused(spoiled, what):
    layer = factors_of(nn.Conv3d(6, 8, 3, groups=2, dtype=torch.float64)).layers["0"]
    spec = json.loads(json.dumps(describe(layer.layer(KernelRanks(2, 3, 3)), "0")))
    assert isinstance(build(spec), HTLayer)
    spec["geometry"] |= spoiled
    with pytest.raises(ValueError, match=what):
        build(spec)


def test_a_configuration_of_such_layers_goes_through_its_text():
    model, images = made(Audio)
    config = uniform(factorize(model, images), 0.4)
    assert Configuration.parse(str(config)) == config
