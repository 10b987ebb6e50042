"""Binary trees over the modes of a tensor: the shape of a hierarchical Tucker format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

Node = tuple[int, ...]
"""A node of a dimension tree: the modes below it, in the tree's order."""


@dataclass(frozen=True)
class DimensionTree:
    """A binary tree over the modes 0 .. d-1, written as nested pairs: ``((1, 2), (3, 0))``.

    Raises:
        ValueError: if the nesting is not binary or does not hold every mode exactly once.
    """

    nested: tuple

    def __post_init__(self) -> None:
        modes = sorted(_modes(self.nested))
        if len(modes) < 2 or modes != list(range(len(modes))):
            raise ValueError(f"a dimension tree holds each of the modes 0..d-1 once, d >= 2; got {self.nested!r}")

    @classmethod
    def balanced(cls, order: int) -> DimensionTree:
        """The tree that halves the modes 0 .. order-1 at every node."""
        return cls(_halve(tuple(range(order))))

    @classmethod
    def linear(cls, order: int) -> DimensionTree:
        """The tree that splits off one mode at a time (the tensor train's shape)."""
        nested: tuple | int = order - 1
        for mode in reversed(range(order - 1)):
            nested = (mode, nested)
        return cls(nested)

    @property
    def order(self) -> int:
        return len(self.root)

    @cached_property
    def root(self) -> Node:
        return _modes(self.nested)

    @cached_property
    def children(self) -> dict[Node, tuple[Node, Node]]:
        """Inner node -> its two children; parents come before their children."""
        return dict(_inner_nodes(self.nested))

    @cached_property
    def edges(self) -> tuple[Node, ...]:
        """Every node but the root, parents before children: the nodes that have a rank."""
        return tuple(child for pair in self.children.values() for child in pair)


def _modes(nested: tuple | int) -> Node:
    if isinstance(nested, int):
        return (nested,)
    if not isinstance(nested, tuple) or len(nested) != 2:
        raise ValueError(f"a node of a dimension tree is a mode or a pair of nodes; got {nested!r}")
    return _modes(nested[0]) + _modes(nested[1])


def _halve(modes: Node) -> tuple | int:
    if len(modes) == 1:
        return modes[0]
    middle = (len(modes) + 1) // 2
    return (_halve(modes[:middle]), _halve(modes[middle:]))


def _inner_nodes(nested: tuple | int) -> Iterator[tuple[Node, tuple[Node, Node]]]:
    if isinstance(nested, int):
        return
    left, right = nested
    yield _modes(nested), (_modes(left), _modes(right))
    yield from _inner_nodes(left)
    yield from _inner_nodes(right)
