"""Which arithmetic networks are trained and evaluated in; factorisation, screening and deployment are in float32.

bfloat16 where the hardware has it, except where it is wrong: on CPUs the gradient of a bfloat16 convolution whose
window is larger than its feature map reads memory that nobody wrote (oneDNN; strided 3 x 3 on maps one pixel wide, as
ResNet18 has them at 16 px, and 7 x 7 on maps up to four wide). It differs from run to run and is NaN at times. Such
maps are tiny, so those convolutions run in float32 at no price.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..processor import has

_CONVOLUTIONS = {
    getattr(torch, name): int(name[-2])
    for name in ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
}
"""Torch's convolutions, each with its number of spatial axes."""


@contextmanager
def autocast(device: torch.device, wanted: bool | None = None) -> Iterator[None]:
    """bfloat16 autocast inside. wanted: None asks for it on CUDA and on processors that have bfloat16."""
    if wanted is None:
        wanted = device.type == "cuda" or (device.type == "cpu" and has("bfloat16"))
    narrow_in_float32 = _NarrowInFloat32() if wanted and device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted), narrow_in_float32:
        yield


class _NarrowInFloat32(TorchFunctionMode):
    """While active, a convolution whose window is larger than its input along some axis is computed in float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _CONVOLUTIONS or not _narrow(_CONVOLUTIONS[func], *_input_and_weight(args, kwargs)):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            args = [value.float() if isinstance(value, Tensor) else value for value in args]
            kwargs = {name: value.float() if isinstance(value, Tensor) else value for name, value in kwargs.items()}
            return func(*args, **kwargs)


def _input_and_weight(args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    named = dict(zip(("input", "weight"), args, strict=False)) | kwargs
    return named["input"], named["weight"]


def _narrow(axes: int, features: Tensor, weight: Tensor) -> bool:
    pairs = zip(features.shape[-axes:], weight.shape[-axes:], strict=True)
    return any(size < window for size, window in pairs)
