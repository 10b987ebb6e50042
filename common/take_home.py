"""A compressed network to take home: saved, exported, deployed anew."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .cost import count_flops, count_params
from .deploy import Deployed, deploy, export_onnx, export_program
from .inputs import Inputs, first, like_model
from .models import save_compressed
from .search import Record


@dataclass(frozen=True)
class Small:
    """A compressed network to take home.

    Attributes:
        model: in eval mode, trainable further, saved and loaded as it is.
        deployed: the same folded and in its fastest execution plans; what the run's speed was measured on.
        record: its ranks, costs and scores.
        images: calibration images, for exports and for the ranges of int8.
    """

    model: nn.Module
    deployed: Deployed
    record: Record
    dense: nn.Module = field(repr=False)
    images: Inputs = field(repr=False)
    details: dict[str, Any] = field(repr=False)

    def save(self, path: str | Path) -> Path:
        """One safetensors file; `load_compressed(path, model=...)` loads it, model being what makes the dense one."""
        metadata = {**self.details, "accuracy": self.record["accuracy"], "trial": self.record["trial"]}
        save_compressed(self.model, path, dense=self.dense, config=self.record["config"], metadata=metadata)
        return Path(path)

    def export_onnx(self, path: str | Path, *, int8: bool = False) -> Path:
        """The deployed network as ONNX, with a dynamic batch axis, checked against torch; quantised if asked for."""
        ranges = self.images if int8 else None
        export_onnx(self.deployed, first(self.images, 2), path, metadata=self.details, int8=ranges)
        return Path(path)

    def export_program(self, path: str | Path) -> Path:
        """The deployed network as a `torch.export` program (.pt2), which torch alone loads."""
        export_program(self.deployed, first(self.images, 2), path)
        return Path(path)

    def deploy(self, batch: Inputs, **options: Any) -> Deployed:
        """Deployed anew for another batch size, device or runtime; see `common.deploy.deploy`."""
        return deploy(self.model, batch, **options)

    @property
    def params(self) -> int:
        return count_params(self.model)

    @property
    def flops(self) -> int:
        """Multiply-accumulates of convolutions and linear layers for one sample."""
        return count_flops(self.model, first(like_model(first(self.images, 2), self.model), 1))
