"""A model's factorised layers: a rank configuration in, a compressed copy out; costs by formula."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..configuration import Configuration, Ranks
from ..modules import copy_with
from .factors import KernelFactors, MatrixFactors
from .grouped import GroupedFactors

Factors = KernelFactors | MatrixFactors | GroupedFactors


@dataclass(frozen=True)
class ModelFactors:
    """A model's factorised layers. Holds the dense model by reference and never changes it.

    Attributes:
        model: the dense model.
        layers: name -> factors, in the model's order.
        skipped: name -> the reason why a convolution or linear layer stays dense.
        input_shape: (C, H, W) of the images that the sizes and costs belong to; of several inputs the first one's.
        dense_params: parameters of the dense model.
        dense_flops: its multiply-accumulates for one image.
    """

    model: nn.Module = field(repr=False)
    layers: dict[str, Factors]
    skipped: dict[str, str]
    input_shape: tuple[int, ...]
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
            layer = self.layers[name].layer(ranks).train(dense.training)
            replaced[dense] = layer.requires_grad_(dense.weight.requires_grad)
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
