"""A network in a file, as ONNX or as a `torch.export` program: any batch size, checked before the file exists."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map

from ..files import atomic_path
from ..inputs import Inputs, first, length, run
from ..modules import copy_with, evaluating, first_line, unwrapped
from .onnx_run import onnx_session
from .packages import package
from .quantise import quantised_onnx

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference between torch's outputs and onnxruntime's that an export may have, relative to the largest."""

ROUGHLY = 1.0
"""The same of a file in int8: what is above it is no rounding. What it does to accuracy is for the user to measure."""


def export_onnx(
    model: nn.Module | Any,
    example: Inputs,
    path: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    int8: Inputs | None = None,
) -> None:
    """Write the model as one ONNX file with a dynamic batch axis, checked against torch before the file exists.

    One input is called "images", one output "logits"; several have the names of their dictionary, or numbers.

    Args:
        model: runs in eval mode; it and its training flags stay as they are. Any device: the export is made on the CPU.
            Or what `deploy` returns.
        example: ``(N, C, H, W)`` images, or several inputs, see `common.inputs`. The file takes any N.
        path: written in one step, after onnxruntime gave torch's outputs, within TOLERANCE, at two batch sizes.
        metadata: kept in the file's own metadata as JSON, such as class names and the normalisation of images.
        int8: calibration images: the file is quantised to int8 with their ranges, for any processor (see
            `common.deploy.quantise`), and may then differ by ROUGHLY.

    Raises:
        ValueError: the model cannot be exported, or does not give the same outputs there.
    """
    with _export_of(model, example, path) as (on_cpu, inputs, temporary):
        # A batch of 1 would be taken for a constant.
        _export(on_cpu, resized(inputs, 2), temporary, metadata)
        if int8 is not None:
            images = tree_map(lambda t: t.detach().cpu(), inputs_of_one(int8))
            temporary.write_bytes(quantised_onnx(temporary.read_bytes(), images, anywhere=True))
        session = onnx_session(temporary, structure=output_structure(on_cpu, inputs))
        for batch, given in _two_batches(inputs):
            try:
                found = session(given)
            except ValueError as error:
                raise ValueError(
                    f"{type(on_cpu).__name__} cannot be exported for any batch size, at batch {batch} the file fails: "
                    f"{error}"
                ) from error
            _check_outputs(run(on_cpu, given), found, batch, None if int8 is None else ROUGHLY)


def export_program(model: nn.Module | Any, example: Inputs, path: str | Path) -> None:
    """Write the model as a `torch.export` program (.pt2) with a dynamic batch axis: torch alone loads and runs it.

    Args:
        model, example: as `export_onnx`; the program runs on the CPU.
        path: written in one step, after the program gave the model's outputs.

    Raises:
        ValueError: the model cannot be exported, or does not give the same outputs there.
    """
    with _export_of(model, example, path) as (on_cpu, inputs, temporary):
        arguments, _ = _arguments(resized(inputs, 2))
        try:
            with _quiet():
                program = torch.export.export(on_cpu, **arguments)
                torch.export.save(program, temporary)
                loaded = torch.export.load(temporary).module()
        except Exception as error:  # the exporter raises what it likes
            raise ValueError(
                f"{type(on_cpu).__name__} cannot be exported by torch.export: {first_line(error)}"
            ) from error
        for batch, given in _two_batches(inputs):
            _check_outputs(run(on_cpu, given), run(loaded, given), batch)


@contextlib.contextmanager
def _export_of(model: nn.Module | Any, example: Inputs, path: str | Path) -> Iterator[tuple[nn.Module, Inputs, Path]]:
    """The model without wrappers, evaluating, and its inputs, both on the CPU; and the temporary file of `path`."""
    model = unwrapped(model if isinstance(model, nn.Module) else getattr(model, "model", model))
    inputs = tree_map(lambda tensor: tensor.detach().cpu(), inputs_of_one(example))
    with evaluating(model), atomic_path(path) as temporary, torch.no_grad():
        yield model if _on_cpu(model) else copy_with(model, {}).cpu(), inputs, temporary


def _two_batches(inputs: Inputs) -> Iterator[tuple[int, Inputs]]:
    """Two batch sizes that an export must give the model's outputs at, each with inputs of this size."""
    for batch in (1, max(3, length(inputs))):
        yield batch, resized(inputs, batch)


def inputs_of_one(example: Inputs) -> Inputs:
    """The example as inputs: a list of tensors counts as several."""
    return tuple(example) if isinstance(example, list) else example


def resized(inputs: Inputs, batch: int) -> Inputs:
    """The samples repeated, or cut off, to a batch of this size."""
    repeats = -(-batch // length(inputs))
    return tree_map(lambda t: t.repeat(repeats, *[1] * (t.ndim - 1))[:batch].contiguous(), inputs)


def output_structure(model: nn.Module, example: Inputs) -> TreeSpec:
    """The structure of the model's output: a tensor, or tuples, lists and dictionaries of tensors.

    Raises:
        ValueError: something else is in it, by its kind.
    """
    with evaluating(model), torch.no_grad():
        leaves, structure = tree_flatten(run(model, example))
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise ValueError(
                f"{type(model).__name__} puts out a {type(leaf).__name__}, which is no tensor: outputs may be tensors "
                "and tuples, lists and dictionaries of them"
            )
    return structure


def onnx_bytes(model: nn.Module, example: Inputs) -> bytes:
    """The graph of a whole network, unchecked, exported as by `export_onnx`."""
    buffer = io.BytesIO()
    with evaluating(model), torch.no_grad():
        _export(model, resized(first(example, 1), 2), buffer)
    return buffer.getvalue()


def _export(
    model: nn.Module, inputs: Inputs, target: Path | io.BytesIO, metadata: Mapping[str, Any] | None = None
) -> None:
    package("onnxscript", "onnx")
    arguments, names = _arguments(inputs)
    try:
        outputs = _output_names(run(model, inputs))
        with _quiet():
            program = torch.onnx.export(
                model, **arguments, input_names=names, output_names=outputs, dynamo=True, verbose=False
            )
        program.model.metadata_props.update({key: json.dumps(value) for key, value in (metadata or {}).items()})
        if isinstance(target, io.BytesIO):
            program.save(target, external_data=False)
        else:
            program.save(str(target), external_data=False)
    except Exception as error:  # the exporter raises what it likes, from five libraries
        raise ValueError(f"{type(model).__name__} cannot be exported to ONNX: {first_line(error)}") from error


def _arguments(inputs: Inputs) -> tuple[dict[str, Any], list[str]]:
    """What the exporters are called with, the batch axis dynamic; and the names of the inputs."""
    batch = torch.export.Dim("batch")
    shapes = tree_map(lambda _: {0: batch}, inputs)
    if isinstance(inputs, Mapping):
        return {"args": (), "kwargs": dict(inputs), "dynamic_shapes": dict(shapes)}, list(inputs)
    several = inputs if isinstance(inputs, tuple) else (inputs,)
    shapes = shapes if isinstance(inputs, tuple) else (shapes,)
    names = ["images"] if len(several) == 1 else [f"input{place}" for place in range(len(several))]
    return {"args": several, "dynamic_shapes": shapes}, names


def _output_names(output: Any) -> list[str]:
    if isinstance(output, Mapping) and all(isinstance(value, Tensor) for value in output.values()):
        return [str(key) for key in output]
    leaves = tree_leaves(output)
    return ["logits"] if len(leaves) == 1 else [f"output{place}" for place in range(len(leaves))]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its progress and the future of its own parts; neither helps who calls it."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_outputs(expected: Any, found: Any, batch: int, allowed: float | None = None) -> None:
    for one, other in zip(tree_leaves(expected), tree_leaves(found), strict=True):
        if one.shape != other.shape:
            raise ValueError(
                f"the exported network gives {tuple(other.shape)} at batch {batch}, torch {tuple(one.shape)}"
            )
        most = allowed or TOLERANCE.get(one.dtype, TOLERANCE[torch.float32])
        one, other = one.double(), other.double()
        error = float((one - other).abs().max() / one.abs().max().clamp_min(1e-30)) if one.numel() else 0.0
        if not error <= most:
            raise ValueError(
                f"the exported network's outputs differ from torch's by {error:.1e} relative at batch {batch}; "
                f"at most {most:.0e} is allowed"
            )


def _on_cpu(model: nn.Module) -> bool:
    return all(tensor.device.type == "cpu" for tensor in model.state_dict().values())
