"""Run a network again and again with a change that begins at one layer, computing only what comes from there on.

What a network computes before the layer does not change with it. So the operations of one pass are counted, those up to
the layer are kept, and later passes are handed their results. Works on torch's operations, not on modules: branches,
shared layers and arithmetic between layers need no description. Kept is what is still to be read, and nothing else;
from layer to layer, in the order in which they run, the place moves on, so that the memory taken is that of one place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..inputs import Inputs, run
from ..modules import Reached, hooked


class Unrepeatable(Exception):
    """The network does not run the same operations twice, or on something that is no plain tensor."""


@dataclass
class _Memory:
    """A storage of the pass: the operations that last read it and last wrote to it."""

    read: float = -1
    written: float = -1


@dataclass
class Prefix:
    """A network's pass over `inputs`, of which the beginning is kept.

    Attributes:
        output: of the whole pass.
        starts: module -> the number of operations before its first call.
    """

    model: nn.Module
    inputs: Inputs
    output: Any = None
    starts: dict[str, int] = field(default_factory=dict)
    _operations: list[Any] = field(default_factory=list)
    _made: list[list[_Memory]] = field(default_factory=list)  # what each operation's outputs lie in
    _kept: list[Any] = field(default_factory=list)
    _layer: str = ""
    _shared: torch.UntypedStorage | None = None

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs, names: Iterable[str]) -> Prefix:
        """One pass that looks where the named modules begin, and until when each result is needed.

        Raises:
            Unrepeatable: the network computes with tensors that have no storage.
        """
        prefix = cls(model, inputs)
        scout = _Scout(prefix._operations, prefix._made)

        def starts(name: str) -> Callable:
            def hook(_module: nn.Module, _inputs: tuple) -> None:
                prefix.starts.setdefault(name, len(prefix._operations))

            return hook

        try:
            with hooked(model, {}, before={name: starts(name) for name in names}), scout:
                prefix.output = run(model, inputs)
        except NotImplementedError as error:
            raise Unrepeatable(str(error)) from error
        for tensor in tree_leaves(prefix.output):
            if isinstance(tensor, Tensor) and (memory := scout.memory(tensor)) is not None:
                memory.read = math.inf
        return prefix

    def advance(self, name: str) -> None:
        """Keep what is computed before this module; modules are taken in the order of `starts`.

        Raises:
            Unrepeatable: other operations than at first.
        """
        place, self._layer = self.starts[name], name
        recorder = _Replay(self._operations, self._kept, until=place)
        with suppress(Reached), hooked(self.model, {}), recorder:
            run(self.model, self.inputs)
        for index, memories in enumerate(self._made[:place]):
            if memories and all(memory.read < place for memory in memories):
                self._kept[index] = tree_map_only(Tensor, self._placeholder, self._kept[index])

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, a pass of the network takes what is kept, and computes the rest.

        Whatever stands at the layer's place by then is a new beginning: from its call on nothing is watched.
        """
        place, copies = len(self._kept), {}
        kept = list(self._kept)
        for index, memories in enumerate(self._made[:place]):
            if any(memory.written >= place for memory in memories):
                kept[index] = tree_map_only(Tensor, lambda tensor: _copied(tensor, copies), kept[index])
        with ExitStack() as watched:

            def leave(_module: nn.Module, _inputs: tuple) -> None:
                watched.close()

            handle = self.model.get_submodule(self._layer).register_forward_pre_hook(leave, prepend=True)
            try:
                watched.enter_context(_Replay(self._operations, kept, until=place))
                yield
            finally:
                handle.remove()

    def _placeholder(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape and strides, by which torch chooses its ways, on memory that all of them share."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        needed = max(extent, 1) * tensor.itemsize
        if self._shared is None or self._shared.nbytes() < needed:
            self._shared = torch.empty(needed, dtype=torch.uint8, device=tensor.device).untyped_storage()
        return tensor.new_empty(0).set_(self._shared, 0, tensor.shape, tensor.stride())


class _Scout(TorchDispatchMode):
    """Notes every operation, and of every storage that one makes who reads it and who writes to it."""

    def __init__(self, operations: list[Any], made: list[list[_Memory]]) -> None:
        super().__init__()
        self._operations, self._made = operations, made
        self._memories: dict[int, _Memory] = {}

    def memory(self, tensor: Tensor) -> _Memory | None:
        return self._memories.get(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, index = kwargs or {}, len(self._operations)
        self._operations.append(func)
        own: dict[int, _Memory] = {}
        for tensor in _tensors((args, kwargs)):
            if (memory := self.memory(tensor)) is not None:
                memory.read = index
                own[tensor.untyped_storage()._cdata] = memory
        output = func(*args, **kwargs)
        for tensor in _written(func, args, kwargs):
            if (memory := self.memory(tensor)) is not None:
                memory.written = index
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        made = []
        for tensor in _tensors(output):
            key = tensor.untyped_storage()._cdata
            if key in own:
                made.append(own[key])
            elif key not in given:  # a new one, perhaps where an old one has been freed; else a parameter or an input
                own[key] = self._memories[key] = _Memory(read=index)
                made.append(own[key])
        self._made.append(made)
        return output


class _Replay(TorchDispatchMode):
    """Hands out what is kept of the first operations, computes and keeps those up to a place, and ends there."""

    def __init__(self, operations: list[Any], kept: list[Any], *, until: int) -> None:
        super().__init__()
        self._operations, self._kept, self._until, self._next = operations, kept, until, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        index = self._next
        self._next += 1
        if index >= self._until:
            raise Reached
        if func is not self._operations[index]:
            raise Unrepeatable(f"operation {index} was {self._operations[index]}, and is {func}")
        if index >= len(self._kept):
            self._kept.append(func(*args, **(kwargs or {})))
        # New tensors on the same memory: autograd notes what is a view of what on those that it is given.
        kept = self._kept[index]
        return _alias(kept) if type(kept) is Tensor else tree_map_only(Tensor, _alias, kept)


_alias = torch.ops.aten.alias.default


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation changes."""
    if not func._schema.is_mutable:
        return []
    values = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    changed = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    return _tensors([value for name, value in values.items() if name in changed])


def _copied(tensor: Tensor, copies: dict[int, Any]) -> Tensor:
    """A copy that shares its storage with the copies of those that the tensor shares its own with."""
    storage = tensor.untyped_storage()
    if storage._cdata not in copies:
        copies[storage._cdata] = storage.clone()
    own = copies[storage._cdata]
    return tensor.new_empty(0).set_(own, tensor.storage_offset(), tensor.shape, tensor.stride())
