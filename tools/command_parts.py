"""The table of every command behind the results, with the minutes that each took."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from common.reports import family
from tools.documents import read_json, run_folders

UNTOLD_KNOBS = ("PROGRESS", "FOLDER", "BASELINES")
"""Knobs of a notebook that change nothing in its results."""


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
