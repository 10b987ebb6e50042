"""Post-training quantisation to int8: weights and feature maps, with ranges from calibration images.

Of ONNX graphs by onnxruntime's static quantisation (QDQ nodes, a scale per output channel), of OpenVINO's by NNCF. Both
leave what their runtime cannot do in int8 in float32.

x86 processors without VNNI add products of int8 by pairs in 16 bits, and cut off what does not fit there: outputs are
then far off, and nothing fails. Products with weights of seven bits always fit, so that is what weights get there, and
in files, which may be run anywhere.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils._pytree import tree_leaves

from ..inputs import Inputs, length, split
from ..modules import first_line
from ..processor import has, is_x86
from .packages import package


def saturates() -> bool:
    """Whether this processor adds products of int8 in 16 bits: x86 without VNNI; and where torch cannot tell."""
    return is_x86() and not has("VNNI")


def quantised_onnx(graph: bytes, images: Inputs, *, anywhere: bool = False) -> bytes:
    """The graph in int8, its ranges those of `images`, which are given in float32 on the CPU.

    Args:
        anywhere: it may be run by another processor than this one.

    Raises:
        ValueError: onnxruntime cannot quantise it, or is not installed.
    """
    quantisation = package("onnxruntime.quantization", "onnx")
    preparation = package("onnxruntime.quantization.shape_inference", "onnx")
    onnx = package("onnx", "onnx")
    names = [one.name for one in onnx.load_from_string(graph).graph.input]

    class Reader(quantisation.CalibrationDataReader):
        """The images one by one, as onnxruntime asks for them."""

        def __init__(self) -> None:
            self.left = _singles(images, names)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder, _silent():
        given, prepared, made = (str(Path(folder) / f"{name}.onnx") for name in ("given", "prepared", "made"))
        Path(given).write_bytes(graph)
        try:
            preparation.quant_pre_process(given, prepared, skip_symbolic_shape=True)
            quantisation.quantize_static(
                prepared,
                made,
                Reader(),
                quant_format=quantisation.QuantFormat.QDQ,
                activation_type=quantisation.QuantType.QUInt8,
                weight_type=quantisation.QuantType.QInt8,
                per_channel=True,
                reduce_range=anywhere or saturates(),
            )
        except Exception as error:  # of onnx, onnxruntime and protobuf, which share no base class
            raise ValueError(f"the graph cannot be quantised: {first_line(error)}") from error
        return Path(made).read_bytes()


def quantised_openvino(model: Any, images: Inputs) -> Any:
    """A model of `openvino_model` in int8, its ranges those of `images`, which are given in float32 on the CPU.

    Raises:
        ValueError: NNCF cannot quantise it, or is not installed.
    """
    with _silent():
        nncf = package("nncf", "openvino")
        names = [port.any_name for port in model.inputs]
        singles = list(_singles(images, names))
        fix = nncf.OverflowFix.ENABLE if saturates() else None
        advanced = nncf.AdvancedQuantizationParameters(overflow_fix=fix)
        try:
            return nncf.quantize(model, nncf.Dataset(singles), subset_size=len(singles), advanced_parameters=advanced)
        except Exception as error:  # NNCF raises what it likes
            raise ValueError(f"the graph cannot be quantised: {first_line(error)}") from error


def _singles(images: Inputs, names: list[str]) -> Iterator[dict[str, np.ndarray]]:
    for one in split(images, 1) if length(images) else ():
        yield {name: leaf.contiguous().numpy() for name, leaf in zip(names, tree_leaves(one), strict=True)}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Inside, neither the progress bars of the quantisers nor their advice are shown; errors are."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
