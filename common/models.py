"""The dense networks by name, with a head for the classes at hand, and their checkpoints."""

from __future__ import annotations

import difflib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from common.compressed_files import load_compressed, save_compressed
from common.files import atomic_path

__all__ = [
    "DENSE_FORMAT",
    "FAMILIES",
    "CheckpointError",
    "build_model",
    "canonical_name",
    "check_image_size",
    "load_checkpoint",
    "load_compressed",
    "save_checkpoint",
    "save_compressed",
]

FAMILIES = {"alexnet": "alexnet", "vgg": "vgg16", "resnet": "resnet18"}
"""Family name -> the architecture it stands for."""

DENSE_FORMAT = "htd-dense-1"
"""Header field `format` of a dense checkpoint; compressed models carry another one."""

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt")

PROBE_SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 299)
"""Square image sizes that an error message tries, to say which ones an architecture can take."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, unsafe or of another network."""


def canonical_name(name: str) -> str:
    """Resolve a family name ("vgg") or an architecture ("vgg16") to the architecture.

    Raises:
        ValueError: neither one of `FAMILIES` nor a torchvision classification model.
    """
    architecture = FAMILIES.get(name.lower(), name.lower())
    known = torchvision.models.list_models(module=torchvision.models)
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=4)
        raise ValueError(
            f"unknown model {name!r}; choose one of {', '.join(FAMILIES.values())}, a family "
            f"({', '.join(FAMILIES)}) or any of torchvision's classification models"
            + (f", such as {', '.join(near)}" if near else "")
        )
    return architecture


def build_model(
    name: str,
    num_classes: int,
    *,
    weights: str = "none",
    image_size: int | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Build a torchvision classification model with a head for `num_classes`, in training mode, on the CPU.

    Args:
        name: an architecture or a family, see `canonical_name`.
        weights: "none" for random weights, "imagenet" for torchvision's best ones (the head stays random), or the path
            of a dense checkpoint of the same architecture, see `load_checkpoint` (its head stays where it fits).
        image_size: checked against the architecture where given.
        seed: of the random weights; None draws them from torch's global generator.

    Raises:
        ValueError: unknown model or weights, fewer than 2 classes, image too small, weights not to be had.
        CheckpointError: see `load_checkpoint`.
    """
    architecture = canonical_name(name)
    if num_classes < 2:
        raise ValueError(f"a classifier needs at least 2 classes, got {num_classes}")
    if image_size is not None:
        check_image_size(architecture, image_size)
    if weights not in ("none", "imagenet") and Path(weights).suffix not in CHECKPOINT_SUFFIXES:
        raise ValueError(f"unknown weights {weights!r}; choose 'none', 'imagenet' or the path of a checkpoint")
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        if weights == "none":
            return _construct(architecture, num_classes=num_classes)
        if weights == "imagenet":
            return _replace_head(_pretrained(architecture), num_classes)
        model, metadata = load_checkpoint(weights, architecture=architecture)
        return (model if metadata["num_classes"] == num_classes else _replace_head(model, num_classes)).train()


def check_image_size(name: str, image_size: int) -> None:
    """Raise ValueError, naming sizes that work, where square images of this size do not pass the network."""
    architecture = canonical_name(name)
    model = _skeleton(architecture, 2).eval()
    failure = _failure(model, image_size)
    if failure:
        fitting = [str(size) for size in PROBE_SIZES if not _failure(model, size)]
        raise ValueError(
            f"{architecture} cannot take {image_size} x {image_size} images ({failure}); "
            f"sizes that work: {', '.join(fitting)}"
        )


def _failure(model: nn.Module, image_size: int) -> str | None:
    """Try a forward pass without data or arithmetic (meta tensors); the first line of its error, if any."""
    try:
        with torch.no_grad():
            model(torch.empty(2, 3, image_size, image_size, device="meta"))
    except (RuntimeError, AssertionError, ValueError) as error:
        return str(error).partition("\n")[0]
    return None


def _construct(architecture: str, *, weights: str | None = None, **options) -> nn.Module:
    if architecture in ("googlenet", "inception_v3"):
        # Their auxiliary heads would make the output of a training pass a tuple.
        options["aux_logits"] = False
        if weights is None:
            options["init_weights"] = True
    return torchvision.models.get_model(architecture, weights=weights, **options)


def _skeleton(architecture: str, num_classes: int) -> nn.Module:
    """The network with shapes but no numbers (meta tensors): VGG16 in milliseconds, and no random draws."""
    try:
        with torch.device("meta"):
            return _construct(architecture, num_classes=num_classes)
    except NotImplementedError:
        # RegNet computes its widths with tensors, so it has to be built for real.
        with torch.random.fork_rng(devices=[]):
            return _construct(architecture, num_classes=num_classes).to("meta")


def _pretrained(architecture: str) -> nn.Module:
    try:
        return _construct(architecture, weights="DEFAULT")
    except (OSError, RuntimeError) as error:
        url = torchvision.models.get_model_weights(architecture).DEFAULT.url
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ValueError(
            f"ImageNet weights of {architecture} could not be loaded ({' '.join(str(error).split())}): "
            f"put {url} into {folder}, or use weights 'none'"
        ) from error


def _head_name(model: nn.Module) -> str:
    """Name of the last linear layer or convolution, which gives one output per class."""
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]


def _replace_head(model: nn.Module, num_classes: int) -> nn.Module:
    name = _head_name(model)
    old = model.get_submodule(name)
    if isinstance(old, nn.Linear):
        head = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    else:
        head = nn.Conv2d(old.in_channels, num_classes, old.kernel_size, bias=old.bias is not None)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, head)
    return model


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
    metadata["num_classes"] = model.get_submodule(_head_name(model)).weight.shape[0]
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
    head = _head_name(_skeleton(architecture, 2)) + ".weight"
    if head not in state:
        raise CheckpointError(f"{path} does not hold a {architecture}: it has no tensor {head!r}")
    found = state[head].shape[0]
    if num_classes is not None and found != num_classes:
        raise CheckpointError(f"{path} has a head of {found} classes, but {num_classes} were asked for")
    model = _skeleton(architecture, found)
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
