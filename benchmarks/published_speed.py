"""Networks of one accuracy: whose is the faster? What a table of published networks lost, against measured speed.

    python benchmarks/published_speed.py --checkpoint resnet20.th --data folder:PATH

Every network of `published_networks.py`'s rows that was trained longest is deployed as the dense one is and timed with
it, in turns, in every runtime and batch size. A network with fewer FLOPs need not be faster: pruned layers stay one
convolution each. So each network is compared with the fastest of ours that loses no more. Speed is of the layers'
shapes: the networks timed are those that the rows were trained from. Let nothing else run.

Writes speed.json after every case and goes on where it was; then speed.md and a figure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `benchmarks` and `common` are found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cifar_resnet import MEAN, STD, from_checkpoint, network_name
from benchmarks.published_networks import DENSE, METHODS, Shapes, standard_of
from benchmarks.rows import command, resumed
from common import data
from common.cost import latency_samples
from common.deploy import deploy
from common.deploy.runtimes import RUNTIMES
from common.files import write_text
from common.knobs import CALIBRATION_IMAGES
from common.provenance import provenance

OURS = METHODS[0]


def trained_rows(content: Mapping[str, Any], network: str) -> list[dict[str, Any]]:
    """One row per method and budget, of the first seed, trained for as long as any was; with the points it lost.

    Raises:
        ValueError: there are no rows of this network.
    """
    own = [row for row in content["rows"] if row["network"] == network and "failed" not in row]
    if not own:
        raise ValueError(f"there are no rows of {network}")
    epochs, seed = max(row["epochs"] for row in own), min(row["seed"] for row in own)
    standard = standard_of(content, network, epochs)
    return [
        {**row, "lost": 100 * (standard - row["test_accuracy"])}
        for row in own
        if (row["epochs"], row["seed"]) == (epochs, seed) and row["method"] != DENSE
    ]


def time_cases(
    content: dict[str, Any],
    target: Path,
    options: argparse.Namespace,
    rows: Sequence[Mapping[str, Any]],
    make_shapes: Callable[[], Shapes],
) -> None:
    """Time the rows in every runtime and batch size of the options that `content` lacks, and write each case at once.

    Networks are made once for all cases, and only where one is missing: others' packages take minutes for some.
    """
    done = {(case["runtime"], case["batch"]) for case in content["cases"]}
    cases = [(runtime, batch) for runtime in options.runtimes for batch in options.batches]
    left = [case for case in cases if case not in done]
    if not left:
        return
    shapes = make_shapes()
    networks = {DENSE: shapes.model} | {_name(row): shapes.of(row) for row in rows}
    for runtime, batch in left:
        example = shapes.images[:batch].clone()
        content["cases"].append(_timed(networks, rows, example, runtime, options.rounds))
        write_text(target, json.dumps(content, indent=1) + "\n")


def _timed(
    networks: Mapping[str, nn.Module], rows: Sequence[Mapping[str, Any]], example: Tensor, runtime: str, rounds: int
) -> dict[str, Any]:
    """One case: seconds per batch of the dense network, and per row its seconds and its speed-up, round by round."""
    batch = len(example)
    runs = {
        name: deploy(network, example, runtime=runtime, rounds=rounds).run
        for name, network in tqdm(networks.items(), desc=f"deploying, {runtime}, batch {batch}", unit="network")
    }
    load = os.getloadavg()[0]
    samples = latency_samples(runs, example, rounds=rounds)
    found = [
        {
            "method": row["method"],
            "budget": row["budget"],
            "seconds": statistics.median(samples[_name(row)]),
            "speedup": statistics.median(d / s for d, s in zip(samples[DENSE], samples[_name(row)], strict=True)),
        }
        for row in rows
    ]
    dense = statistics.median(samples[DENSE])
    return {"runtime": runtime, "batch": batch, "dense_seconds": dense, "load_average": load, "rows": found}


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['method']} {row['budget']}"


def curves(content: Mapping[str, Any], case: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Method -> its networks as (speed-up, points lost), in the order of speed."""
    lost = {(row["method"], row["budget"]): row["lost"] for row in content["networks"]}
    points: dict[str, list[tuple[float, float]]] = {}
    for row in case["rows"]:
        points.setdefault(row["method"], []).append((row["speedup"], lost[row["method"], row["budget"]]))
    return {method: sorted(points[method]) for method in METHODS if method in points}


def losing_no_more(content: Mapping[str, Any], case: Mapping[str, Any]) -> dict[str, list[float]]:
    """Method -> for each of its networks how many times as fast our fastest is that loses no more than it.

    Networks that lose less than any of ours are left out.
    """
    found = curves(content, case)
    return {
        method: [
            max(fitting) / speedup
            for speedup, lost in points
            if (fitting := [ours for ours, ours_lost in found[OURS] if ours_lost <= lost])
        ]
        for method, points in found.items()
        if method != OURS
    }


def table(content: Mapping[str, Any]) -> str:
    """A line per network with its speed-up in every case; then ours over each other's, ours losing no more."""
    cases, facts = content["cases"], content["provenance"]
    titles = [f"{case['runtime']}, batch {case['batch']}" for case in cases]
    lines = [
        [
            row["method"],
            f"{row['flops_kept']:.1%}",
            f"{row['lost']:.2f}",
            *(f"{_of(case, row)['speedup']:.2f}x" for case in cases),
        ]
        for row in sorted(content["networks"], key=lambda row: (METHODS.index(row["method"]), -row["budget"]))
    ]
    lines.append(["dense", "100.0%", "0.00", *(f"{1e3 * case['dense_seconds']:.2f} ms" for case in cases)])
    heads = ["method", "FLOPs kept", "points lost", *titles]
    parts = [tabulate(lines, headers=heads, tablefmt="github", disable_numparse=True)]
    ratios = [losing_no_more(content, case) for case in cases]
    leads = [[method, *(_range(case.get(method, [])) for case in ratios)] for method in ratios[0] if method != OURS]
    heads = [f"{OURS}, losing no more: times as fast as", *titles]
    parts.append(tabulate(leads, headers=heads, tablefmt="github", disable_numparse=True))
    parts.append(
        f"{content['network']}, {content['epochs']} epochs of fine-tuning, points lost on test; speed-up over the "
        f"dense network, all deployed alike and timed in turns. Below, each network beside the fastest of {OURS} that "
        "loses no more, slowest and fastest ratio of a method's networks. "
        f"{facts['machine']}, {facts['threads']} threads, revision {facts['git_revision']}; load average before the "
        f"timings at most {max(case['load_average'] for case in cases):.1f}."
    )
    return "\n\n".join(parts)


def _of(case: Mapping[str, Any], row: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(one for one in case["rows"] if _name(one) == _name(row))


def _range(ratios: Sequence[float]) -> str:
    if not ratios:
        return "-"
    return f"{min(ratios):.2f}x to {max(ratios):.2f}x" if len(ratios) > 1 else f"{ratios[0]:.2f}x"


def figure(content: Mapping[str, Any]) -> Figure:
    """Points lost against speed-up, a panel per case and a line per method."""
    cases = content["cases"]
    drawn = Figure(figsize=(4.2 * len(cases), 4), layout="constrained")
    panels = drawn.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        for method, points in curves(content, case).items():
            style = {"linewidth": 2.5, "zorder": 3} if method == OURS else {"linewidth": 1}
            axes.plot(*zip(*points, strict=True), marker="o", label=method, **style)
        axes.set_title(f"{case['runtime']}, batch {case['batch']}")
        axes.set_xlabel("speed-up over the dense network")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("points of test accuracy lost")
    panels[0].legend(fontsize="small")
    drawn.suptitle(f"{content['network']}, {content['epochs']} epochs of fine-tuning")
    return drawn


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 2 for bad input, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    return command(options.out, "speed", lambda: _run(options), table, figure)


def _run(options: argparse.Namespace) -> dict[str, Any]:
    model = from_checkpoint(options.checkpoint)
    network = network_name(model)
    known = json.loads((options.out / "rows.json").read_text(encoding="utf-8"))
    rows = trained_rows(known, network)
    target = options.out / "speed.json"
    own = {name: getattr(options, name) for name in ("rounds", "calibration")}
    asked = {**own, "network": network, "timed": [_name(row) for row in rows]}
    content = resumed(target, {"asked": asked, "cases": [], "provenance": provenance("cpu", 0)})
    content |= {"network": network, "epochs": rows[0]["epochs"], "networks": rows}

    def make_shapes() -> Shapes:
        dataset = data.load(options.data, image_size=32, mean=MEAN, std=STD)
        return Shapes(model, dataset.train.sample(options.calibration, rows[0]["seed"]))

    time_cases(content, target, options, rows, make_shapes)
    return content


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="state dict of ResNet-20 or ResNet-56")
    parser.add_argument("--data", default="cifar10", help="cifar10 or folder:PATH (default: cifar10)")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=["onnxruntime", "openvino"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--calibration", type=int, default=CALIBRATION_IMAGES, metavar="IMAGES", help="that the rows were made with"
    )
    parser.add_argument("--out", type=Path, default=Path("results/published-networks"), help="the folder of rows.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
