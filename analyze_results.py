"""Turns the JSON of searches into tables and plots: python analyze_results.py JSON... [--out DIR] [--tolerance 0.02]"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.configuration import parse_config_str
from common.files import write_text
from common.reports import (
    TIE_RULES,
    Choice,
    Group,
    caption,
    choose,
    group_runs,
    load_runs,
    render,
    standard,
)

STYLES = ("txt", "csv", "md", "html")
PUBLISHED = ("params_reduction", "flops_reduction", "speedup")
FOLDER = Path("analysis")
"""Where JSON, tables and plots go unless told otherwise; git ignores it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 when an input could not be used."""
    options = _parser().parse_args(arguments)
    runs, problems, notes = load_runs(options.inputs or [FOLDER])
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not runs:
        return 2
    groups = group_runs(runs)
    choices = {group.label: choose(group, options.tolerance, options.ties) for group in groups}
    rows = [choice.cells() for of_group in choices.values() for choice in of_group]
    lines = caption(groups, options.tolerance, options.ties)
    try:
        published = read_published(options.published) if options.published else {}
        for style in STYLES:
            write_text(options.out / f"table.{style}", render(rows, lines, style))
        print(render(rows, lines, "txt"), end="")
        if not options.no_plots:
            draw(groups, choices, options.out, options.tolerance, published)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 2 if problems else 0


def read_published(path: Path) -> dict[tuple[str, str], dict[str, float]]:
    """(data set, model family) -> published figures: params_reduction, flops_reduction, speedup.

    Raises:
        ValueError: the file is not such JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            (content["dataset"], name): {key: float(one[key]) for key in PUBLISHED}
            for name, one in content["models"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not hold published figures ({', '.join(PUBLISHED)} by model): {error}"
        ) from error


def draw(
    groups: Sequence[Group],
    choices: Mapping[str, Sequence[Choice]],
    out: Path,
    tolerance: float,
    published: Mapping[tuple[str, str], Mapping[str, float]] | None = None,
) -> None:
    """Per group a scatter and the chosen ranks, and a radar for each group, as PNG in `out`."""
    from common.reports import plots

    models = []
    for group in groups:
        slug = re.sub(r"[^a-z0-9]+", "-", group.label.lower()).strip("-")
        best = {choice.criterion: choice.best for choice in choices[group.label] if choice.best is not None}
        chosen = {criterion: candidate.record for criterion, candidate in best.items()}
        baseline = group.runs[-1]["baseline"]
        figure = plots.accuracy_cost_scatter(
            group.records(), baseline, title=group.label, tolerance=tolerance, chosen=chosen
        )
        plots.save(figure, out / f"{slug}-accuracy-cost.png")
        if not best:
            continue
        title = f"{group.label}: ranks of the chosen models"
        figure = plots.layer_ranks(_configurations(chosen), full_ranks=_full_ranks(group), title=title)
        plots.save(figure, out / f"{slug}-ranks.png")
        smallest = best["Best FLOPs Red."]
        models.append(
            plots.ModelResult(
                name=group.label,
                params_reduction=1 - smallest.params_kept,
                flops_reduction=1 - smallest.flops_kept,
                accuracy=smallest.record["accuracy"],
                baseline_accuracy=standard(smallest.baseline),
                speedup=smallest.speedup,
            )
        )
    if models:
        beside = {
            group.label: plots.ModelResult("published", **known)
            for group in groups
            if (known := (published or {}).get((group.runs[0]["header"].get("dataset"), group.label.split(" ")[0])))
        }
        figure = plots.radar_with_scatter(models, published=beside, title="Best FLOPs reduction of each model")
        plots.save(figure, out / "radar.png")


def _full_ranks(group: Group) -> dict[str, tuple[int, ...]] | None:
    """Layer -> full ranks, if every log of the group says them in its header; older logs do not."""
    texts = {run["header"].get("full_ranks") for run in group.runs}
    return parse_config_str(texts.pop()) if len(texts) == 1 and None not in texts else None


def _configurations(chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Label -> ranks by layer; criteria that chose the same configuration share a label."""
    labels: dict[str, list[str]] = {}
    for criterion, record in chosen.items():
        labels.setdefault(record["config_str"], []).append(criterion)
    return {" = ".join(criteria): parse_config_str(text) for text, criteria in labels.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Turn the JSON of searches into tables and plots.")
    parser.add_argument(
        "inputs", nargs="*", type=Path, metavar="JSON", help=f"JSON files, logs or folders (default: {FOLDER}/)"
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"folder for the output (default: {FOLDER}/)")
    parser.add_argument(
        "--tolerance", type=_fraction, default=0.02, help="accuracy that may be lost, a fraction (default: 0.02)"
    )
    parser.add_argument(
        "--ties",
        choices=TIE_RULES,
        default=TIE_RULES[0],
        help="among equals take the first in the log (default), or the higher accuracy, then the shorter time",
    )
    parser.add_argument("--no-plots", action="store_true", help="write tables only")
    parser.add_argument(
        "--published", type=Path, metavar="FILE", help="JSON of published figures to draw beside ours in the radars"
    )
    return parser


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a fraction in [0, 1); 0.02 means two percentage points")
    return value


if __name__ == "__main__":
    sys.exit(main())
