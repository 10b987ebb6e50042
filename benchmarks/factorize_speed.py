"""What a candidate costs: factorise once and compress, against tensorly's `partial_tucker` on the same layers.

    python benchmarks/factorize_speed.py

Both sides decompose the same k x k layers of ResNet18 at the same leaf ranks, in the same process, in interleaved
rounds. `partial_tucker` (modes 0 and 1, its default SVD initialisation and iterations) starts from scratch for every
candidate. `factorize` runs once per model; `compress` is what a candidate costs after that: cold, with no middle basis
cached, as for the first candidate with these leaf ranks, and warm, as for a later one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tensorly
import torch
from tabulate import tabulate
from tensorly.decomposition import partial_tucker
from torch import nn

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `common` is found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.compress import ModelFactors, factorize
from common.configuration import KernelRanks
from common.files import write_text
from common.models import build_model, load_checkpoint
from common.provenance import provenance
from common.ranks import uniform


def tensorly_seconds(model: nn.Module, config: dict[str, KernelRanks]) -> float:
    """Seconds to decompose every configured layer with `partial_tucker` at the configuration's leaf ranks."""
    kernels = {name: model.get_submodule(name).weight.detach() for name in config}
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        return timed(
            lambda: [
                partial_tucker(kernel, rank=[config[name].rank_out, config[name].rank_in], modes=[0, 1])
                for name, kernel in kernels.items()
            ]
        )


def timed(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def round_seconds(model: nn.Module, images: torch.Tensor, fraction: float) -> dict[str, float]:
    """One round: every way once, from the same state. Factors are made anew, so that nothing is cached."""
    made: list[ModelFactors] = []
    seconds = {"factorize, data-aware": timed(lambda: made.append(factorize(model, images, layers="kernels")))}
    factors = made[0]
    config = uniform(factors, fraction)
    seconds["factorize, weight-only"] = timed(
        lambda: factorize(model, layers="kernels", input_shape=factors.input_shape)
    )
    seconds["compress, cold"] = timed(lambda: factors.compress(config))
    seconds["compress, warm"] = timed(lambda: factors.compress(config))
    seconds["partial_tucker"] = tensorly_seconds(model, config)
    return seconds


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        if options.rounds < 1:
            raise ValueError(f"--rounds must be at least 1; got {options.rounds}")
        if options.checkpoint:
            model, _ = load_checkpoint(options.checkpoint, architecture="resnet18")
        else:
            model = build_model("resnet18", 10, seed=options.seed).eval()
        generator = torch.Generator().manual_seed(options.seed)
        images = torch.randn(options.images, 3, options.image_size, options.image_size, generator=generator)
        round_seconds(model, images[:8], options.fraction)  # warm-up
        rounds = [round_seconds(model, images, options.fraction) for _ in range(options.rounds)]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    median = {way: statistics.median(one[way] for one in rounds) for way in rounds[0]}
    ratio = {way: median["partial_tucker"] / value for way, value in median.items()}
    content = {
        "provenance": provenance("cpu", options.seed),
        "settings": {key: str(value) for key, value in vars(options).items()},
        "layers": len(uniform(factorize(model, layers="kernels", input_shape=(3, 32, 32)), options.fraction)),
        "median_seconds": median,
        "partial_tucker_over_this": ratio,
        "rounds": rounds,
    }
    write_text(options.out, json.dumps(content, indent=1) + "\n")
    rows = [(way, f"{value:.3f}", f"{ratio[way]:.1f}x") for way, value in median.items()]
    print(tabulate(rows, headers=["ResNet18, all k x k layers", "seconds", "partial_tucker / this"], tablefmt="pretty"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time factorise and compress against tensorly's partial_tucker.")
    parser.add_argument("--checkpoint", type=Path, help="of a ResNet18; default: random weights")
    parser.add_argument("--fraction", type=float, default=0.25, help="rank fraction of the channels (default 0.25)")
    parser.add_argument("--images", type=int, default=2000, help="calibration images (default 2000)")
    parser.add_argument("--image-size", type=int, default=32, metavar="PIXELS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/factorize_speed.json"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
