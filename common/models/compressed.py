"""Compressed networks in files: one safetensors file, without pickle, that loads without the dense network.

The header says which architecture it is, and describes every module that is not as in the dense one. Loading builds
the architecture without allocating it, puts the described modules in, and takes the tensors, strictly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from ..compress import HTLayer
from ..configuration import Ranks
from ..modules import copy_with, unwrapped
from .architectures import canonical_name, head_name, skeleton
from .checkpoints import CheckpointError, check_digest, read_tensors, write_tensors
from .header import COMPRESSED_FORMAT, OWN_FORMAT, parsed
from .specs import build, describe, differences

DEFAULT_SIZE = 224
"""Pixels of the images on which a file is checked whose maker did not say what it is for."""


def save_compressed(
    model: nn.Module,
    path: str | Path,
    *,
    architecture: str | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    dense: nn.Module | None = None,
    config: Mapping[str, Ranks] | None = None,
    metadata: dict | None = None,
) -> None:
    """Write a compressed network, also a deployed one (`Deployed.model`), in any mix of execution plans.

    Nothing but the model and the path is needed: torchvision's networks are recognised, and loaded without anything
    else; any other is loaded into what `load_compressed(path, model=...)` makes.

    Args:
        model: stays as it is. Loading gives its outputs bit for bit, on the same device with the same libraries.
        architecture: the torchvision architecture, or family, that was compressed; None recognises it.
        num_classes: of its head; None counts them.
        image_size: height and width in pixels of the images that it was made for.
        dense: the network of somebody's own that was compressed; needed where the model was deployed since, as
            batch norms are then gone that the dense one has.
        config: the rank configuration that it was made from; the file can be loaded without.
        metadata: anything JSON can hold, such as class names, normalisation, provenance and accuracy.

    Raises:
        ValueError: the model is not of this architecture, but for what compressing and deploying change; or the
            metadata is not for JSON.
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "a compiled model cannot be saved: save the model that was compiled, and compile after loading"
        )
    model = unwrapped(model)
    if architecture is None and dense is None:
        architecture = recognised_architecture(model)
    named = canonical_name(architecture) if architecture is not None else None
    what = named or type(model).__name__
    try:
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        header = {
            "config": json.dumps({name: asdict(ranks) for name, ranks in (config or {}).items()}),
            "channels_last": json.dumps([name for name, tensor in tensors.items() if _is_channels_last(tensor)]),
            "metadata": json.dumps(metadata or {}, allow_nan=False),
        }
        if named is not None:
            header |= _torchvision_header(model, tensors, named, num_classes, image_size)
        else:
            header |= _own_header(model, tensors, dense)
    except (TypeError, ValueError) as error:
        raise ValueError(f"this model cannot be saved as a compressed {what}: {error}") from error
    write_tensors(path, tensors, header)


def _torchvision_header(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    architecture: str,
    num_classes: int | None,
    image_size: int | tuple[int, int] | None,
) -> dict[str, str]:
    sides = image_size if isinstance(image_size, tuple) else (image_size or DEFAULT_SIZE,) * 2
    input_shape = (3, *sides)
    classes = num_classes or _head_classes(model, architecture)
    specs = differences(model, skeleton(architecture, classes))
    rebuilt = _rebuilt(architecture, classes, input_shape, json.loads(json.dumps(specs)))
    _check_tensors(rebuilt, tensors)
    return {
        "format": COMPRESSED_FORMAT,
        "architecture": architecture,
        "num_classes": json.dumps(classes),
        "input_shape": json.dumps(input_shape),
        "modules": json.dumps(specs),
    }


def _own_header(model: nn.Module, tensors: Mapping[str, Tensor], dense: nn.Module | None) -> dict[str, str]:
    if dense is not None:
        specs = differences(model, unwrapped(dense), plain_settings=False)
        _check_tensors(_with_modules(copy_with(unwrapped(dense), {}), specs), tensors, buffers=False)
    else:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, HTLayer)}
        specs = {name: describe(module, name) for name, module in layers.items()}
    return {"format": OWN_FORMAT, "network": type(model).__name__, "modules": json.dumps(specs)}


def recognised_architecture(model: nn.Module) -> str | None:
    """The torchvision architecture that a compressed network was made from; None if it is of another kind."""
    home = type(model).__module__
    if not home.startswith("torchvision.models."):
        return None
    for name in torchvision.models.list_models(module=torchvision.models):
        if torchvision.models.get_model_builder(name).__module__ != home:
            continue
        try:
            differences(model, skeleton(name, _head_classes(model, name)))
        except (ValueError, AttributeError, IndexError):
            continue
        return name
    return None


def _head_classes(model: nn.Module, architecture: str) -> int:
    """How many outputs the head of a network of this architecture has, whether it is factorised or not."""
    return model.get_submodule(head_name(skeleton(architecture, 2))).weight.shape[0]


def load_compressed(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
) -> tuple[nn.Module, dict]:
    """Read a network written by `save_compressed`, in evaluation mode.

    Args:
        model: for a network that is not torchvision's: its class or a function that makes it (its weights are not
            needed), or a dense one, which stays as it is.

    Returns:
        The model, and what the file says of it: config (layer name -> ranks), plans (layer name -> execution plan;
        deployed layers are plain modules and not listed) and metadata; of torchvision's networks also architecture,
        num_classes and input_shape.

    Raises:
        CheckpointError (a ValueError): a missing, damaged or foreign file, or one whose header and tensors disagree.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no compressed model at {path}")
    header, state = read_tensors(path)
    own = header.get("format") == OWN_FORMAT
    if own and model is None:
        raise CheckpointError(
            f"{path} holds a {header.get('network', 'network')} of somebody's own: give what makes the dense network "
            "as model=, such as its class"
        )
    try:
        info = parsed(header)
        if own:
            loaded = _with_modules(_made(model), info.pop("modules"))
        else:
            if not any(tensor.shape[:1] == (info["num_classes"],) for tensor in state.values()):
                raise ValueError(f"no tensor has an entry for each of its {info['num_classes']} classes")
            loaded = _rebuilt(info["architecture"], info["num_classes"], info["input_shape"], info.pop("modules"))
        _check_tensors(loaded, state, buffers=not own)
    except Exception as error:  # a header made by hand can make any part of torch fail
        raise CheckpointError(f"{path} is not a compressed model that can be loaded: {_one_line(error)}") from error
    check_digest(header, state, path)
    for name in set(info.pop("channels_last")) & state.keys():
        if state[name].ndim == 4:
            state[name] = _channels_last(state[name])
    loaded.load_state_dict(state, assign=True)
    layers = {name: module for name, module in loaded.named_modules() if isinstance(module, HTLayer)}
    return loaded.to(device).eval(), {**info, "plans": {name: layer.plan for name, layer in layers.items()}}


def _made(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """A network of the dense kind, without numbers where that is possible; a given one is copied."""
    if isinstance(model, nn.Module):
        return copy_with(unwrapped(model), {})
    try:
        with torch.device("meta"):
            empty = model()
    except (NotImplementedError, RuntimeError, TypeError):
        return model()
    unsaved = {name for name, _ in empty.named_buffers()} - empty.state_dict().keys()
    return model() if unsaved else empty


def _with_modules(model: nn.Module, specs: Mapping[str, Any], kind: str | None = None) -> nn.Module:
    """The network with the described modules put in. kind: what an error calls it."""
    for name, spec in specs.items():
        if not name:
            return build(spec)
        try:
            model.get_submodule(name)
            module = build(spec)
        except AttributeError as error:
            raise ValueError(f"{kind or type(model).__name__} has no module {name!r}") from error
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"module {name!r} cannot be built: {_one_line(error)}") from error
        model.set_submodule(name, module)
    return model


def _rebuilt(
    architecture: str, num_classes: int, input_shape: tuple[int, int, int], specs: Mapping[str, Any]
) -> nn.Module:
    """The network that the descriptions make of the architecture: no numbers yet, but it gives the right shapes."""
    if "" in specs:
        raise ValueError(f"it is not a {architecture} as a whole")
    model = _with_modules(skeleton(architecture, num_classes), specs, architecture)
    model.eval()
    try:
        with torch.no_grad():
            output = model(torch.empty(1, *input_shape, device="meta"))
    except Exception as error:  # a network of descriptions that do not fit together can fail in any way
        raise ValueError(f"its modules do not fit together: {_one_line(error)}") from error
    if not isinstance(output, Tensor) or tuple(output.shape) != (1, num_classes):
        raise ValueError(f"its modules do not give {num_classes} outputs for one image of {input_shape}")
    return model


def _check_tensors(model: nn.Module, found: Mapping[str, Tensor], *, buffers: bool = True) -> None:
    """Raise ValueError unless the tensors have the model's names, shapes and kinds (floating or whole numbers).

    buffers: refuse buffers that are not part of the state as well.
    """
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | found.keys()):
        shapes = [tuple(state[name].shape) if name in state else "absent" for state in (wanted, found)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"tensor {name!r} should be {shapes[0]}, is {shapes[1]}")
        types = [state[name].dtype for state in (wanted, found)]
        if types[0].is_floating_point != types[1].is_floating_point or types[1].is_complex:
            raise ValueError(f"tensor {name!r} should be {types[0]}, is {types[1]}")
    unsaved = {name for name, _ in model.named_buffers()} - wanted.keys()
    if unsaved and buffers:
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
