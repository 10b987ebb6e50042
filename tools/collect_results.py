"""Brings finished runs into results/: python tools/collect_results.py logs/*.log [--out results]

For each log: its JSON, the training log of its baseline, and the weights of the smallest network that lost at most half
a point (if they are small) go to results/<dataset>-<size>/; then the tables and figures of each such folder and of all
together are made. The executed notebooks are put there by papermill.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `common` and the two log scripts are found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import analyze_results
import jsonify_logs
from common.files import atomic_path, write_text
from common.finetune.baselines import checkpoint_path
from common.reports import best_of, load_runs, read_log, to_json
from tools.documents import RUN_FOLDER, run_folders
from tools.run_parts import STRICT

LARGEST_WEIGHTS = 6_000_000
"""Bytes up to which a network's weights are kept beside its results."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 when an input could not be used."""
    options = _parser().parse_args(arguments)
    try:
        for log in jsonify_logs.log_paths(options.logs):
            print(f"{log} -> {collect(log, options.out, options.baselines)}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    strict = ["--tolerance", str(STRICT)]
    folders = run_folders(options.out)
    for notebook in (path for folder in folders for path in folder.glob("*.ipynb")):
        forget_paths(notebook)
    codes = [analyze_results.main([str(folder), "--out", str(folder), *strict]) for folder in folders]
    published = options.out / "published.json"
    beside = ["--published", str(published)] if published.exists() else []
    codes.append(analyze_results.main([*map(str, folders), "--out", str(options.out), *strict, *beside]))
    return max(codes)


def collect(log: Path, out: Path, baselines: Path) -> Path:
    """Bring one run home; returns its folder.

    Raises:
        ValueError: the log does not say which data set and size it is about, or has no baseline.
    """
    run = to_json(read_log(log))
    head = run["header"]
    folder = out / f"{head.get('dataset')}-{head.get('image_size')}"
    if not RUN_FOLDER.fullmatch(folder.name) or run["baseline"] is None:
        raise ValueError(f"{log} is not the log of a whole run: it lacks the data set, the image size or the baseline")
    write_text(folder / f"{log.stem}.json", json.dumps(run, indent=1, allow_nan=False) + "\n")
    named = head.get("baseline_checkpoint") or checkpoint_path(head["model"], head["dataset"], head["image_size"]).name
    own = baselines / f"{Path(str(named)).stem}.json"
    for training in _trainings(own):
        name = head["model"] if training == own else training.stem
        shutil.copyfile(training, folder / f"baseline-{name}.json")
    weights = _smallest(folder / f"{log.stem}.json", log)
    if weights is not None and weights.stat().st_size < LARGEST_WEIGHTS:
        with atomic_path(folder / f"{head['model']}-smallest-seed{head['seed']}.safetensors") as temporary:
            shutil.copyfile(weights, temporary)
    return folder


def _trainings(log: Path) -> list[Path]:
    """The training log of a baseline, then of the one of another size that it started from, and so on."""
    found: list[Path] = []
    while log.exists() and log not in found:
        found.append(log)
        start = Path(json.loads(log.read_text(encoding="utf-8"))["weights"])
        log = log.with_name(f"{start.stem}.json")
    return found


def forget_paths(notebook: Path) -> None:
    """Keep of the paths that papermill notes in an executed notebook the file names: folders are one machine's."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    noted = content["metadata"].get("papermill", {})
    paths = {key: Path(noted[key]).name for key in ("input_path", "output_path") if noted.get(key)}
    if any(noted[key] != name for key, name in paths.items()):
        noted.update(paths)
        write_text(notebook, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _smallest(run: Path, log: Path) -> Path | None:
    """The weights of the accepted candidate with the fewest parameters, by the tables' rule; None if there is none."""
    (found,) = load_runs([run])[0]
    best = best_of(found, "Best Params Red.", STRICT)
    if best is None:
        return None
    path = log.with_suffix("") / f"candidate-{best.record['trial']}.safetensors"
    return path if path.exists() else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Bring finished runs into results/.")
    parser.add_argument("logs", nargs="*", type=Path, default=[Path("logs")], help="logs or folders (default: logs/)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="default: results/")
    parser.add_argument(
        "--baselines", type=Path, default=Path("finetuned/saved_models"), metavar="DIR", help="of the dense networks"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
