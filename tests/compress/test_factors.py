"""One layer's factors: exact at full ranks, optimal where they claim it, and counted by formulas that hold."""

import itertools
import math

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from common.compress import KernelFactors, MatrixFactors, factorize
from common.compress.decompose import BASES, WHITENING_FLOOR
from common.compress.factors import KERNEL_TREE
from common.compress.htucker import error_bound, mode_product, node_singular_values
from common.compress.layers import PLANS, merge_stages
from common.configuration import KernelRanks, MatrixRanks
from common.cost import count_flops, count_params
from common.deploy.plans import plan_flops
from common.ranks import build_menus
from tests.helpers import relative_error

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
SIZE = (9, 10)

LAYERS = {
    "3x5": lambda: nn.Conv2d(6, 7, (3, 5), padding=(1, 2)),
    "1x7": lambda: nn.Conv2d(6, 5, (1, 7), stride=(1, 2)),
    "7x1, no bias": lambda: nn.Conv2d(6, 8, (7, 1), padding=(3, 0), bias=False),
    "even window": lambda: nn.Conv2d(6, 4, (2, 4), stride=2, padding=1),
    "more outputs than weights each": lambda: nn.Conv2d(6, 23, (1, 3)),
    "reflected, dilated": lambda: nn.Conv2d(6, 9, 3, padding=2, dilation=2, padding_mode="reflect"),
    "1x1": lambda: nn.Conv2d(6, 5, 1, stride=2, padding=1),
    "1x1, wide": lambda: nn.Conv2d(6, 11, 1, bias=False),
    "linear behind a flatten": lambda: nn.Sequential(nn.Flatten(), nn.Linear(6 * 9 * 10, 7)),
    "linear on rows": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(90, 12)),
}


def correlated_images(count: int = 8, channels: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Images whose channels mix few strong sources and have a mean, as behind a relu; one mixture for all seeds."""
    mixing = torch.randn(channels, channels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixing *= 0.4 ** torch.arange(channels, dtype=torch.float64)
    sources = torch.randn(count, channels, *SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (torch.einsum("cs,nshw->nchw", mixing, sources) + 0.3).to(dtype)


def degenerate_images(kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Calibration images whose moments are singular."""
    images = correlated_images(4, dtype=dtype)
    if kind == "one image":
        return images[:1]
    if kind == "dead channels":
        images[:, ::2] = 0
    elif kind == "constant":
        images = images[:1, :, :1, :1].expand(4, 6, *SIZE).contiguous()
    elif kind == "all zero":
        images = torch.zeros_like(images)
    elif kind == "one channel, copied":
        images = images[:, :1].expand(4, 6, *SIZE).contiguous()
    elif kind == "dark":
        images = images * 1e-6
    return images


def built(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return LAYERS[name]().to(dtype).eval()


def names(model: nn.Module) -> list[str]:
    """Every layer by name: small matrices are only factorised if they are asked for."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def only_factors(
    model: nn.Module, images: Tensor | None = None, *, bases: str = "both"
) -> KernelFactors | MatrixFactors:
    shape = (
        (next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels, *SIZE) if images is None else None
    )
    (factors,) = factorize(model, images, bases=bases, input_shape=shape, layers=names(model)).layers.values()
    return factors


def only_named(layer: nn.Conv2d) -> KernelFactors | MatrixFactors:
    model = nn.Sequential()
    model.add_module("conv", layer)
    return only_factors(model)


def kernel_factors(layer: nn.Conv2d, images: Tensor | None = None, *, bases: str = "both") -> KernelFactors:
    factors = only_factors(layer, images, bases=bases)
    assert isinstance(factors, KernelFactors)
    return factors


def reconstructed(factors, ranks) -> Tensor:
    """The weight that the truncated layer stands for, in the dense layer's shape."""
    return factors.layer(ranks).with_plan("dense").stages[0].weight.detach().reshape(factors.shape)


def legal_kernel_ranks(full: KernelRanks, k_h: int, k_w: int):
    for rank_in in range(1, full.rank_in + 1):
        for rank_out in range(1, full.rank_out + 1):
            for rank_mid in range(1, min(rank_in * k_h, k_w * rank_out) + 1):
                yield KernelRanks(rank_in, rank_mid, rank_out)


def square_root(moment: Tensor) -> Tensor:
    """C^(1/2) with the floor that the factors document."""
    values, vectors = torch.linalg.eigh(moment)
    return vectors @ torch.diag((values + WHITENING_FLOOR * values.mean()).sqrt()) @ vectors.T


# --- full ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bases", BASES)
@pytest.mark.parametrize("name", LAYERS)
def test_full_ranks_reproduce_the_layer(name, bases, dtype):
    model, images = built(name, dtype), correlated_images(dtype=dtype)
    factors = factorize(model, images, bases=bases, layers=names(model))
    compressed = factors.compress(factors.full_ranks())
    unseen = correlated_images(dtype=dtype, seed=1).flip(1)
    with torch.no_grad():
        assert relative_error(compressed(unseen), model(unseen)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["one image", "dead channels", "constant", "all zero", "one channel, copied", "dark"])
@pytest.mark.parametrize("name", LAYERS)
def test_full_ranks_reproduce_the_layer_whatever_the_calibration_images_were(name, kind, dtype):
    """On images unlike the calibration images: what those never showed must be there all the same."""
    model = built(name, dtype)
    factors = factorize(model, degenerate_images(kind, dtype), layers=names(model))
    compressed = factors.compress(factors.full_ranks())
    unseen = correlated_images(dtype=dtype, seed=1)
    with torch.no_grad():
        assert relative_error(compressed(unseen), model(unseen)) < TOLERANCE[dtype]


def test_a_layer_of_zeros_has_no_error_at_any_rank():
    """A pruned or zero-initialised layer has no energy to lose: 0, not 0/0."""
    model = nn.Sequential(nn.Conv2d(6, 4, 3), nn.Conv2d(4, 5, 1)).double()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    for images in (None, correlated_images()):
        factors = factorize(model, images, input_shape=(6, *SIZE), layers=names(model))
        config = {"0": KernelRanks(2, 3, 1), "1": MatrixRanks(2)}
        assert [factors.layers[name].output_error(ranks) for name, ranks in config.items()] == [0, 0]
        assert not factors.compress(config)(correlated_images()).any()


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bases", BASES)
@pytest.mark.parametrize("kernel", [(3, 2), (1, 3), (3, 1)])
def test_the_error_never_grows_with_a_rank(kernel, bases):
    torch.manual_seed(4)
    factors = kernel_factors(nn.Conv2d(4, 5, kernel).double(), correlated_images(channels=4), bases=bases)
    errors = {ranks: factors.output_error(ranks) for ranks in legal_kernel_ranks(factors.full_ranks, *kernel)}
    for ranks, error in errors.items():
        assert 0 <= error <= 1
        for step in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
            larger = KernelRanks(ranks.rank_in + step[0], ranks.rank_mid + step[1], ranks.rank_out + step[2])
            if larger in errors:
                assert errors[larger] <= error + 1e-12, (ranks, larger)
    assert errors[factors.full_ranks] < 1e-12


def test_the_error_for_weight_only_bases_is_that_of_the_kernel_and_within_the_hsvd_bound():
    torch.manual_seed(5)
    layer = nn.Conv2d(4, 6, (3, 2)).double()
    factors = kernel_factors(layer)
    kernel = layer.weight.detach()
    singular_values = node_singular_values(kernel, KERNEL_TREE)
    for ranks in legal_kernel_ranks(factors.full_ranks, 3, 2):
        actual = (kernel - reconstructed(factors, ranks)).norm()
        assert factors.output_error(ranks) == pytest.approx((actual / kernel.norm()).item() ** 2, abs=1e-10)
        nodes = {
            (1,): ranks.rank_in,
            (1, 2): ranks.rank_mid,
            (3, 0): ranks.rank_mid,
            (0,): ranks.rank_out,
            (2,): 3,
            (3,): 2,
        }
        assert actual <= error_bound(singular_values, nodes, KERNEL_TREE) * (1 + 1e-10) + 1e-12


@pytest.mark.parametrize("bases", ["input", "both"])
def test_the_error_is_that_of_the_whitened_kernel(bases):
    """The metric is read back off the bases: what they undo is what the kernel was whitened by."""
    torch.manual_seed(6)
    layer, images = nn.Conv2d(6, 5, (2, 3)).double(), correlated_images()
    factors = kernel_factors(layer, images, bases=bases)
    undone = (torch.linalg.pinv(factors.expand), torch.linalg.inv(factors.reduce).T)
    undone += (torch.linalg.inv(factors.unwhiten_row), torch.linalg.inv(factors.unwhiten_col))

    def whitened(kernel: Tensor) -> Tensor:
        for mode, matrix in enumerate(undone):
            kernel = mode_product(kernel, matrix, mode)
        return kernel

    whole = whitened(layer.weight.detach())
    assert factors.energy == pytest.approx(whole.square().sum().item(), rel=1e-9)
    for ranks in legal_kernel_ranks(factors.full_ranks, 2, 3):
        lost = whole - whitened(reconstructed(factors, ranks))
        expected = (lost.norm() / whole.norm()).item() ** 2
        assert factors.output_error(ranks) == pytest.approx(expected, rel=1e-6, abs=1e-10)


def test_what_cutting_the_output_leaf_alone_loses_is_the_variance_measured_there():
    """Neighbouring positions are correlated, so the kernel's energy alone would be wrong about this."""
    torch.manual_seed(7)
    layer, images = nn.Conv2d(6, 5, (2, 3)).double(), correlated_images()
    factors, full = kernel_factors(layer, images), kernel_factors(layer, images).full_ranks
    outputs = layer(images).detach().movedim(1, -1).reshape(-1, 5)
    variances = torch.linalg.eigvalsh(torch.cov(outputs.T, correction=0)).flip(0)
    for rank_out in range(2, 6):
        ranks = KernelRanks(full.rank_in, min(full.rank_mid, 3 * rank_out), rank_out)
        lost = variances[rank_out:].sum() / variances.sum()
        assert factors.output_error(ranks) == pytest.approx(lost.item(), rel=0.02, abs=1e-4)


def varying(outputs: Tensor) -> Tensor:
    """(N, C, H, W) less the mean of each channel, which bias correction and batch norm restore."""
    return outputs - outputs.mean((0, 2, 3), keepdim=True)


def test_without_correlation_between_positions_the_error_is_that_of_the_output():
    """The promise of the whitening: for a window that meets independent pixels, the estimate is the measured error."""
    torch.manual_seed(7)
    layer, images = nn.Conv2d(6, 9, (2, 3)).double(), correlated_images(400)
    factors = kernel_factors(layer, images)
    with torch.no_grad():
        dense = layer(images)
        for ranks in (KernelRanks(1, 2, 3), KernelRanks(2, 4, 3), KernelRanks(4, 3, 6), KernelRanks(3, 6, 8)):
            lost = varying(factors.layer(ranks)(images) - dense).square().sum() / varying(dense).square().sum()
            assert factors.output_error(ranks) == pytest.approx(lost.item(), rel=0.05)


@pytest.mark.parametrize("smooth", [False, True])
def test_data_aware_bases_lose_less_of_the_output_than_weight_only_ones(smooth):
    """On images that were not seen, with the channels correlated, and neighbouring positions too."""
    torch.manual_seed(8)
    layer, (seen, unseen) = nn.Conv2d(6, 12, 3).double(), (correlated_images(64, seed=seed) for seed in (0, 9))
    if smooth:
        seen, unseen = (nn.functional.avg_pool2d(images, 3, stride=1, padding=1) for images in (seen, unseen))
    lost = {}
    with torch.no_grad():
        dense = layer(unseen)
        for bases in BASES:
            truncated = kernel_factors(layer, seen, bases=bases).layer(KernelRanks(2, 5, 4))
            lost[bases] = (varying(truncated(unseen) - dense).square().sum() / varying(dense).square().sum()).item()
    assert lost["input"] < 0.5 * lost["weight"]
    assert lost["both"] < 0.5 * lost["weight"]
    assert lost["both"] < 1.2 * lost["input"]


@pytest.mark.parametrize("name", ["1x1, wide", "linear"])
def test_a_matrix_layers_truncation_is_optimal_in_the_mean_square_of_its_output(name):
    """Against brute force: the singular vectors of W C^(1/2), with C the covariance of the input."""
    torch.manual_seed(10)
    images = correlated_images(32)
    if name == "linear":
        model, rows = nn.Linear(6, 9).double(), images.mean((2, 3))
        factors = only_factors(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), model), images)
    else:
        model, rows = nn.Conv2d(6, 9, 1).double(), images.movedim(1, -1).reshape(-1, 6)
        factors = only_factors(model, images)
    assert isinstance(factors, MatrixFactors)
    weight = model.weight.detach().flatten(1)
    root = square_root(torch.cov(rows.T, correction=0))
    left, values, right = torch.linalg.svd(weight @ root)
    for rank in range(1, 6):
        best = (left[:, :rank] * values[:rank]) @ right[:rank] @ torch.linalg.inv(root)
        loss = {
            which: ((rows - rows.mean(0)) @ (weight - approximation).T).square().sum().item()
            for which, approximation in (("best", best), ("ours", reconstructed(factors, MatrixRanks(rank))))
        }
        assert loss["ours"] <= loss["best"] * 1.001
        total = ((rows - rows.mean(0)) @ weight.T).square().sum().item()
        assert factors.output_error(MatrixRanks(rank)) == pytest.approx(loss["ours"] / total, rel=0.05, abs=3e-4)


def test_a_matrix_layers_error_never_grows_with_the_rank():
    for images in (None, correlated_images()):
        errors = only_factors(built("1x1, wide"), images).output_errors()
        assert ((errors >= 0) & (errors <= 1)).all()
        assert (errors.diff() <= 1e-12).all()
        assert errors[-1] < 1e-12


def test_a_matrix_layers_error_for_weight_only_bases_is_that_of_the_matrix():
    model = built("1x1")
    factors, weight = only_factors(model), model.weight.detach().flatten(1)
    for rank in range(1, factors.full_ranks.rank + 1):
        lost = (weight - reconstructed(factors, MatrixRanks(rank))).norm() / weight.norm()
        assert factors.output_error(MatrixRanks(rank)) == pytest.approx(lost.item() ** 2, abs=1e-10)


@pytest.mark.parametrize("bases", BASES)
def test_the_energies_of_every_edge_are_falling_and_sum_to_the_whole(bases):
    factors = kernel_factors(built("3x5"), correlated_images(), bases=bases)
    for edge in ("in", "mid", "out"):
        energies = factors.edge_energies(edge)
        assert (energies.diff() <= 1e-12).all()
        assert energies.sum().item() == pytest.approx(factors.energy, rel=1e-9)


# --- bases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bases", BASES)
@pytest.mark.parametrize("name", LAYERS)
def test_the_output_basis_is_orthonormal_up_to_its_gains(name, bases):
    expand = only_factors(built(name), correlated_images(), bases=bases).expand
    if bases == "both":
        expand = expand / expand.norm(dim=0)
    torch.testing.assert_close(expand.T @ expand, torch.eye(expand.shape[1], dtype=expand.dtype), rtol=0, atol=1e-10)


def test_the_weight_only_input_basis_is_orthonormal():
    reduce = only_factors(built("3x5"), correlated_images(), bases="weight").reduce
    torch.testing.assert_close(reduce @ reduce.T, torch.eye(6, dtype=reduce.dtype), rtol=0, atol=1e-10)


def test_the_data_aware_input_basis_is_orthonormal_for_whitened_inputs():
    images = correlated_images()
    reduce = only_factors(built("3x5"), images).reduce
    pixels = images.movedim(1, -1).reshape(-1, 6)
    basis = reduce @ square_root(torch.cov(pixels.T, correction=0))
    torch.testing.assert_close(basis @ basis.T, torch.eye(6, dtype=basis.dtype), rtol=0, atol=1e-9)


# --- layers -----------------------------------------------------------------------------------------------------------


def test_asymmetric_ranks_end_up_on_their_own_edges():
    layer = only_factors(built("3x5"), correlated_images()).layer(KernelRanks(rank_in=2, rank_mid=3, rank_out=2))
    assert [tuple(stage.weight.shape) for stage in layer.stages] == [
        (2, 6, 1, 1),
        (3, 2, 3, 1),
        (2, 3, 1, 5),
        (7, 2, 1, 1),
    ]


@pytest.mark.parametrize(
    ("name", "ranks", "plan"),
    [
        ("3x5", KernelRanks(2, 3, 2), "chain"),
        ("3x5", KernelRanks(2, 6, 2), "tucker"),
        ("3x5", KernelRanks(6, 4, 2), "output-chain"),
        ("3x5", KernelRanks(6, 4, 7), "separable"),
        ("3x5", KernelRanks(6, 10, 2), "output-pair"),
        ("3x5", KernelRanks(6, 18, 7), "dense"),
        ("1x7", KernelRanks(4, 1, 2), "output-chain"),
        ("7x1, no bias", KernelRanks(2, 2, 2), "input-chain"),
    ],
)
def test_an_edge_that_costs_without_saving_is_contracted(name, ranks, plan):
    assert only_factors(built(name), correlated_images()).layer(ranks).plan == plan


@pytest.mark.parametrize("name", ["3x5", "1x7", "7x1, no bias"])
def test_no_ranks_cost_more_than_one_of_their_own_contractions(name):
    factors = only_factors(built(name), correlated_images())
    full = factors.full_ranks
    for rank_in, rank_out in itertools.product(range(1, full.rank_in + 1), range(1, full.rank_out + 1)):
        limit = min(rank_in * factors.shape[2], factors.shape[3] * rank_out)
        for rank_mid in {1, (1 + limit) // 2, limit}:
            ranks = KernelRanks(rank_in, rank_mid, rank_out)
            assert factors.flops(ranks) == min(factors.flops(ranks, groups) for groups in PLANS.values())
            layer = factors.layer(ranks)
            assert factors.flops(ranks) == plan_flops(layer, factors.trace.input_shape)[layer.plan]


def test_layers_of_the_same_factors_share_nothing():
    factors = only_factors(built("3x5"), correlated_images())
    first, second = (factors.layer(KernelRanks(3, 4, 5)) for _ in range(2))
    before = [parameter.clone() for parameter in second.parameters()]
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.fill_(7)
    third = factors.layer(KernelRanks(3, 4, 5))
    for value, *others in zip(before, second.parameters(), third.parameters(), strict=True):
        assert all(torch.equal(value, other) for other in others)


def test_the_order_of_requests_does_not_matter():
    """Middle bases are cached by leaf ranks; what was asked before must not show."""
    wanted = KernelRanks(3, 4, 5)
    fresh = only_factors(built("3x5"), correlated_images())
    expected = reconstructed(fresh, wanted)
    used = only_factors(built("3x5"), correlated_images())
    for ranks in (KernelRanks(3, 2, 5), KernelRanks(5, 4, 3), used.full_ranks):
        used.output_error(ranks)
        used.layer(ranks)
    assert torch.equal(reconstructed(used, wanted), expected)


def test_neighbouring_stages_of_the_middle_are_of_one_size():
    """Half of the root matrix on each side: neither stage's gradients dwarf the other's."""
    layer = only_factors(built("3x5"), correlated_images()).layer(KernelRanks(3, 4, 5))
    row, col = layer.stages[1].weight, layer.stages[2].weight
    torch.testing.assert_close(row.flatten(1).norm(dim=1), col.transpose(0, 1).flatten(1).norm(dim=1))


# --- costs ------------------------------------------------------------------------------------------------------------


@st.composite
def kernels_with_ranks(draw) -> tuple[nn.Conv2d, KernelRanks]:
    c_in, c_out = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    k_h, k_w = draw(st.sampled_from([(1, 3), (3, 1), (2, 3), (3, 3), (4, 1), (3, 2)]))
    layer = nn.Conv2d(
        c_in,
        c_out,
        (k_h, k_w),
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        padding=(draw(st.integers(0, 2)), draw(st.integers(0, 2))),
        dilation=(draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        bias=draw(st.booleans()),
    )
    rank_in = draw(st.integers(1, c_in))
    rank_out = draw(st.integers(1, min(c_out, c_in * k_h * k_w)))
    return layer, KernelRanks(rank_in, draw(st.integers(1, min(rank_in * k_h, k_w * rank_out))), rank_out)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(kernels_with_ranks())
def test_formulas_equal_the_counted_module(case):
    layer, ranks = case
    factors = kernel_factors(layer)
    module = factors.layer(ranks)
    shape = (layer.in_channels, *SIZE)
    assert factors.params(ranks) == count_params(module)
    assert factors.flops(ranks) == count_flops(module, shape)
    assert (factors.dense_params, factors.dense_flops) == (count_params(layer), count_flops(layer, shape))
    for plan in module.plans:
        replanned = module.with_plan(plan)
        assert factors.flops(ranks, replanned.groups) == count_flops(replanned, shape), plan


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(0, 2),
    st.booleans(),
    st.data(),
)
def test_matrix_formulas_equal_the_counted_module(c_in, c_out, stride, padding, bias, data):
    layer = nn.Conv2d(c_in, c_out, 1, stride=stride, padding=padding, bias=bias)
    factors = only_factors(layer)
    ranks = MatrixRanks(data.draw(st.integers(1, min(c_in, c_out))))
    module = factors.layer(ranks)
    assert factors.params(ranks) == count_params(module)
    assert factors.flops(ranks) == count_flops(module, (c_in, *SIZE))
    assert (factors.dense_params, factors.dense_flops) == (count_params(layer), count_flops(layer, (c_in, *SIZE)))


@pytest.mark.parametrize("name", ["linear behind a flatten", "linear on rows"])
def test_formulas_hold_for_linear_layers(name):
    model, images = built(name), correlated_images()
    factors = factorize(model, images, layers=names(model))
    ranks = MatrixRanks(5) if name == "linear on rows" else KernelRanks(4, 9, 3)
    compressed = factors.compress({"1": ranks})
    assert factors.params({"1": ranks}) == count_params(compressed)
    assert factors.flops({"1": ranks}) == count_flops(compressed, (6, *SIZE))
    assert factors.flops({}) == count_flops(model, (6, *SIZE))


def test_costs_of_a_case_computed_by_hand():
    """5 -> 2 -> 3 -> 4 -> 7 channels, 3 x 5 window, stride (2, 1), on a 9 x 10 map that becomes 4 x 10, then 4 x 6."""
    factors = kernel_factors(nn.Conv2d(5, 7, (3, 5), stride=(2, 1)))
    ranks = KernelRanks(rank_in=2, rank_mid=3, rank_out=4)
    stages = [5 * 2, 2 * 3 * 3, 3 * 4 * 5, 4 * 7]
    assert factors.params(ranks) == sum(stages) + 7
    assert factors.flops(ranks) == 9 * 10 * stages[0] + 4 * 10 * stages[1] + 4 * 6 * (stages[2] + stages[3])
    assert factors.dense_flops == 4 * 6 * 7 * 5 * 15


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (KernelRanks(0, 1, 1), r"layer conv: rank_in must be .*1\.\.6; got 0"),
        (KernelRanks(7, 1, 1), r"layer conv: rank_in must be .*1\.\.6; got 7"),
        (KernelRanks(1, 1, 8), r"layer conv: rank_out must be .*1\.\.7; got 8"),
        (KernelRanks(1, 1, -1), r"layer conv: rank_out must be .*1\.\.7; got -1"),
        (KernelRanks(2, 0, 5), r"layer conv: rank_mid at rank_in 2 and rank_out 5 must be .*1\.\.6; got 0"),
        (KernelRanks(2, 7, 5), r"layer conv: rank_mid at rank_in 2 and rank_out 5 must be .*1\.\.6; got 7"),
        (KernelRanks(6, 6, 1), r"layer conv: rank_mid at rank_in 6 and rank_out 1 must be .*1\.\.5; got 6"),
        (KernelRanks(2.5, 2, 2), r"layer conv: rank_in must be .*1\.\.6; got 2\.5"),
        (KernelRanks(2, 2.0, 2), r"layer conv: rank_mid .* must be .*1\.\.6; got 2\.0"),
        (KernelRanks(2, 2, "3"), r"layer conv: rank_out must be .*1\.\.7; got '3'"),
        (KernelRanks(None, 2, 2), r"layer conv: rank_in must be .*1\.\.6; got None"),
        (MatrixRanks(3), r"layer conv: ranks must be KernelRanks.*; got MatrixRanks\(rank=3\)"),
        ((2, 2, 2), r"layer conv: ranks must be KernelRanks.*; got \(2, 2, 2\)"),
    ],
)
def test_illegal_kernel_ranks_are_refused_by_name_value_and_range(ranks, message):
    factors = only_named(nn.Conv2d(6, 7, (3, 5)))
    for use in (factors.check, factors.layer, factors.output_error):
        with pytest.raises(ValueError, match=message):
            use(ranks)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (MatrixRanks(0), r"layer conv: rank must be .*1\.\.5; got 0"),
        (MatrixRanks(6), r"layer conv: rank must be .*1\.\.5; got 6"),
        (MatrixRanks(math.inf), r"layer conv: rank must be .*1\.\.5; got inf"),
        (KernelRanks(1, 1, 1), r"layer conv: ranks must be MatrixRanks.*; got KernelRanks"),
        (3, r"layer conv: ranks must be MatrixRanks.*; got 3"),
    ],
)
def test_illegal_matrix_ranks_are_refused_by_name_value_and_range(ranks, message):
    factors = only_named(nn.Conv2d(6, 5, 1))
    for use in (factors.check, factors.layer, factors.output_error):
        with pytest.raises(ValueError, match=message):
            use(ranks)


# --- the hierarchical Tucker tensor that a kernel's factors are ------------------------------------------------------


def dense_kernel(layer) -> Tensor:
    """The kernel that a factorised layer convolves with, all stages contracted."""
    whole = ("in", "row", "col", "out")
    return merge_stages(layer.weights(), [whole])[whole]


@pytest.mark.parametrize("ranks", [KernelRanks(5, 9, 7), KernelRanks(1, 1, 1), KernelRanks(12, 20, 36)])
def test_the_tensor_is_the_kernel_that_the_layer_convolves_with(factors, ranks):
    own = factors.layers["4"]
    tensor = own.as_htucker(ranks)
    assert tensor.shape == own.shape == (36, 12, 3, 3)
    assert tensor.ranks == {(1, 2): ranks.rank_mid, (3, 0): ranks.rank_mid, (1,): ranks.rank_in, (2,): 3, (3,): 3,
                            (0,): ranks.rank_out}  # fmt: skip
    kernel = dense_kernel(own.layer(ranks))
    assert (tensor.to_dense() - kernel).abs().max() <= 1e-5 * kernel.abs().max()


def test_the_tensor_shares_nothing_with_the_factors(factors):
    own = factors.layers["4"]
    before = own.core.clone(), own.reduce.clone()
    tensor = own.as_htucker(KernelRanks(5, 9, 7))
    for part in (*tensor.bases.values(), *tensor.transfers.values()):
        part.zero_()
    assert torch.equal(own.core, before[0])
    assert torch.equal(own.reduce, before[1])


def test_a_printed_tensor_draws_its_tree_with_ranks_and_shapes(factors):
    lines = str(factors.layers["4"].as_htucker(KernelRanks(5, 9, 7))).splitlines()
    assert lines[0].startswith("36 x 12 x 3 x 3 in hierarchical Tucker format")
    assert [line.split("(")[1].split(")")[0] for line in lines[1:]] == [
        "in, kh, kw, out", "in, kh", "in", "kh", "kw, out", "kw", "out",
    ]  # fmt: skip
    assert "rank    9   B: 5 x 3 x 9" in lines[2]
    assert "rank    5   U: 12 x 5" in lines[3]


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "vgg16"])
def test_every_menu_entry_of_the_three_networks_keeps_the_bound_of_the_hsvd(name):
    """Weight-only factors: the kernel's error is at most the root of the summed squared discarded singular values."""
    model = torchvision.models.get_model(name, num_classes=10).eval()
    convolutions = [n for n, m in model.named_modules() if type(m) is nn.Conv2d and m.kernel_size != (1, 1)]
    whole = factorize(model, input_shape=(3, 64, 64), layers=convolutions)
    entries = 0
    for layer, menu in build_menus(whole).items():
        kernel = model.get_submodule(layer).weight.detach()
        spectra = node_singular_values(kernel, KERNEL_TREE)
        for entry in menu[:-1]:
            tensor = whole.layers[layer].as_htucker(entry.ranks)
            bound = error_bound(spectra, tensor.ranks, KERNEL_TREE)
            assert (tensor.to_dense() - kernel).norm() <= bound * (1 + 1e-4) + 1e-4 * kernel.norm(), (layer, entry)
            entries += 1
    assert entries > 3 * len(convolutions)


# --- layers whose mean nothing gives back ----------------------------------------------------------------------------


@pytest.mark.parametrize("behind", ["nothing", "a norm", "a bias"])
def test_the_metric_counts_the_mean_exactly_where_nothing_gives_it_back(behind):
    """A matrix of rank 8 in the metric of what counts: the best there is, and what the menu says of it is the truth."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, bias=behind == "a bias").double()
    network = nn.Sequential(layer, *([nn.BatchNorm1d(48).double()] if behind == "a norm" else [])).eval()
    x = torch.randn(400, 64, dtype=torch.float64) @ torch.diag(torch.linspace(2, 0.1, 64).double()) + 3
    factors = factorize(network, x, layers=["0"]).layers["0"]
    with torch.no_grad():
        found, expected = factors.layer(MatrixRanks(8))(x), layer(x)
    if behind != "nothing":
        found, expected = found - found.mean(0), expected - expected.mean(0)
    error = float((found - expected).square().sum() / expected.square().sum())
    values = torch.linalg.svdvals(expected).square()
    assert error == pytest.approx(float(values[8:].sum() / values.sum()), rel=1e-3)
    assert factors.output_error(MatrixRanks(8)) == pytest.approx(error, rel=1e-2)


@pytest.mark.parametrize(("bias", "norm"), [(False, False), (False, True), (True, False)])
def test_kernels_of_bare_layers_are_whitened_about_zero(bias, norm):
    torch.manual_seed(1)
    conv = nn.Conv2d(12, 16, 3, padding=1, bias=bias)
    network = nn.Sequential(conv, *([nn.BatchNorm2d(16)] if norm else [])).eval()
    x = torch.randn(40, 12, 6, 6) + 2
    factors = factorize(network, x, layers=["0"]).layers["0"]
    pixels = x.movedim(1, -1).reshape(-1, 12)
    moment = pixels.T @ pixels / len(pixels) if not (bias or norm) else torch.cov(pixels.T, correction=0)
    basis = factors.reduce @ square_root(moment.double()).float()
    torch.testing.assert_close(basis @ basis.T, torch.eye(12), rtol=0, atol=5e-3)
