"""Every rule and sampler at the same FLOPs budgets, evaluations and fine-tuning: is the policy worth having?

    python benchmarks/rank_selection.py --model resnet18 --dataset mnist --image-size 32 --seeds 0 1 2

A classic rule (uniform, energy, vbmf) looks at the weights' singular values and proposes one configuration per budget.
A sampler (policy, tpe, random, nsga2) proposes --evaluations of them, and the best when screened is taken. All are
compressed with the same data-aware factors, reconstructed alike and fine-tuned alike. The ablation screens the policy's
most probable configuration with one thing taken away at a time. All seeds share the baseline and its split; a seed
decides the calibration images, the samplers' draws and the order of fine-tuning's batches. The baseline is trained for
three epochs where there is none, unless --weights names one that was trained for longer.

Writes rows.json after every row and goes on where an interrupted run stopped; then the tables and the plot.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import torch
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `common` and `finetuned` are found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rank_selection_report import write_report
from common import data
from common.compress import ModelFactors, factorize
from common.configuration import Configuration
from common.files import exclusive, write_text
from common.finetune import (
    TrainingDiverged,
    TrainSettings,
    baseline,
    evaluate,
    given_baseline,
    teacher_logits,
    train,
)
from common.presets import RunSettings
from common.provenance import provenance
from common.ranks import RULES, build_menus, meet_budget, worthwhile
from common.search import (
    MOST_SENSITIVITY_IMAGES,
    SAMPLERS,
    UPDATE_RATE,
    CandidateFailed,
    MenuCosts,
    Policy,
    Screener,
    Screening,
    Search,
    SearchSettings,
    blended_sensitivity,
    configuration,
    measured_sensitivity,
    proxy_sensitivity,
)
from common.search.sensitivity import ANCHORS

ABLATIONS: dict[str, dict[str, Any]] = {
    "policy, whole": {},
    "bases from the input alone": {"bases": "input"},
    "bases from the weights alone": {"bases": "weight"},
    "batch norm estimated again, no fit": {"correction": "norms"},
    "truncated, nothing given back": {"correction": "none"},
    "size heuristic off": {"use_size": False},
    "sensitivity off": {"use_sensitivity": False},
    "sensitivity: measured divergence alone": {"sensitivity": "measured"},
    "sensitivity: output error alone": {"sensitivity": "proxy"},
}


NO_UPDATE, AS_MANY_PASSES = "policy, no update", "tpe, as many passes"
"""The policy without the cross-entropy method; TPE with as many more candidates as the sensitivities cost."""


class Bench:
    """Everything that one seed's rows have in common."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed
        # One split for every seed, the one that the baseline was trained on: it never saw what is validated on.
        self.dataset = data.load(options.dataset, image_size=options.image_size, train_limit=options.train_limit)
        if options.weights is None:
            self.dense = baseline(options.model, self.dataset)
        else:
            self.dense = given_baseline(options.model, self.dataset, options.weights)
        self.images = self.dataset.train.sample(min(options.calibration, len(self.dataset.train)), seed)
        self._factors: dict[str, ModelFactors] = {}
        self.menus = build_menus(self.factors("both"))
        self.costs = MenuCosts.of(self.factors("both"), self.menus)
        cache = options.out / f"sensitivity-{seed}.json"
        images = self.images[:MOST_SENSITIVITY_IMAGES]
        measured = measured_sensitivity(self.factors("both"), self.menus, images, cache=cache)
        passes = sum(min(ANCHORS, len(menu) - 1) for menu in self.menus.values())
        self.sensitivity_passes = passes * len(images)
        self.candidate_passes = len(self.images) + min(options.screen, len(self.dataset.val))
        self.sensitivities = {
            "blended": blended_sensitivity(self.menus, measured),
            "measured": measured,
            "proxy": proxy_sensitivity(self.menus),
        }
        self.screener = self.make_screener("both")
        self.teacher = teacher_logits(self.dense.model, self.dataset, options.out)

    def factors(self, bases: str) -> ModelFactors:
        if bases not in self._factors:
            self._factors[bases] = factorize(self.dense.model, self.images, bases=bases)
        return self._factors[bases]

    def make_screener(self, bases: str) -> Screener:
        return Screener(self.factors(bases), self.images, self.dataset.val, limit=self.options.screen)

    def policy(self, budget: float, sensitivity: str = "blended", **switches: bool) -> Policy:
        return Policy.solve(self.sensitivities[sensitivity], self.costs, budget, **switches)

    def settings(self) -> TrainSettings:
        """Fine-tuning as in a run, but no longer than --batches."""
        run = RunSettings(self.options.model, self.options.dataset, self.options.image_size, seed=self.seed)
        chosen = run.finetune_recipe(len(self.dataset.train))
        return replace(chosen, epochs=1, max_batches_per_epoch=self.options.batches)

    def finetuned(self, config: dict) -> dict[str, Any]:
        """Validation and test accuracy after fine-tuning; or why there is none."""
        model = self.screener.build(config)
        try:
            history = train(model, self.dataset, self.settings(), teacher_logits=self.teacher, progress=False)
        except TrainingDiverged as failure:
            return {"status": "failed", "reason": str(failure)}
        return {
            "status": "fine-tuned",
            "val_finetuned": history.epochs[-1].val_accuracy,
            "test_accuracy": evaluate(model, self.dataset.test).accuracy,
        }


def rule_choice(bench: Bench, rule: str, budget: float) -> tuple[dict, Screening, int]:
    """The rule's configuration at the budget, what it screens at, and how many configurations were evaluated."""
    config = meet_budget(rule, bench.factors("weight"), budget, priced=bench.factors("both"))
    return config, bench.screener.screen(config), 1


def sampler_choice(
    bench: Bench, kind: str, budget: float, *, more: int = 0, update_rate: float = UPDATE_RATE
) -> tuple[Configuration, Screening, int]:
    """The best of --evaluations configurations and so many more, by the divergence when screened: a search that is kept
    in memory."""
    evaluations = bench.options.evaluations + more
    settings = SearchSettings(
        budgets=(budget,), candidates=evaluations, sampler=kind, update_rate=update_rate, seed=bench.seed
    )
    records = Search(bench.screener, bench.menus, bench.sensitivities["blended"], settings).run(progress=False)
    screened = [record for record in records if record["status"] == "screened"]
    if not screened:
        raise CandidateFailed(f"all {evaluations} candidates of {kind} at budget {budget} failed")
    best = min(screened, key=lambda record: record["divergence"])
    found = Screening(best["val_accuracy"], best["divergence"], best["params"], best["flops"], best["seconds"])
    return best["config"], found, evaluations


def ablation_choice(
    bench: Bench, budget: float, *, bases: str = "both", correction: str = "reconstruct", **switches
) -> Any:
    """What the policy's most probable configuration screens at, with one thing taken away."""
    config = configuration(bench.menus, bench.policy(budget, **switches).mode())
    if correction != "reconstruct":
        factors = bench.factors(bases)
        model = factors.compress(config)
        if correction == "norms":
            update_bn([bench.images], model)
        found = evaluate(model, bench.dataset.val, limit=bench.options.screen)
        return config, found.accuracy
    screener = bench.screener if bases == "both" else bench.make_screener(bases)
    return config, screener.screen(worthwhile(bench.factors(bases), config)).accuracy


def heads(options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """What each row of a seed is of, in their order."""
    names = {"rules": (*RULES, *SAMPLERS, NO_UPDATE, AS_MANY_PASSES), "ablation": tuple(ABLATIONS)}
    return [
        {"seed": seed, "budget": budget, "table": table, "name": name}
        for budget in options.budgets
        for table, group in names.items()
        for name in group
    ]


def rule_row(bench: Bench, head: Mapping[str, Any]) -> dict[str, Any]:
    """What a rule or a sampler chooses at a budget, screened and fine-tuned, with what the choice took."""
    dense, name, budget = bench.factors("both"), head["name"], head["budget"]
    started, kind = time.perf_counter(), name.split(",")[0]
    if name in RULES:
        config, found, evaluations = rule_choice(bench, name, budget)
    else:
        rate = 0.0 if name == NO_UPDATE else UPDATE_RATE
        more = round(bench.sensitivity_passes / bench.candidate_passes) if name == AS_MANY_PASSES else 0
        config, found, evaluations = sampler_choice(bench, kind, budget, more=more, update_rate=rate)
    searched = time.perf_counter() - started
    sensitivity_passes = bench.sensitivity_passes if kind == "policy" else 0
    return {
        **head,
        "config_str": str(Configuration(config)),
        "evaluations": evaluations,
        "image_passes": evaluations * bench.candidate_passes + sensitivity_passes,
        "flops_kept": found.flops / dense.dense_flops,
        "params_kept": found.params / dense.dense_params,
        "val_screened": found.accuracy,
        "divergence": found.divergence,
        "search_seconds": searched,
        **bench.finetuned(config),
        "seconds": time.perf_counter() - started,
    }


def ablation_row(bench: Bench, head: Mapping[str, Any]) -> dict[str, Any]:
    """What is chosen with a part of the method taken away, screened."""
    config, accuracy = ablation_choice(bench, head["budget"], **ABLATIONS[head["name"]])
    return {**head, "config_str": str(Configuration(config)), "val_screened": accuracy}


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for bad input."""
    options = _parser().parse_args(arguments)
    options.out = options.out or Path(f"results/rank-selection/{options.model}-{options.dataset}-{options.image_size}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    path = options.out / "rows.json"
    try:
        with exclusive(options.out):
            content = known_rows(path, options)
            content["provenance"].append(provenance("cpu", options.seeds[0]))
            keys = {_key(row) for row in content["rows"]}
            for seed in options.seeds:
                missing = [head for head in heads(options, seed) if _key(head) not in keys]
                if not missing:
                    continue
                bench = Bench(options, seed)
                for head in tqdm(missing, desc=f"seed {seed}", unit="row"):
                    row = rule_row(bench, head) if head["table"] == "rules" else ablation_row(bench, head)
                    content["rows"].append(row)
                    content["dense_test"] = bench.dense.test_accuracy
                    write_text(path, json.dumps(content, indent=1))
        print(write_report(content, options.out))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def known_rows(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What an earlier run of the same settings left; else nothing.

    Raises:
        ValueError: its rows are of other settings.
    """
    names = ("model", "dataset", "image_size", "train_limit", "evaluations", "batches", "calibration", "screen")
    asked = {name: getattr(options, name) for name in names}
    if options.weights is not None:  # left out where it changes nothing: rows of before go on
        asked["weights"] = hashlib.sha256(Path(options.weights).read_bytes()).hexdigest()[:16]
    if not path.exists():
        return {"asked": asked, "provenance": [], "rows": []}
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("asked", "unknown ones") != asked:
        raise ValueError(f"{path} has rows of other settings: give another --out")
    return content


def _key(row: dict[str, Any]) -> tuple:
    return row["seed"], row["budget"], row["table"], row["name"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare rank rules and samplers at the same budgets.")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--dataset", default="mnist", help="default: mnist")
    parser.add_argument("--image-size", type=int, default=32, metavar="PIXELS")
    parser.add_argument("--weights", metavar="PATH", help="checkpoint of a trained baseline; default: train one")
    parser.add_argument("--train-limit", type=int, metavar="IMAGES", help="use a stratified subset for fine-tuning")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.30, 0.15, 0.08], help="shares of dense FLOPs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=16, help="configurations each sampler may screen")
    parser.add_argument("--batches", type=int, default=80, help="of fine-tuning, 128 images each")
    parser.add_argument("--calibration", type=int, default=512, metavar="IMAGES")
    parser.add_argument("--screen", type=int, default=1000, metavar="IMAGES", help="validation images screened on")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--out", type=Path, help="default: results/rank-selection/MODEL-DATASET-SIZE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
