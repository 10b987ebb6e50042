"""Rank of a noisy matrix by empirical variational Bayesian matrix factorisation (EVBMF).

The model: V = B A^T + noise, V of shape (L, M) with L <= M, the factors Gaussian with variances learned from V, the
noise independent Gaussian of variance sigma^2. Its global variational solution is analytic: every singular value gamma
of V below a threshold is removed, the others are shrunk. Only sigma^2, when unknown, needs a search on one axis.

Nakajima, Sugiyama, Babacan, Tomioka: Global Analytic Solution of Fully-Observed Variational Bayesian Matrix
Factorization, JMLR 14 (2013); the threshold and the bounds on sigma^2 in the form of the authors' Condition for Perfect
Dimensionality Recovery by Variational Bayesian PCA, JMLR 16 (2015). Symbols below are theirs: alpha = L / M and
x = gamma^2 / (M sigma^2), the squared singular value in units of the noise.

Where the model does not hold:
 - A noiseless matrix of low rank has no sigma^2 > 0: it is reported as 0 and the rank is the numerical one, the number
   of singular values above RESOLUTION times the largest.
 - A noiseless matrix of full rank cannot be told from noise by its singular values: a flat spectrum (the identity, an
   orthogonal matrix) has rank 0, and so has every single row or column.
 - Where weak signals make up a third or more of the spectrum, the noise is overestimated and the rank too low; the
   method is known to be conservative.
 - Rows and columns of zeros (dead channels) saw no noise and say nothing about it: `evbmf` leaves them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq, minimize_scalar

# Rows, columns and singular values this small beside the largest are zero: they are rounding of float32 weights.
RESOLUTION = 1e-6
# Points of the scan over log sigma^2 whose best one is then refined; the objective may have several local minima.
SCAN_POINTS = 256


@dataclass(frozen=True, eq=False)
class EVBMF:
    """The global EVBMF solution of one (L, M) matrix.

    singular_values: (rank,) those of the posterior mean, in falling order: shrunk, in the units of the matrix.
    noise_variance: sigma^2 per entry of the matrix, given or estimated.
    threshold: singular values of the matrix at or below this were taken for noise.
    """

    rank: int
    singular_values: NDArray[np.float64]
    noise_variance: float
    threshold: float


def evbmf_rank(matrix: ArrayLike | torch.Tensor) -> int:
    """The EVBMF rank of `matrix`: (L, M), noise variance estimated. Raises as `evbmf`."""
    return evbmf(matrix).rank


def evbmf(matrix: ArrayLike | torch.Tensor, noise_variance: float | None = None) -> EVBMF:
    """Global EVBMF solution of `matrix`: (L, M), in any orientation; not mutated, computed in float64.

    Args:
        noise_variance: sigma^2 per entry; None estimates it from the matrix. With 0 the rank is the numerical one.

    Raises:
        ValueError: not a non-empty matrix of finite numbers, or a negative noise variance.
    """
    values = _as_float64(matrix)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"evbmf needs a non-empty matrix (L, M); got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"evbmf needs finite numbers; the {values.shape} matrix holds NaN or infinity")
    live = _without_dead_rows_and_columns(values)
    return evbmf_from_singular_values(np.linalg.svd(live, compute_uv=False), live.shape, noise_variance)


def evbmf_from_singular_values(
    singular_values: ArrayLike | torch.Tensor, shape: tuple[int, int], noise_variance: float | None = None
) -> EVBMF:
    """As `evbmf`, for a caller who has the singular values already.

    Args:
        singular_values: (min(L, M),) all of them, in any order.
        shape: (L, M) of the matrix, in either orientation, without its rows and columns of zeros.

    Raises:
        ValueError: a number of values other than min(L, M), a negative or non-finite one, a negative noise variance.
    """
    gamma = _checked_singular_values(singular_values, shape)
    if noise_variance is not None and not (np.isfinite(noise_variance) and noise_variance >= 0):
        raise ValueError(f"noise_variance must be finite and at least 0; got {noise_variance}")
    rows, columns = sorted(shape)
    largest = float(gamma[0])
    if largest == 0:
        return EVBMF(0, np.zeros(0), noise_variance or 0.0, 0.0)
    # From here on in units of the largest singular value, so that no square over- or underflows.
    relative = gamma / largest
    relative[relative <= RESOLUTION] = 0.0
    if noise_variance is None:
        variance = _estimate_noise_variance(relative, columns)
    else:
        variance = float(np.square(np.sqrt(noise_variance) / largest))
    threshold = max(RESOLUTION, float(np.sqrt(columns * variance * _signal_threshold(rows / columns))))
    kept = relative[relative > threshold]
    return EVBMF(
        rank=len(kept),
        singular_values=largest * _shrink(kept, variance, rows, columns),
        noise_variance=float(variance * largest * largest if noise_variance is None else noise_variance),
        threshold=threshold * largest,
    )


def _as_float64(values: ArrayLike | torch.Tensor) -> NDArray[np.float64]:
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def _without_dead_rows_and_columns(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rows and columns of `matrix` that are not numerically zero; at least one of each."""
    scale = np.abs(matrix).max()
    if scale == 0:
        return matrix[:1, :1]
    row_norms, column_norms = (np.linalg.norm(matrix / scale, axis=axis) for axis in (1, 0))
    live_rows = row_norms > RESOLUTION * row_norms.max()
    live_columns = column_norms > RESOLUTION * column_norms.max()
    return matrix[np.ix_(live_rows, live_columns)]


def _checked_singular_values(singular_values: ArrayLike | torch.Tensor, shape: tuple[int, int]) -> NDArray[np.float64]:
    """(min(L, M),) in falling order."""
    gamma = _as_float64(singular_values)
    if len(shape) != 2 or min(shape) < 1 or gamma.shape != (min(shape),):
        raise ValueError(f"an (L, M) = {tuple(shape)} matrix needs all min(L, M) singular values; got {gamma.shape}")
    if not (np.isfinite(gamma).all() and (gamma >= 0).all()):
        raise ValueError(f"singular values must be finite and at least 0; got {gamma.min()} to {gamma.max()}")
    return np.sort(gamma)[::-1]


@lru_cache(maxsize=1024)
def _signal_tau(alpha: float) -> float:
    """tau at the threshold, about 2.51 sqrt(alpha): the zero of Phi(tau) + Phi(tau / alpha), Phi(z) = log(1+z)/z - 1/2.

    Phi falls and vanishes at z = 2.513, so the sum is positive at tau = 2.5 alpha and negative at tau = 2.6.
    """

    def phi(z: float) -> float:
        return np.log1p(z) / z - 0.5

    return brentq(lambda tau: phi(tau) + phi(tau / alpha), 2.5 * alpha, 2.6, xtol=1e-14, rtol=1e-14)


def _signal_threshold(alpha: float) -> float:
    """The x above which a singular value is signal; above the (1 + sqrt(alpha))^2 where the spectrum of noise ends."""
    tau = _signal_tau(alpha)
    return (1 + tau) * (1 + alpha / tau)


def _shrink(gamma: NDArray[np.float64], noise_variance: float, rows: int, columns: int) -> NDArray[np.float64]:
    """Posterior singular values of those above the threshold: the larger root of a quadratic, gamma without noise."""
    ratio = noise_variance / gamma**2
    linear = 1 - (rows + columns) * ratio
    return gamma / 2 * (linear + np.sqrt(linear**2 - 4 * rows * columns * ratio**2))


def _estimate_noise_variance(gamma: NDArray[np.float64], columns: int) -> float:
    """The sigma^2 of least free energy between its bounds, 0 for a matrix without noise.

    gamma: (L,) in falling order, the first above 0.
    """
    # In units of the mean square per entry, which is the upper bound on sigma^2: energies average 1.
    rows = len(gamma)
    scale = float(np.mean(gamma**2) / columns)
    energies = gamma**2 / (columns * scale)  # (L,) x at sigma^2 = scale
    lower = _lower_bound(energies, rows / columns)
    if lower == 0:
        return 0.0
    if lower >= 1:
        return scale

    def objective(log_variance: float) -> float:
        return _free_energy(energies, log_variance, rows / columns)

    grid = np.linspace(np.log(lower), 0.0, SCAN_POINTS)
    best = int(np.argmin([objective(point) for point in grid]))
    around = (grid[max(best - 1, 0)], grid[min(best + 1, SCAN_POINTS - 1)])
    refined = minimize_scalar(objective, bounds=around, method="bounded", options={"xatol": 1e-10})
    log_variance = min((refined.x, *around), key=objective)
    return float(scale * np.exp(log_variance))


def _lower_bound(energies: NDArray[np.float64], alpha: float) -> float:
    """Lower bound on sigma^2 in the units of `energies`: at most `signals` of them can be signal."""
    signals = int(np.ceil(len(energies) / (1 + alpha))) - 1
    return max(energies[signals] / _signal_threshold(alpha), energies[signals:].mean())


def _free_energy(energies: NDArray[np.float64], log_variance: float, alpha: float) -> float:
    """Free energy per row as a function of log sigma^2, constants dropped.

    Noise costs x + log sigma^2 (from x - log x, without the constant, so that zero singular values are allowed); each
    signal adds log(tau + 1) + alpha log(tau / alpha + 1) - tau, with x = (1 + tau)(1 + alpha / tau).
    """
    x = energies * np.exp(-log_variance)
    x_signal = x[x > _signal_threshold(alpha)]
    excess = x_signal - (1 + alpha)
    tau = (excess + np.sqrt(excess**2 - 4 * alpha)) / 2
    gain = np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau
    return float(x.mean() + log_variance + gain.sum() / len(energies))
