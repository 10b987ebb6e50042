"""What a machine can do at best, measured: the roofline of Williams et al. 2009 (doi:10.1145/1498765.1498785).

No kernel can be faster than its arithmetic at the peak of large convolutions, or its traffic at the speed of copies of
that size.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..cost import measure_latency
from .onnx_export import onnx_bytes
from .onnx_run import onnx_session
from .openvino_run import openvino_session
from .profile import FLOAT_BYTES, Kernel, check_runtime, openvino_graph

COPIED_BYTES = tuple(2**power for power in range(14, 29, 2))
"""Sizes of the copies that are timed, read and written bytes together: from what fits into a core's cache to memory."""


@dataclass(frozen=True)
class Roofline:
    """What a machine can do at best, in one runtime, with a number of threads.

    Attributes:
        flops_per_second: multiply-accumulates, of the fastest of some large convolutions.
        copies: (bytes read and written, bytes per second) of copies, by size.
    """

    flops_per_second: float
    copies: tuple[tuple[int, float], ...]

    def seconds(self, kernel: Kernel) -> float:
        """The least that a kernel can take."""
        return max(kernel.flops / self.flops_per_second, kernel.bytes / self.bytes_per_second(kernel.bytes))

    def bytes_per_second(self, size: int) -> float:
        """Of a copy of this many bytes: between measured sizes, along the logarithm."""
        sizes = [one for one, _ in self.copies]
        place = bisect_left(sizes, size)
        if place in (0, len(sizes)):
            return self.copies[min(place, len(sizes) - 1)][1]
        (low, slow), (high, fast) = self.copies[place - 1], self.copies[place]
        share = math.log(size / low) / math.log(high / low)
        return slow + share * (fast - slow)


def roofline(runtime: str, threads: int | None = None, *, rounds: int = 10, int8: bool = False) -> Roofline:
    """Measure the peak of large convolutions in a runtime, in float32 or int8, and the speed of copies of all sizes.

    Raises:
        ValueError: a runtime that `profile` does not take.
    """
    check_runtime(runtime, int8)
    threads = threads or torch.get_num_threads()
    peak = 0.0
    for channels, side, window in ((128, 56, 3), (256, 28, 3), (512, 14, 3), (512, 28, 1)):
        layer = nn.Conv2d(channels, channels, window, padding=window // 2, bias=False).requires_grad_(False)
        images = torch.randn(8, channels, side, side)
        graph = onnx_bytes(layer.eval(), images)
        if runtime == "onnxruntime":
            run = onnx_session(graph, threads)
        else:
            run = openvino_session(openvino_graph(graph, images if int8 else None), threads)
        seconds = measure_latency({"peak": run}, images, rounds=rounds, threads=threads)["peak"]
        peak = max(peak, layer.weight.numel() * 8 * side**2 / seconds)
    return Roofline(peak, tuple((size, _copy_speed(size, threads, rounds)) for size in COPIED_BYTES))


def _copy_speed(size: int, threads: int, rounds: int) -> float:
    source = torch.randn(size // (2 * FLOAT_BYTES))
    target = torch.empty_like(source)
    repeats = max(1, 2**22 // size)  # one call of torch's costs microseconds

    def copies(given: Tensor) -> Tensor:
        for _ in range(repeats):
            target.copy_(given)
        return target

    return repeats * size / measure_latency({"copy": copies}, source, rounds=rounds, threads=threads)["copy"]
