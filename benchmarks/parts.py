"""A batch whole, on all threads, or in parts with a thread each: how long it takes, and how steadily.

    python benchmarks/parts.py --model alexnet --config results/mnist-224/alexnet-smallest-seed0.safetensors

On processors of several dies a core reads another's feature maps quickly or slowly by where the system has put the two,
and that changes while one looks. Every round times all ways in turns. Writes parts.json, parts.md and parts.png. Let
nothing else run at the time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from tabulate import tabulate

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `common` and `benchmarks` are found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.latency import Network, add_network_options
from benchmarks.rows import command
from common.cost import latency_samples
from common.deploy import Target, deploy
from common.deploy.parts import in_parts, part_sizes
from common.files import write_text
from common.provenance import provenance

RUNTIMES = ("onnxruntime", "openvino")
WHOLE = "whole"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds per batch of every round, of both networks in every way; written to parts.json."""
    given = Network.of(options)
    example = torch.randn(options.batch, *given.input_shape, generator=torch.Generator().manual_seed(0))
    threads, runs = torch.get_num_threads(), {}
    origin = provenance("cpu", 0)
    for side, network in (("dense", given.dense), ("compressed", given.compressed)):
        model = deploy(network, example, runtime=options.runtime).model
        session = Target(options.runtime, False, False, threads).uncompiled_run(model, example)
        alone = session.alone()
        runs[f"{side}, {WHOLE}"] = session.call
        for size in part_sizes(options.batch, threads):
            runs[f"{side}, parts of {size}"] = in_parts(alone, size, threads)
    samples = latency_samples(runs, example, rounds=options.rounds)
    content = {
        "network": given.name,
        "config": given.config,
        "batch": options.batch,
        "image_size": options.image_size,
        "runtime": options.runtime,
        "threads": threads,
        "seconds": samples,
        "provenance": origin,
    }
    write_text(options.out / "parts.json", json.dumps(content) + "\n")
    return content


def table(content: Mapping[str, Any]) -> str:
    """A row per network and way: its median, its spread, and the dense network's whole batch beside it."""
    dense = np.median(content["seconds"][f"dense, {WHOLE}"])
    rows = []
    for name, seconds in content["seconds"].items():
        low, median, high = 1e3 * np.percentile(seconds, [10, 50, 90])
        network, _, way = name.partition(", ")
        spread = f"{low:.2f} to {high:.2f}"
        rows.append([network, way, f"{median:.2f}", spread, f"{high / low:.2f}", f"{1e3 * dense / median:.2f}x"])
    heads = ["network", "batch", "ms per batch", "10 % to 90 %", "their ratio", "dense, whole / this"]
    origin = content["provenance"]
    note = (
        f"{content['network']} at {content['image_size']} px, batch {content['batch']}, {content['runtime']}, "
        f"{len(next(iter(content['seconds'].values())))} rounds in turns; {origin['machine']}, {content['threads']} "
        f"threads, revision {origin['git_revision']}; `{origin['command']}`."
    )
    return tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True) + f"\n\n{note}"


def figure(content: Mapping[str, Any]) -> Figure:
    """Milliseconds of each round, a panel per network."""
    drawn, panels = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    for panel, side in zip(panels, ("dense", "compressed"), strict=True):
        for name, seconds in content["seconds"].items():
            network, _, way = name.partition(", ")
            if network == side:
                panel.plot(1e3 * np.array(seconds), linewidth=0.9, label=way)
        panel.set_title(f"{content['network']}, {side}")
        panel.set_xlabel("Round")
        panel.set_ylabel("Milliseconds per batch")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend()
    return drawn


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    options.out = options.out or Path("results") / f"parts-{options.model}"
    return command(options.out, "parts", lambda: measure(options), table, figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_options(parser)
    parser.add_argument("--batch", type=int, default=16, metavar="IMAGES")
    parser.add_argument("--runtime", choices=RUNTIMES, default="onnxruntime")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, help="default: results/parts-NETWORK")
    return parser


if __name__ == "__main__":
    sys.exit(main())
