"""Full ranks reproduce the network: torchvision's classification networks, with how many layers each has factorised.

    python benchmarks/every_network.py --size 64 [--models resnet18 vgg11 ...]

Random weights, weight-only bases. Writes results/every-network.json and .md; a network that fails is a row with its
error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from tqdm import tqdm

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `common` is found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.compress import factorize
from common.files import write_text
from common.models import build_model
from common.provenance import provenance

SIZES = {"inception_v3": 96}
"""Networks that smaller images do not pass."""


def checked(name: str, size: int) -> dict[str, Any]:
    """One network: layers factorised and left dense, and how far its outputs at full ranks are from the dense ones."""
    started = time.perf_counter()
    side = max(size, SIZES.get(name, 0))
    model = build_model(name, 10, seed=0).eval()
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    factors = factorize(model, input_shape=(3, side, side))
    small = factors.compress(factors.full_ranks())
    with torch.no_grad():
        expected, found = model(images), small(images)
    reasons = Counter(reason.split(" (")[0].split(":")[0] for reason in factors.skipped.values())
    return {
        "network": name,
        "factorised": len(factors.layers),
        "dense": len(factors.skipped),
        "because": dict(reasons),
        "difference": float((expected - found).abs().max() / expected.abs().max()),
        "seconds": time.perf_counter() - started,
    }


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0; 1 where a network is not reproduced."""
    parser = argparse.ArgumentParser(description="Check that full ranks reproduce torchvision's networks.")
    parser.add_argument("--models", nargs="+", help="default: all classification networks")
    parser.add_argument(
        "--largest", type=float, default=50e6, help="parameters up to which one is tried (default: 50e6)"
    )
    parser.add_argument("--size", type=int, default=64, metavar="PIXELS")
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    names = options.models or torchvision.models.list_models(module=torchvision.models)
    rows = []
    for name in tqdm(names, unit="network"):
        weights = torchvision.models.get_model_weights(name).DEFAULT
        if weights.meta["num_params"] > options.largest:
            continue
        try:
            rows.append(checked(name, options.size))
        except (ValueError, RuntimeError) as error:
            rows.append({"network": name, "error": str(error).splitlines()[0][:160]})
    content = {"rows": rows, "provenance": provenance("cpu", 0)}
    write_text(options.out / "every-network.json", json.dumps(content, indent=1) + "\n")
    write_text(options.out / "every-network.md", table(rows) + "\n")
    print(table(rows))
    return 0 if all(row.get("difference", 1.0) < 1e-3 for row in rows) else 1


def table(rows: list[dict[str, Any]]) -> str:
    """One line per network."""
    lines = [
        [row["network"], row["factorised"], row["dense"], f"{row['difference']:.0e}", "; ".join(row["because"])]
        if "error" not in row
        else [row["network"], "-", "-", "-", f"error: {row['error']}"]
        for row in rows
    ]
    return tabulate(lines, headers=["network", "factorised", "left dense", "difference", "because"], tablefmt="github")


if __name__ == "__main__":
    sys.exit(main())
