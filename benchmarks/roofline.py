"""Where the time of a network goes, layer by layer, and how far each is from what the machine can do at best.

    python benchmarks/roofline.py --model resnet18 --config results/mnist-224/resnet18-smallest-seed0.safetensors
    python benchmarks/roofline.py --model vgg16 --config results/mnist-224/vgg16-smallest-seed0.safetensors

    python benchmarks/roofline.py --model resnet18 --config ... --precision int8

Weights are random unless a file is given: times do not depend on them. Both sides, deployed alike, in onnxruntime and
OpenVINO; in int8 in OpenVINO alone, whose kernels say what they move. Writes roofline.json, roofline.md and a figure
per runtime and batch size. Let nothing else run at the time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `common` is found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.latency import Network, add_network_options
from common.cost import measure_latency
from common.deploy import deploy
from common.deploy.profile import IN_INT8, PROFILED, profile
from common.deploy.roofline import Roofline, roofline
from common.files import atomic_path, write_text
from common.provenance import provenance

SIDES = ("dense", "compressed")
SHOWN_LAYERS = 8

CALIBRATION = 8
"""Images whose ranges int8 takes: its speed does not depend on them."""


def measure(
    networks: Mapping[str, nn.Module],
    images: Tensor,
    limits: Roofline,
    runtime: str,
    rounds: int,
    int8: Tensor | None = None,
) -> dict[str, Any]:
    """Both sides' kernels at a batch size, each with its limit, and the time of a whole batch without a profiler.

    int8: calibration images, for both sides in int8.
    """
    deployed = {
        side: deploy(network, images, runtime=runtime, rounds=rounds, int8=int8) for side, network in networks.items()
    }
    whole = measure_latency({side: one.run for side, one in deployed.items()}, images, rounds=rounds)
    kernels = {
        side: [
            asdict(kernel) | {"limit": limits.seconds(kernel)}
            for kernel in profile(one.model, images, runtime=runtime, rounds=rounds, int8=int8)
        ]
        for side, one in deployed.items()
    }
    precision = "float32" if int8 is None else "int8"
    return {"runtime": runtime, "precision": precision, "batch": len(images), "seconds": whole, "kernels": kernels}


def _way(row: Mapping[str, Any]) -> str:
    """A row's runtime, and its precision where that is not float32; files of before know no other."""
    return row["runtime"] if row.get("precision", "float32") == "float32" else f"{row['runtime']} {row['precision']}"


def by_layer(kernels: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Layer -> (seconds, limit) of all its kernels; a factorised layer's stages are one layer."""
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    names = {kernel["layer"] for kernel in kernels}
    for kernel in kernels:
        layer = kernel["layer"]
        head, _, tail = layer.rpartition(".")
        if tail.isdigit() and head and sum(name.rpartition(".")[0] == head for name in names) > 1:
            layer = head
        layer = layer or f"{kernel['kind']}, layout"
        found[layer][0] += kernel["seconds"]
        found[layer][1] += kernel["limit"]
    return {name: (seconds, limit) for name, (seconds, limit) in found.items()}


def table(content: Mapping[str, Any]) -> str:
    """One line per runtime, batch and side; below, the layers that lose the most time against their limits."""
    lines, notes = [], []
    for row in content["rows"]:
        for side in SIDES:
            kernels, seconds = row["kernels"][side], row["seconds"][side]
            limit = sum(kernel["limit"] for kernel in kernels)
            inside = sum(kernel["seconds"] for kernel in kernels)
            busy = sum(kernel["limit"] for kernel in kernels if kernel["flops"])
            layers = by_layer(kernels)
            worst = sorted(layers, key=lambda name: layers[name][1] - layers[name][0])[:SHOWN_LAYERS]
            lines.append(
                [
                    _way(row),
                    row["batch"],
                    side,
                    f"{1e3 * seconds:.2f}",
                    f"{1e3 * inside:.2f}",
                    f"{1e3 * limit:.2f}",
                    f"{limit / seconds:.0%}",
                    f"{busy / limit:.0%}",
                    len(kernels),
                ]
            )
            if side == "compressed":
                lost = ", ".join(
                    f"{name} {1e3 * layers[name][0]:.2f} for {1e3 * layers[name][1]:.2f}"
                    for name in worst
                    if layers[name][0] > layers[name][1]
                )
                notes.append(f"{_way(row)}, batch {row['batch']}, ms above the limit: {lost}.")
    heads = ["runtime", "batch", "network", "ms", "in kernels", "limit", "reached", "limit of arithmetic", "kernels"]
    facts, machine = content["provenance"], content["machine"]
    peaks = ", ".join(
        f"{runtime} {one['flops_per_second'] / 1e9:.0f} G multiply-accumulates a second"
        for runtime, one in machine.items()
    )
    copies = ", ".join(
        f"{size / 2**20:g} MiB {speed / 1e9:.0f} GB/s" for size, speed in next(iter(machine.values()))["copies"]
    )
    notes = [
        f"Peaks of large convolutions: {peaks}. Copies, read and written: {copies}.",
        *notes,
        f"{content['network']}, {content['image_size']} px; {facts['machine']}, {facts['threads']} threads, revision "
        f"{facts['git_revision']}; `{facts['command']}`.",
    ]
    text = tabulate(lines, headers=heads, tablefmt="github", disable_numparse=True)
    return text + "\n\n" + "\n".join(f"- {note}" for note in notes)


def figure(row: Mapping[str, Any], network: str) -> Figure:
    """Per layer, what both sides take and the least that they could."""
    layers = {side: by_layer(row["kernels"][side]) for side in SIDES}
    names = list(dict.fromkeys([*layers["dense"], *layers["compressed"]]))
    names = [name for name in names if any(layers[side].get(name, (0, 0))[0] > 1e-5 for side in SIDES)]
    result, axes = plt.subplots(figsize=(8, 1.2 + 0.3 * len(names)), layout="constrained")
    for side, shift, colour in (("dense", -0.2, "tab:gray"), ("compressed", 0.2, "tab:blue")):
        places = [place + shift for place in range(len(names))]
        seconds, limits = ([1e3 * layers[side].get(name, (0, 0))[part] for name in names] for part in (0, 1))
        axes.barh(places, seconds, 0.38, color=colour, alpha=0.45, label=f"{side}, measured")
        axes.barh(places, limits, 0.38, color=colour, label=f"{side}, at best")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ms per batch")
    axes.set_title(f"{network}, batch {row['batch']}, {_way(row)}")
    axes.legend(fontsize=8)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        given = Network.of(options)
        networks = {"dense": given.dense, "compressed": given.compressed}
        int8 = options.precision == "int8"
        runtimes = options.runtimes or (IN_INT8 if int8 else PROFILED)
        if int8 and set(runtimes) != set(IN_INT8):
            raise ValueError(f"--precision int8 is of {', '.join(IN_INT8)} alone; got --runtimes {' '.join(runtimes)}")
        limits = {runtime: roofline(runtime, rounds=options.rounds, int8=int8) for runtime in runtimes}
        torch.manual_seed(0)
        ranges = torch.randn(CALIBRATION, 3, options.image_size, options.image_size) if int8 else None
        rows = []
        for runtime in runtimes:
            for batch in options.batches:
                images = torch.randn(batch, 3, options.image_size, options.image_size)
                rows.append(measure(networks, images, limits[runtime], runtime, options.rounds, ranges))
        content = {
            "network": given.name,
            "config": given.config,
            "sizes": given.sizes,
            "image_size": options.image_size,
            "machine": {runtime: asdict(limit) for runtime, limit in limits.items()},
            "rows": rows,
            "provenance": provenance("cpu", 0),
        }
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = options.out or Path("results") / f"roofline-{given.name}"
    write_text(out / "roofline.json", json.dumps(content) + "\n")
    write_text(out / "roofline.md", table(content) + "\n")
    for row in rows:
        with atomic_path(out / f"{_way(row).replace(' ', '-')}-batch{row['batch']}.png") as path:
            figure(row, given.name).savefig(path, dpi=130)
        plt.close("all")
    print(table(content))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_options(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--runtimes", nargs="+", choices=PROFILED, help="default: all that can")
    parser.add_argument("--precision", choices=["float32", "int8"], default="float32", help="int8: of openvino alone")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="default: results/roofline-NETWORK")
    return parser


if __name__ == "__main__":
    sys.exit(main())
