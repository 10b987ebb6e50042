"""An unfinished training run on disk: enough to go on as if it had never stopped, refused where it does not fit."""

from __future__ import annotations

import pickle
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import Dataset
from ..files import atomic_path
from .settings import TrainSettings


class StateMismatch(ValueError):
    """A checkpoint of another run, or a damaged one."""


def fingerprint(settings: TrainSettings, dataset: Dataset, taught: str) -> dict[str, Any]:
    """What must be equal for a run to be continued: settings, training images (by their labels) and teacher."""
    return {
        **settings.recorded(),
        "data set": dataset.name,
        "image size": dataset.image_size,
        "training images": len(dataset.train),
        "training labels (CRC)": zlib.crc32(dataset.train.labels.cpu().numpy().tobytes()),
        "teacher": taught,
    }


class TrainState:
    """Model, optimizer and history of one run, saved after each epoch as a file that loads without pickle."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any]):
        self._model = model
        self._optimizer = optimizer
        self._identity = identity

    def save(self, path: str | Path, history: list[dict[str, float]]) -> None:
        """Replace the checkpoint in one step."""
        with atomic_path(path) as temporary:
            torch.save(
                {
                    "identity": self._identity,
                    "model": self._model.state_dict(),
                    "optimizer": self._optimizer.state_dict(),
                    "history": history,
                },
                temporary,
            )

    def load(self, path: str | Path) -> list[dict[str, float]]:
        """Restore model and optimizer and return the history; empty where there is no checkpoint.

        Raises:
            StateMismatch: damaged file, or one of other settings, other data or another model.
        """
        path = Path(path)
        if not path.exists():
            return []
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            identity, history = saved["identity"], saved["history"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise StateMismatch(f"checkpoint {path} is damaged; delete it to start afresh") from error
        for name, value in self._identity.items():
            if identity.get(name) != value:
                raise StateMismatch(
                    f"checkpoint {path} was written with {name} = {identity.get(name)!r}, this run has {value!r}; "
                    "use the same settings to continue, or delete it to start afresh"
                )
        try:
            self._model.load_state_dict(saved["model"])
            self._optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise StateMismatch(f"checkpoint {path} belongs to another model ({reason})") from error
        return history
