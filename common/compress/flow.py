"""Which tensors of a pass are a layer's own output, as it left the layer or behind its batch norm."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass
class Flow:
    """Tensors are known by their identity, and not kept alive.

    Attributes:
        through: layer -> the batch norm that reads its output.
    """

    through: dict[str, str] = field(default_factory=dict)
    _owners: dict[int, tuple[weakref.ref, str]] = field(default_factory=dict)

    def put(self, tensor: Tensor, layer: str) -> None:
        self._owners[id(tensor)] = weakref.ref(tensor), layer

    def layer_of(self, tensor: Any) -> str | None:
        known, layer = self._owners.get(id(tensor), (None, None))
        return layer if known is not None and known() is tensor else None

    def drop(self, tensor: Any) -> None:
        self._owners.pop(id(tensor), None)

    def read(self, norm: str, tensor: Tensor) -> None:
        """A batch norm reads the tensor."""
        if (layer := self.layer_of(tensor)) is not None:
            self.through[layer] = norm


def running_norms(model: nn.Module) -> list[str]:
    """The batch norms that normalise by statistics of their own in eval mode."""
    return [name for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
