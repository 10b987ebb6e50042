"""What every room does with a torch module: run it as in use, watch it run, copy it with parts exchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

MOST_IMAGES, MOST_PIXELS = 512, 2**21
"""What a batch holds at most: the first maps of VGG16 at 224 px take 13 million bytes an image."""


def evaluation_batch(height: int, width: int) -> int:
    """How many images of this size a batch should hold when nothing is trained."""
    return max(1, min(MOST_IMAGES, MOST_PIXELS // (height * width)))


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put `models` in eval mode; afterwards give every submodule the mode that it had."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Callable]) -> Iterator[None]:
    """Inside: the model in eval mode, without gradients, with a forward hook on each of the named layers."""
    handles = []
    with evaluating(model), torch.no_grad():
        try:
            for name, hook in hooks.items():
                handles.append(model.get_submodule(name).register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()


def copy_with(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A deep copy of the model in which some modules are replaced, under every name that they have.

    What is replaced is never copied. Where the model itself is replaced, its replacement is the result.
    """
    # deepcopy takes what its memo holds for an object, so the replaced modules are swapped while the rest is copied.
    return copy.deepcopy(model, {id(old): new for old, new in replaced.items()})
