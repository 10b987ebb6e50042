"""What every room does with a torch module: run it as in use, watch it run, copy it with parts exchanged."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .inputs import LAST, Inputs

ModuleOrTensor = TypeVar("ModuleOrTensor", nn.Module, torch.Tensor)

MOST_IMAGES, MOST_PIXELS = 512, 2**21
"""What a batch holds at most: the first maps of VGG16 at 224 px take 13 million bytes an image."""


def evaluation_batch(height: int, width: int) -> int:
    """How many images of this size a batch should hold when nothing is trained."""
    return max(1, min(MOST_IMAGES, MOST_PIXELS // (height * width)))


def inputs_batch(inputs: Inputs) -> int:
    """How many samples like these a batch should hold when nothing is trained: by the largest input's size."""
    pixels = max(math.prod(tensor.shape[2:]) if tensor.ndim > 2 else 1 for tensor in tree_leaves(inputs))
    return evaluation_batch(1, pixels)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put `models` in eval mode; afterwards give every submodule the mode that it had."""
    modules = [module for model in models for module in model.modules()]
    modes = [module.training for module in modules]
    if any(modes):
        for model in models:
            model.eval()
    try:
        yield
    finally:
        for module, was_training in zip(modules, modes, strict=True):
            if module.training != was_training:
                module.training = was_training


@contextmanager
def differentiated(model: nn.Module) -> Iterator[None]:
    """Inside, gradients are on and every parameter asks for one; afterwards only those that did before."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def hooked(
    model: nn.Module, hooks: Mapping[str, Callable], *, before: Mapping[str, Callable] | None = None
) -> Iterator[None]:
    """Inside: the model in eval mode, without gradients, with a forward hook on each of the named layers.

    before: likewise hooks that are called before the layer runs. Both find the layer's input in its place, as
    torch's own hooks do, also where the model names it: ``layer(input=x)``.
    """
    handles = []
    with evaluating(model), torch.no_grad():
        try:
            for name, hook in hooks.items():
                module = model.get_submodule(name)
                handles.append(module.register_forward_hook(_given_inputs(hook), with_kwargs=True))
            for name, hook in (before or {}).items():
                module = model.get_submodule(name)
                handles.append(module.register_forward_pre_hook(_given_inputs(hook), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _given_inputs(hook: Callable) -> Callable:
    def called(module: nn.Module, inputs: tuple, named: dict[str, Any], *output: Any) -> Any:
        if not inputs and "input" in named:
            inputs = (named["input"],)
        return hook(module, inputs, *output)

    return called


class Reached(BaseException):
    """Ends a pass of a network where nothing more is wanted of it; no business of the network's own error handling."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, out of torch.compile's, DataParallel's and DistributedDataParallel's wrappings.

    Raises:
        ValueError: a scripted network, whose layers cannot be exchanged; something that is no module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"a torch module is needed; got a {type(model).__name__}")
    while True:
        if isinstance(model, torch.jit.ScriptModule):
            raise ValueError(
                "a scripted (TorchScript) network cannot be taken apart: give the network before scripting"
            )
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def laid_out(value: ModuleOrTensor, channels_last: bool) -> ModuleOrTensor:
    """A tensor, or a module (which is changed), in channels-last memory or in torch's usual one.

    Unlike `Module.to`, it takes modules with weights of every order: maps of two and of three axes are laid out.
    """

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        layout = LAST.get(tensor.ndim) if channels_last else None
        return tensor.contiguous(memory_format=layout or torch.contiguous_format)

    return value._apply(convert) if isinstance(value, nn.Module) else convert(value)


def copy_with(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A deep copy of the model in which some modules are replaced, under every name that they have.

    What is replaced is never copied. Where the model itself is replaced, its replacement is the result. Activations
    that the model keeps with their graph are copied without it; what cannot be copied at all (a lock, an open file) is
    shared with the model.

    Raises:
        ValueError: the model cannot be copied, naming what stands in the way.
    """
    # deepcopy takes what its memo holds for an object, so the replaced modules are swapped while the rest is copied.
    memo = {id(old): new for old, new in replaced.items()}
    try:
        return copy.deepcopy(model, dict(memo))
    except (RuntimeError, TypeError, AttributeError):
        pass  # something in it cannot be copied: found and worked around below, where it still fails if it must
    kept: list[object] = []  # the memo goes by id: what it holds must live as long as it does
    for module in model.modules():
        if module not in replaced:
            for value in vars(module).values():
                _remember(value, memo, kept)
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError, AttributeError) as error:
        culprit = _uncopied(model, memo) or type(model).__name__
        raise ValueError(f"the network cannot be copied, {culprit} stands in the way: {first_line(error)}") from error


def _remember(value: object, memo: dict[int, object], kept: list[object]) -> None:
    """Enter into the memo what deepcopy would stumble over in an attribute's value."""
    if isinstance(value, nn.Module) or id(value) in memo:
        return
    if isinstance(value, torch.Tensor):
        if not value.is_leaf:
            memo[id(value)] = value.detach().clone()
            kept.append(value)
    elif isinstance(value, dict):
        for item in value.values():
            _remember(item, memo, kept)
    elif isinstance(value, list | tuple | set):
        for item in value:
            _remember(item, memo, kept)
    elif not _can_be_copied(value, memo):
        memo[id(value)] = value
        kept.append(value)


def _can_be_copied(value: object, memo: Mapping[int, object]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except (RuntimeError, TypeError, AttributeError):
        return False
    return True


def _uncopied(model: nn.Module, memo: Mapping[int, object]) -> str | None:
    """The first attribute, with its module's name, that deepcopy cannot copy."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute != "_modules" and not _can_be_copied(value, memo):
                return f"attribute {'.'.join(filter(None, (name, attribute)))!r}"
    return None


def out_of_memory(error: BaseException) -> str | None:
    """What an error says if memory ran out, on a GPU or on a CPU (a plain RuntimeError there); None for others."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    ):
        return f"out of memory: {first_line(error) if str(error) else 'the operating system gave no more'}"
    return None


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, without a terminal's escape codes."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()[:300] if lines else 'no message'}"
