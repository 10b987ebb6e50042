"""The measured parts of README.md and docs/ as Markdown, each made from committed files under results/.

A document names a part between two markers, such as `<!-- headline:begin -->` and `<!-- headline:end -->`; `fill`
writes it there.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from common.reports import (
    Candidate,
    Group,
    caption,
    choose,
    family,
    group_runs,
    mean_and_deviation,
    render,
    seeds_behind,
    standard,
)

HOPELESS = 50
"""Points lost by which an untrained network is one that waits for its training."""

STRICT, LOOSE = 0.005, 0.02
"""Accuracy on test that may be lost, in the first and in the second table."""

RUN_FOLDER = re.compile(r"(digits|mnist|fashion-mnist|cifar10)-\d+")
MARKER = re.compile(r"<!-- (?P<name>[\w-]+):begin -->\n(?P<text>.*?)<!-- (?P=name):end -->", re.DOTALL)
MEASURED = re.compile(r"\d[\d.,]*(?:x\b|\s?(?:%|points?\b|minutes?\b|seconds?\b|ms\b|MB\b))")
"""What a measured figure looks like. Outside the markers there may be none, unless the line says it is a knob."""

UNTOLD_KNOBS = ("PROGRESS", "FOLDER", "BASELINES")
"""Knobs of a notebook that change nothing in its results."""

Run = Mapping[str, Any]


def fill(text: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """The text with each marked part made anew.

    Raises:
        ValueError: a marker names a part that nobody makes.
    """

    def made(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in parts:
            raise ValueError(f"no part is called {name!r}; there are {', '.join(parts)}")
        return f"<!-- {name}:begin -->\n{parts[name]().rstrip()}\n<!-- {name}:end -->"

    return MARKER.sub(made, text)


def untraced(text: str) -> list[str]:
    """The lines outside markers and code that state something like a measured figure."""
    prose = re.sub(r"```.*?```", "", MARKER.sub("", text), flags=re.DOTALL)
    prose = re.sub(r"`[^`\n]*`", "", prose)
    return [line.strip() for line in prose.splitlines() if MEASURED.search(line)]


def run_folders(results: Path) -> list[Path]:
    """`results/<dataset>-<size>`, the folders that hold runs."""
    return sorted(path for path in results.iterdir() if path.is_dir() and RUN_FOLDER.fullmatch(path.name))


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
        found = [best for run in group.runs if (best := _smallest(group, run)) is not None]
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


def _smallest(group: Group, run: Run) -> Candidate | None:
    choices = choose(Group(group.label, (run,)), STRICT)
    return next(choice.best for choice in choices if choice.criterion == "Best FLOPs Red.")


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
    name = re.sub(r"\(R\)|\(TM\)| Processor$", "", head["machine"])
    return f"{name}, {head['threads']} threads"


def _speed(head: Mapping[str, Any]) -> str:
    runtime = f"{head['runtime']} {head['versions']['onnxruntime']}"
    return f"speed in {runtime}, batch {head['latency_batch']}, dense and compressed interleaved"


def fine_tuned(content: Mapping[str, Any]) -> str:
    """Test accuracy after fine-tuning of each rank rule at each budget: mean and spread over the seeds."""
    rows = [row for row in content["rows"] if row["table"] == "rules" and row.get("test_accuracy") is not None]
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        values = [[r["test_accuracy"] for r in rows if (r["name"], r["budget"]) == (name, b)] for b in budgets]
        lines.append([name, *(mean_and_deviation(found, "{:.4f}") for found in values)])
    heads = ["ranks from", *(f"{budget:.0%} of the FLOPs" for budget in budgets)]
    table = tabulate(lines, headers=heads, tablefmt="github", disable_numparse=True)
    seeds = len({row["seed"] for row in rows})
    return f"{table}\n\nDense: {content['dense_test']:.4f}. Mean ± standard deviation of {seeds} seeds."


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


def beside_others(content: Mapping[str, Any], network: str) -> str:
    """Points lost on one published network: a line per method, a column per budget, without training and with."""
    own = [row for row in content["rows"] if row["network"] == network and "test_accuracy" in row]
    dense, rows = content["dense"][network], [row for row in own if row["budget"] < 1]
    controls = [row["test_accuracy"] for row in own if row["budget"] == 1]
    trained = max(dense, statistics.mean(controls)) if controls else dense
    columns = sorted({(row["epochs"], row["budget"]) for row in rows}, key=lambda column: (column[0], -column[1]))

    def cell(method: str, epochs: int, budget: float) -> str:
        key = (method, epochs, budget)
        reference = trained if epochs else dense
        lost = [
            100 * (reference - row["test_accuracy"])
            for row in rows
            if (row["method"], row["epochs"], row["budget"]) == key
        ]
        # Channels and ranks that were chosen without data wait for their training: what they lose before says nothing.
        hopeless = lost and not epochs and statistics.mean(lost) > HOPELESS
        return "-" if hopeless else mean_and_deviation(lost)

    methods = dict.fromkeys(row["method"] for row in rows)
    lines = [[method, *(cell(method, *column) for column in columns)] for method in methods]
    heads = [f"{budget:.0%}, {f'{epochs} epochs' if epochs else 'untrained'}" for epochs, budget in columns]
    table = tabulate(lines, headers=["points lost", *heads], tablefmt="github", disable_numparse=True)
    trained_on = f", trained on as long {statistics.mean(controls):.4f}" if controls else ""
    return f"{table}\n\nDense: {dense:.4f}{trained_on}. Lower is better. {seeds_behind(rows)}"


def published_on_cifar10(published: Mapping[str, Any]) -> str:
    """What others publish for CIFAR-10's residual networks, as they state it."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"-{value:.1%}"

    rows = [
        [
            one["network"],
            one["method"],
            share(one.get("flops_removed")),
            share(one.get("params_removed")),
            f"{one['points_lost']:.2f}",
            "not stated here" if one["epochs"] is None else one["epochs"],
        ]
        for one in published["cifar10"]
    ]
    heads = ["network", "method", "FLOPs", "parameters", "points lost", "epochs"]
    return tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True)


def seeds(runs: Sequence[Run]) -> str:
    """Where a setting was run with several seeds: the smallest accepted candidate of each seed, and the spread."""
    rows = []
    for group in group_runs(runs):
        if len(group.runs) < 2:
            continue
        found = []
        for run in group.runs:
            best = {c.criterion: c.best for c in choose(Group(group.label, (run,)), STRICT)}["Best FLOPs Red."]
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


def commands(results: Path) -> str:
    """Every measurement under results/: what, the command, and the minutes that it took, as the files say."""
    rows = []
    for name, minutes in read_json(results / "timings.json")["minutes"].items():
        rows.append([f"{name.partition(' ')[0]}, after `make setup`", f"`{name}`", f"{minutes:.0f}"])
    for folder in run_folders(results):
        for path in sorted(folder.glob("baseline-*.json")):
            rows.append(_baseline_command(path, read_json(path)))
        for path in sorted(folder.glob("*.ipynb")):
            rows.append(_notebook_command(folder.name, read_json(path)["metadata"]["papermill"]))
    for path in sorted((results / "rank-selection").glob("*/rows.json")):
        content = read_json(path)
        seconds = sum(row.get("seconds", 0.0) for row in content["rows"])
        command = content["provenance"][-1]["command"]
        rows.append([f"rank rules, {path.parent.name}", f"`python benchmarks/{command}`", f"{seconds / 60:.0f}"])
    for path in [*sorted(results.glob("latency-*/latency.json")), results / "factorize_speed.json"]:
        what = path.parent.name if path.name == "latency.json" else "factorisation speed"
        rows.append([what, f"`python benchmarks/{read_json(path)['provenance']['command']}`", "-"])
    return tabulate(rows, headers=["what", "command", "minutes"], tablefmt="github", disable_numparse=True)


def _baseline_command(path: Path, record: Mapping[str, Any]) -> list[str]:
    settings = record["settings"]
    options = {
        "--model": record["model"],
        "--dataset": record["dataset"],
        "--image-size": record["image_size"],
        "--epochs": settings["epochs"],
        "--train-limit": record["train_images"],
        "--batch-size": settings["batch_size"],
        "--learning-rate": f"{settings['learning_rate']:g}",
    }
    if settings.get("val_images"):
        options["--val-images"] = settings["val_images"]
    if record["weights"] != "none":
        options["--weights"] = record["weights"]
    words = [str(word) for option in options.items() for word in option]
    command = f"`{shlex.join(['python', 'finetuned/finetune_models.py', *words])}`"
    minutes = sum(epoch["seconds"] for epoch in record["epochs"]) / 60
    what = f"{path.parent.name}: baseline {record['model']}"
    if not path.parent.name.endswith(f"-{record['image_size']}"):
        what += f", first at {record['image_size']} px"
    elif path.stem != f"baseline-{record['model']}":
        what += f", first on {record['train_images']:,} images"
    return [what, command, f"{minutes:.0f}"]


def _notebook_command(folder: str, executed: Mapping[str, Any]) -> list[str]:
    notebook = Path(executed["input_path"]).name
    if executed.get("duration") is None or executed.get("exception"):
        raise ValueError(f"{notebook} under {folder} was not run to its end: run it again or delete it")
    knobs = {key: value for key, value in executed["parameters"].items() if key not in UNTOLD_KNOBS}
    words = [
        word
        for key, value in knobs.items()
        for word in (["-y", f"{key}: {value}"] if isinstance(value, list) else ["-p", key, str(value)])
    ]
    seed = f", seed {knobs['SEED']}" if "SEED" in knobs else ""
    command = f"`{shlex.join(['papermill', notebook, 'out.ipynb', *words])}`"
    return [f"{folder}: {family(notebook.split('-')[1])}{seed}", command, f"{executed['duration'] / 60:.0f}"]


def reliability(content: Mapping[str, Any]) -> str:
    """What was damaged or killed, how often, and what came of it."""
    rows = []
    for what, counts in content["counts"].items():
        told = ", ".join(f"{value:,} {key}" for key, value in counts.items())
        rows.append([what, told])
    origin = content["provenance"]
    table = tabulate(rows, headers=["what", "counts"], tablefmt="github", disable_numparse=True)
    return f"{table}\n\n{origin['machine']}, seed {origin['seed']}, revision {origin['git_revision']}."


def factorisation(measured: Mapping[str, Any]) -> str:
    """What factorising and compressing cost beside a Tucker-2 decomposition of the same layers."""
    seconds = measured["median_seconds"]
    rows = [[name, f"{value:.2f}", f"{seconds['partial_tucker'] / value:.0f}x"] for name, value in seconds.items()]
    heads = ["step", "seconds", "faster than partial_tucker"]
    return tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file.

    Raises:
        ValueError: it is missing or damaged, with its path.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
