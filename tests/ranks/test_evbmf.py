"""EVBMF: known ranks and noise are recovered, and the analytic solution is the one that iteration comes to."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.ranks.evbmf import evbmf, evbmf_from_singular_values, evbmf_rank

SHAPES_AND_RANKS = [(40, 60, 5), (64, 64, 10), (30, 300, 8), (200, 50, 7), (64, 576, 20)]


def low_rank_plus_noise(rows, columns, rank, *, signal, noise_std, seed):
    """V: (rows, columns). Signal singular values from `signal` to twice that, in units of the largest of the noise."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(rows, rank)))
    right, _ = np.linalg.qr(rng.normal(size=(columns, rank)))
    largest_noise = noise_std * (math.sqrt(rows) + math.sqrt(columns))
    singular_values = signal * largest_noise * np.linspace(2, 1, rank)
    return (left * singular_values) @ right.T + noise_std * rng.normal(size=(rows, columns))


@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES_AND_RANKS)
@pytest.mark.parametrize("signal", [1.7, 5.0, 50.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_known_rank_and_noise_are_recovered(rows, columns, rank, signal, seed):
    noise_std = 0.3 * 10**seed
    solution = evbmf(low_rank_plus_noise(rows, columns, rank, signal=signal, noise_std=noise_std, seed=seed))
    assert solution.rank == rank == len(solution.singular_values)
    assert solution.noise_variance == pytest.approx(noise_std**2, rel=0.15)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_noise_variance_is_within_two_percent_on_a_large_matrix(seed):
    solution = evbmf(low_rank_plus_noise(300, 700, 25, signal=4.0, noise_std=0.02, seed=seed))
    assert solution.rank == 25
    assert solution.noise_variance == pytest.approx(0.02**2, rel=0.02)


@pytest.mark.parametrize(("rows", "columns"), [(40, 60), (64, 64), (100, 900), (5, 7), (2, 2), (1, 9), (30, 3)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pure_noise_has_rank_zero(rows, columns, seed):
    matrix = 3 * np.random.default_rng(seed).normal(size=(rows, columns))
    solution = evbmf(matrix)
    assert solution.rank == 0
    assert solution.singular_values.shape == (0,)
    assert solution.noise_variance == pytest.approx(np.mean(matrix**2), rel=1e-6)


def test_signal_below_the_noise_is_not_seen():
    assert evbmf_rank(low_rank_plus_noise(60, 80, 4, signal=0.2, noise_std=1.0, seed=0)) == 0


# --- against the variational equations themselves


def iterate_one_component(gamma, rows, columns, noise_variance, sweeps=20_000):
    """Mean singular value and free energy (less that of the empty component) of one column pair a, b, by coordinate
    descent on the posterior means and variances and the prior variances, started at the singular value itself."""
    a = b = math.sqrt(gamma)
    var_a, var_b = noise_variance / gamma, noise_variance / gamma
    for _ in range(sweeps):
        prior_a, prior_b = a**2 / columns + var_a, b**2 / rows + var_b
        var_a = noise_variance / (b**2 + rows * var_b + noise_variance / prior_a)
        a = var_a * gamma * b / noise_variance
        var_b = noise_variance / (a**2 + columns * var_a + noise_variance / prior_b)
        b = var_b * gamma * a / noise_variance
    prior_a, prior_b = a**2 / columns + var_a, b**2 / rows + var_b
    square_a, square_b = a**2 + columns * var_a, b**2 + rows * var_b
    energy = (
        columns * math.log(prior_a / var_a)
        + rows * math.log(prior_b / var_b)
        + (square_a / prior_a - columns)
        + (square_b / prior_b - rows)
        + (square_a * square_b - 2 * gamma * a * b) / noise_variance
    )
    return a * b, energy


@pytest.mark.parametrize(("rows", "columns"), [(4, 30), (10, 15), (12, 12)])
def test_analytic_solution_equals_the_iterated_variational_equations(rows, columns):
    noise_variance = 0.4
    threshold = evbmf_from_singular_values(np.ones(rows), (rows, columns), noise_variance).threshold
    for factor in (1.02, 1.5, 4.0):
        gamma = threshold * factor
        values = np.array([gamma] + [0.0] * (rows - 1))
        solution = evbmf_from_singular_values(values, (rows, columns), noise_variance)
        iterated, energy = iterate_one_component(gamma, rows, columns, noise_variance)
        assert solution.singular_values == pytest.approx([iterated], rel=1e-6)
        assert energy < 0
    # Just below the threshold the iteration still has a local solution, but the empty component is better.
    _, energy = iterate_one_component(threshold * 0.99, rows, columns, noise_variance)
    assert energy > 0


@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES_AND_RANKS)
def test_estimated_noise_is_what_the_posterior_leaves_over(rows, columns, rank):
    """At a stationary point of the free energy sigma^2 is the expected squared residual per entry."""
    matrix = low_rank_plus_noise(rows, columns, rank, signal=2.5, noise_std=0.7, seed=4)
    solution = evbmf(matrix)
    gamma = np.linalg.svd(matrix, compute_uv=False)
    residual = np.sum(gamma**2) - np.sum(gamma[: solution.rank] * solution.singular_values)
    assert solution.noise_variance == pytest.approx(residual / matrix.size, rel=1e-5)


# --- invariances

matrices = st.builds(
    lambda rows, columns, rank, signal, seed: low_rank_plus_noise(
        rows, columns, min(rank, rows, columns), signal=signal, noise_std=1.0, seed=seed
    ),
    st.integers(1, 14),
    st.integers(1, 14),
    st.integers(1, 5),
    st.floats(0.1, 30.0),
    st.integers(0, 10_000),
)
few_examples = settings(max_examples=60, deadline=None, derandomize=True)


def assert_same_solution(one, other, scale=1.0):
    assert one.rank == other.rank
    np.testing.assert_allclose(scale * one.singular_values, other.singular_values, rtol=1e-5)
    assert scale**2 * one.noise_variance == pytest.approx(other.noise_variance, rel=1e-5)
    assert scale * one.threshold == pytest.approx(other.threshold, rel=1e-5)


@few_examples
@given(matrices)
def test_transposition_changes_nothing(matrix):
    assert_same_solution(evbmf(matrix), evbmf(matrix.T))


@few_examples
@given(matrices, st.integers(-100, 100))
def test_scaling_scales_the_solution(matrix, exponent):
    scale = 10.0**exponent
    assert_same_solution(evbmf(matrix), evbmf(-scale * matrix), scale=scale)


@few_examples
@given(matrices, st.randoms(use_true_random=False))
def test_singular_values_in_any_order_serve_as_well_as_the_matrix(matrix, random):
    values = list(np.linalg.svd(matrix, compute_uv=False))
    random.shuffle(values)
    assert_same_solution(evbmf(matrix), evbmf_from_singular_values(values, matrix.shape))


@few_examples
@given(matrices)
def test_solution_is_within_the_model(matrix):
    gamma = np.linalg.svd(matrix, compute_uv=False)
    solution = evbmf(matrix)
    assert 0 <= solution.rank < max(2, min(matrix.shape))
    assert 0 <= solution.noise_variance <= np.mean(matrix**2) * (1 + 1e-9)
    assert np.all(solution.singular_values > 0)
    assert np.all(solution.singular_values < gamma[: solution.rank])
    assert np.all(np.diff(solution.singular_values) <= 0)
    assert solution.rank == np.count_nonzero(gamma > solution.threshold)


@few_examples
@given(matrices, st.floats(0, 1e3), st.floats(1, 10))
def test_more_noise_given_means_no_more_rank(matrix, noise_variance, factor):
    low, high = evbmf(matrix, noise_variance), evbmf(matrix, noise_variance * factor)
    assert high.rank <= low.rank
    assert (low.noise_variance, high.noise_variance) == (noise_variance, noise_variance * factor)
    assert np.all(high.singular_values <= low.singular_values[: high.rank] * (1 + 1e-12))


# --- where the model does not hold


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_noiseless_low_rank_matrix_has_its_numerical_rank(dtype):
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=(50, 3)) @ rng.normal(size=(3, 80))).astype(dtype)
    solution = evbmf(matrix)
    assert (solution.rank, solution.noise_variance) == (3, 0.0)
    np.testing.assert_allclose(solution.singular_values, np.linalg.svd(matrix, compute_uv=False)[:3], rtol=1e-5)


def test_dead_rows_and_columns_change_nothing():
    matrix = low_rank_plus_noise(30, 70, 4, signal=3.0, noise_std=0.1, seed=0)
    padded = np.full((42, 80), 1e-12)
    padded[5:35, 3:73] = matrix
    assert_same_solution(evbmf(matrix), evbmf(padded))


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (6, 2)])
def test_a_zero_matrix_has_rank_zero_and_no_noise(shape):
    for solution in (evbmf(np.zeros(shape)), evbmf_from_singular_values(np.zeros(min(shape)), shape)):
        assert (solution.rank, solution.noise_variance, solution.threshold) == (0, 0.0, 0.0)


def test_a_flat_spectrum_reads_as_noise_unless_the_noise_is_known_to_be_zero():
    assert evbmf_rank(np.eye(6)) == 0
    assert evbmf(np.eye(6), noise_variance=0.0).rank == 6


def test_a_single_entry_row_or_column_is_noise():
    for matrix in ([[2.0]], [[1.0, -3.0, 2.0]], [[1.0], [4.0]]):
        solution = evbmf(matrix)
        assert solution.rank == 0
        assert solution.noise_variance == pytest.approx(np.mean(np.square(matrix)))


# --- interface


def test_torch_tensors_are_taken_and_left_alone():
    matrix = low_rank_plus_noise(20, 30, 3, signal=4.0, noise_std=1.0, seed=0)
    parameter = torch.nn.Parameter(torch.tensor(matrix))
    before = parameter.detach().clone()
    assert_same_solution(evbmf(matrix), evbmf(parameter))
    assert torch.equal(parameter, before)
    values = torch.linalg.svdvals(before)
    assert_same_solution(evbmf(matrix), evbmf_from_singular_values(values, parameter.shape))
    assert torch.equal(values, torch.linalg.svdvals(before))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.array([[1.0, np.nan], [0.0, 1.0]]), "NaN or infinity"),
        (np.array([[1.0, np.inf], [0.0, 1.0]]), "NaN or infinity"),
        (np.zeros((0, 4)), r"non-empty matrix.*\(0, 4\)"),
        (np.zeros(4), r"non-empty matrix.*\(4,\)"),
        (np.zeros((2, 3, 3)), r"non-empty matrix.*\(2, 3, 3\)"),
    ],
)
def test_bad_matrices_are_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        evbmf(matrix)


@pytest.mark.parametrize("noise_variance", [-0.1, math.nan, math.inf])
def test_bad_noise_variances_are_refused(noise_variance):
    with pytest.raises(ValueError, match="noise_variance must be finite and at least 0"):
        evbmf(np.eye(3), noise_variance)


@pytest.mark.parametrize(
    ("values", "shape", "message"),
    [
        ([2.0, 1.0], (3, 4), r"\(3, 4\) matrix needs all min\(L, M\) singular values; got \(2,\)"),
        ([2.0, 1.0], (2,), "needs all"),
        ([2.0, -1.0], (2, 4), "-1.0 to 2.0"),
        ([2.0, math.nan], (2, 4), "must be finite"),
    ],
)
def test_bad_singular_values_are_refused(values, shape, message):
    with pytest.raises(ValueError, match=message):
        evbmf_from_singular_values(values, shape)
