"""What a run's folder was begun with: candidates of another baseline, or of other settings, would not compare."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from .files import read_json, write_text

MAY_CHANGE = (
    "candidates",
    "promote",
    "tolerance",
    "control",
    "latency_batch",
    "runtime",
    "int8",
    "executor",
    "address",
    "workers",
    "threads",
    "storage",
    "folder",
    "baselines",
    "data_root",
    "device",
)
"""Knobs that a run may be continued with another value of: the candidates that it has stay what they are."""


def claim_folder(settings: Any, dense: nn.Module) -> None:
    """Note in the run's folder what it is begun with, or see that it is gone on with the same.

    Args:
        settings: the knobs of a run; its `state_folder` is claimed.
        dense: the baseline.

    Raises:
        ValueError: the folder was begun with another baseline or other settings: it is named, and what differs.
    """
    moved = {"budgets"} if settings.max_loss is not None else set()
    own = {name: value for name, value in settings.rows() if name not in moved.union(MAY_CHANGE)}
    own["baseline"] = weights_digest(dense)
    own = json.loads(json.dumps(own, default=str))
    path = settings.state_folder / "settings.json"
    if not path.exists():
        write_text(path, json.dumps(own, indent=1))
        return
    known = read_json(path)
    differing = sorted(name for name in own if name in known and known[name] != own[name])
    if differing:
        raise ValueError(
            f"{settings.state_folder} was begun with another {', '.join(differing)}: "
            "delete it, or give the run another folder or seed"
        )


def weights_digest(model: nn.Module) -> str:
    """A short digest of everything in a network's state."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        if isinstance(tensor, Tensor):
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
