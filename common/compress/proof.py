"""The proof of a factorisation: the network computes the same twice, at full ranks it computes what it did, and a layer
that does not stays dense.

It finds what cannot be seen on a layer: a network that picks its layers by their class, hands their weights to
something else, or changes them on the way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..inputs import Inputs, run
from ..modules import evaluating, first_line
from .model_factors import ModelFactors

ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Largest difference between the outputs at full ranks and the dense ones, relative to the largest, by type."""


def check_repeatable(model: nn.Module, example: Inputs) -> None:
    """Refuse a network without weights, and one that changes its input so that a second pass gives something else.

    Every pass over images that are kept would then begin with what the pass before has left of them.

    Raises:
        ValueError: it is such a network.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(
            "the network is on torch's meta device, where parameters have no values: load its weights first"
        )
    given = tree_map(torch.clone, example)
    expected = _outputs(model, given)
    pairs = zip(tree_leaves(given), tree_leaves(example), strict=True)
    if all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in pairs):
        return
    if difference := outputs_differ(expected, _outputs(model, given)):
        raise ValueError(
            f"the network changes its input in place, and computes something else ({difference}) from the same images "
            "the next time: begin its forward with a copy, x = x.clone()"
        )


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
