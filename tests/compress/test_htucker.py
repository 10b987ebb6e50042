"""Properties of the hierarchical Tucker format, in float64 on small tensors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.compress import DimensionTree, HTucker, hsvd
from common.compress.htucker import error_bound, max_ranks, node_singular_values, quasi_optimality

KERNEL_TREE = DimensionTree(((1, 2), (3, 0)))
TREES = {
    2: [DimensionTree((0, 1)), DimensionTree((1, 0))],
    3: [DimensionTree.balanced(3), DimensionTree((2, (0, 1))), DimensionTree.linear(3)],
    4: [DimensionTree.balanced(4), DimensionTree.linear(4), KERNEL_TREE],
    5: [DimensionTree.balanced(5), DimensionTree(((4, (1, 0)), (2, 3)))],
    6: [DimensionTree.balanced(6), DimensionTree.linear(6)],
}
CASES = [(order, tree) for order, trees in TREES.items() for tree in trees]
SIZES = (5, 4, 3, 6, 2, 3)


def random_tensor(order: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SIZES[:order], generator=generator, dtype=torch.float64)


def structured_tensor(order: int) -> torch.Tensor:
    """1 / (1 + i_1 + ... + i_d): smooth, so its matricizations' singular values fall fast."""
    grids = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in SIZES[:order]), indexing="ij")
    return 1 / (1 + sum(grids))


def halved_ranks(shape, tree):
    return {node: max(1, rank // 2) for node, rank in max_ranks(shape, tree).items()}


@pytest.mark.parametrize(("order", "tree"), CASES)
def test_full_ranks_reconstruct(order, tree):
    tensor = random_tensor(order)
    decomposed = hsvd(tensor, tree)
    assert decomposed.shape == tensor.shape
    assert decomposed.ranks == max_ranks(tensor.shape, tree)
    torch.testing.assert_close(decomposed.to_dense(), tensor, rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", [random_tensor, structured_tensor])
@pytest.mark.parametrize(("order", "tree"), CASES)
def test_error_within_both_bounds(order, tree, make):
    tensor = make(order)
    singular_values = node_singular_values(tensor, tree)
    for ranks in (halved_ranks(tensor.shape, tree), dict.fromkeys(tree.edges, 1)):
        error = torch.linalg.vector_norm(tensor - hsvd(tensor, tree, ranks=ranks).to_dense()).item()
        assert error <= error_bound(singular_values, ranks, tree) * (1 + 1e-10)
        # No tensor of these ranks can beat the largest single edge's discarded tail (Eckart and Young), so this is
        # a stronger statement than "at most sqrt(2 d - 3) times the best possible".
        lower = max(float(singular_values[node][ranks[node] :].norm()) for node in tree.edges)
        assert error <= quasi_optimality(tree) * lower * (1 + 1e-10) + 1e-14
        assert error >= lower * (1 - 1e-10)


@pytest.mark.parametrize(("order", "tree"), CASES)
@pytest.mark.parametrize("relative", [1e-6, 0.05, 0.4])
def test_tolerance_is_kept(order, tree, relative):
    tensor = structured_tensor(order)
    tolerance = relative * tensor.norm().item()
    decomposed = hsvd(tensor, tree, tolerance=tolerance)
    assert (tensor - decomposed.to_dense()).norm() <= tolerance
    assert decomposed.num_parameters() <= hsvd(tensor, tree).num_parameters()


def test_error_falls_with_the_ranks():
    tensor = random_tensor(4)
    errors = []
    for rank in range(1, 5):
        ranks = {node: min(rank * 2, limit) for node, limit in max_ranks(tensor.shape, KERNEL_TREE).items()}
        errors.append((tensor - hsvd(tensor, KERNEL_TREE, ranks=ranks).to_dense()).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_bases_are_orthonormal_and_input_is_untouched():
    tensor = random_tensor(4)
    before = tensor.clone()
    decomposed = hsvd(tensor, KERNEL_TREE, ranks=halved_ranks(tensor.shape, KERNEL_TREE))
    for basis in decomposed.bases.values():
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=basis.dtype))
    assert torch.equal(tensor, before)


def test_parameter_count_is_the_formula():
    ranks = {(1, 2): 5, (3, 0): 5, (1,): 3, (2,): 2, (3,): 4, (0,): 4}
    decomposed = hsvd(random_tensor(4), KERNEL_TREE, ranks=ranks)
    leaves = 4 * 3 + 3 * 2 + 6 * 4 + 5 * 4
    transfers = 3 * 2 * 5 + 4 * 4 * 5 + 5 * 5 * 1
    assert decomposed.num_parameters() == leaves + transfers


@pytest.mark.parametrize(("order", "tree"), CASES)
def test_singular_values_without_the_full_tensor(order, tree):
    tensor = structured_tensor(order)
    expected = node_singular_values(tensor, tree)
    scaled = _with_skewed_bases(hsvd(tensor, tree))
    for node, values in scaled.node_singular_values().items():
        # Gramians square the singular values, so half of the digits are left.
        torch.testing.assert_close(values, expected[node], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("order", "tree"), CASES)
def test_truncation_keeps_the_bound_and_the_tolerance(order, tree):
    tensor = random_tensor(order)
    full = _with_skewed_bases(hsvd(tensor, tree))
    ranks = halved_ranks(tensor.shape, tree)
    truncated = full.truncate(ranks=ranks)
    assert truncated.ranks == ranks
    error = (tensor - truncated.to_dense()).norm().item()
    assert error <= error_bound(node_singular_values(tensor, tree), ranks, tree) * (1 + 1e-6)
    tolerance = 0.3 * tensor.norm().item()
    assert (tensor - full.truncate(tolerance=tolerance).to_dense()).norm() <= tolerance


def _with_skewed_bases(tensor: HTucker) -> HTucker:
    """The same tensor with leaf bases that are not orthonormal: mode m scaled by 2, its parent by one half."""
    parent_of = {child: node for node, pair in tensor.tree.children.items() for child in pair}
    parent = parent_of[(0,)]
    transfers = {node: b.clone() for node, b in tensor.transfers.items()}
    transfers[parent] = transfers[parent] / 2
    return HTucker(tensor.tree, {**tensor.bases, 0: tensor.bases[0] * 2}, transfers)


def test_low_rank_tensor_is_found_exactly():
    generator = torch.Generator().manual_seed(3)
    factors = [torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (6, 5, 3, 4)]
    tensor = torch.einsum("ar,br,cr,dr->abcd", *factors)
    decomposed = hsvd(tensor, KERNEL_TREE, tolerance=1e-9)
    assert set(decomposed.ranks.values()) == {2}
    torch.testing.assert_close(decomposed.to_dense(), tensor)


@given(st.integers(0, 1000), st.floats(0.0, 2.0))
@settings(max_examples=25, deadline=None)
def test_tolerance_property(seed, relative):
    tensor = random_tensor(4, seed)
    tolerance = relative * tensor.norm().item()
    error = (tensor - hsvd(tensor, KERNEL_TREE, tolerance=tolerance).to_dense()).norm().item()
    assert error <= tolerance + 1e-12 * math.sqrt(tensor.numel())


@pytest.mark.parametrize("nested", [(0, 0), (0, 2), (0, 1, 2), ((0, 1),), (0, "1"), 0])
def test_bad_trees_are_refused(nested):
    with pytest.raises(ValueError, match="dimension tree"):
        DimensionTree(nested)


def test_bad_ranks_are_refused():
    tensor = random_tensor(4)
    good = halved_ranks(tensor.shape, KERNEL_TREE)
    cases = [
        ({**good, (1,): 0}, r"node \(1,\) must be in 1..4; got 0"),
        ({**good, (1,): 5}, r"node \(1,\) must be in 1..4; got 5"),
        ({**good, (1, 2): 2, (3, 0): 3}, "share one rank"),
        ({node: r for node, r in good.items() if node != (1,)}, r"no rank for node \(1,\)"),
        ({**good, (2, 3): 1}, "no such node"),
    ]
    for ranks, message in cases:
        with pytest.raises(ValueError, match=message):
            hsvd(tensor, KERNEL_TREE, ranks=ranks)
    with pytest.raises(ValueError, match="not both"):
        hsvd(tensor, KERNEL_TREE, ranks=good, tolerance=0.1)
    with pytest.raises(ValueError, match="negative"):
        hsvd(tensor, KERNEL_TREE, tolerance=-1.0)
    with pytest.raises(ValueError, match="5 modes"):
        hsvd(random_tensor(5), KERNEL_TREE)
    with pytest.raises(ValueError, match="NaN"):
        hsvd(tensor * float("nan"), KERNEL_TREE)
