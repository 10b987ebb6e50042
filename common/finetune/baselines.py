"""The dense baselines that are compressed later: trained once, kept as checkpoints, loaded ever after.

A checkpoint belongs to what it was made from: data, split, settings and starting weights have a fingerprint, which
stands in its header. It is used where the fingerprint is the one that is asked for; otherwise another one is trained
and kept beside it, under a name of its own. A network that somebody has trained already can be taken as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import nn

from ..data import Dataset
from ..files import write_text
from ..models import (
    CheckpointError,
    build_model,
    canonical_name,
    check_image_size,
    load_checkpoint,
    save_checkpoint,
)
from ..provenance import provenance
from ..reports.method_plots import training_curve
from ..reports.plots import save
from .evaluation import evaluate
from .settings import TrainSettings, recipe
from .training import train

CURVE_KEYS = ("epoch", "train_loss", "val_loss", "val_accuracy")
"""What of each epoch the training curve shows."""

VALIDATED = "validated_images"
"""Where a checkpoint says how many validation images its accuracy is of."""

SAVED_MODELS = Path("finetuned/saved_models")


@dataclass(frozen=True)
class Baseline:
    """A trained dense network, in evaluation mode, and what is known about it."""

    model: nn.Module
    architecture: str
    checkpoint: Path
    val_accuracy: float
    test_accuracy: float
    trained_now: bool
    fingerprint: str


@dataclass(frozen=True)
class _Wanted:
    """The baseline that is asked for: what it is made from, and where it lies."""

    architecture: str
    dataset: Dataset
    settings: TrainSettings | None  # None: taken as it is
    weights: str
    folder: Path

    @property
    def facts(self) -> dict[str, Any]:
        """Everything that the trained weights follow from."""
        weights = self.weights
        if Path(weights).is_file():
            weights = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
        data = self.dataset
        return {
            "architecture": self.architecture,
            "train": data.train.content,
            "validation": data.val.content,
            "test": data.test.content,
            "classes": list(data.classes),
            "image_size": data.image_size,
            "mean": list(data.mean),
            "std": list(data.std),
            "settings": None if self.settings is None else self.settings.recorded(),
            "weights": weights,
        }

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def paths(self) -> tuple[Path, Path]:
        """Where it may lie: under the plain name, or, where another one has that, under a name of its own."""
        plain = checkpoint_path(self.architecture, self.dataset.name, self.dataset.image_size, self.folder)
        return plain, plain.with_stem(f"{plain.stem}-{self.fingerprint[:8]}")

    def matches(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this metadata is it. Checkpoints without a fingerprint are of earlier versions:
        they are taken where all that they say agrees, and never for image folders, which they tell by a name only.
        """
        if "fingerprint" in metadata:
            return metadata["fingerprint"] == self.fingerprint
        own = self.settings.recorded()
        settings = {**own, **(metadata.get("settings") or {})}
        agreeing = {
            "dataset": self.dataset.name,
            "image_size": self.dataset.image_size,
            "weights": self.weights,
            "train_images": len(self.dataset.train),
            "val_images": len(self.dataset.val),
        }
        same = all(metadata.get(key) == value for key, value in agreeing.items())
        return same and settings == own and not self.dataset.name.startswith("folder:")


def checkpoint_path(architecture: str, dataset: str, image_size: int, folder: Path = SAVED_MODELS) -> Path:
    """Where a baseline's checkpoint lies; a folder data set is named by its last folder."""
    short = re.sub(r"[^A-Za-z0-9-]+", "-", Path(dataset).name.removeprefix("folder:"))
    size = "x".join(map(str, image_size)) if isinstance(image_size, tuple) else image_size
    return folder / f"{architecture}_{short}_{size}.safetensors"


def baseline(
    model_name: str,
    dataset: Dataset,
    settings: TrainSettings | None = None,
    *,
    weights: str = "none",
    folder: Path = SAVED_MODELS,
    progress: bool = True,
) -> Baseline:
    """Load the checkpoint of just this baseline, or train it when there is none, and say which.

    Args:
        settings: None takes those of `recipe`.

    Raises:
        ValueError: see `train_baseline`; or a checkpoint of this name is damaged.
    """
    wanted = _wanted(model_name, dataset, settings, weights, folder)
    with _alone(wanted.paths[0]):
        for path in wanted.paths:
            if path.exists() and (found := _loaded(wanted, path)) is not None:
                print(f"Loaded {wanted.architecture} for {dataset.name} from {path}.")
                return found
        plain, own = wanted.paths
        other = f"; the one in {plain} is of other data, settings or starting weights" if plain.exists() else ""
        print(f"No checkpoint of this baseline{other}: training {wanted.architecture} on {dataset.name} now.")
        return _trained(wanted, own if plain.exists() else plain, progress=progress)


def train_baseline(
    model_name: str,
    dataset: Dataset,
    settings: TrainSettings | None = None,
    *,
    weights: str = "none",
    folder: Path = SAVED_MODELS,
    fresh: bool = False,
    progress: bool = True,
) -> Baseline:
    """Train one network, read its test accuracy once at the end, and write checkpoint, curve and log.

    Args:
        settings: None takes those of `recipe`.
        fresh: start over where an unfinished run was left; otherwise it is continued.

    Raises:
        ValueError: unknown model, images too small for it, an unfinished run of other settings.
        TrainingDiverged: the loss became NaN or infinite.
    """
    wanted = _wanted(model_name, dataset, settings, weights, folder)
    plain, own = wanted.paths
    with _alone(plain):
        taken = plain.exists() and _loaded(wanted, plain) is None
        return _trained(wanted, own if taken else plain, fresh=fresh, progress=progress)


def given_baseline(model_name: str, dataset: Dataset, weights: str) -> Baseline:
    """A trained network as its checkpoint has it: evaluated on validation and test, not trained, and nothing written.

    Raises:
        ValueError: no such file, or one of another network or of other classes; images too small for it.
    """
    architecture, path = canonical_name(model_name), Path(weights)
    check_image_size(architecture, dataset.image_size)
    model, metadata = load_checkpoint(
        path, architecture=architecture, num_classes=dataset.num_classes, device=dataset.device
    )
    if metadata["classes"] and list(metadata["classes"]) != list(dataset.classes):
        raise CheckpointError(f"{path} was trained on other classes than {dataset.name} has: give epochs to train it")
    model = model.to(memory_format=torch.channels_last)  # as training leaves it
    validation, test = (evaluate(model, split).accuracy for split in (dataset.val, dataset.test))
    print(f"Took {architecture} from {path} as it is.")
    fingerprint = _Wanted(architecture, dataset, None, weights, path.parent).fingerprint
    return Baseline(model, architecture, path, validation, test, trained_now=False, fingerprint=fingerprint)


def _wanted(model_name: str, dataset: Dataset, settings: TrainSettings | None, weights: str, folder: Path) -> _Wanted:
    architecture = canonical_name(model_name)
    settings = settings or recipe(architecture, pretrained=weights != "none", train_images=len(dataset.train))
    return _Wanted(architecture, dataset, settings, weights, Path(folder))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the baselines of one plain name: a second run waits until the first has trained, and then loads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path.with_name(f".{path.stem}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"Another process is at work on {path}: waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _loaded(wanted: _Wanted, path: Path) -> Baseline | None:
    """The baseline in this file; None if it is another one."""
    model, metadata = load_checkpoint(path, device=wanted.dataset.device)
    if metadata["architecture"] != wanted.architecture or not wanted.matches(metadata):
        return None
    if "val_accuracy" not in metadata or "test_accuracy" not in metadata:
        raise CheckpointError(f"{path} was not written by finetune_models.py: its accuracy is not recorded")
    model = model.to(memory_format=torch.channels_last)  # as training leaves it
    validation = metadata["val_accuracy"]
    if metadata.get(VALIDATED) != len(wanted.dataset.val):
        # Of an earlier version, whose last epoch read `val_images` of them: candidates are judged by all.
        validation = evaluate(model, wanted.dataset.val, amp=wanted.settings.amp).accuracy
    accuracies = validation, metadata["test_accuracy"]
    return Baseline(model, wanted.architecture, path, *accuracies, trained_now=False, fingerprint=wanted.fingerprint)


def _trained(wanted: _Wanted, path: Path, *, fresh: bool = False, progress: bool = True) -> Baseline:
    """Train it into this file, going on from where an earlier process was interrupted."""
    dataset, settings = wanted.dataset, wanted.settings
    unfinished = path.with_suffix(f".{Path(wanted.weights).stem}.unfinished.pt")
    if fresh:
        unfinished.unlink(missing_ok=True)
    model = build_model(
        wanted.architecture,
        dataset.num_classes,
        weights=wanted.weights,
        image_size=dataset.image_size,
        seed=settings.seed,
    )
    history = train(model, dataset, settings, checkpoint=unfinished, progress=progress)
    test = evaluate(model, dataset.test)
    record = {
        "model": wanted.architecture,
        "dataset": dataset.name,
        "image_size": dataset.image_size,
        "weights": wanted.weights,
        "train_images": len(dataset.train),
        "val_images": len(dataset.val),
        "test_images": len(dataset.test),
        "val_accuracy": history.epochs[-1].val_accuracy,
        VALIDATED: len(dataset.val),
        "test_accuracy": test.accuracy,
        "fingerprint": wanted.fingerprint,
        "settings": settings.recorded(),
        "epochs": [asdict(epoch) for epoch in history.epochs],
        "provenance": provenance(dataset.device, settings.seed),
    }
    write_text(path.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
    curve = [{key: epoch[key] for key in CURVE_KEYS} for epoch in record["epochs"]]
    save(training_curve(curve, title=f"{wanted.architecture}, {dataset.name}"), path.with_suffix(".png"))
    save_checkpoint(model, path, architecture=wanted.architecture, classes=dataset.classes, metadata=record)
    unfinished.unlink(missing_ok=True)
    accuracies = record["val_accuracy"], test.accuracy
    return Baseline(model, wanted.architecture, path, *accuracies, trained_now=True, fingerprint=wanted.fingerprint)
