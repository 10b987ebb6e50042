"""A grouped layer's factors: those of every group, truncated to the same ranks and put side by side."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..configuration import Ranks
from .factors import KernelFactors, LayerFactors, MatrixFactors


@dataclass(frozen=True, kw_only=True)
class GroupedFactors(LayerFactors):
    """A grouped convolution: groups that know nothing of one another, each with factors of its own.

    All groups take the same ranks, so that every stage is one grouped convolution.

    Attributes:
        parts: the factors of each group, without bias, as of a layer of one group.
    """

    parts: tuple[KernelFactors | MatrixFactors, ...] = field(repr=False)

    @property
    def full_ranks(self) -> Ranks:
        """The ranks at which the layer is reproduced to rounding."""
        return self.parts[0].full_ranks

    def check(self, ranks: Ranks) -> None:
        """Raise ValueError unless each group can be truncated to these ranks."""
        self.parts[0].check(ranks)

    def groups(self, ranks: Ranks) -> tuple[tuple[str, ...], ...]:
        """The stages that stay apart."""
        return self.parts[0].groups(ranks)

    def truncated(self, ranks: Ranks) -> dict[tuple[str, ...], Tensor]:
        """Stage group -> weight, the groups' side by side: ``(groups o, i, h, w)`` or ``(groups o, i)``."""
        parts = [part.truncated(ranks) for part in self.parts]
        return {group: torch.cat([part[group] for part in parts]) for group in parts[0]}

    def params(self, ranks: Ranks) -> int:
        """Parameters of the truncated layer, bias included."""
        return sum(part.params(ranks) for part in self.parts) + self._bias_params

    def flops(self, ranks: Ranks) -> int:
        """Multiply-accumulates of the truncated layer for one image."""
        return sum(part.flops(ranks) for part in self.parts)

    def output_error(self, ranks: Ranks) -> float:
        """Relative squared error of the output that these ranks cause: discarded over total energy, in 0..1."""
        self.check(ranks)
        errors = [part.output_error(ranks) for part in self.parts]
        return float(self._pooled(torch.tensor(errors, dtype=torch.float64).unsqueeze(1))[0])

    def output_errors(self, *leaf_ranks: int) -> Tensor:
        """Relative squared errors at growing ranks of the middle edge, or of a matrix's one edge."""
        return self._pooled(torch.stack([part.output_errors(*leaf_ranks).double().cpu() for part in self.parts]))

    def _pooled(self, errors: Tensor) -> Tensor:
        """Errors of the groups ``(groups, n)``, each relative to its own energy, as the layer's ``(n,)``."""
        energies = torch.tensor([part.energy for part in self.parts], dtype=torch.float64)
        weights = energies / energies.sum() if energies.sum() > 0 else torch.full_like(energies, 1 / len(energies))
        return weights @ errors

    def edge_energies(self, edge: str = "mid") -> Tensor:
        """Squared singular values of an edge, falling, summed over the groups."""
        return torch.stack([part.edge_energies(edge).double() for part in self.parts]).sum(0)
