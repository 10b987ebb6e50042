"""A factorised layer against torch's own layer with the kernel that its stages multiply out to, in every plan."""

import pytest
import torch
from torch import Tensor, nn

from common.compress import Geometry, HTLayer
from common.compress.layers import MATRIX_PLANS, PLANS, chain_ranks, compose, merge_stages, plan_name
from common.configuration import KernelRanks, MatrixRanks
from tests.helpers import relative_error

# torch itself warns that an even window with padding="same" is padded on one side only, which is what is wanted here.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

C_IN, C_OUT = 5, 7
RANKS = KernelRanks(rank_in=3, rank_mid=4, rank_out=6)
KERNELS = [(1, 7), (7, 1), (3, 5), (2, 4), (4, 3)]
GEOMETRIES = {
    "plain": {},
    "strided": {"stride": (2, 3)},
    "padded": {"padding": (1, 2)},
    "valid": {"padding": "valid", "stride": (1, 2)},
    "same": {"padding": "same"},
    "dilated": {"dilation": (1, 2)},
    "strided, padded, dilated": {"stride": (3, 1), "padding": (2, 1), "dilation": (2, 1)},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect"},
    "replicate, strided": {"padding": (1, 3), "padding_mode": "replicate", "stride": (2, 1)},
    "circular": {"padding": (3, 2), "padding_mode": "circular"},
    "same, circular, dilated": {"padding": "same", "padding_mode": "circular", "dilation": (2, 1)},
    "same, reflect": {"padding": "same", "padding_mode": "reflect"},
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def random_chain(kernel: tuple[int, int], dtype: torch.dtype = torch.float64) -> dict[tuple[str, ...], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        ("in",): (RANKS.rank_in, C_IN, 1, 1),
        ("row",): (RANKS.rank_mid, RANKS.rank_in, kernel[0], 1),
        ("col",): (RANKS.rank_out, RANKS.rank_mid, 1, kernel[1]),
        ("out",): (C_OUT, RANKS.rank_out, 1, 1),
    }
    return {stage: torch.randn(shape, generator=generator, dtype=dtype) for stage, shape in shapes.items()}


def multiplied_out(chain: dict[tuple[str, ...], Tensor]) -> Tensor:
    """The kernel (C_out, C_in, k_h, k_w) of a chain, by the definition of the format."""
    u_in, row, col, u_out = (chain[(stage,)] for stage in ("in", "row", "col", "out"))
    return torch.einsum("ac,mah,bmw,ob->ochw", u_in[:, :, 0, 0], row[..., 0], col[:, :, 0], u_out[:, :, 0, 0])


def dense_convolution(kernel: Tensor, bias: Tensor | None, options: dict) -> nn.Conv2d:
    layer = nn.Conv2d(C_IN, C_OUT, kernel.shape[2:], bias=bias is not None, dtype=kernel.dtype, **options)
    layer.weight.data = kernel
    if bias is not None:
        layer.bias.data = bias
    return layer


def storages(module: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", GEOMETRIES)
def test_every_plan_equals_the_convolution_with_the_reconstructed_kernel(case, kernel, bias, dtype):
    chain = random_chain(kernel, dtype)
    generator = torch.Generator().manual_seed(1)
    shift = torch.randn(C_OUT, generator=generator, dtype=dtype) if bias else None
    dense = dense_convolution(multiplied_out(chain), shift, GEOMETRIES[case])
    images = torch.randn(2, C_IN, 15, 14, generator=generator, dtype=dtype)
    expected = dense(images)
    finest = HTLayer(chain, shift, Geometry.of(dense))
    for plan in PLANS:
        assert relative_error(finest.with_plan(plan)(images), expected) < TOLERANCE[dtype], plan


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": (2, 3)},
        {"stride": 2, "padding": (1, 2)},
        {"padding": (2, 1), "padding_mode": "reflect"},
        {"padding": "same", "stride": 1},
    ],
)
def test_every_plan_of_a_1x1_convolution_equals_it(options, bias, dtype):
    generator = torch.Generator().manual_seed(2)
    reduce, expand = (torch.randn(s, generator=generator, dtype=dtype) for s in ((3, C_IN), (C_OUT, 3)))
    shift = torch.randn(C_OUT, generator=generator, dtype=dtype) if bias else None
    dense = dense_convolution((expand @ reduce)[:, :, None, None], shift, options)
    images = torch.randn(2, C_IN, 9, 8, generator=generator, dtype=dtype)
    pair = HTLayer({("in",): reduce, ("out",): expand}, shift, Geometry.of(dense))
    for plan in MATRIX_PLANS:
        assert relative_error(pair.with_plan(plan)(images), dense(images)) < TOLERANCE[dtype], plan


@pytest.mark.parametrize("shape", [(4, C_IN), (2, 3, C_IN), (2, 3, 4, C_IN)])
@pytest.mark.parametrize("bias", [True, False])
def test_every_plan_of_a_linear_layer_equals_it_on_any_leading_axes(shape, bias):
    generator = torch.Generator().manual_seed(3)
    reduce, expand = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, C_IN), (C_OUT, 3)))
    shift = torch.randn(C_OUT, generator=generator, dtype=torch.float64) if bias else None
    features = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected = nn.functional.linear(features, expand @ reduce, shift)
    pair = HTLayer({("in",): reduce, ("out",): expand}, shift, Geometry(linear=True))
    for plan in MATRIX_PLANS:
        assert relative_error(pair.with_plan(plan)(features), expected) < 1e-10, plan


@pytest.mark.parametrize("bias", [True, False])
def test_every_plan_of_a_linear_layer_behind_a_flatten_equals_it(bias):
    chain = random_chain((3, 5))
    generator = torch.Generator().manual_seed(4)
    shift = torch.randn(C_OUT, generator=generator, dtype=torch.float64) if bias else None
    features = torch.randn(4, C_IN * 3 * 5, generator=generator, dtype=torch.float64)
    expected = nn.functional.linear(features, multiplied_out(chain).flatten(1), shift)
    finest = HTLayer(chain, shift, Geometry(unflatten=(C_IN, 3, 5), linear=True))
    for plan in PLANS:
        assert relative_error(finest.with_plan(plan)(features), expected) < 1e-10, plan


def test_stages_have_their_own_rank_on_each_side():
    """Three different ranks and channels: a swap of any two shows."""
    layer = HTLayer(random_chain((3, 5)), None, Geometry(padding=(1, 2)))
    assert [tuple(stage.weight.shape) for stage in layer.stages] == [
        (RANKS.rank_in, C_IN, 1, 1),
        (RANKS.rank_mid, RANKS.rank_in, 3, 1),
        (RANKS.rank_out, RANKS.rank_mid, 1, 5),
        (C_OUT, RANKS.rank_out, 1, 1),
    ]
    tucker = layer.with_plan("tucker")
    assert [tuple(stage.weight.shape) for stage in tucker.stages] == [
        (RANKS.rank_in, C_IN, 1, 1),
        (RANKS.rank_out, RANKS.rank_in, 3, 5),
        (C_OUT, RANKS.rank_out, 1, 1),
    ]


@pytest.mark.parametrize("plan", PLANS)
def test_the_ranks_shown_are_those_of_the_edges_that_are_left(plan):
    layer = HTLayer(random_chain((3, 5)), None, Geometry()).with_plan(plan)
    assert list(layer.ranks) == chain_ranks(PLANS[plan], RANKS)
    assert f"plan={plan}" in repr(layer)


def test_stride_and_padding_act_once_on_each_axis():
    layer = HTLayer(random_chain((3, 5)), None, Geometry(stride=(2, 3), padding=(1, 2), dilation=(1, 2)))
    assert [stage.stride for stage in layer.stages] == [(1, 1), (2, 1), (1, 3), (1, 1)]
    assert [stage.padding for stage in layer.stages] == [(0, 0), (1, 0), (0, 2), (0, 0)]
    assert [stage.dilation for stage in layer.stages] == [(1, 1), (1, 1), (1, 2), (1, 1)]


def test_only_the_last_stage_has_a_bias():
    layer = HTLayer(random_chain((3, 5)), torch.arange(float(C_OUT), dtype=torch.float64), Geometry())
    assert [stage.bias is not None for stage in layer.stages] == [False, False, False, True]
    assert layer.bias is layer.stages[-1].bias


@pytest.mark.parametrize("plan", PLANS)
def test_another_plan_shares_no_storage(plan):
    layer = HTLayer(random_chain((3, 5)), torch.ones(C_OUT, dtype=torch.float64), Geometry())
    assert not storages(layer) & storages(layer.with_plan(plan))


def test_a_layer_copies_the_weights_that_it_is_made_of():
    chain = random_chain((3, 5))
    bias = torch.ones(C_OUT, dtype=torch.float64)
    layer = HTLayer(chain, bias, Geometry())
    assert not storages(layer) & {t.untyped_storage().data_ptr() for t in (*chain.values(), bias)}


@pytest.mark.parametrize("training", [True, False])
def test_another_plan_keeps_the_training_flag(training):
    layer = HTLayer(random_chain((3, 5)), None, Geometry()).train(training)
    assert {module.training for module in layer.with_plan("tucker").modules()} == {training}


def test_every_plan_can_be_trained():
    images = torch.randn(2, C_IN, 8, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    finest = HTLayer(random_chain((3, 5)), torch.zeros(C_OUT, dtype=torch.float64), Geometry())
    for plan in PLANS:
        layer = finest.with_plan(plan)
        layer(images).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters()), plan


def test_plans_are_reachable_exactly_when_they_only_contract():
    finest = HTLayer(random_chain((3, 5)), None, Geometry())
    assert set(finest.plans) == set(PLANS)
    assert set(finest.with_plan("tucker").plans) == {"tucker", "input-pair", "output-pair", "dense"}
    assert set(finest.with_plan("separable").plans) == {"separable", "dense"}
    assert finest.with_plan("dense").plans == ("dense",)


def test_a_plan_that_needs_finer_stages_is_refused_with_the_legal_ones():
    tucker = HTLayer(random_chain((3, 5)), None, Geometry()).with_plan("tucker")
    with pytest.raises(ValueError, match=r"'tucker' can be run as .*tucker.*dense; got 'separable'"):
        tucker.with_plan("separable")


@pytest.mark.parametrize("plan", ["pair", "quick", ""])
def test_an_unknown_plan_is_refused(plan):
    layer = HTLayer(random_chain((3, 5)), None, Geometry())
    with pytest.raises(ValueError, match=f"can be run as chain, .*; got {plan!r}"):
        layer.with_plan(plan)


def test_groups_that_are_no_plan_are_refused():
    with pytest.raises(ValueError, match="no execution plan"):
        plan_name([("in",), ("row", "out")])


def test_composition_is_order_and_position_aware():
    """Two windows, one per axis: the composed window holds the product of their entries, channels summed over."""
    generator = torch.Generator().manual_seed(6)
    first = torch.randn(4, 3, 2, 1, generator=generator, dtype=torch.float64)
    second = torch.randn(5, 4, 1, 3, generator=generator, dtype=torch.float64)
    composed = compose(first, second)
    for h in range(2):
        for w in range(3):
            torch.testing.assert_close(composed[:, :, h, w], second[:, :, 0, w] @ first[:, :, h, 0])


def test_merging_all_stages_gives_the_kernel():
    chain = random_chain((3, 5))
    merged = merge_stages(chain, PLANS["dense"])
    torch.testing.assert_close(merged[("in", "row", "col", "out")], multiplied_out(chain))


def test_ranks_print_in_the_form_of_the_log():
    assert str(KernelRanks(rank_in=16, rank_mid=24, rank_out=8)) == "(16, 24, 8)"
    assert str(MatrixRanks(rank=8)) == "(8)"
