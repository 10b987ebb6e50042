"""The hierarchical Tucker (HT) format for a tensor of any order and any binary dimension tree.

A tensor ``X`` of order d is written with one *leaf basis* per mode and one *transfer tensor* per inner node of a binary
tree over the modes. The basis of an inner node is never stored: it is the product of its children's bases with its
transfer tensor,

    U_t = (U_left kron U_right) B_t,      U_t: (product of the node's mode sizes, r_t),

and the root (r_root = 1) gives back vec(X). Storage is O(d n r + d r^3) instead of O(n^d).

Sources: Hackbusch and Kuehn, J. Fourier Anal. Appl. 15 (2009), for the format; Grasedyck, SIAM J. Matrix Anal. Appl.
31(4) (2010), for the hierarchical SVD (HSVD), its truncation and its error bounds.

This module knows tensors only, no networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import tensorly
import torch
from torch import Tensor

from .dimension_tree import DimensionTree, Node


def matricize(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Matricization of ``tensor``: the modes ``rows`` (in that order) as rows, the others, ascending, as columns."""
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        return tensorly.base.matricize(tensor, tuple(rows))


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """``tensor x_mode matrix``: the mode of size n becomes of size m for a ``matrix`` of shape (m, n)."""
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        return tensorly.tenalg.mode_dot(tensor, matrix, mode)


@dataclass(frozen=True)
class HTucker:
    """A tensor in hierarchical Tucker format.

    Attributes:
        tree: the dimension tree.
        bases: mode m -> leaf basis ``U_m: (n_m, r_m)``.
        transfers: inner node t -> transfer tensor ``B_t: (r_left, r_right, r_t)``; r_root = 1.
        names: what the modes are called when the tensor is printed; their numbers by default.
    """

    tree: DimensionTree
    bases: Mapping[int, Tensor]
    transfers: Mapping[Node, Tensor]
    names: tuple[str, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.bases[mode].shape[0] for mode in range(self.tree.order))

    @property
    def ranks(self) -> dict[Node, int]:
        """HT rank of every node but the root."""
        return {node: self._rank(node) for node in self.tree.edges}

    def num_parameters(self) -> int:
        return sum(t.numel() for t in (*self.bases.values(), *self.transfers.values()))

    def __str__(self) -> str:
        """The tree, one node a line, with its rank and the shape of its basis U or transfer tensor B."""
        whole = " x ".join(map(str, self.shape))
        head = f"{whole} in hierarchical Tucker format: {self.num_parameters():,} numbers for {math.prod(self.shape):,}"
        lines = list(self._branches(self.tree.root, "", ""))
        width = max(len(branch) for branch, _ in lines)
        return "\n".join([head, *(f"{branch:<{width}}   {facts}" for branch, facts in lines)])

    def _branches(self, node: Node, first: str, rest: str) -> Iterator[tuple[str, str]]:
        """(branch, facts) of a node and of all below it; `first` and `rest` indent its own line and its children's."""
        label = "(" + ", ".join(self.names[mode] if self.names else str(mode) for mode in node) + ")"
        tensor = self.bases[node[0]] if len(node) == 1 else self.transfers[node]
        kind = "U" if len(node) == 1 else "B"
        yield first + label, f"rank {self._rank(node):>4}   {kind}: {' x '.join(map(str, tensor.shape))}"
        for place, child in enumerate(self.tree.children.get(node, ())):
            last = place == 1
            yield from self._branches(child, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))

    def to_dense(self) -> Tensor:
        """The full tensor, by contracting the tree from the leaves to the root."""
        root = self.tree.root
        sizes = [self.shape[mode] for mode in root]
        return self._node_basis(root).reshape(sizes).permute(_inverse(root)).contiguous()

    def node_singular_values(self) -> dict[Node, Tensor]:
        """Singular values of every node's matricization, from reduced Gramians: the full tensor is never formed.

        Source: Grasedyck (2010), section 4 (orthogonalise, then accumulate Gramians from the root to the leaves).
        """
        gramians = _reduced_gramians(_orthogonalized(self))
        return {node: torch.linalg.eigvalsh(g).flip(0).clamp_min(0).sqrt() for node, g in gramians.items()}

    def truncate(self, *, ranks: Mapping[Node, int] | None = None, tolerance: float | None = None) -> HTucker:
        """Truncate to smaller ranks, or to an error of at most ``tolerance`` (absolute, Frobenius norm).

        Costs O(d n r^2 + d r^4): the full tensor is never formed. The result shares no storage with this tensor.

        Raises:
            ValueError: unless exactly one of ``ranks`` and ``tolerance`` is given, or if a rank is out of range.
        """
        orthogonal = _orthogonalized(self)
        rotations, singular_values = {}, {}
        for node, gramian in _reduced_gramians(orthogonal).items():
            eigenvalues, vectors = torch.linalg.eigh(gramian)
            singular_values[node] = eigenvalues.flip(0).clamp_min(0).sqrt()
            rotations[node] = vectors.flip(1)
        kept = _choose_ranks(self.tree, singular_values, ranks, tolerance)
        rotations = {node: rotation[:, : kept[node]] for node, rotation in rotations.items()}
        return _rotated(orthogonal, rotations)

    def _rank(self, node: Node) -> int:
        return self.bases[node[0]].shape[1] if len(node) == 1 else self.transfers[node].shape[2]

    def _node_basis(self, node: Node) -> Tensor:
        if len(node) == 1:
            return self.bases[node[0]]
        left, right = (self._node_basis(child) for child in self.tree.children[node])
        # One child at a time: a single einsum would form all of (i, j, a, b) on the way.
        basis = torch.einsum("ibr,jb->ijr", torch.einsum("ia,abr->ibr", left, self.transfers[node]), right)
        return basis.reshape(-1, basis.shape[2])


def node_singular_values(tensor: Tensor, tree: DimensionTree) -> dict[Node, Tensor]:
    """Singular values of the matricization of every node but the root.

    Both children of the root see the same values: they are the two sides of one matrix.
    """
    _check_order(tensor, tree)
    return {node: torch.linalg.svdvals(matricize(tensor, node)) for node in tree.edges}


def hsvd(
    tensor: Tensor,
    tree: DimensionTree | None = None,
    *,
    ranks: Mapping[Node, int] | None = None,
    tolerance: float | None = None,
) -> HTucker:
    """Hierarchical SVD: ``tensor`` (n_1, ..., n_d) in HT format, truncated by ``ranks`` or ``tolerance``, never both.

    With neither, nothing is truncated beyond exact zeros of the matricizations' size. The bases are the leading left
    singular vectors of the nodes' matricizations; ``ranks`` may leave out one child of the root (it is its sibling's).

    Args:
        tree: the dimension tree; balanced by default.
        ranks: node -> rank, for every node but the root.
        tolerance: the largest Frobenius-norm error allowed; the ranks are then the smallest for which every edge keeps
            its share tolerance / sqrt(2 d - 3) (Grasedyck 2010, theorem 3.11).

    Raises:
        ValueError: both ``ranks`` and ``tolerance`` given, a rank out of range or missing, a tree of another order.
    """
    tree = tree or DimensionTree.balanced(tensor.ndim)
    _check_order(tensor, tree)
    bases, singular_values = {}, {}
    for node in tree.edges:
        bases[node], singular_values[node] = left_singular_basis(matricize(tensor, node))
    kept = _choose_ranks(tree, singular_values, ranks, tolerance)
    bases = {node: basis[:, : kept[node]].contiguous() for node, basis in bases.items()}
    transfers = {}
    for node, (left, right) in tree.children.items():
        parent = matricize(tensor, node) if node == tree.root else bases[node]
        parent = parent.reshape(bases[left].shape[0], bases[right].shape[0], -1)
        transfers[node] = torch.einsum("ijr,ia,jb->abr", parent, bases[left], bases[right])
    return HTucker(tree, {node[0]: basis for node, basis in bases.items() if len(node) == 1}, transfers)


def left_singular_basis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors (m, min(m, n)) and singular values of ``matrix`` (m, n), in falling order."""
    basis, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return basis, values


def max_ranks(shape: Sequence[int], tree: DimensionTree) -> dict[Node, int]:
    """The largest rank that each node's matricization can have: the smaller of its two sides."""
    total = math.prod(shape)
    return {node: min(rows := math.prod(shape[mode] for mode in node), total // rows) for node in tree.edges}


def error_bound(singular_values: Mapping[Node, Tensor], ranks: Mapping[Node, int], tree: DimensionTree) -> float:
    """Upper bound of the HSVD's error: root of the summed squared discarded singular values over the 2 d - 3 edges.

    The root's two children are one edge, counted once. Source: Grasedyck (2010), theorem 3.11.
    """
    return math.sqrt(sum(float(singular_values[node][ranks[node] :].square().sum()) for node in _distinct_edges(tree)))


def quasi_optimality(tree: DimensionTree) -> float:
    """How many times the best possible error (at the same ranks) the HSVD's error can be: sqrt(2 d - 3)."""
    return math.sqrt(2 * tree.order - 3)


def _distinct_edges(tree: DimensionTree) -> tuple[Node, ...]:
    """The edges with the root's second child left out: it repeats the first child's singular values."""
    second_child = tree.children[tree.root][1]
    return tuple(node for node in tree.edges if node != second_child)


def _check_order(tensor: Tensor, tree: DimensionTree) -> None:
    if tensor.ndim != tree.order:
        raise ValueError(f"the tensor has {tensor.ndim} modes, the dimension tree {tree.order}")
    if not torch.isfinite(tensor).all():
        raise ValueError("the tensor holds NaN or infinite entries")


def _choose_ranks(
    tree: DimensionTree,
    singular_values: Mapping[Node, Tensor],
    ranks: Mapping[Node, int] | None,
    tolerance: float | None,
) -> dict[Node, int]:
    if ranks is not None and tolerance is not None:
        raise ValueError("give ranks or a tolerance, not both")
    limits = {node: len(values) for node, values in singular_values.items()}
    if ranks is not None:
        return _checked_ranks(tree, limits, ranks)
    if tolerance is None:
        return limits
    if not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative; got {tolerance}")
    share = (tolerance / quasi_optimality(tree)) ** 2
    return {node: _smallest_rank(values, share) for node, values in singular_values.items()}


def _smallest_rank(values: Tensor, allowed_square: float) -> int:
    """The smallest rank >= 1 whose discarded squared singular values sum to at most ``allowed_square``."""
    tail_squares = values.square().flip(0).cumsum(0)
    return max(1, len(values) - int((tail_squares <= allowed_square).sum()))


def _checked_ranks(tree: DimensionTree, limits: Mapping[Node, int], ranks: Mapping[Node, int]) -> dict[Node, int]:
    ranks = dict(ranks)
    first, second = tree.children[tree.root]
    for given, missing in ((first, second), (second, first)):
        if given in ranks:
            ranks.setdefault(missing, ranks[given])
    for node in tree.edges:
        if node not in ranks:
            raise ValueError(f"no rank for node {node}; the tree's nodes are {list(tree.edges)}")
        if not 1 <= ranks[node] <= limits[node]:
            raise ValueError(f"rank of node {node} must be in 1..{limits[node]}; got {ranks[node]}")
    if unknown := set(ranks) - set(tree.edges):
        raise ValueError(f"no such node in the tree: {sorted(unknown)}; its nodes are {list(tree.edges)}")
    if ranks[first] != ranks[second]:
        raise ValueError(
            f"the root's children {first} and {second} share one rank; got {ranks[first]} and {ranks[second]}"
        )
    return ranks


def _inverse(permutation: Sequence[int]) -> list[int]:
    return sorted(range(len(permutation)), key=lambda i: permutation[i])


def _orthogonalized(tensor: HTucker) -> HTucker:
    """The same tensor with orthonormal node bases: QR from the leaves to the root."""
    carried: dict[Node, Tensor] = {}
    bases, transfers = {}, {}
    for mode, basis in tensor.bases.items():
        bases[mode], carried[(mode,)] = torch.linalg.qr(basis)
    for node, (left, right) in reversed(tensor.tree.children.items()):
        transfer = torch.einsum("xa,yb,abr->xyr", carried[left], carried[right], tensor.transfers[node])
        if node != tensor.tree.root:
            flat, carried[node] = torch.linalg.qr(transfer.reshape(-1, transfer.shape[2]))
            transfer = flat.reshape(*transfer.shape[:2], -1)
        transfers[node] = transfer
    return HTucker(tensor.tree, bases, transfers)


def _reduced_gramians(tensor: HTucker) -> dict[Node, Tensor]:
    """Node t -> ``G_t: (r_t, r_t)`` with ``X^(t) X^(t)^T = U_t G_t U_t^T``, for a tensor with orthonormal bases."""
    one = torch.ones(1, 1, dtype=tensor.bases[0].dtype, device=tensor.bases[0].device)
    gramians = {tensor.tree.root: one}
    for node, (left, right) in tensor.tree.children.items():
        transfer, gramian = tensor.transfers[node], gramians[node]
        gramians[left] = torch.einsum("abr,rs,xbs->ax", transfer, gramian, transfer)
        gramians[right] = torch.einsum("abr,rs,ays->by", transfer, gramian, transfer)
    del gramians[tensor.tree.root]
    return gramians


def _rotated(tensor: HTucker, rotations: Mapping[Node, Tensor]) -> HTucker:
    """Project every node's basis on the columns of its rotation ``Q_t: (r_t, k_t)``."""
    root = tensor.tree.root
    identity = torch.ones(1, 1, dtype=tensor.bases[0].dtype, device=tensor.bases[0].device)
    bases = {mode: basis @ rotations[(mode,)] for mode, basis in tensor.bases.items()}
    transfers = {
        node: torch.einsum(
            "abr,ax,by,rz->xyz",
            tensor.transfers[node],
            rotations[left],
            rotations[right],
            identity if node == root else rotations[node],
        )
        for node, (left, right) in tensor.tree.children.items()
    }
    return HTucker(tensor.tree, bases, transfers)
