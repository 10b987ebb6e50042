"""How a kernel of any order meets its input, and the convolutions that its stages are.

A kernel's window has one, two or three axes. In a factorised layer it has two sides, the *rows* and the *columns* of
the tree ``((in, rows), (columns, out))``: height and width in two dimensions; time and the whole of height by width
in three, the tree ``((in, k_t), ((k_h, k_w), out))``; in one dimension there are no rows, which leaves
``(in, (k, out))``. Weights are in *kernel form* ``(C_out, C_in, rows, columns)`` whatever the number of axes, and
whichever way torch keeps them: a transposed convolution's come first in, a group's input channels are its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class Sides(NamedTuple):
    """Which axes of a window are its rows, and which its columns."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]


SIDES = {1: Sides((), (0,)), 2: Sides((0,), (1,)), 3: Sides((0,), (1, 2))}
"""Number of a window's axes -> its two sides."""


@dataclass(frozen=True)
class Geometry:
    """How a kernel meets its input, per axis of its window; ``padding`` is a tuple of widths, "same" or "valid".

    ``unflatten`` is (C, H, W) for a linear layer behind a flatten: its input is viewed as that feature map.
    ``linear`` marks a layer that maps (N, features) to (N, features). ``window`` holds the sizes of a window of three
    axes, two of which are the columns; the others' can be seen on the weights.
    """

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] | str = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    padding_mode: str = "zeros"
    unflatten: tuple[int, int, int] | None = None
    linear: bool = False
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] | None = None
    window: tuple[int, ...] | None = None

    @classmethod
    def of(cls, layer: Convolution | nn.Linear, unflatten: tuple[int, int, int] | None = None) -> Geometry:
        if isinstance(layer, nn.Linear):
            return cls(unflatten=unflatten, linear=True)
        transposed = isinstance(layer, TRANSPOSED)
        return cls(
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.padding_mode,
            groups=layer.groups,
            transposed=transposed,
            output_padding=layer.output_padding if transposed else None,
            window=layer.kernel_size if len(layer.kernel_size) == 3 else None,
        )

    @property
    def axes(self) -> int:
        """How many the window has."""
        return len(self.stride)

    @property
    def sides(self) -> Sides:
        return SIDES[self.axes]

    def convolution(self, weight: Tensor, bias: Tensor | None, *, rows: bool, columns: bool) -> Convolution:
        """A convolution with a copy of ``weight: (o, i, h, w)`` that strides, pads and dilates on the sides named.

        A stage without a window is a plain convolution even where the layer is a transposed one.

        Raises:
            ValueError: a weight that is wider than the sides allow.
        """
        on = [(rows and axis in self.sides.rows) or (columns and axis in self.sides.columns) for axis in self._each()]
        transposed = self.transposed and any(on)
        weight = weight.reshape(*weight.shape[:2], *self._sizes(weight, on))
        if transposed:
            weight = swapped(weight, self.groups)
        options = {"stride": self._where(on, self.stride, 1), "dilation": self._where(on, self.dilation, 1)}
        options["padding"] = self.padding if isinstance(self.padding, str) else self._where(on, self.padding, 0)
        if transposed:
            options["output_padding"] = self._where(on, self.output_padding, 0)
        kinds = TRANSPOSED if transposed else CONVOLUTIONS
        first, second = weight.shape[0], weight.shape[1] * self.groups
        layer = nn.utils.skip_init(
            kinds[self.axes - 1],
            first if transposed else second,
            second if transposed else first,
            tuple(weight.shape[2:]),
            padding_mode=self.padding_mode,
            groups=self.groups,
            bias=bias is not None,
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        return filled(layer, weight, bias)

    def _each(self) -> range:
        return range(self.axes)

    def _where(self, on: Sequence[bool], values: Sequence[int], default: int) -> tuple[int, ...]:
        return tuple(value if here else default for value, here in zip(values, on, strict=True))

    def _sizes(self, weight: Tensor, on: Sequence[bool]) -> tuple[int, ...]:
        """The window of a weight in kernel form, axis by axis."""
        height, width = weight.shape[2:]
        if self.axes == 3:
            sizes = self._where(on, self.window or (1, 1, 1), 1)
        else:
            sizes = (width,) if self.axes == 1 else (height, width)
        sides = tuple(math.prod(sizes[axis] for axis in side) for side in self.sides)
        if sides != (height, width):
            raise ValueError(f"a window of {height} x {width} does not fit one of {self.axes} axes, {sizes}")
        return sizes

    def kernel_form(self, weight: Tensor, *, transposed: bool) -> Tensor:
        """A convolution's weight as ``(C_out, C_in of a group, rows, columns)``; transposed: of a transposed one."""
        weight = swapped(weight, self.groups) if transposed else weight
        sizes = [math.prod(weight.shape[2 + axis] for axis in side) for side in self.sides]
        return weight.reshape(*weight.shape[:2], *sizes)

    def sides_of(self, sizes: Sequence[int]) -> tuple[int, int]:
        """Sizes per axis, of a window or of a map, as (rows, columns)."""
        rows, columns = (math.prod(sizes[axis] for axis in side) for side in self.sides)
        return rows, columns


def paddings(layer: nn.Module) -> list[tuple[int, int]]:
    """(before, after) along each axis of a plain convolution's window; torch keeps them last axis first."""
    both = layer._reversed_padding_repeated_twice
    return list(zip(both[0::2], both[1::2], strict=True))[::-1]


def swapped(weight: Tensor, groups: int) -> Tensor:
    """``(groups a, b, ...)`` -> ``(groups b, a, ...)``: between a transposed convolution's weight and a plain one's."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def scale_outputs(layer: nn.Module, factors: Tensor) -> None:
    """Multiply a convolution's or linear layer's weight, in place, by one factor per output channel ``(C_out,)``."""
    weight, shape = layer.weight.detach(), (-1,)
    if isinstance(layer, TRANSPOSED):
        weight, shape = weight.unflatten(0, (layer.groups, -1)), (layer.groups, 1, -1)
    weight.mul_(factors.reshape(*shape, *[1] * (weight.ndim - len(shape))))


def filled(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The layer with a copy of these in place of its own."""
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer
