"""A dense network with a head for the classes at hand: random, pretrained, or from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from torch import nn

from .architectures import canonical_name, check_image_size, construct, head_name
from .checkpoints import load_checkpoint

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt")


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
            return construct(architecture, num_classes=num_classes)
        if weights == "imagenet":
            return _replace_head(_pretrained(architecture), num_classes)
        model, metadata = load_checkpoint(weights, architecture=architecture)
        return (model if metadata["num_classes"] == num_classes else _replace_head(model, num_classes)).train()


def _pretrained(architecture: str) -> nn.Module:
    try:
        return construct(architecture, weights="DEFAULT")
    except (OSError, RuntimeError) as error:
        url = torchvision.models.get_model_weights(architecture).DEFAULT.url
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ValueError(
            f"ImageNet weights of {architecture} could not be loaded ({' '.join(str(error).split())}): "
            f"put {url} into {folder}, or use weights 'none'"
        ) from error


def _replace_head(model: nn.Module, num_classes: int) -> nn.Module:
    name = head_name(model)
    old = model.get_submodule(name)
    if isinstance(old, nn.Linear):
        head = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    else:
        head = nn.Conv2d(old.in_channels, num_classes, old.kernel_size, bias=old.bias is not None)
    model.set_submodule(name, head)
    return model
