"""Networks that others trained, compressed without training or with a few epochs: the policy beside what others do.

    python benchmarks/published_networks.py --checkpoints resnet20.th resnet56.th --data folder:PATH --epochs 0 3

CIFAR-10's residual networks from their published checkpoints. Every method chooses ranks at the same budgets of FLOPs;
all are compressed with the same data-aware factors and reconstructed alike. Samplers propose --candidates
configurations per budget and the one of least divergence on validation images is taken; rules propose one. Test is read
once for each row. The checkpoints were trained on all training images, so that validation accuracy flatters them;
divergence from the dense outputs ranks candidates all the same. With --epochs, all are fine-tuned alike, distilled
from the dense one on augmented images, by its outputs and by the feature maps of its blocks where theirs have the same
shape; the dense network trained on as long is a row of its own. With --passes, networks without training are tuned
alike on the calibration images, without labels.

Writes rows.json after every row, and goes on where it was; then table.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `benchmarks` and `common` are found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import peers
from benchmarks.cifar_resnet import MEAN, STD, from_checkpoint, network_name
from benchmarks.rows import command, resumed
from common import data
from common.compress import ModelFactors, factorize, reconstruct
from common.configuration import Configuration
from common.cost import count_params
from common.files import write_text
from common.finetune import TrainSettings, evaluate, train
from common.knobs import CALIBRATION_IMAGES
from common.modules import copy_with, first_line
from common.provenance import provenance
from common.ranks import build_menus, meet_budget
from common.reports import mean_and_deviation, seeds_behind
from common.search import (
    CalibrationPasses,
    CalibrationTrainer,
    CandidateFailed,
    Screener,
    Search,
    SearchSettings,
    blended_sensitivity,
    for_tuning,
    measured_sensitivity,
    sensitivity_images,
)

RULES = ("uniform", "energy", "vbmf")
SAMPLERS = ("policy", "tpe")
TWO_FACTOR = "two-factor SVD"
PEERS = ("torch-pruning", "tensorly-torch Tucker", "tensorly-torch CP", "Tucker-2, VBMF")
METHODS = (*SAMPLERS, *RULES, TWO_FACTOR, *PEERS)
DENSE = "dense, trained on"

RECIPE = TrainSettings(
    learning_rate=0.02, weight_decay=1e-4, distill_weight=0.9, distill_temperature=4.0, feature_weight=100.0
)
"""How networks are fine-tuned: of every method alike, and the dense one. The weight of the feature maps was chosen
among 0, 10 and 100 by the divergence from the dense outputs on validation."""


TUNING = for_tuning(TrainSettings(learning_rate=0.01, weight_decay=1e-4))
"""How networks without training are tuned, of every method alike: as `compress_network` does it by itself."""


class Shapes:
    """A network's factors, and the networks of the layers that rows have: not fitted, not trained."""

    def __init__(self, model: nn.Module, images: Tensor, factors: ModelFactors | None = None) -> None:
        self.model, self.images = model, images
        self.factors = factorize(model, images) if factors is None else factors

    @cached_property
    def weights(self) -> ModelFactors:
        """Factorised without data, as rules and peers that look at weights alone need it."""
        return factorize(self.model, self.images, bases="weight")

    def of(self, row: Mapping[str, Any]) -> nn.Module:
        """What a row's speed can be measured on, which is of the layers alone."""
        method, config = row["method"], Configuration.parse(row["config_str"])
        if method == DENSE:
            return self.model
        if method == TWO_FACTOR:
            return peers.in_plan(self.factors, config, "output-pair")
        if method in PEERS:
            return self.peer(method, row["budget"])
        return self.factors.compress(config)

    def peer(self, method: str, budget: float) -> nn.Module:
        """The network of somebody else's method, before any training."""
        flops = int(budget * self.factors.dense_flops)
        if method == "torch-pruning":
            return peers.torch_pruning(self.model, self.images, flops)
        if method == "Tucker-2, VBMF":
            return peers.in_plan(self.weights, peers.tucker2_ranks(self.weights, budget), "tucker")
        kind = method.rsplit(" ", 1)[1].lower()
        return peers.tensorly_torch(self.model, self.images, flops, factorization=kind)


class Bench(Shapes):
    """What all rows of one network and seed have in common."""

    def __init__(self, model: nn.Module, dataset: data.Dataset, options: argparse.Namespace, seed: int) -> None:
        super().__init__(model, dataset.train.sample(options.calibration, seed))
        self.dataset, self.options, self.seed = dataset, options, seed
        self.screener = Screener(self.factors, self.images, dataset.val, limit=options.screen)
        self.menus = build_menus(self.factors)
        few = sensitivity_images(self.images)
        measured = measured_sensitivity(self.factors, self.menus, few, progress=False)
        self.sensitivity = blended_sensitivity(self.menus, measured)

    def row(self, method: str, budget: float, epochs: int, untrained: Mapping[str, Any] | None) -> dict[str, Any]:
        """What a method comes to at a budget: the network that it chooses on validation, and that one's test score.

        untrained: the method's row without training, whose ranks are taken. A peer that fails is a row that says why.
        """
        try:
            return self._row(method, budget, epochs, untrained)
        except Exception as error:  # other people's packages raise whatever they like
            if method not in PEERS:
                raise
            return {"failed": first_line(error)}

    def _row(self, method: str, budget: float, epochs: int, untrained: Mapping[str, Any] | None) -> dict[str, Any]:
        started = time.perf_counter()
        if untrained is not None and method in (*SAMPLERS, *RULES):
            config, tried = Configuration.parse(untrained["config_str"]), untrained["screened"]
            network = self.screener.build(config)
        else:
            network, config, tried = self.chosen(method, budget)
        if epochs:
            recipe = replace(RECIPE, epochs=epochs, seed=self.seed, val_images=self.options.screen)
            train(network, self.dataset, recipe, teacher=self.model)
        elif self.options.passes:
            self.tune(network)
        seconds = time.perf_counter() - started
        return {
            "config_str": str(config),
            "flops_kept": peers.flops_of(network, self.images) / self.factors.dense_flops,
            "params_kept": count_params(network) / self.factors.dense_params,
            "divergence": self.screener.distance(network),
            "val_accuracy": evaluate(network, self.dataset.val, limit=self.options.screen).accuracy,
            "test_accuracy": evaluate(network, self.dataset.test).accuracy,
            "screened": tried,
            "seconds": seconds,
        }

    def tune(self, network: nn.Module) -> None:
        """Learn the dense network's maps and outputs on the calibration images alone."""
        passes = CalibrationPasses(self.images, self.options.passes, self.seed)
        settings, distance = replace(TUNING, seed=self.seed), self.screener.distance
        trainer = CalibrationTrainer(self.model, passes, settings, "kl", distance, distance=distance)
        with TemporaryDirectory() as folder:
            trainer.train(network, Path(folder) / "state.pt", lambda done: None)

    def chosen(self, method: str, budget: float) -> tuple[nn.Module, Configuration, int]:
        """The network, its configuration, and how many were screened for it."""
        if method == DENSE:
            return copy_with(self.model, {}), Configuration({}), 0
        if method not in SAMPLERS:
            return *proposed(self, self.screener, method, budget), 1
        settings = SearchSettings(budgets=(budget,), candidates=self.options.candidates, sampler=method, seed=self.seed)
        records = Search(self.screener, self.menus, self.sensitivity, settings).run(progress=False)
        screened = [record for record in records if record["status"] == "screened"]
        if not screened:
            raise CandidateFailed(f"all candidates of {method} at {budget} failed")
        best = min(screened, key=lambda record: record["divergence"])["config"]
        return self.screener.build(best), best, len(records)


def proposed(shapes: Shapes, screener: Screener, method: str, budget: float) -> tuple[nn.Module, Configuration]:
    """The one network that a rule or a peer proposes at a budget, and its ranks (a peer's has none of ours).

    Networks of our layers are fitted alike, on the screener's images.
    """
    if method == TWO_FACTOR:
        config = peers.two_factor_ranks(shapes.factors, budget)
        return reconstruct(peers.in_plan(shapes.factors, config, "output-pair"), screener.targets), config
    if method in PEERS:
        return shapes.peer(method, budget), Configuration({})
    config = meet_budget(method, shapes.weights, budget, priced=shapes.factors)
    return screener.build(config), config


def table(content: Mapping[str, Any]) -> str:
    """Points lost on test, mean and standard deviation over the seeds: a line per method, a column per budget.

    They are counted from the better of the dense network as published and as trained on.
    """
    parts = []
    for network, epochs in dict.fromkeys((row["network"], row["epochs"]) for row in content["rows"]):
        dense = content["dense"][network]
        rows = [row for row in content["rows"] if (row["network"], row["epochs"]) == (network, epochs)]
        standard = standard_of(content, network, epochs)
        failures = {row["method"]: row["failed"] for row in rows if "failed" in row}
        if not epochs:  # others' packages leave batch norms to the training that they are made for
            rows = [row for row in rows if row["method"] not in PEERS]
        budgets = sorted({row["budget"] for row in rows}, reverse=True)
        lines = [
            [
                method,
                *(_lost(standard, [r for r in rows if r["method"] == method and r["budget"] == b]) for b in budgets),
            ]
            for method in (*METHODS, DENSE)
            if any(row["method"] == method for row in rows)
        ]
        heads = [f"{network}: points lost", *(f"{budget:.0%}" for budget in budgets)]
        parts.append(tabulate(lines, headers=heads, tablefmt="github", disable_numparse=True))
        trained = f"{epochs} epochs of fine-tuning" if epochs else _untrained(content["asked"])
        parts.append(
            f"Columns are shares of the dense FLOPs. {trained}. Dense: {dense:.4f} on test. {seeds_behind(rows)}"
        )
        parts += [f"{method}: {reason}." for method, reason in failures.items()]
    if content["provenance"].get("peers"):
        parts.append("Peers: " + ", ".join(f"{n} {v}" for n, v in content["provenance"]["peers"].items()) + ".")
    return "\n\n".join(parts)


def _untrained(asked: Mapping[str, Any]) -> str:
    if not asked.get("passes"):
        return "No training"
    images = f"{asked['calibration']:,} calibration images"
    return f"No training data: tuned in {asked['passes']} passes over the {images}, without labels"


def standard_of(content: Mapping[str, Any], network: str, epochs: int) -> float:
    """The test accuracy that losses are counted from: of the dense network, as published or trained on as long."""
    rows = [row for row in content["rows"] if (row["network"], row["epochs"]) == (network, epochs)]
    controls = [row["test_accuracy"] for row in rows if row["method"] == DENSE]
    published = content["dense"][network]
    return max(published, statistics.mean(controls)) if controls else published


def _lost(dense: float, rows: Sequence[Mapping[str, Any]]) -> str:
    if any("failed" in row for row in rows):
        return "failed"
    return mean_and_deviation([100 * (dense - row["test_accuracy"]) for row in rows])


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 2 for bad input, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    return command(options.out, "table", lambda: _run(options), table)


def _run(options: argparse.Namespace) -> dict[str, Any]:
    dataset = data.load(options.data, image_size=32, mean=MEAN, std=STD)
    asked = {name: getattr(options, name) for name in ("candidates", "calibration", "screen")}
    if options.passes:  # left out where it changes nothing: rows of before go on
        asked["passes"] = options.passes
    target = options.out / "rows.json"
    facts = provenance("cpu", 0) | {"peers": peers.versions()}
    content = resumed(target, {"asked": asked, "dense": {}, "rows": [], "provenance": facts})
    for path in options.checkpoints:
        model = from_checkpoint(path)
        network = network_name(model)
        if network not in content["dense"]:
            content["dense"][network] = evaluate(model, dataset.test).accuracy
        for seed in options.seeds:
            known = {_key(row): row for row in content["rows"]}
            left = [
                key
                for epochs in sorted(options.epochs)
                for budget in options.budgets
                for method in options.methods
                if (key := (network, seed, budget, method, epochs)) not in known
            ]
            if any(options.epochs) and (network, seed, 1.0, DENSE, max(options.epochs)) not in known:
                left.append((network, seed, 1.0, DENSE, max(options.epochs)))
            if not left:
                continue
            bench = Bench(model, dataset, options, seed)
            for key in tqdm(left, desc=f"{network}, seed {seed}", unit="row"):
                _, _, budget, method, epochs = key
                row = bench.row(method, budget, epochs, known.get((*key[:-1], 0)))
                known[key] = dict(zip(KEY, key, strict=True)) | row
                content["rows"].append(known[key])
                write_text(target, json.dumps(content, indent=1) + "\n")
    return content


KEY = ("network", "seed", "budget", "method", "epochs")


def _key(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in KEY)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", nargs="+", required=True, metavar="PATH", help="state dicts of ResNet-20, -56")
    parser.add_argument("--data", default="cifar10", help="cifar10 or folder:PATH (default: cifar10)")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5, 0.35, 0.25])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, nargs="+", default=[0], help="of fine-tuning (default: 0, none)")
    parser.add_argument("--candidates", type=int, default=24, help="screened per budget by a sampler (default: 24)")
    parser.add_argument("--calibration", type=int, default=CALIBRATION_IMAGES, metavar="IMAGES")
    parser.add_argument(
        "--passes", type=int, default=0, help="over the calibration images, to tune what is not trained (default: 0)"
    )
    parser.add_argument("--screen", type=int, default=1000, metavar="IMAGES")
    parser.add_argument("--out", type=Path, default=Path("results/published-networks"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
