"""Checkpoints of dense networks: safetensors with what is needed to rebuild them, or a plain `.pth` state dict."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..files import atomic_path
from ..modules import first_line
from .architectures import canonical_name, head_name, skeleton

DENSE_FORMAT = "htd-dense-1"
"""Header field `format` of a dense checkpoint; compressed models carry another one."""


DIGEST = "digest"
"""Header field with what the rest of the file comes to; files of earlier versions have none."""


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
    write_tensors(path, model.state_dict(), header)


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
        header, state, metadata = _read_safetensors(path)
        if expected and metadata["architecture"] != expected:
            raise CheckpointError(f"{path} holds a {metadata['architecture']}, but {expected} was asked for")
    else:
        if expected is None:
            raise CheckpointError(f"{path} does not say its architecture: name it")
        state = read_state_dict(path)
        header, metadata = {}, {"architecture": expected, "classes": None}
    model = _rebuild(state, metadata["architecture"], num_classes, path)
    check_digest(header, state, path)
    metadata["num_classes"] = model.get_submodule(head_name(model)).weight.shape[0]
    return model.to(device).eval(), metadata


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor], dict]:
    header, state = read_tensors(path)
    if header.get("format") != DENSE_FORMAT:
        found = header.get("format", "none")
        raise CheckpointError(
            f"{path} is not a dense checkpoint: format {DENSE_FORMAT!r} was expected, {found!r} found"
        )
    try:
        metadata = {**json.loads(header["metadata"]), "architecture": canonical_name(header["architecture"])}
        metadata["classes"] = json.loads(header["classes"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header: {first_line(error)}") from error
    return header, state, metadata


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Write tensors and header as one safetensors file, with a digest of both; see `check_digest`."""
    # Copies: safetensors refuses tensors that share storage, and wants plain memory order.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(state, temporary, metadata={**header, DIGEST: content_digest(header, state)})


def content_digest(header: Mapping[str, str], state: Mapping[str, Tensor]) -> str:
    """What a file's header, but for the digest itself, and its tensors come to."""
    rest = {key: value for key, value in header.items() if key != DIGEST}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header and the tensors of a safetensors file, checked to be usable; what is read is no window into the file.

    Raises:
        CheckpointError: damaged, or with tensors that no network can use.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except Exception as error:  # of safetensors, of the system, of torch for types that it does not know
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {first_line(error)}") from error
    check_usable(state, path)
    return header, state


def check_digest(header: Mapping[str, str], state: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError where the file was altered since it was written. The last check: it says no more."""
    if DIGEST in header and header[DIGEST] != content_digest(header, state):
        raise CheckpointError(f"{path} was altered: its digest does not agree with its content")


def check_usable(state: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError unless the floating tensors are of one usable type, dense and finite."""
    floating = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    for name, tensor in state.items():
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            kind = "a meta tensor" if tensor.is_meta else tensor.dtype
            raise CheckpointError(f"{path}: tensor {name!r} should be torch.float32, is {kind}, {tensor.layout}")
    kinds = {tensor.dtype for tensor in floating.values()}
    if odd := kinds - {torch.float16, torch.bfloat16, torch.float32, torch.float64}:
        raise CheckpointError(f"{path} holds numbers of type {min(map(str, odd))}, which networks do not run in")
    if len(kinds) > 1:
        raise CheckpointError(f"{path} mixes {', '.join(sorted(map(str, kinds)))}: convert it to one type")
    for name, tensor in floating.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: tensor {name!r} has NaN or infinite entries")


WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "ema")
"""Keys under which training scripts keep the state dict beside epoch, optimizer and the like."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and Lightning put before every name."""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a state dict that somebody saved with torch, in float32; code that a file holds is never run.

    They are taken out of the dictionary and the prefixes that training scripts wrap them in.

    Raises:
        CheckpointError: missing, damaged, packed or pickled; or without a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    _refuse_bombs(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged or holds pickled objects, which are not loaded because they can run code: "
            "save model.state_dict() instead"
        ) from error
    except Exception as error:  # a damaged pickle makes torch raise whatever it stumbles over
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from error
    state = plain_state(state, path)
    check_usable(state, path)
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def plain_state(state: Any, path: Path) -> dict[str, Tensor]:
    """The state dict itself, out of the dictionary and the prefixes that training scripts wrap it in.

    Raises:
        CheckpointError: there is none in it.
    """
    if isinstance(state, Mapping) and not any(isinstance(value, Tensor) for value in state.values()):
        state = next((state[key] for key in WRAPPERS if isinstance(state.get(key), Mapping)), state)
    if (
        not isinstance(state, Mapping)
        or not state
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())
    ):
        raise CheckpointError(f"{path} is not a state dict (parameter name -> tensor)")
    state = dict(state)
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _refuse_bombs(path: Path) -> None:
    """Torch stores its records as they are: one that is packed unpacks to anything."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from error
    size = path.stat().st_size
    packed = any(one.compress_type != zipfile.ZIP_STORED for one in records)
    if packed or sum(one.file_size for one in records) > size:
        raise CheckpointError(f"{path} is packed, which torch's checkpoints are not: it may unpack to any size")


def _rebuild(state: dict[str, Tensor], architecture: str, num_classes: int | None, path: Path) -> nn.Module:
    head = head_name(skeleton(architecture, 2)) + ".weight"
    if head not in state:
        raise CheckpointError(f"{path} does not hold a {architecture}: it has no tensor {head!r}")
    if state[head].ndim < 2 or not 1 <= state[head].shape[0] <= state[head].numel():
        raise CheckpointError(f"{path} has a head {head!r} of shape {tuple(state[head].shape)}, which is none")
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
