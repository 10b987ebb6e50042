"""Decompose one layer, once: everything that costs an eigendecomposition of the layer's own size.

The kernel is decomposed in the metric of what the layer computes. With the input's second moment ``C = E[x x^T]`` the
whitened kernel ``W x_in C^(1/2)`` has as its squared norm the energy of the layer's output (for inputs that are
uncorrelated between the positions of the window), so truncating it truncates the output. The input leaf gives C^(-1/2)
back. The output leaf holds the eigenvectors of the measured covariance of the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .factors import DOUBLE_PRECISION_UP_TO, KernelFactors, MatrixFactors, falling_eigenbasis, gram_matrix
from .geometry import Convolution, Geometry
from .grouped import GroupedFactors
from .htucker import matricize, mode_product
from .moments import LayerMoments, wide
from .trace import LayerTrace

WHITENING_FLOOR = 1e-4
"""Share of the mean variance that is added to every direction before whitening: a direction that the calibration
images never showed is cheap to drop but can still be represented."""

WINDOW_FLOOR = 1e-2
"""The same for the few rows and columns of the window: three whitenings in a row must not eat up float32's digits."""

BASES = ("weight", "input", "both")
"""What the bases are made from: the weights alone, the input's second moment, or that and the output's covariance."""


def factorize_layer(
    name: str,
    layer: Convolution | nn.Linear,
    trace: LayerTrace,
    moments: LayerMoments | None,
    bases: str,
    *,
    is_kernel: bool,
) -> KernelFactors | MatrixFactors | GroupedFactors:
    """Factorise one layer: as a kernel with a window, or as a matrix; a grouped one group by group.

    moments: None for bases from the weights alone; bases: one of BASES.
    """
    geometry = Geometry.of(layer, trace.unflatten)
    weight, bias = _weight(layer, geometry), layer.bias
    described = {
        "name": name,
        "trace": trace,
        "dtype": layer.weight.dtype,
        "geometry": geometry,
        "bias": None if bias is None else bias.detach().clone(),
        "output_mean": None if moments is None else moments.output_mean.to(weight),
        "output_std": None if moments is None else moments.output_covariance.diagonal().clamp_min(0).sqrt().to(weight),
    }
    make = _factorize_kernel if is_kernel else _factorize_matrix
    if geometry.groups == 1:
        return make(weight, moments, bases, described)
    alone = {**described, "geometry": replace(geometry, groups=1), "bias": None}
    alone |= {"output_mean": None, "output_std": None}
    of_groups = moments.split(geometry.groups) if moments else [None] * geometry.groups
    parts = [make(w, m, bases, alone) for w, m in zip(weight.chunk(geometry.groups), of_groups, strict=True)]
    return GroupedFactors(parts=tuple(parts), shape=parts[0].shape, **described)


def _weight(layer: Convolution | nn.Linear, geometry: Geometry) -> Tensor:
    """The layer's weight ``(C_out, C_in of a group, rows, columns)``; see `wide`."""
    weight = wide(layer.weight)
    if geometry.unflatten is not None:
        return weight.reshape(len(weight), *geometry.unflatten)
    if geometry.linear:
        return weight[:, :, None, None]
    return geometry.kernel_form(weight, transposed=geometry.transposed)


def _factorize_kernel(
    weight: Tensor, moments: LayerMoments | None, bases: str, described: Mapping[str, Any]
) -> KernelFactors:
    """Factorise a kernel ``W: (C_out, C_in, k_h, k_w)``; see :class:`KernelFactors`."""
    precise = weight.double() if weight.shape[0] <= DOUBLE_PRECISION_UP_TO else weight
    if moments and bases != "weight":
        floors = (WHITENING_FLOOR, WINDOW_FLOOR, WINDOW_FLOOR)
        pairs = [_whitening(c.to(precise), floor) for c, floor in zip(moments.window, floors, strict=True)]
    else:
        pairs = [(torch.eye(n).to(precise),) * 2 for n in weight.shape[1:]]
    whitened = precise
    for mode, (root, _) in enumerate(pairs, start=1):
        whitened = mode_product(whitened, root, mode)
    unwhiten_in, unwhiten_row, unwhiten_col = (inverse for _, inverse in pairs)

    covariance = moments.output_covariance if moments and bases == "both" else None
    variances, basis_out = _output_basis(matricize(whitened, (0,)), covariance)
    basis_out = basis_out.to(precise)
    projected = mode_product(whitened, basis_out.T, 0)
    energies = projected.flatten(1).square().sum(1)
    gain = torch.ones_like(energies) if covariance is None else _gain(variances.to(precise), energies)
    projected = projected * gain.reshape(-1, 1, 1, 1)
    basis_in = falling_eigenbasis(gram_matrix(matricize(projected, (1,))))[1].to(precise)
    core = mode_product(projected, basis_in.T, 1)
    return KernelFactors(
        core=core.permute(1, 2, 3, 0).contiguous().to(weight),
        reduce=(basis_in.T @ unwhiten_in).to(weight),
        unwhiten_row=unwhiten_row.to(weight),
        unwhiten_col=unwhiten_col.to(weight),
        expand=(basis_out / gain).to(weight),
        shape=tuple(weight.shape),
        **described,
    )


def _factorize_matrix(
    weight: Tensor, moments: LayerMoments | None, bases: str, described: Mapping[str, Any]
) -> MatrixFactors:
    """Factorise a matrix ``W: (C_out, C_in, 1, 1)``; see :class:`MatrixFactors`."""
    weight = weight.flatten(1)
    precise = weight.double() if max(weight.shape) <= DOUBLE_PRECISION_UP_TO else weight
    energies, basis = _output_basis(precise, moments.output_covariance if moments and bases != "weight" else None)
    basis = basis.to(precise)
    return MatrixFactors(
        reduce=(basis.T @ precise).to(weight),
        expand=basis.to(weight),
        energies=energies.clamp_min(0),
        shape=tuple(weight.shape),
        **described,
    )


def _output_basis(weight: Tensor, covariance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output energies (falling) and the orthonormal output basis ``(C_out, min(C_out, n))`` of ``weight: (C_out, n)``.

    The basis is the eigenvectors of the output covariance, or of the weights' own Gram matrix where there is none. Two
    things make the full basis reproduce the layer whatever the images were: it is sought within the range of the
    weights, and a little of their Gram matrix orders the directions that the images never showed.
    """
    tall = weight.shape[0] > weight.shape[1]
    span = torch.linalg.qr(weight).Q if tall else None
    gram = gram_matrix(span.T @ weight if tall else weight)
    if covariance is not None:
        covariance = covariance.to(gram)
        covariance = span.T @ covariance @ span if tall else covariance
        gram = _of_trace_one(covariance) + WHITENING_FLOOR * _of_trace_one(gram)
    energies, basis = falling_eigenbasis(gram)
    return energies, span @ basis.to(span) if tall else basis


def _of_trace_one(matrix: Tensor) -> Tensor:
    """Scaled to trace 1; zeros where nothing varied (rounding can push the trace of such a covariance below 0)."""
    trace = matrix.diagonal().sum()
    return matrix / trace if trace > 0 else torch.zeros_like(matrix)


def _gain(variances: Tensor, energies: Tensor) -> Tensor:
    """Per output direction, the factor that turns the kernel's energy there into the variance measured there.

    Inputs at neighbouring positions add up in some directions of the output and cancel in others, which the whitened
    kernel does not know; the measured variances ``(n,)`` do.
    """
    ratio = _unit_sum(variances.clamp_min(0)) / _unit_sum(energies)
    return torch.where(ratio.isfinite(), ratio, 1).sqrt().clamp(1e-2, 1e2)


def _unit_sum(values: Tensor) -> Tensor:
    return values / values.sum()


def _whitening(covariance: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """C^(1/2) and C^(-1/2) of the covariance ``C: (n, n)``, regularised by `least` times its mean eigenvalue."""
    values, vectors = falling_eigenbasis(covariance)
    values = values.clamp_min(0)
    # Inputs that are zero throughout say nothing: whiten by the identity.
    floor = least * values.mean() if values[0] > 0 else 1
    root = (values + floor).sqrt()
    return ((vectors * root) @ vectors.T).to(covariance), ((vectors / root) @ vectors.T).to(covariance)
