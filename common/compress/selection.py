"""Which layers can be factorised, by what they are; `proof` has what only the whole network shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from .geometry import TRANSPOSED, Convolution
from .layers import HTLayer
from .trace import DECOMPOSABLE, LayerTrace

LAYER_SETS = ("all", "convs", "kernels")
"""Which layers to factorise: every one, only convolutions, or only convolutions with a window (no 1 x 1)."""

SMALLEST_MATRIX = 32
"""A matrix with a side shorter than this stays dense: a head of few classes has next to nothing to save, and each of
its outputs is one that the network is judged by. It is factorised all the same if it is asked for by name."""


SMALLEST_GROUP = 8
"""Likewise the channels of a group."""


def choose_layers(
    model: nn.Module, traces: Mapping[str, LayerTrace], layers: str | Iterable[str]
) -> tuple[dict[str, bool], dict[str, str]]:
    """Name -> whether the layer is a kernel (else a matrix), and name -> reason for those that stay dense.

    Raises:
        ValueError: an unknown set of layers, or a layer asked for by name that cannot be factorised.
    """
    if isinstance(layers, str) and layers not in LAYER_SETS:
        raise ValueError(f"layers must be one of {', '.join(LAYER_SETS)} or a list of names; got {layers!r}")
    layers = layers if isinstance(layers, str) else set(layers)
    owners = _owners(model)
    chosen, skipped = {}, {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, HTLayer):
            inside += (f"{name}.",)
            skipped[name] = "it is factorised already: factorise the dense network, its factors give any ranks"
        if not isinstance(module, DECOMPOSABLE) or name.startswith(inside or ("\0",)):
            continue
        reason = _reason_to_skip(name, module, traces, layers) or _shared(name, module, owners)
        if reason:
            skipped[name] = reason
        else:
            chosen[name] = is_kernel(module, traces[name])
    if not isinstance(layers, str) and (unknown := layers - set(chosen)):
        name = sorted(unknown)[0]
        raise ValueError(f"layer {name!r} cannot be factorised: {skipped.get(name, 'the model has no such layer')}")
    return chosen, skipped


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> the names of the modules that hold it, each module once."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def _shared(name: str, module: nn.Module, owners: Mapping[int, list[str]]) -> str | None:
    others = [other for other in owners[id(module.weight)] if other != name]
    return f"it shares its weight with {others[0]}" if others else None


def _reason_to_skip(
    name: str, module: nn.Module, traces: Mapping[str, LayerTrace], layers: str | set[str]
) -> str | None:
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters (weight norm, pruning or the like)"
    if type(module) not in DECOMPOSABLE:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"a {kind}, which is none of torch's own convolutions and linear layers"
    if module._forward_hooks or module._forward_pre_hooks:
        return "a forward hook on it may change what it computes: remove the hook, or fold it into the network"
    if "forward" in vars(module):
        return "its forward was replaced by another function"
    if _groups(module) > 1 and 1 in _channels(module):
        return "a depthwise convolution"
    if name not in traces:
        return "it does not run in eval mode"
    if not traces[name].batched:
        return "its input has no batch axis: give it one image as a batch of one"
    if isinstance(layers, str):
        least = min(_channels(module))
        if _groups(module) > 1 and least < SMALLEST_GROUP:
            return f"a grouped convolution of fewer than {SMALLEST_GROUP} channels per group"
        if not is_kernel(module, traces[name]) and least < SMALLEST_MATRIX:
            return f"a matrix with a side shorter than {SMALLEST_MATRIX}"
        kernel_only = layers == "kernels" and not isinstance(module, nn.Linear) and not has_window(module)
        outside = kernel_only or (layers != "all" and isinstance(module, nn.Linear))
    else:
        outside = name not in layers
    return "not in the chosen set of layers" if outside else None


def is_kernel(module: Convolution | nn.Linear, trace: LayerTrace) -> bool:
    """Whether the layer's weight is taken as a kernel with a window, and not as a matrix."""
    return trace.unflatten is not None if isinstance(module, nn.Linear) else has_window(module)


def has_window(module: Convolution) -> bool:
    """Whether a convolution sees more than one position at a time."""
    return any(size > 1 for size in module.kernel_size)


def _groups(module: Convolution | nn.Linear) -> int:
    return 1 if isinstance(module, nn.Linear) else module.groups


def _channels(module: Convolution | nn.Linear) -> tuple[int, int]:
    """(C_out, C_in) of one group."""
    first, second = module.weight.shape[:2]
    if isinstance(module, TRANSPOSED):
        return second, first // module.groups
    return first // _groups(module), second
