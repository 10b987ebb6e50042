"""Finished runs from files: the JSON that `jsonify_logs.py` makes, logs, and folders of them."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .log_reader import SCHEMA, VERSION, read_log, to_json
from .schema import RunDocument, problem, record_problem


def load_runs(inputs: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """The runs in JSON files, logs and folders (their `*.json`), a line per bad input, and a line per file left aside.

    A file that is JSON of another kind is left aside; it is a bad input only where nothing else was named.
    """
    runs, problems, aside = [], [], []
    for given in inputs:
        # Hidden files are somebody's temporary ones: a run that was killed in the middle of a write leaves them.
        found = sorted(p for p in given.glob("*.json") if not p.name.startswith(".")) if given.is_dir() else [given]
        before = len(runs), len(problems)
        for path in found:
            try:
                run = _load(path)
                if run is None:
                    aside.append(f"{path} is left aside: it is not JSON of schema {SCHEMA}")
                else:
                    runs.append(_with_baseline(run, path))
            except (OSError, ValueError) as error:
                problems.append(str(error))
        if given.is_dir() and before == (len(runs), len(problems)):
            problems.append(f"no results in folder {given}; name JSON files or logs, or run jsonify_logs.py first")
    if not runs and not problems:
        problems.append(f"nothing to show: {'; '.join(aside)}; make such JSON with jsonify_logs.py")
    return runs, problems, aside


def _load(path: Path) -> dict[str, Any] | None:
    """A run, or None if the file is valid JSON of another kind."""
    if path.suffix == ".log":
        parsed = read_log(path)
        for warning in parsed.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        return to_json(parsed)
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        return None
    if run.get("version") != VERSION:
        raise ValueError(f"{path} has schema version {run.get('version')}, not {VERSION}; run jsonify_logs.py again")
    if wrong := problem(RunDocument, run):
        raise ValueError(f"{path} {wrong}; run jsonify_logs.py again")
    for place, record in enumerate(run["candidates"]):
        if wrong := record_problem(record):
            raise ValueError(f"{path}: candidate {place} {wrong}; run jsonify_logs.py again")
    return run


def _with_baseline(run: dict[str, Any], path: Path) -> dict[str, Any]:
    if run["baseline"] is None:
        raise ValueError(f"{path} has no baseline to compare with; its log lacks the line 'Baseline MODEL: ...'")
    header = run["header"]
    control = header.get("dense_control")
    control = control if isinstance(control, dict) else {}
    of_control = {key: _accuracy(control.get(key), header) for key in ("accuracy", "val_accuracy")}
    if of_control["accuracy"] is not None:
        run["baseline"]["control_accuracy"] = of_control["accuracy"]
    validation = _accuracy(header.get("dense_val_accuracy"), header)
    if validation is not None:
        run["baseline"]["val_accuracy"] = max(validation, of_control["val_accuracy"] or validation)
    return run


def _accuracy(found: Any, header: Mapping[str, Any]) -> float | None:
    """A number that may be one: a share, or, in a log that names a metric, anything finite."""
    if not isinstance(found, int | float) or isinstance(found, bool) or not math.isfinite(found):
        return None
    return found if "metric" in header or 0 <= found <= 1 else None
