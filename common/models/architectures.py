"""The dense networks by name: which there are, which images they take, and their shapes without any numbers."""

from __future__ import annotations

import difflib

import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

FAMILIES = {"alexnet": "alexnet", "vgg": "vgg16", "resnet": "resnet18"}
"""Family name -> the architecture it stands for."""

PROBE_SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 299)
"""Square image sizes that an error message tries, to say which ones an architecture can take."""


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


def check_image_size(name: str, image_size: int) -> None:
    """Raise ValueError, naming sizes that work, where square images of this size do not pass the network."""
    architecture = canonical_name(name)
    model = skeleton(architecture, 2).eval()
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


def construct(architecture: str, *, weights: str | None = None, **options) -> nn.Module:
    if architecture in ("googlenet", "inception_v3"):
        # Their auxiliary heads would make the output of a training pass a tuple.
        options["aux_logits"] = False
        if weights is None:
            options["init_weights"] = True
    return torchvision.models.get_model(architecture, weights=weights, **options)


def skeleton(architecture: str, num_classes: int) -> nn.Module:
    """The network with shapes but no numbers (meta tensors): VGG16 in milliseconds, and no random draws."""
    try:
        with torch.device("meta"):
            return construct(architecture, num_classes=num_classes)
    except NotImplementedError:
        # RegNet computes its widths with tensors: only what parameters are made by goes to the meta device there.
        with torch.random.fork_rng(devices=[]), _ParametersOnMeta():
            return construct(architecture, num_classes=num_classes)


class _ParametersOnMeta(TorchFunctionMode):
    """While active, tensors that modules allocate have shapes but no numbers; other arithmetic is done."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def head_name(model: nn.Module) -> str:
    """Name of the last linear layer or convolution, which gives one output per class."""
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
