"""Checkpoints of dense networks: safetensors with what is needed to rebuild them, or a plain `.pth` state dict."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..files import atomic_path
from .architectures import canonical_name, head_name, skeleton

DENSE_FORMAT = "htd-dense-1"
"""Header field `format` of a dense checkpoint; compressed models carry another one."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, unsafe or of another network."""


def save_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    architecture: str,
    classes: Sequence[str],
    metadata: dict | None = None,
) -> None:
    """Write a dense model as safetensors, with what is needed to rebuild it in the header.

    metadata: anything JSON can hold, such as provenance and accuracy.
    """
    header = {
        "format": DENSE_FORMAT,
        "architecture": canonical_name(architecture),
        "num_classes": str(len(classes)),
        "classes": json.dumps(list(classes)),
        "metadata": json.dumps(metadata or {}),
    }
    # Copies: safetensors refuses tensors that share storage, and wants plain memory order.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(state, temporary, metadata=header)


def load_checkpoint(
    path: str | Path,
    *,
    architecture: str | None = None,
    num_classes: int | None = None,
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, dict]:
    """Rebuild a dense model from a safetensors checkpoint or from a `.pth` state dict, in evaluation mode.

    Args:
        architecture: what the file must hold; needed for `.pth`, which does not say.
        num_classes: how many outputs the head must have.

    Returns:
        The model and its metadata: what was saved, with architecture, num_classes and classes
        (None for `.pth`) added.

    Raises:
        CheckpointError: missing, damaged, pickled or foreign file, other architecture, other head.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    expected = canonical_name(architecture) if architecture else None
    if path.suffix == ".safetensors":
        state, metadata = _read_safetensors(path)
        if expected and metadata["architecture"] != expected:
            raise CheckpointError(f"{path} holds a {metadata['architecture']}, but {expected} was asked for")
    else:
        if expected is None:
            raise CheckpointError(f"{path} does not say its architecture: name it")
        state = _read_state_dict(path)
        metadata = {"architecture": expected, "classes": None}
    model = _rebuild(state, metadata["architecture"], num_classes, path)
    metadata["num_classes"] = model.get_submodule(head_name(model)).weight.shape[0]
    return model.to(device).eval(), metadata


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # Copies: what safetensors returns are windows into one mapped file.
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from error
    if header.get("format") != DENSE_FORMAT:
        found = header.get("format", "none")
        raise CheckpointError(
            f"{path} is not a dense checkpoint: format {DENSE_FORMAT!r} was expected, {found!r} found"
        )
    try:
        metadata = {**json.loads(header["metadata"]), "architecture": canonical_name(header["architecture"])}
        metadata["classes"] = json.loads(header["classes"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a damaged header: {error}") from error
    return state, metadata


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged or holds pickled objects, which are not loaded because they can run code: "
            "save model.state_dict() instead"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is not a state dict (parameter name -> tensor)")
    return state


def _rebuild(state: dict[str, Tensor], architecture: str, num_classes: int | None, path: Path) -> nn.Module:
    head = head_name(skeleton(architecture, 2)) + ".weight"
    if head not in state:
        raise CheckpointError(f"{path} does not hold a {architecture}: it has no tensor {head!r}")
    found = state[head].shape[0]
    if num_classes is not None and found != num_classes:
        raise CheckpointError(f"{path} has a head of {found} classes, but {num_classes} were asked for")
    model = skeleton(architecture, found)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise CheckpointError(
                f"{path} does not hold a {architecture}: tensor {name!r} should be {wanted.get(name, 'absent')}, "
                f"is {given.get(name, 'absent')}"
            )
    model.load_state_dict(state, assign=True)
    return model
