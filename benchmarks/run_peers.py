"""A network that a run found, beside what others make of the same dense one: as many FLOPs, trained and deployed alike.

    python benchmarks/run_peers.py --log results/mnist-224/resnet18-mnist-224-cpu-seed0.json \\
        --weights finetuned/saved_models/resnet18_mnist_224.safetensors --out run-peers-resnet18

The log says all that the run was made with: data, images, recipe, epochs, and its smallest network within what it may
lose. Every method gets that network's FLOPs and the run's fine-tuning; ranks of the run's are taken and trained again
here, so that all rows are of one machine. Then all are timed with the dense network, in turns, in every runtime and
batch size; nothing else may run then. A method that cannot reach the FLOPs is a row that says why.

Writes rows.json after every row and case, and goes on where it was; then run-peers.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import nn
from tqdm import tqdm

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `benchmarks` and `common` are found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import peers
from benchmarks.published_networks import PEERS, TWO_FACTOR, Shapes, proposed
from benchmarks.published_speed import time_cases
from benchmarks.rows import command, resumed
from common.configuration import Configuration
from common.cost import count_params
from common.deploy.runtimes import RUNTIMES
from common.experiment import Experiment
from common.files import write_text
from common.finetune import TrainingDiverged, evaluate
from common.modules import first_line
from common.presets import RunSettings
from common.provenance import provenance
from common.reports import best_of, load_runs, standard

OURS = "policy"
METHODS = (OURS, "uniform", TWO_FACTOR, *PEERS)

TAKEN = (
    *("model", "dataset", "image_size", "train_limit", "val_images", "split_seed"),
    *("layers", "calibration_images", "screen_images", "finetune_epochs", "seed"),
)
"""The knobs of a run that decide what a method gets."""

SAME_NETWORK = 0.002
"""By how much the test accuracy of one network may differ between machines, in shares: they round differently."""


class Bench:
    """A run's experiment once more, with its smallest network to be met.

    Args:
        log: the run's JSON.
        weights: the checkpoint of the dense network that it began with.

    Raises:
        ValueError: no such log, or the log of a run that found nothing; weights that are not the run's.
    """

    def __init__(self, log: Path, weights: Path, out: Path) -> None:
        runs, problems, _ = load_runs([log])
        if problems:
            raise ValueError("; ".join(problems))
        (self.run,) = runs
        head = self.run["header"]
        if missing := [name for name in TAKEN if name not in head]:
            raise ValueError(f"{log} is of an older run: it does not say {', '.join(missing)}")
        self.ours = _smallest(self.run)
        settings = RunSettings(
            **{name: head[name] for name in TAKEN}, weights=str(weights), baseline_epochs=0, folder=str(out)
        )
        self.experiment = Experiment(settings)
        accuracy = self.experiment.dense_score()
        if abs(accuracy - self.run["baseline"]["accuracy"]) > SAME_NETWORK:
            raise ValueError(
                f"{weights} is not the network that {log.name} began with: its test accuracy is {accuracy:.4f}, and "
                f"was {self.run['baseline']['accuracy']:.4f}"
            )
        factors = self.experiment.factorize()
        self.shapes = Shapes(self.experiment.dense_model(), self.experiment.draw_calibration(), factors)

    @property
    def budget(self) -> float:
        """The share of the dense FLOPs that every method may keep."""
        return self.ours["flops"] / self.shapes.factors.dense_flops

    def row(self, method: str) -> dict[str, Any]:
        """What a method comes to; a peer that fails, or whose training diverges, is a row that says why."""
        try:
            return {"method": method, "budget": self.budget, **self._row(method)}
        except Exception as error:  # other people's packages raise whatever they like
            if method not in PEERS and not isinstance(error, TrainingDiverged):
                raise
            return {"method": method, "budget": self.budget, "failed": first_line(error)}

    def _row(self, method: str) -> dict[str, Any]:
        dataset, trainer = self.experiment.load_data(), self.experiment.make_trainer()
        started = time.perf_counter()
        network, config = self._network(method)
        # A row is the unit that is gone on with: what is left of one that was killed is of no use.
        checkpoint = self.experiment.settings.state_folder / "row.unfinished.pt"
        checkpoint.unlink(missing_ok=True)
        untrained = evaluate(network, dataset.val).accuracy
        epochs = trainer.train(network, checkpoint, lambda _: True)
        checkpoint.unlink(missing_ok=True)
        return {
            "config_str": str(config),
            "params": count_params(network),
            "flops": peers.flops_of(network, self.shapes.images),
            "untrained_val_accuracy": untrained,
            "val_accuracy": epochs[-1].val_accuracy,
            "test_accuracy": evaluate(network, dataset.test).accuracy,
            "seconds": time.perf_counter() - started,
        }

    def _network(self, method: str) -> tuple[nn.Module, Configuration]:
        screener = self.experiment.make_screener()
        if method == OURS:
            config = Configuration.parse(self.ours["config_str"])
            return screener.build(config), config
        return proposed(self.shapes, screener, method, self.budget)


def _smallest(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record of the run's network of fewest parameters within what it was to lose."""
    head = run["header"]
    allowed = head["tolerance"] if head.get("max_loss") is None else head["max_loss"]
    best = best_of(run, "Best Params Red.", allowed)
    if best is None:
        raise ValueError(f"{run['source']}: no network of this run lost at most {allowed}")
    return best.record


def table(content: Mapping[str, Any]) -> str:
    """A line per method: its size, what it lost, and its speed-up in every case."""
    head, facts, cases = content["run"], content["provenance"], content["cases"]
    titles = [f"{case['runtime']}, batch {case['batch']}" for case in cases]
    lines, failures = [], []
    for row in content["rows"]:
        if "failed" in row:
            failures.append(f"{row['method']}: {row['failed']}.")
            continue
        speeds = [one["speedup"] for case in cases for one in case["rows"] if one["method"] == row["method"]]
        lines.append(
            [
                row["method"],
                f"{row['params']:,}",
                f"{row['flops'] / head['flops']:.2%}",
                f"{100 * (head['standard'] - row['test_accuracy']):.2f}",
                *(f"{speed:.1f}x" for speed in speeds),
            ]
        )
    dense = [f"{1e3 * case['dense_seconds']:.1f} ms" for case in cases]
    lines.append(["dense", f"{head['params']:,}", "100.00%", "0.00", *dense])
    heads = [f"{head['model']}, {head['dataset']} {head['image_size']} px", "params", "FLOPs", "points lost", *titles]
    loads = max((case["load_average"] for case in cases), default=0.0)
    note = (
        f"Each at the FLOPs of the run's smallest network, fine-tuned {head['epochs']} epochs on {head['images']:,} "
        f"images as the run's candidates were. Points lost on test, from {head['standard']:.4f}, the better of the "
        "dense network and of itself trained on as long. Speed-up over the dense network, all deployed alike and timed "
        f"in turns. Seed {head['seed']}; {facts['machine']}, {facts['threads']} threads, revision "
        f"{facts['git_revision']}; load average before the timings at most {loads:.1f}. "
        + ", ".join(f"{name} {version}" for name, version in facts["peers"].items())
        + f". `python benchmarks/{facts['command']}`"
    )
    return "\n\n".join([tabulate(lines, headers=heads, tablefmt="github", disable_numparse=True), *failures, note])


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 2 for bad input, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    return command(options.out, "run-peers", lambda: _run(options), table)


def _run(options: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(options.log, options.weights, options.out / "state")
    target = options.out / "rows.json"
    settings = bench.experiment.settings
    facts = {
        **{name: getattr(settings, name) for name in ("model", "dataset", "image_size", "seed")},
        "epochs": settings.finetune_epochs,
        "images": len(bench.experiment.load_data().train),
        "params": bench.shapes.factors.dense_params,
        "flops": bench.shapes.factors.dense_flops,
        "standard": standard(bench.run["baseline"]),
    }
    asked = {"log": options.log.name, "rounds": options.rounds, "network": bench.ours["config_str"]}
    fresh = {"asked": asked, "run": facts, "rows": [], "cases": []}
    content = resumed(target, {**fresh, "provenance": provenance("cpu", settings.seed) | {"peers": peers.versions()}})
    known = [row["method"] for row in content["rows"]]
    for method in tqdm([one for one in options.methods if one not in known], desc=settings.model, unit="row"):
        content["rows"].append(bench.row(method))
        content["cases"] = []  # all rows are timed together
        write_text(target, json.dumps(content, indent=1) + "\n")
    rows = [row for row in content["rows"] if "failed" not in row]
    time_cases(content, target, options, rows, lambda: bench.shapes)
    return content


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True, metavar="RUN.json", help="the run's log as JSON")
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint of the dense network it began with")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--runtimes", nargs="*", choices=RUNTIMES, default=["onnxruntime"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True, help="folder for rows.json and run-peers.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
