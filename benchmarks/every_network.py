"""Full ranks reproduce the network: torchvision's and timm's, with how many layers each has factorised.

    python benchmarks/every_network.py [--collection torchvision timm] [--models resnet18 timm:convnext_atto ...]

Random weights, weight-only bases. Of torchvision all classification networks, of timm the smallest network of every
family. Writes results/every-network.json, after each network, and .md; a run that was stopped goes on where it was. A
network that fails is a row with its error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `common` is found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.compress import factorize
from common.files import write_text
from common.models import build_model
from common.modules import first_line
from common.provenance import provenance

COLLECTIONS = ("torchvision", "timm")

SIZES = {"inception_v3": 96, "maxvit_t": 224}
"""Networks that smaller images do not pass."""

LARGEST_DIFFERENCE = 1e-3
"""Of the outputs, relative to the largest: what is above it is not reproduced."""


def timm_package() -> Any:
    """timm, which is installed for this table alone.

    Raises:
        ValueError: it is not.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ValueError("timm is not installed: pip install timm, or --collection torchvision") from error
    return timm


def names_of(collections: Iterable[str], largest: float) -> list[str]:
    """The networks of these collections of at most so many parameters; timm's begin with "timm:"."""
    names = []
    if "torchvision" in collections:
        for name in torchvision.models.list_models(module=torchvision.models):
            weights = torchvision.models.get_model_weights(name).DEFAULT
            if weights.meta["num_params"] <= largest:
                names.append(name)
    if "timm" in collections:
        names += [f"timm:{name}" for name in _smallest_of_families(largest)]
    return names


def _smallest_of_families(largest: float) -> list[str]:
    """timm's smallest network of each of its modules, by parameters."""
    timm = timm_package()
    found = []
    for family in sorted(timm.list_modules()):
        sizes = {}
        for name in timm.list_models(module=family):
            with torch.device("meta"):
                try:
                    sizes[name] = sum(p.numel() for p in timm.create_model(name, num_classes=10).parameters())
                except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError):
                    continue  # it computes with its weights while it is made, which the meta device cannot
        if sizes and min(sizes.values()) <= largest:
            found.append(min(sizes, key=sizes.__getitem__))
    return found


def made(name: str, size: int) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network of random weights, and the shape of its images."""
    if not name.startswith("timm:"):
        side = max(size, SIZES.get(name, 0))
        return build_model(name, 10, seed=0).eval(), (3, side, side)
    torch.manual_seed(0)
    model = timm_package().create_model(name.removeprefix("timm:"), num_classes=10).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)  # a head that begins at zero would put out nothing to compare
    return model, tuple(model.default_cfg["input_size"])


def checked(name: str, size: int) -> dict[str, Any]:
    """One network: layers factorised and left dense, and how far its outputs at full ranks are from the dense ones."""
    started = time.perf_counter()
    model, shape = made(name, size)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    factors = factorize(model, input_shape=shape)
    small = factors.compress(factors.full_ranks())
    with torch.no_grad():
        expected, found = model(images), small(images)
    reasons = Counter(reason.split(" (")[0].split(":")[0] for reason in factors.skipped.values())
    return {
        "network": name,
        "size": shape[-1],
        "factorised": len(factors.layers),
        "dense": len(factors.skipped),
        "because": dict(reasons),
        "difference": float((expected - found).abs().max() / expected.abs().max()),
        "seconds": time.perf_counter() - started,
    }


def known_rows(path: Path, size: int, found_by: dict[str, Any], *, keep: bool) -> list[dict[str, Any]]:
    """The rows of an earlier run of just this code, size and these versions; else none.

    keep: of any revision, but for those that were not reproduced.
    """
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text())
        if keep and content["size"] == size:
            return [row for row in content["rows"] if row.get("difference", 1.0) < LARGEST_DIFFERENCE]
        same = all(content["provenance"][key] == found_by[key] for key in ("git_revision", "versions"))
        clean = not found_by["git_revision"].endswith("-dirty")
        return content["rows"] if same and clean and content["size"] == size else []
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of networks ({error!r}): move it away") from error


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0; 1 where a network is not reproduced; 2 where the request makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="default: the whole of the collections")
    parser.add_argument("--collection", nargs="+", choices=COLLECTIONS, default=list(COLLECTIONS))
    parser.add_argument(
        "--largest", type=float, default=150e6, help="parameters up to which one is tried (default: 150e6)"
    )
    parser.add_argument(
        "--size", type=int, default=64, metavar="PIXELS", help="of torchvision's; timm's have their own"
    )
    parser.add_argument("--keep", action="store_true", help="rows of earlier revisions, where they were reproduced")
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    found_by = provenance("cpu", 0)
    target = options.out / "every-network.json"
    try:
        names = options.models or names_of(options.collection, options.largest)
        rows = [row for row in known_rows(target, options.size, found_by, keep=options.keep) if row["network"] in names]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    done = {row["network"] for row in rows}
    for name in tqdm([name for name in names if name not in done], unit="network"):
        try:
            rows.append(checked(name, options.size))
            rows[-1]["revision"] = found_by["git_revision"]
        except Exception as error:  # whatever a network of somebody's raises is its row
            rows.append({"network": name, "error": first_line(error)[:160]})
        content = {"size": options.size, "rows": rows, "provenance": found_by}
        write_text(target, json.dumps(content, indent=1) + "\n")
    rows.sort(key=lambda row: names.index(row["network"]))
    write_text(options.out / "every-network.md", table(rows) + "\n")
    print(table(rows))
    return 0 if all(row.get("difference", 1.0) < LARGEST_DIFFERENCE for row in rows) else 1


def table(rows: list[dict[str, Any]]) -> str:
    """One line per network, and their count."""
    lines = [
        [row["network"], row["factorised"], row["dense"], f"{row['difference']:.0e}", _reasons(row["because"])]
        if "error" not in row
        else [row["network"], "-", "-", "-", f"error: {row['error']}"]
        for row in rows
    ]
    headers = ["network", "factorised", "left dense", "difference", "because"]
    good = [row for row in rows if row.get("difference", 1.0) < LARGEST_DIFFERENCE]
    of_timm = sum(row["network"].startswith("timm:") for row in good)
    summary = f"Reproduced to {LARGEST_DIFFERENCE:g}: {len(good) - of_timm} of torchvision's, {of_timm} of timm's; "
    counted = Counter(row["revision"] for row in rows if "revision" in row)
    by = ", ".join(f"{count} at {revision}" for revision, count in counted.items())
    text = tabulate(lines, headers=headers, tablefmt="github")
    return f"{text}\n\n{summary}{len(rows) - len(good)} not. Rows by revision: {by}."


def _reasons(counted: dict[str, int]) -> str:
    return "; ".join(f"{count} x {reason}" for reason, count in counted.items())


if __name__ == "__main__":
    sys.exit(main())
