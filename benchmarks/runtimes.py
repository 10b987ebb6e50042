"""A dense network and its compressed copy in every runtime and precision of this machine's CPU, timed in turns.

    python benchmarks/runtimes.py --dense finetuned/saved_models/resnet18_mnist_224.safetensors \\
        --compressed results/mnist-224/resnet18-smallest-seed0.safetensors --data mnist --image-size 224

Both sides get every runtime: a speed-up is that of the same runtime and precision, and, in a column of its own, that
over the fastest dense network in float32 of all runtimes. Test accuracy stands beside each, since quantisation costs
some. Where a side's weights are not at hand, random ones have the same speed, and no accuracy is shown of it:

    python benchmarks/runtimes.py --model vgg16 --compressed results/mnist-224/vgg16-mnist-224-cpu-seed0.json:0.0325-7

Let nothing else run at the time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `common` is found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.latency import Network
from common.cost import count_flops, count_params, latency_samples, summarise
from common.data import Dataset, load
from common.deploy import Deployed, deploy
from common.deployed_set import INT8_IMAGES, AsModule
from common.files import write_text
from common.finetune import evaluate
from common.models import load_checkpoint
from common.provenance import provenance

SIDES = ("dense", "compressed")

BLOCKS = 3
"""How often all runtimes and precisions have their turn."""


@dataclass(frozen=True)
class Way:
    """A runtime and the numbers that it computes in."""

    runtime: str
    precision: str

    def deployed(self, network: nn.Module, example: Tensor, images: Tensor, rounds: int) -> Deployed:
        options: dict[str, Any] = {"runtime": self.runtime, "rounds": rounds}
        if self.precision == "int8":
            options["int8"] = images
        elif self.precision == "bfloat16":
            options["dtype"] = torch.bfloat16
        return deploy(network, example, **options)

    def __str__(self) -> str:
        return f"{self.runtime} {self.precision}"


WAYS = {
    str(way): way
    for way in (
        Way("torch", "float32"),
        Way("onnxruntime", "float32"),
        Way("openvino", "float32"),
        Way("openvino", "bfloat16"),
        Way("onnxruntime", "int8"),
        Way("openvino", "int8"),
    )
}


@dataclass(frozen=True)
class Pair:
    """A dense network and its compressed copy; `trained`: the sides whose weights were given, others' are random."""

    name: str
    networks: Mapping[str, nn.Module]
    trained: frozenset[str]

    @classmethod
    def of(cls, options: argparse.Namespace) -> Pair:
        """As the command line says.

        Raises:
            ValueError: files or ranks that do not fit, or a network that nothing names.
            OSError: a file that cannot be read.
        """
        given = Network(options.model, options.compressed, options.image_size, 10, seed=0)
        if options.dense is None:
            dense = given.dense
        else:
            dense, _ = load_checkpoint(options.dense, architecture=given.name, num_classes=given.num_classes)
        trained = {"dense": options.dense is not None, "compressed": given.trained}
        networks = {"dense": dense, "compressed": given.compressed}
        return cls(given.name, networks, frozenset(side for side in SIDES if trained[side]))


def measure(pair: Pair, dataset: Dataset, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per batch size, runtime and precision: seconds per batch of both sides, test accuracy of trained ones."""
    images = dataset.train.sample(min(INT8_IMAGES, len(dataset.train)), 0)
    accuracies: dict[tuple[str, str], float] = {}
    rows = []
    for batch in sorted(options.batches, reverse=True):  # accuracy is found in the largest, which is the fastest
        deployed = {
            (side, way): WAYS[way].deployed(network, images[:batch].clone(), images, options.rounds)
            for way in tqdm(options.ways, desc=f"deploying for batch {batch}", unit="runtime")
            for side, network in pair.networks.items()
        }
        for key, model in deployed.items():
            if key[0] in pair.trained and key not in accuracies:
                pieces = _on_batches(model, batch)
                # In the precision that is deployed: autocast would make bfloat16 of torch's float32.
                accuracies[key] = evaluate(pieces, dataset.test, limit=options.test_images, amp=False).accuracy
        load_average = os.getloadavg()[0]
        samples = _in_blocks(deployed, options, images[:batch].clone())
        for way in options.ways:
            sides = {side: vars(summarise(samples[side, way], batch)) for side in SIDES}
            scores = {side: accuracies.get((side, way)) for side in SIDES}
            rows.append({"batch": batch, "way": way, **sides, "accuracy": scores, "load_average": load_average})
    return sorted(rows, key=lambda row: options.batches.index(row["batch"]))


def _in_blocks(
    deployed: Mapping[tuple[str, str], Deployed], options: argparse.Namespace, example: Tensor
) -> dict[tuple[str, str], list[float]]:
    """Seconds per batch of each side in each way: both sides in turns, and BLOCKS times all the ways in turns.

    Not every call in turns: a runtime's threads go on looking for work for a while after it, and take a processor from
    the next runtime's.
    """
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in deployed}
    for _ in range(BLOCKS):
        for way in options.ways:
            runs = {(side, way): deployed[side, way].run for side in SIDES}
            for key, values in latency_samples(runs, example, rounds=-(-options.rounds // BLOCKS)).items():
                samples[key] += values
    return samples


def _on_batches(model: Deployed, batch: int) -> nn.Module:
    """The deployed network, run on as many images at once as it is made for: graphs are compiled for each size."""
    inner = AsModule(model)

    class Pieces(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.cat([inner(piece) for piece in images.split(batch)])

    return Pieces()


def table(content: Mapping[str, Any]) -> str:
    """The rows as a Markdown table, with what they were measured on below."""
    lines = []
    for row in content["rows"]:
        floats = [r for r in content["rows"] if r["batch"] == row["batch"] and r["way"].endswith("float32")]
        best = min((r["dense"]["median"] for r in floats), default=None)
        dense, ours = row["dense"]["median"], row["compressed"]["median"]
        lines.append(
            [
                row["batch"],
                *row["way"].split(),
                f"{1e3 * dense:.2f}",
                f"{1e3 * ours:.2f}",
                f"{dense / ours:.2f}x",
                "-" if best is None else f"{best / dense:.2f}x",
                "-" if best is None else f"{best / ours:.2f}x",
                *("-" if row["accuracy"][side] is None else f"{row['accuracy'][side]:.4f}" for side in SIDES),
            ]
        )
    headers = ["batch", "runtime", "precision", "dense ms", "compressed ms", "speed-up"]
    headers += [
        "dense, over best float32",
        "compressed, over best dense float32",
        "dense accuracy",
        "compressed accuracy",
    ]
    sizes, found_by = content["sizes"], content["provenance"]
    share = {key: sizes["compressed"][key] / sizes["dense"][key] for key in ("params", "flops")}
    notes = [
        f"{content['network']}, {content['image_size']} px: {share['params']:.1%} of the parameters, "
        f"{share['flops']:.1%} of the FLOPs kept. Accuracy of {_of_images(content)} test images.",
        f"{found_by['machine']}, {found_by['threads']} threads, revision {found_by['git_revision']}; median of "
        f"{content['rounds']} interleaved rounds, both sides folded and with plans chosen by measurement.",
        f"Load average before the timings at most {max(row['load_average'] for row in content['rows']):.1f}.",
    ]
    random = [side for side in SIDES if content["rows"][0]["accuracy"][side] is None]
    if random:
        notes.append(f"Of random weights, so that no accuracy is shown: {' and '.join(random)}.")
    notes += _best_of_both(content["rows"])
    text = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
    return text + "\n\n" + "\n".join(f"- {note}" for note in notes)


def _of_images(content: Mapping[str, Any]) -> str:
    """Which test images accuracy is of: files of before knew the first so many only."""
    used = content["test_images"]
    return f"all {used:,}" if used == content.get("all_test_images") else f"the first {used}"


def _best_of_both(rows: list[dict[str, Any]]) -> list[str]:
    """Per batch size, each side in the runtime that suits it best, by precision."""
    notes = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        best: dict[tuple[str, str], float] = {}
        for row in rows:
            if row["batch"] == batch:
                for side in SIDES:
                    key = side, row["way"].split()[1]
                    best[key] = min(best.get(key, float("inf")), row[side]["median"])
        pairs = [
            f"{ours} against the dense network's {theirs} {best['dense', theirs] / best['compressed', ours]:.2f}x"
            for ours, theirs in (("float32", "float32"), ("int8", "float32"), ("int8", "int8"))
            if ("compressed", ours) in best and ("dense", theirs) in best
        ]
        if pairs:
            notes.append(f"Batch {batch}, each side in its fastest runtime: {', '.join(pairs)}.")
    return notes


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        if options.test_images is not None and options.test_images < 1:
            raise ValueError(f"--test-images must be at least 1, got {options.test_images}")
        pair = Pair.of(options)
        dataset = load(options.data, options.data_root, image_size=options.image_size)
        shape = tuple(next(dataset.test.batches(1)).images.shape[1:])
        content = {
            "network": pair.name,
            "image_size": options.image_size,
            "test_images": min(options.test_images or len(dataset.test), len(dataset.test)),
            "all_test_images": len(dataset.test),
            "rounds": BLOCKS * -(-options.rounds // BLOCKS),
            "sizes": {n: {"params": count_params(m), "flops": count_flops(m, shape)} for n, m in pair.networks.items()},
            "rows": measure(pair, dataset, options),
            "provenance": provenance("cpu", 0),
        }
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = options.out or Path("results") / f"runtimes-{pair.name}"
    ratios = [r["dense"]["median"] / r["compressed"]["median"] for r in content["rows"]]
    write_text(out / "runtimes.json", json.dumps(content, indent=1) + "\n")
    write_text(out / "runtimes.md", table(content) + "\n")
    print(table(content))
    print(f"\nmedian speed-up over all rows: {statistics.median(ratios):.2f}x")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, help="checkpoint of the dense network (.safetensors); default: random")
    parser.add_argument("--compressed", required=True, help="file of save_compressed, or as --config of latency.py")
    parser.add_argument("--model", help="network by name, where no file says it")
    parser.add_argument("--data", default="mnist", help="data set, or folder:PATH (default: mnist)")
    parser.add_argument("--data-root", help="default: $HTD_DATA, else data")
    parser.add_argument("--image-size", type=int, default=224, metavar="PIXELS")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--rounds", type=int, default=15, help=f"at least, in {BLOCKS} blocks (default: 15)")
    parser.add_argument("--test-images", type=int, help="for the accuracies: the first so many (default: all)")
    parser.add_argument("--out", type=Path, help="default: results/runtimes-NETWORK")
    return parser


if __name__ == "__main__":
    sys.exit(main())
