"""Fold batch norm into the layer before it: in inference it is a scale and a shift per channel, which are free there.

Which layers feed a batch norm, and only it, is read off one forward pass. So it works for every network that runs, with
whatever control flow, and for factorised layers, whose last stage takes the scale.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..compress import CONVOLUTIONS, TRANSPOSED, HTLayer, scale_outputs
from ..inputs import Inputs, run
from ..modules import copy_with, hooked, unwrapped

FOLDABLE = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, HTLayer)
"""Layers that take a batch norm up; exactly these classes."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Batch norms that are folded; exactly these classes: one of somebody's own may do more than normalise."""


def fold_batch_norm(model: nn.Module, example: Inputs) -> tuple[nn.Module, dict[str, str]]:
    """A copy of the model with every batch norm folded that directly follows a layer; shares no tensor with it.

    Args:
        model: run once on ``example: (N, C, H, W)`` in eval mode; stays as it was.

    Returns:
        The copy, in eval mode, with an identity in place of each folded batch norm, and layer name -> the name of the
        batch norm that it took up. A batch norm before its convolution, or behind a layer whose output something else
        reads too, stays.
    """
    model = unwrapped(model)
    pairs = _foldable_pairs(model, example)
    replaced: dict[nn.Module, nn.Module] = {}
    for layer_name, norm_name in pairs.items():
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        replaced[layer] = fold_pair(layer, norm)
        replaced[norm] = nn.Identity()
    return copy_with(model, replaced).eval(), pairs


def fold_pair(layer: nn.Module, norm: _BatchNorm) -> nn.Module:
    """One new layer that does what ``layer`` and then ``norm``, by its running statistics, do."""
    # In float64, and rounded once.
    variance, mean = norm.running_var.double(), norm.running_mean.double()
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    if layer.bias is not None:
        shift = shift + layer.bias.detach().double() * scale
    before = _last_stage(layer).weight
    wide = nn.Parameter(before.detach().to(torch.float64, copy=True), requires_grad=False)
    folded = copy.deepcopy(layer, {id(before): wide}).eval()
    last = _last_stage(folded)
    scale_outputs(last, scale)
    last.weight = nn.Parameter(wide.detach().to(before.dtype), requires_grad=before.requires_grad)
    last.bias = nn.Parameter(shift.to(before.dtype), requires_grad=before.requires_grad)
    return folded


def _last_stage(layer: nn.Module) -> nn.Module:
    return layer.stages[-1] if isinstance(layer, HTLayer) else layer


def _foldable_pairs(model: nn.Module, example: Inputs) -> dict[str, str]:
    """Layer name -> name of the batch norm that alone reads its output; both run exactly once."""
    names = {module: name for name, module in model.named_modules()}
    runs: dict[str, int] = {}
    producers: dict[int, tuple[Tensor, str]] = {}  # id of an output -> the output, kept alive, and its layer's name
    readers: dict[str, list[str | None]] = {}  # layer name -> what reads its output: a batch norm, or something else

    def read_by(value: object, reader: str | None) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and id(tensor) in producers:
                readers.setdefault(producers[id(tensor)][1], []).append(reader)

    def layer_ran(module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        name = names[module]
        runs[name] = runs.get(name, 0) + 1
        producers[id(output)] = (output, name)

    def norm_ran(module: nn.Module, inputs: tuple, _output: Tensor) -> None:
        name = names[module]
        runs[name] = runs.get(name, 0) + 1
        # Behind a linear layer that put its features last, a norm of 3-way tensors normalises the axis before them.
        (source,) = [producers[id(one)][1] for one in inputs if id(one) in producers] or [None]
        tokens = source is not None and inputs[0].ndim > 2 and _features_last(model.get_submodule(source))
        read_by(inputs, None if tokens else name)

    class Readers(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            # A batch norm announces itself; asking a tensor for its size reads no value.
            if func is not nn.functional.batch_norm and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
                read_by((args, kwargs or {}), None)
            return result

    hooks = {}
    for name, module in model.named_modules():
        if type(module) in FOLDABLE and not _inside_factorised(model, name) and not _is_patched(module):
            hooks[name] = layer_ran
        elif type(module) in NORMS and module.running_mean is not None and not _is_patched(module):
            hooks[name] = norm_ran
    with hooked(model, hooks), Readers():
        read_by(run(model, example), None)
    return {
        layer: reading[0]
        for layer, reading in readers.items()
        if len(reading) == 1 and reading[0] is not None and runs[layer] == runs[reading[0]] == 1
    }


def _features_last(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, HTLayer) and layer.geometry.linear)


def _is_patched(module: nn.Module) -> bool:
    """Whether a hook or a replaced forward may make the module compute something else than its class does."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _inside_factorised(model: nn.Module, name: str) -> bool:
    """Whether the module is a stage of a factorised layer, which folds as a whole."""
    parents = (name[:place] for place, letter in enumerate(name) if letter == ".")
    return any(isinstance(model.get_submodule(parent), HTLayer) for parent in ["", *parents] if parent != name)
