"""Batches in the forms that people have: a tensor, a tuple or dictionary of tensors, a DataLoader of (inputs, targets).

*Inputs* are what a network is called with: a tensor, a tuple of tensors (its positional arguments) or a dictionary of
tensors (its named ones), all with the batch as their first axis. *Batches* are anything that yields inputs, or pairs of
inputs and targets; a tensor, an array, a tuple or a dictionary alone is one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
Batches = Inputs | np.ndarray | Iterable[Any]

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Order of a tensor -> torch's channels-last layout: of maps of two and of three axes."""


def run(model: Any, inputs: Inputs) -> Any:
    """The model's output for one batch of inputs."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def length(inputs: Inputs) -> int:
    """How many samples a batch holds."""
    return len(tree_leaves(inputs)[0])


def first(inputs: Inputs, number: int) -> Inputs:
    """The first `number` samples of a batch."""
    return tree_map(lambda tensor: tensor[:number], inputs)


def split(inputs: Inputs, size: int, *, even: bool = False) -> Iterator[Inputs]:
    """The batch in pieces of `size` samples, the last one smaller; `even`: as many pieces, of nearly one size each."""
    leaves, spec = tree_flatten(inputs)
    pieces = -(-length(inputs) // size)
    for parts in zip(*(leaf.tensor_split(pieces) if even else leaf.split(size) for leaf in leaves), strict=True):
        yield spec.unflatten(parts)


def joined(batches: Iterable[Inputs]) -> Inputs:
    """Batches of one form as one batch.

    Raises:
        ValueError: there are none.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("no images were given: the batches are empty")
    if len(batches) == 1:
        return batches[0]
    return tree_map(lambda *tensors: torch.cat(tensors), *batches)


def like_model(inputs: Inputs, model: nn.Module) -> Inputs:
    """The inputs on the device of the model, floating ones in its floating type; whole numbers stay what they are."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return inputs
    return tree_map(lambda t: t.to(parameter.device, parameter.dtype if t.is_floating_point() else t.dtype), inputs)


def channels_last(inputs: Inputs) -> Inputs:
    """Feature maps in channels-last memory; tensors of other orders as they are."""
    return tree_map(lambda t: t.contiguous(memory_format=LAST[t.ndim]) if t.ndim in LAST else t, inputs)


def pairs_of(given: Any, argument: str = "data") -> Iterator[tuple[Inputs, Any]]:
    """The (inputs, targets) of every batch of a loader, of a list of batches, or of one of our splits.

    Raises:
        ValueError: a batch without targets, naming the argument.
    """
    batches = _of_split(given)
    if not isinstance(batches, Iterable):
        raise ValueError(f"{argument} must yield pairs of inputs and targets; got a {type(given).__name__}")
    for batch in batches:
        if hasattr(batch, "images"):
            yield batch.images, batch.labels
        elif isinstance(batch, list | tuple) and len(batch) == 2:
            yield inputs_of(batch, argument), batch[1]
        else:
            raise ValueError(f"{argument} must yield pairs of inputs and targets; got a {type(batch).__name__}")


def _of_split(given: Any) -> Any:
    """The batches of one of our splits; anything else as it is."""
    return given.batches(256) if callable(getattr(given, "batches", None)) else given


def inputs_of(batch: Any, argument: str = "images", *, several: bool = False) -> Inputs:
    """The inputs in one batch: the batch itself, or the first of a pair (inputs, targets), or `batch.images`.

    several: a tuple is several inputs, and not inputs with targets.

    Raises:
        ValueError: it is neither, naming the argument that it came in.
    """
    batch = getattr(batch, "images", batch)
    if isinstance(batch, list | tuple) and batch and not several:
        batch = batch[0]
    if isinstance(batch, np.ndarray):
        batch = torch.from_numpy(batch)
    if isinstance(batch, list):
        batch = tuple(batch)
    leaves = tree_leaves(batch) if isinstance(batch, Tensor | tuple | Mapping) else []
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.ndim for leaf in leaves):
        raise ValueError(
            f"{argument}: a batch is a tensor, a tuple or dictionary of tensors, or a pair of such inputs and targets; "
            f"got a {type(batch).__name__}"
        )
    if len({len(leaf) for leaf in leaves}) > 1:
        raise ValueError(f"{argument}: the inputs of one batch hold {[len(leaf) for leaf in leaves]} samples")
    return batch


def batches_of(given: Batches, argument: str = "images") -> Iterator[Inputs]:
    """The inputs of every batch in what was given, in order.

    Raises:
        ValueError: something that is neither inputs nor batches of them, naming the argument.
    """
    given = _of_split(given)
    if isinstance(given, tuple):
        yield inputs_of(given, argument, several=True)
    elif isinstance(given, Tensor | np.ndarray | Mapping):
        yield inputs_of(given, argument)
    elif isinstance(given, Iterable):
        for batch in given:
            yield inputs_of(batch, argument)
    else:
        raise ValueError(f"{argument} must be a tensor or yield batches of them; got a {type(given).__name__}")


def sample(given: Batches, most: int, argument: str = "images") -> Inputs:
    """The first `most` samples of all batches, as one batch; what is streamed is read no further.

    Raises:
        ValueError: there are none.
    """
    kept, seen = [], 0
    for inputs in batches_of(given, argument):
        if length(inputs):
            kept.append(first(inputs, most - seen))
            seen += length(kept[-1])
        if seen >= most:
            break
    if not seen:
        raise ValueError(f"no calibration images were given: {argument} is empty")
    return joined(kept)
