"""Train the dense baselines that are compressed later.

    python finetuned/finetune_models.py --model resnet18 --dataset mnist --image-size 32 --epochs 3

Writes <architecture>_<dataset>_<size>.safetensors with its training curve (.png) and log (.json).
An interrupted run goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `common` is found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.data import load
from common.finetune import SAVED_MODELS, StateMismatch, TrainingDiverged, recipe, train_baseline
from common.models import FAMILIES, canonical_name, check_image_size


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
    parser.add_argument("--val-images", type=int, metavar="IMAGES", help="after each epoch but the last; default: all")
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
