"""Train the dense baselines that are compressed later.

    python finetuned/finetune_models.py --model resnet18 --dataset mnist --image-size 32 --epochs 3

Writes <architecture>_<dataset>_<size>.safetensors with its training curve (.png) and log (.json).
An interrupted run goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `common` is found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.data import Dataset, load
from common.files import atomic_path, write_text
from common.finetune import EpochRecord, StateMismatch, TrainingDiverged, TrainSettings, evaluate, recipe, train
from common.models import (
    FAMILIES,
    CheckpointError,
    build_model,
    canonical_name,
    check_image_size,
    load_checkpoint,
    save_checkpoint,
)
from common.provenance import provenance

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
    _plot_curve(history.epochs, f"{architecture}, {dataset.name}", path.with_suffix(".png"))
    save_checkpoint(model, path, architecture=architecture, classes=dataset.classes, metadata=record)
    unfinished.unlink(missing_ok=True)
    return Baseline(model, architecture, path, record["val_accuracy"], test.accuracy, trained_now=True)


def _plot_curve(epochs: tuple[EpochRecord, ...], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    numbers = [epoch.epoch for epoch in epochs]
    loss_axes.plot(numbers, [epoch.train_loss for epoch in epochs], "o-", label="training (augmented)")
    loss_axes.plot(numbers, [epoch.val_loss for epoch in epochs], "s--", label="validation")
    loss_axes.set(xlabel="epoch", ylabel="loss (nats)", xticks=numbers)
    loss_axes.legend()
    accuracy_axes.plot(numbers, [100 * epoch.val_accuracy for epoch in epochs], "s--", color="C1")
    accuracy_axes.set(xlabel="epoch", ylabel="validation accuracy (%)", xticks=numbers)
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["resnet18"], help="architectures or families, or 'all' three")
    parser.add_argument("--dataset", default="mnist", help="digits, mnist, fashion-mnist, cifar10, folder:PATH")
    parser.add_argument("--image-size", type=int, default=32, metavar="PIXELS")
    parser.add_argument("--data-root", metavar="DIR", help="default: $HTD_DATA, else data")
    parser.add_argument(
        "--weights",
        default="none",
        metavar="WEIGHTS",
        help="what it starts from: none, imagenet, or a checkpoint of the same network, such as one of a smaller size",
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, help="default: 128, or 32 for small data sets")
    parser.add_argument("--learning-rate", type=float, help="default: what suits the architecture")
    parser.add_argument("--train-limit", type=int, metavar="IMAGES", help="use a stratified subset")
    parser.add_argument("--val-images", type=int, metavar="IMAGES", help="evaluated after each epoch; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, ...")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--out", type=Path, default=SAVED_MODELS, metavar="DIR")
    parser.add_argument("--fresh", action="store_true", help="ignore an unfinished run")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> None:
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    names = list(FAMILIES) if "all" in options.model else options.model
    architectures = list(dict.fromkeys(canonical_name(name) for name in names))
    for architecture in architectures:
        check_image_size(architecture, options.image_size)
    dataset = load(
        options.dataset,
        options.data_root,
        image_size=options.image_size,
        seed=options.seed,
        device=_device(options.device),
        train_limit=options.train_limit,
    )
    for architecture in architectures:
        chosen = {
            "epochs": options.epochs,
            "seed": options.seed,
            "batch_size": options.batch_size,
            "learning_rate": options.learning_rate,
            "val_images": options.val_images,
        }
        settings = replace(
            recipe(architecture, pretrained=options.weights != "none", train_images=len(dataset.train)),
            **{name: value for name, value in chosen.items() if value is not None},
        )
        print(f"{architecture} on {dataset.name}: {len(dataset.train)} images of {dataset.image_size} px")
        done = train_baseline(
            architecture,
            dataset,
            settings,
            weights=options.weights,
            folder=options.out,
            fresh=options.fresh,
        )
        print(f"validation {done.val_accuracy:.4f}, test {done.test_accuracy:.4f}, saved in {done.checkpoint}")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).partition(chr(10))[0]}") from error
    return device


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0, 1 (diverged), 2 (bad input) or 130 (interrupted)."""
    options = _parse(arguments)
    try:
        _run(options)
    except KeyboardInterrupt:
        print("\nInterrupted; the same command continues after the last finished epoch.", file=sys.stderr)
        return 130
    except StateMismatch as error:
        print(f"error: {error} (--fresh does that)", file=sys.stderr)
        return 2
    except TrainingDiverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
