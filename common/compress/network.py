"""Factorise a whole model once; a rank configuration in, a compressed copy out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..configuration import Configuration, Ranks
from ..cost import count_flops, count_params
from ..modules import copy_with
from .decompose import BASES, factorize_kernel, factorize_matrix
from .factors import KernelFactors, MatrixFactors
from .moments import gather_moments
from .trace import LayerTrace, trace_layers

LAYER_SETS = ("all", "convs", "kernels")
"""Which layers to factorise: every one, only convolutions, or only convolutions with a window (no 1 x 1)."""

SMALLEST_MATRIX = 32
"""A matrix with a side shorter than this stays dense: a head of few classes has next to nothing to save, and each of
its outputs is one that the network is judged by. It is factorised all the same if it is asked for by name."""


@dataclass(frozen=True)
class ModelFactors:
    """A model's factorised layers. Holds the dense model by reference and never changes it.

    Attributes:
        model: the dense model.
        layers: name -> factors, in the model's order.
        skipped: name -> the reason why a convolution or linear layer stays dense.
        input_shape: (C, H, W) of the images that the sizes and costs belong to.
        dense_params: parameters of the dense model.
        dense_flops: its multiply-accumulates for one image.
    """

    model: nn.Module = field(repr=False)
    layers: dict[str, KernelFactors | MatrixFactors]
    skipped: dict[str, str]
    input_shape: tuple[int, int, int]
    dense_params: int
    dense_flops: int

    def full_ranks(self) -> Configuration:
        """The configuration that reproduces the dense model to rounding."""
        return Configuration({name: factors.full_ranks for name, factors in self.layers.items()})

    def check(self, config: Mapping[str, Ranks]) -> None:
        """Raise ValueError, naming the layer, the value and the legal range, unless the configuration can be built."""
        for name, ranks in config.items():
            if name in self.skipped:
                raise ValueError(f"layer {name} stays dense: {self.skipped[name]}")
            if name not in self.layers:
                raise ValueError(f"no layer {name!r} was factorised; there are {', '.join(self.layers)}")
            self.layers[name].check(ranks)

    def compress(self, config: Mapping[str, Ranks]) -> nn.Module:
        """A copy of the model with the configured layers truncated; shares no tensor with the dense model.

        Only slices bases and contracts small cores. The weights that are replaced are never copied.

        Raises:
            ValueError: a layer that does not exist or stays dense, or a rank out of range.
        """
        self.check(config)
        replaced: dict[nn.Module, nn.Module] = {}
        for name, ranks in config.items():
            dense = self.model.get_submodule(name)
            replaced[dense] = self.layers[name].layer(ranks).train(dense.training)
        return copy_with(self.model, replaced)

    def params(self, config: Mapping[str, Ranks]) -> int:
        """Parameters of ``compress(config)``, by formula."""
        return self.dense_params + sum(
            self.layers[name].params(ranks) - self.layers[name].dense_params for name, ranks in config.items()
        )

    def flops(self, config: Mapping[str, Ranks]) -> int:
        """Multiply-accumulates of ``compress(config)`` for one image, by formula: convolutions and linear layers."""
        return self.dense_flops + sum(
            self.layers[name].flops(ranks) - self.layers[name].dense_flops for name, ranks in config.items()
        )

    def output_means(self) -> dict[str, Tensor]:
        """Name -> the dense layer's mean output ``(C_out,)``, for :func:`recalibrate`."""
        return {name: f.output_mean for name, f in self.layers.items() if f.output_mean is not None}

    def output_stds(self) -> dict[str, Tensor]:
        """Name -> standard deviation of the dense layer's output ``(C_out,)``, likewise."""
        return {name: f.output_std for name, f in self.layers.items() if f.output_std is not None}


def factorize(
    model: nn.Module,
    images: Tensor | Iterable[Tensor] | None = None,
    *,
    layers: str | Iterable[str] = "all",
    bases: str = "both",
    input_shape: tuple[int, int, int] | None = None,
    batch_size: int = 128,
) -> ModelFactors:
    """Factorise every layer that can be, once.

    Args:
        model: the dense model; it stays as it was, and the factors share no tensor with it.
        images: calibration images ``(N, C, H, W)``, or batches of them, from the training split: data-aware bases.
            None: weight-only bases (plain HSVD).
        layers: one of LAYER_SETS, or the names of the layers to factorise.
        bases: with images, what they are used for; one of BASES.
        input_shape: (C, H, W) when there are no images; 224 x 224 by default.

    Raises:
        ValueError: an unknown layer, layer set or basis; no images; images that make an activation NaN or infinite.
    """
    if bases not in BASES:
        raise ValueError(f"bases must be one of {', '.join(BASES)}; got {bases!r}")
    if images is not None and not isinstance(images, Tensor):
        images = list(images)
    example = _example(model, images, input_shape)
    traces = trace_layers(model, example)
    chosen, skipped = _choose(model, traces, layers)
    kernels = [name for name, is_kernel in chosen.items() if is_kernel]
    moments = {}
    if images is not None:
        observed = {name: traces[name] for name in chosen}
        moments = gather_moments(model, images, observed, kernels=kernels, batch_size=batch_size)
    factors = {}
    with torch.no_grad():
        for name, is_kernel in chosen.items():
            make = factorize_kernel if is_kernel else factorize_matrix
            factors[name] = make(name, model.get_submodule(name), traces[name], moments.get(name), bases)
    shape = tuple(example.shape[1:])
    return ModelFactors(model, factors, skipped, shape, count_params(model), count_flops(model, shape))


def _example(model: nn.Module, images: Tensor | list[Tensor] | None, input_shape: tuple | None) -> Tensor:
    if images is not None:
        if not len(images) or not len(images[0]):
            raise ValueError("no calibration images were given")
        return images[:1] if isinstance(images, Tensor) else images[0][:1]
    parameter = next(model.parameters())
    if input_shape is None:
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        input_shape = (first.in_channels if first is not None else 3, 224, 224)
    return torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype)


def _choose(
    model: nn.Module, traces: Mapping[str, LayerTrace], layers: str | Iterable[str]
) -> tuple[dict[str, bool], dict[str, str]]:
    """Name -> whether the layer is a kernel (else a matrix), and name -> reason for those that stay dense."""
    if isinstance(layers, str) and layers not in LAYER_SETS:
        raise ValueError(f"layers must be one of {', '.join(LAYER_SETS)} or a list of names; got {layers!r}")
    layers = layers if isinstance(layers, str) else set(layers)
    chosen, skipped = {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear, nn.modules.conv._ConvTransposeNd, nn.Conv1d, nn.Conv3d)):
            continue
        reason = _reason_to_skip(name, module, traces, layers)
        if reason:
            skipped[name] = reason
        else:
            chosen[name] = _is_kernel(module, traces[name])
    if not isinstance(layers, str) and (unknown := layers - set(chosen)):
        name = sorted(unknown)[0]
        raise ValueError(f"layer {name!r} cannot be factorised: {skipped.get(name, 'the model has no such layer')}")
    return chosen, skipped


def _reason_to_skip(
    name: str, module: nn.Module, traces: Mapping[str, LayerTrace], layers: str | set[str]
) -> str | None:
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "a transposed convolution"
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters (weight norm, pruning or the like)"
    if type(module) not in (nn.Conv2d, nn.Linear):
        return f"a {type(module).__name__}, which is neither torch's Conv2d nor its Linear"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return "a depthwise convolution" if module.groups == module.in_channels else "a grouped convolution"
    if name not in traces:
        return "it does not run in eval mode"
    if isinstance(layers, str):
        if not _is_kernel(module, traces[name]) and min(module.weight.shape[:2]) < SMALLEST_MATRIX:
            return f"a matrix with a side shorter than {SMALLEST_MATRIX}"
        kernel_only = layers == "kernels" and isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
        outside = kernel_only or (layers != "all" and isinstance(module, nn.Linear))
    else:
        outside = name not in layers
    return "not in the chosen set of layers" if outside else None


def _is_kernel(module: nn.Conv2d | nn.Linear, trace: LayerTrace) -> bool:
    if isinstance(module, nn.Linear):
        return trace.unflatten is not None
    return module.kernel_size != (1, 1)
