"""Which layers can be factorised: chosen by what they are, and proven by what the network computes with them.

What cannot be seen on a layer shows in a pass at full ranks: a network that picks its layers by their class, hands
their weights to something else, or changes them on the way, computes something else then, and those layers stay dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..inputs import Inputs, run
from ..modules import evaluating, first_line
from .layers import HTLayer
from .trace import LayerTrace

if TYPE_CHECKING:
    from .network import ModelFactors

LAYER_SETS = ("all", "convs", "kernels")
"""Which layers to factorise: every one, only convolutions, or only convolutions with a window (no 1 x 1)."""

SMALLEST_MATRIX = 32
"""A matrix with a side shorter than this stays dense: a head of few classes has next to nothing to save, and each of
its outputs is one that the network is judged by. It is factorised all the same if it is asked for by name."""

ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Largest difference between the outputs at full ranks and the dense ones, relative to the largest, by type."""


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
        kinds = (nn.Conv2d, nn.Linear, nn.modules.conv._ConvTransposeNd, nn.Conv1d, nn.Conv3d)
        if not isinstance(module, kinds) or name.startswith(inside or ("\0",)):
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
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "a transposed convolution"
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters (weight norm, pruning or the like)"
    if type(module) not in (nn.Conv2d, nn.Linear):
        return f"a {type(module).__name__}, which is neither torch's Conv2d nor its Linear"
    if module._forward_hooks or module._forward_pre_hooks:
        return "a forward hook on it may change what it computes: remove the hook, or fold it into the network"
    if "forward" in vars(module):
        return "its forward was replaced by another function"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return "a depthwise convolution" if module.groups == module.in_channels else "a grouped convolution"
    if name not in traces:
        return "it does not run in eval mode"
    if isinstance(layers, str):
        if not is_kernel(module, traces[name]) and min(module.weight.shape[:2]) < SMALLEST_MATRIX:
            return f"a matrix with a side shorter than {SMALLEST_MATRIX}"
        kernel_only = layers == "kernels" and isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
        outside = kernel_only or (layers != "all" and isinstance(module, nn.Linear))
    else:
        outside = name not in layers
    return "not in the chosen set of layers" if outside else None


def is_kernel(module: nn.Conv2d | nn.Linear, trace: LayerTrace) -> bool:
    """Whether the layer's weight is taken as a kernel with a window, and not as a matrix."""
    if isinstance(module, nn.Linear):
        return trace.unflatten is not None
    return module.kernel_size != (1, 1)


def without_broken(factors: ModelFactors, example: Inputs) -> ModelFactors:
    """The factors less the layers with which, at full ranks, the network does not compute what it did.

    One pass of the dense network and one at full ranks on a few inputs; only where they differ is each layer tried
    alone.
    """
    if not factors.layers:
        return factors
    expected = _outputs(factors.model, example)
    if _problem(factors, list(factors.layers), example, expected) is None:
        return factors
    broken = {
        name: problem
        for name in factors.layers
        if (problem := _problem(factors, [name], example, expected)) is not None
    }
    kept = [name for name in factors.layers if name not in broken]
    while kept and (problem := _problem(factors, kept, example, expected)) is not None:
        broken[kept.pop()] = f"together with the others, {problem}"
    layers = {name: layer for name, layer in factors.layers.items() if name not in broken}
    return replace(factors, layers=layers, skipped={**factors.skipped, **broken})


def _problem(factors: ModelFactors, names: list[str], example: Inputs, expected: list[Tensor]) -> str | None:
    """What is wrong with the network in which these layers are factorised at full ranks; None if nothing is."""
    try:
        model = factors.compress({name: factors.layers[name].full_ranks for name in names})
        silent = _silent(model, names)
        found = _outputs(model, example)
    except Exception as error:  # whatever a network raises that reads its layers from outside
        return f"the network does not run with it factorised ({first_line(error)})"
    if unrun := [name for name, ran in silent.items() if not ran]:
        return f"the network does not call {unrun[0]} once it is factorised: it may choose its way by a layer's class"
    difference = outputs_differ(expected, found)
    return difference and f"with it factorised at full ranks the network computes something else ({difference})"


def _silent(model: nn.Module, names: list[str]) -> dict[str, list[bool]]:
    """Name of each of these layers -> a list that gets an entry when the layer runs."""
    ran: dict[str, list[bool]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, own=ran[name]: own.append(True))
    return ran


def _outputs(model: nn.Module, example: Inputs) -> list[Tensor]:
    """The tensors of the model's output in eval mode, with the same random numbers at every call."""
    devices = {tensor.device for tensor in tree_leaves(example) if tensor.device.type == "cuda"}
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        return output_tensors(run(model, example))


def output_tensors(output: Any) -> list[Tensor]:
    """The floating tensors in a network's output: a tensor, or tuples, lists and dictionaries of them.

    Raises:
        ValueError: there is none, naming the kind of output.
    """
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    found = [leaf for leaf in leaves if leaf.is_floating_point()]
    if not found:
        raise ValueError(
            f"the network's output, a {type(output).__name__}, holds no floating tensor that can be compared"
        )
    return found


def outputs_differ(expected: list[Tensor], found: list[Tensor], most: float | None = None) -> str | None:
    """How the outputs differ by more than rounding, in words; None if they do not."""
    if [one.shape for one in expected] != [one.shape for one in found]:
        return f"shapes {[tuple(one.shape) for one in found]} for {[tuple(one.shape) for one in expected]}"
    for one, other in zip(expected, found, strict=True):
        limit = ROUNDING.get(one.dtype, 1e-3) if most is None else most
        scale = one.abs().max().float().clamp_min(1e-30) if one.numel() else 1.0
        error = float((other.to(one) - one).abs().max().float() / scale) if one.numel() else 0.0
        if not error <= limit:
            return f"by {error:.1e} relative"
    return None
