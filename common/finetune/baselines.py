"""The dense baselines that are compressed later: trained once, kept as checkpoints, loaded ever after."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from ..data import Dataset
from ..files import write_text
from ..models import CheckpointError, build_model, canonical_name, load_checkpoint, save_checkpoint
from ..provenance import provenance
from ..reports.method_plots import training_curve
from ..reports.plots import save
from .evaluation import evaluate
from .settings import TrainSettings, recipe
from .training import train

CURVE_KEYS = ("epoch", "train_loss", "val_loss", "val_accuracy")
"""What of each epoch the training curve shows."""

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


def checkpoint_path(architecture: str, dataset: str, image_size: int, folder: Path = SAVED_MODELS) -> Path:
    """Where a baseline's checkpoint lies; a folder data set is named by its last folder."""
    short = re.sub(r"[^A-Za-z0-9-]+", "-", Path(dataset).name.removeprefix("folder:"))
    return folder / f"{architecture}_{short}_{image_size}.safetensors"


def baseline(
    model_name: str,
    dataset: Dataset,
    settings: TrainSettings | None = None,
    *,
    weights: str = "none",
    folder: Path = SAVED_MODELS,
    progress: bool = True,
) -> Baseline:
    """Load the baseline's checkpoint, or train it when there is none, and say which.

    Raises:
        ValueError: see `train_baseline`; or the checkpoint does not fit the data set.
    """
    architecture = canonical_name(model_name)
    path = checkpoint_path(architecture, dataset.name, dataset.image_size, folder)
    if not path.exists():
        print(f"No checkpoint at {path}: training {architecture} on {dataset.name} now.")
        return train_baseline(architecture, dataset, settings, weights=weights, folder=folder, progress=progress)
    model, metadata = load_checkpoint(
        path, architecture=architecture, num_classes=dataset.num_classes, device=dataset.device
    )
    model = model.to(memory_format=torch.channels_last)  # as training leaves it
    print(f"Loaded {architecture} for {dataset.name} from {path}.")
    if "val_accuracy" not in metadata or "test_accuracy" not in metadata:
        raise CheckpointError(f"{path} was not written by finetune_models.py: its accuracy is not recorded")
    return Baseline(model, architecture, path, metadata["val_accuracy"], metadata["test_accuracy"], trained_now=False)


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
        settings: None takes those of `common.train_settings.recipe`.
        fresh: start over where an unfinished run was left; otherwise it is continued.

    Raises:
        ValueError: unknown model, images too small for it, an unfinished run of other settings.
        TrainingDiverged: the loss became NaN or infinite.
    """
    architecture = canonical_name(model_name)
    settings = settings or recipe(architecture, pretrained=weights != "none", train_images=len(dataset.train))
    path = checkpoint_path(architecture, dataset.name, dataset.image_size, folder)
    unfinished = path.with_suffix(f".{Path(weights).stem}.unfinished.pt")
    if fresh:
        unfinished.unlink(missing_ok=True)
    model = build_model(
        architecture,
        dataset.num_classes,
        weights=weights,
        image_size=dataset.image_size,
        seed=settings.seed,
    )
    history = train(model, dataset, settings, checkpoint=unfinished, progress=progress)
    test = evaluate(model, dataset.test)
    record = {
        "model": architecture,
        "dataset": dataset.name,
        "image_size": dataset.image_size,
        "weights": weights,
        "train_images": len(dataset.train),
        "val_images": len(dataset.val),
        "test_images": len(dataset.test),
        "val_accuracy": history.epochs[-1].val_accuracy,
        "test_accuracy": test.accuracy,
        "settings": asdict(settings),
        "epochs": [asdict(epoch) for epoch in history.epochs],
        "provenance": provenance(dataset.device, settings.seed),
    }
    write_text(path.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
    curve = [{key: epoch[key] for key in CURVE_KEYS} for epoch in record["epochs"]]
    save(training_curve(curve, title=f"{architecture}, {dataset.name}"), path.with_suffix(".png"))
    save_checkpoint(model, path, architecture=architecture, classes=dataset.classes, metadata=record)
    unfinished.unlink(missing_ok=True)
    return Baseline(model, architecture, path, record["val_accuracy"], test.accuracy, trained_now=True)
