"""Compressed networks in files: one safetensors file, without pickle, that loads without the dense network.

The header says which architecture it is, and describes every module that is not as in the dense one. Loading builds
the architecture without allocating it, puts the described modules in, and takes the tensors, strictly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..compress import HTLayer
from ..configuration import Configuration, KernelRanks, MatrixRanks, Ranks
from ..files import atomic_path
from .architectures import canonical_name, skeleton
from .checkpoints import CheckpointError, read_tensors
from .specs import LARGEST, build, differences

COMPRESSED_FORMAT = "htd-compressed-1"
"""Header field `format`; dense checkpoints carry another one."""


def save_compressed(
    model: nn.Module,
    path: str | Path,
    *,
    architecture: str,
    num_classes: int,
    image_size: int,
    config: Mapping[str, Ranks] | None = None,
    metadata: dict | None = None,
) -> None:
    """Write a compressed network, also a deployed one (`Deployed.model`), in any mix of execution plans.

    Args:
        model: stays as it is. Loading gives its outputs bit for bit, on the same device with the same libraries.
        architecture: the torchvision architecture, or family, that was compressed.
        image_size: height and width in pixels of the images that it was made for.
        config: the rank configuration that it was made from; the file can be loaded without.
        metadata: anything JSON can hold, such as provenance and accuracy.

    Raises:
        ValueError: the model is not of this architecture, but for what compressing and deploying change; or it is
            compiled; or the metadata is not for JSON.
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "a compiled model cannot be saved: save the model that was compiled, and compile after loading"
        )
    architecture = canonical_name(architecture)
    input_shape = (3, image_size, image_size)
    try:
        specs = differences(model, skeleton(architecture, num_classes))
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        rebuilt = _rebuilt(architecture, num_classes, input_shape, json.loads(json.dumps(specs)))
        _check_tensors(rebuilt, tensors)
        header = {
            "format": COMPRESSED_FORMAT,
            "architecture": architecture,
            "num_classes": json.dumps(num_classes),
            "input_shape": json.dumps(input_shape),
            "config": json.dumps({name: asdict(ranks) for name, ranks in (config or {}).items()}),
            "modules": json.dumps(specs),
            "channels_last": json.dumps([name for name, tensor in tensors.items() if _is_channels_last(tensor)]),
            "metadata": json.dumps(metadata or {}, allow_nan=False),
        }
    except (TypeError, ValueError) as error:
        raise ValueError(f"this model cannot be saved as a compressed {architecture}: {error}") from error
    # Copies: safetensors refuses tensors that share storage, and wants plain memory order.
    state = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(state, temporary, metadata=header)


def load_compressed(path: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, dict]:
    """Read a network written by `save_compressed`, in evaluation mode.

    Returns:
        The model, and what the file says of it: architecture, num_classes, input_shape, config (layer name -> ranks),
        plans (layer name -> execution plan; deployed layers are plain modules and not listed) and metadata.

    Raises:
        CheckpointError (a ValueError): a missing, damaged or foreign file, or one whose header and tensors disagree.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no compressed model at {path}")
    header, state = read_tensors(path)
    try:
        info = _parsed(header)
        if not any(tensor.shape[:1] == (info["num_classes"],) for tensor in state.values()):
            raise ValueError(f"no tensor has an entry for each of its {info['num_classes']} classes")
        model = _rebuilt(info["architecture"], info["num_classes"], info["input_shape"], info.pop("modules"))
        _check_tensors(model, state)
    except Exception as error:  # a header made by hand can make any part of torch fail
        raise CheckpointError(f"{path} is not a compressed model that can be loaded: {_one_line(error)}") from error
    for name in set(info.pop("channels_last")) & state.keys():
        if state[name].ndim == 4:
            state[name] = _channels_last(state[name])
    model.load_state_dict(state, assign=True)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, HTLayer)}
    return model.to(device).eval(), {**info, "plans": {name: layer.plan for name, layer in layers.items()}}


def _parsed(header: Mapping[str, str]) -> dict[str, Any]:
    """The header's fields, each checked by itself."""
    if header.get("format") != COMPRESSED_FORMAT:
        raise ValueError(f"format {COMPRESSED_FORMAT!r} was expected, {header.get('format', 'none')!r} found")
    fields = ("num_classes", "input_shape", "config", "modules", "channels_last", "metadata")
    missing = [name for name in ("architecture", *fields) if name not in header]
    if missing:
        raise ValueError(f"its header has no {', '.join(missing)}")
    try:
        info = {name: json.loads(header[name]) for name in fields}
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    kinds = {"num_classes": int, "input_shape": list, "channels_last": list}
    for name in fields:
        if type(info[name]) is not kinds.get(name, dict):
            raise ValueError(f"{name} in its header is a {type(info[name]).__name__}")
    sizes = [info["num_classes"], *info["input_shape"]]
    if len(sizes) != 4 or not all(type(size) is int and 1 <= size <= LARGEST for size in sizes):
        raise ValueError(f"its header has classes and input shape {sizes}")
    if not all(isinstance(name, str) for name in info["channels_last"]):
        raise ValueError("channels_last in its header is not a list of names")
    info["architecture"] = canonical_name(header["architecture"])
    info["input_shape"] = tuple(info["input_shape"])
    info["config"] = Configuration({name: _ranks(name, ranks) for name, ranks in info["config"].items()})
    return info


def _ranks(name: str, ranks: Any) -> KernelRanks | MatrixRanks:
    kinds = {("rank",): MatrixRanks, ("rank_in", "rank_mid", "rank_out"): KernelRanks}
    kind = kinds.get(tuple(ranks)) if isinstance(ranks, dict) else None
    if kind is None or not all(type(rank) is int and 1 <= rank <= LARGEST for rank in ranks.values()):
        raise ValueError(f"the configuration in its header has no ranks for {name}")
    return kind(**ranks)


def _rebuilt(
    architecture: str, num_classes: int, input_shape: tuple[int, int, int], specs: Mapping[str, Any]
) -> nn.Module:
    """The network that the descriptions make of the architecture: no numbers yet, but it gives the right shapes."""
    model = skeleton(architecture, num_classes)
    for name, spec in specs.items():
        if not name:
            raise ValueError(f"it is not a {architecture} as a whole")
        try:
            model.get_submodule(name)
            module = build(spec)
        except AttributeError as error:
            raise ValueError(f"{architecture} has no module {name!r}") from error
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"module {name!r} cannot be built: {_one_line(error)}") from error
        model.set_submodule(name, module)
    model.eval()
    try:
        with torch.no_grad():
            output = model(torch.empty(1, *input_shape, device="meta"))
    except Exception as error:  # a network of descriptions that do not fit together can fail in any way
        raise ValueError(f"its modules do not fit together: {_one_line(error)}") from error
    if not isinstance(output, Tensor) or tuple(output.shape) != (1, num_classes):
        raise ValueError(f"its modules do not give {num_classes} outputs for one image of {input_shape}")
    return model


def _check_tensors(model: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the tensors have the model's names, shapes and kinds (floating or whole numbers)."""
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | found.keys()):
        shapes = [tuple(state[name].shape) if name in state else "absent" for state in (wanted, found)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"tensor {name!r} should be {shapes[0]}, is {shapes[1]}")
        types = [state[name].dtype for state in (wanted, found)]
        if types[0].is_floating_point != types[1].is_floating_point or types[1].is_complex:
            raise ValueError(f"tensor {name!r} should be {types[0]}, is {types[1]}")
    unsaved = {name for name, _ in model.named_buffers()} - wanted.keys()
    if unsaved:
        raise ValueError(f"buffer {min(unsaved)!r} is computed when the network is made, and not in its state")


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether the strides are those of channels-last and not the plain ones.

    A kernel of 1 x 1 is the same memory both ways and counts as contiguous both ways. Its strides matter all the same:
    torch takes them as a hint of the layout to run in.
    """
    if tensor.ndim != 4:
        return False
    plain = torch.empty(tensor.shape, device="meta")
    last = torch.empty(tensor.shape, device="meta", memory_format=torch.channels_last)
    return plain.stride() != tensor.stride() == last.stride()


def _channels_last(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, memory_format=torch.channels_last).copy_(tensor)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
