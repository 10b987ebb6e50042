"""Factorise a whole model once, and prove that it still is what it was."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..cost import count_flops, count_params
from ..inputs import Batches, Inputs, batches_of, first, like_model, sample
from ..modules import unwrapped
from .decompose import BASES, factorize_layer
from .geometry import CONVOLUTIONS
from .model_factors import ModelFactors
from .moments import gather_moments
from .proof import check_repeatable, without_broken
from .selection import choose_layers
from .trace import trace_layers

NOISE_SIZES = {1: (4096,), 2: (224, 224), 3: (16, 112, 112)}
"""Axes of a network's first convolution -> the size of the input that is taken for granted where none is given."""

PROOF_IMAGES = 2
"""Calibration images on which the network at full ranks is compared with the dense one."""


def factorize(
    model: nn.Module,
    images: Batches | None = None,
    *,
    layers: str | Iterable[str] = "all",
    bases: str = "both",
    input_shape: tuple[int, int, int] | None = None,
    batch_size: int = 128,
) -> ModelFactors:
    """Factorise every layer that can be, once, and prove it: at full ranks the network computes what it did.

    A layer that does not reproduce its part (other code reads it, chooses its way by its class, or the like) stays
    dense, with the reason in `skipped`.

    Args:
        model: the dense model, also compiled or in DataParallel; it stays as it was, and the factors share no tensor
            with it.
        images: calibration images ``(N, C, H, W)`` from the training split, or batches in any form (see
            `common.inputs`: a DataLoader of pairs, arrays, several inputs): data-aware bases. None: weight-only bases
            (plain HSVD).
        layers: one of LAYER_SETS, or the names of the layers to factorise.
        bases: with images, what they are used for; one of BASES.
        input_shape: (C, H, W) when there are no images; by default what NOISE_SIZES has.

    Raises:
        ValueError: a scripted network, one without weights, or one that changes its input in place; an unknown layer,
            layer set or basis; no images; images that make an activation NaN or infinite; or no layer that can be
            factorised, with the reasons.
    """
    model = unwrapped(model)
    if bases not in BASES:
        raise ValueError(f"bases must be one of {', '.join(BASES)}; got {bases!r}")
    if images is not None and not isinstance(images, Tensor):
        # Read twice: for the shapes and for the moments. As pairs, since a tuple alone may be several inputs or one.
        images = [(one, None) for one in batches_of(images)]
    example = _example(model, images, input_shape)
    check_repeatable(model, first(example, 1))
    traces = trace_layers(model, first(example, 1))
    chosen, skipped = choose_layers(model, traces, layers)
    kernels = [name for name, is_kernel in chosen.items() if is_kernel]
    moments = {}
    if images is not None:
        observed = {name: traces[name] for name in chosen}
        moments = gather_moments(model, images, observed, kernels=kernels, batch_size=batch_size)
    factors = {}
    with torch.no_grad():
        for name, is_kernel in chosen.items():
            layer, known = model.get_submodule(name), moments.get(name)
            factors[name] = factorize_layer(name, layer, traces[name], known, bases, is_kernel=is_kernel)
    shape = tuple(tree_leaves(example)[0].shape[1:])
    flops = count_flops(model, first(example, 1))
    found = ModelFactors(model, factors, skipped, shape, count_params(model), flops)
    found = without_broken(found, example)
    if not found.layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.skipped.items())
        raise ValueError(f"no layer of {type(model).__name__} can be factorised: {reasons or 'it has none'}")
    return found


def _example(model: nn.Module, images: Tensor | list[Inputs] | None, input_shape: tuple | None) -> Inputs:
    """A few inputs for shapes, costs and the proof: of the images, or noise where there are none."""
    if images is not None:
        return like_model(sample(images, PROOF_IMAGES), model)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if input_shape is None:
        first_layer = next((m for m in model.modules() if isinstance(m, CONVOLUTIONS)), None)
        channels, axes = (first_layer.in_channels, len(first_layer.kernel_size)) if first_layer is not None else (3, 2)
        input_shape = (channels, *NOISE_SIZES[axes])
    noise = torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0))
    return noise.to(like)
