"""The measured parts of documents that are made from runs: what each network came to, and what that took."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from common.reports import (
    Candidate,
    Group,
    best_of,
    caption,
    choose,
    family,
    group_runs,
    mean_and_deviation,
    render,
    standard,
)

STRICT, LOOSE = 0.005, 0.02
"""Accuracy on test that may be lost, in the first and in the second table."""

Run = Mapping[str, Any]


def largest(runs: Sequence[Run]) -> list[Run]:
    """The runs at the largest image size that their family was run at on their data set."""
    sizes: dict[tuple[str, str], int] = {}
    for run in runs:
        sizes[_task(run)] = max(sizes.get(_task(run), 0), run["header"]["image_size"])
    return [run for run in runs if run["header"]["image_size"] == sizes[_task(run)]]


def _task(run: Run) -> tuple[str, str]:
    return family(run["header"]["model"]), run["header"]["dataset"]


def headline(runs: Sequence[Run], tolerance: float) -> str:
    """The nine-column table at one tolerance, with what it needs to be understood."""
    groups = group_runs(runs)
    rows = [choice.cells() for group in groups for choice in choose(group, tolerance)]
    return render(rows, caption(groups, tolerance), "md")


def networks(runs: Sequence[Run], dataset: str) -> str:
    """One row per network on one data set, at the largest size that was run: dense -> its smallest accepted candidate.

    Where a setting was run with several seeds, the figures are means, and the last column counts them.
    """
    rows: list[list[str]] = []
    machines: dict[str, list[str]] = {}
    speeds: dict[str, None] = {}
    for group in group_runs([run for run in largest(runs) if run["header"]["dataset"] == dataset]):
        found = [best for run in group.runs if (best := _smallest(run)) is not None]
        if not found:
            rows.append([_title(group), "none within tolerance", "-", "-", "-", "-", "-"])
            continue
        mean = statistics.mean
        rows.append(
            [
                _title(group),
                f"{group.runs[0]['header']['image_size']} px",
                _shrunk(found[0].baseline["params"], mean(one.record["params"] for one in found)),
                _shrunk(found[0].baseline["flops"], mean(one.record["flops"] for one in found)),
                f"{mean(standard(one.baseline) for one in found):.4f} → "
                f"{mean(one.record['accuracy'] for one in found):.4f}",
                f"{mean(one.speedup for one in found if one.speedup):.1f}x",
                str(len(found)),
            ]
        )
        for machine in dict.fromkeys(_machine(run["header"]) for run in group.runs):
            machines.setdefault(machine, []).append(_title(group))
        speeds |= dict.fromkeys(_speed(run["header"]) for run in group.runs)
    heads = ["network", "images", "parameters", "FLOPs", "test accuracy", "speed-up", "seeds"]
    table = tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True)
    lines = [*machines] if len(machines) < 2 else [f"{', '.join(of)}: {machine}" for machine, of in machines.items()]
    return f"{table}\n\n{'; '.join([*lines, *speeds])}."


def _smallest(run: Run) -> Candidate | None:
    return best_of(run, "Best FLOPs Red.", STRICT)


def _title(group: Group) -> str:
    return {"alexnet": "AlexNet", "resnet18": "ResNet18", "vgg16": "VGG16"}.get(
        group.runs[0]["header"]["model"], group.runs[0]["header"]["model"]
    )


def _shrunk(dense: float, compressed: float) -> str:
    return f"{_engineering(dense)} → {_engineering(compressed)} ({dense / compressed:.0f}x)"


def _engineering(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def _machine(head: Mapping[str, Any]) -> str:
    name = re.sub(r"\(R\)|\(TM\)| Processor(?= \(|$)", "", head["machine"])
    return f"{name}, {head['threads']} threads"


def _speed(head: Mapping[str, Any]) -> str:
    runtime = f"{head['runtime']} {head['versions']['onnxruntime']}"
    return f"speed in {runtime}, batch {head['latency_batch']}, dense and compressed interleaved"


def origin(runs: Sequence[Run]) -> str:
    """One line per run: its size, seed, machine, versions and revision."""
    lines = []
    for run in runs:
        head = run["header"]
        versions = head["versions"]
        images = head["train_limit"] or "all"
        lines.append(
            [
                f"{family(head['model'])}, {head['dataset']} {head['image_size']} px",
                head["seed"],
                f"{images} training images",
                f"{head['machine']}, {head['device']}, {head['threads']} threads",
                f"torch {versions['torch']}, onnxruntime {versions['onnxruntime']}",
                f"{head['runtime']}, batch {head['latency_batch']}",
                f"`{head['git_revision']}`",
            ]
        )
    heads = ["run", "seed", "data", "machine", "versions", "speed measured in", "revision"]
    return tabulate(lines, headers=heads, tablefmt="github", disable_numparse=True)


def against_published(runs: Sequence[Run], published: Mapping[str, Any]) -> str:
    """The best candidate by each criterion at the strict tolerance, beside the published figure, cell by cell: on the
    published data set, at the largest image size that was run."""
    rows = []
    for group in group_runs([run for run in largest(runs) if run["header"]["dataset"] == published["dataset"]]):
        known = published["models"].get(group.label.split(" ")[0])
        if known is None:
            continue
        best = {choice.criterion: choice.best for choice in choose(group, STRICT)}
        cells = [
            ("parameters", "params_reduction", best["Best Params Red."], lambda c: 1 - c.params_kept, "-{:.1%}"),
            ("FLOPs", "flops_reduction", best["Best FLOPs Red."], lambda c: 1 - c.flops_kept, "-{:.1%}"),
            ("speed", "speedup", best["Best Speedup"], lambda c: c.speedup, "{:.2f}x"),
        ]
        for label, key, candidate, value, form in cells:
            ours = value(candidate) if candidate else None
            shown = form.format(ours) if ours is not None else "none within tolerance"
            ahead = "yes" if ours is not None and ours > known[key] else "no"
            rows.append([group.label, label, form.format(known[key]), shown, ahead])
    heads = ["network", "", "published", "here", "ahead"]
    table = tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True)
    rule = f"Here: at most {100 * STRICT:g} points lost, the best of each row on its own."
    return f"{table}\n\n{published['source']} {rule}"


def seeds(runs: Sequence[Run]) -> str:
    """Where a setting was run with several seeds: the smallest accepted candidate of each seed, and the spread."""
    rows = []
    for group in group_runs(runs):
        if len(group.runs) < 2:
            continue
        found = []
        for run in group.runs:
            best = _smallest(run)
            seed = str(run["header"]["seed"])
            rows.append([group.label, seed, *(_figures(best) if best else ["none within tolerance", "-", "-", "-"])])
            found += [best] if best else []
        if len(found) > 1:
            rows.append([group.label, "mean ± sd", *_spread(found)])
    heads = ["network", "seed", "parameters saved", "FLOPs saved", "test accuracy", "speed-up"]
    return tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True)


def _values(candidate: Candidate) -> list[tuple[float, str]]:
    return [
        (1 - candidate.params_kept, "{:.2%}"),
        (1 - candidate.flops_kept, "{:.2%}"),
        (candidate.record["accuracy"], "{:.4f}"),
        (candidate.speedup or float("nan"), "{:.2f}x"),
    ]


def _figures(candidate: Candidate) -> list[str]:
    return [form.format(value) for value, form in _values(candidate)]


def _spread(candidates: Sequence[Candidate]) -> list[str]:
    columns = zip(*map(_values, candidates), strict=True)
    return [mean_and_deviation([value for value, _ in column], column[0][1]) for column in columns]


def search_costs(runs: Sequence[Run], published: Mapping[str, Any]) -> str:
    """Minutes of each search beside fine-tuning every candidate; seconds per candidate beside the published ones."""
    rows = []
    for run in runs:
        seconds, head = run["header"].get("search_seconds"), run["header"]
        if not seconds:
            continue
        tried = run["counts"]["tried"]
        known = published["models"].get(family(head["model"]), {}).get("gpu_seconds_per_candidate", "-")
        rows.append(
            [
                f"{family(head['model'])}, {head['dataset']} {head['image_size']} px, seed {head['seed']}",
                str(tried),
                *(f"{seconds.get(step, 0) / 60:.1f}" for step in ("screen", "finetune", "total", "exhaustive")),
                f"{seconds['exhaustive'] / seconds['total']:.0f}x",
                f"{seconds['total'] / tried:.1f}",
                str(known),
            ]
        )
    heads = [
        "run",
        "candidates",
        "screening, min",
        "fine-tuning, min",
        "search, min",
        "fine-tuning all, min",
        "saved",
        "s per candidate (2 CPU cores)",
        "published, GPU s",
    ]
    return tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True)
