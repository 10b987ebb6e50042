"""Turns the JSON of searches into tables and plots: python analyze_results.py JSON... [--out DIR] [--tolerance 0.02]"""

import argparse
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
)

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
STYLES = ("txt", "csv", "md", "html")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 1 when `--check` finds a file out of date; 2 when an input could not be used."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.check and options.readme is None:
        parser.error("--check needs --readme FILE, the file to check")
    runs, problems = load_runs(options.inputs or [Path("results")])
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not runs:
        return 2
    groups = group_runs(runs)
    choices = {group.label: choose(group, options.tolerance, options.ties) for group in groups}
    rows = [choice.cells() for of_group in choices.values() for choice in of_group]
    notes = caption(groups, options.tolerance, options.ties)
    try:
        if options.check:
            return 2 if problems else _check(options.readme, render(rows, notes, "md"))
        for style in STYLES:
            write_text(options.out / f"table.{style}", render(rows, notes, style))
        print(render(rows, notes, "txt"), end="")
        if options.readme is not None:
            text = options.readme.read_text(encoding="utf-8")
            write_text(options.readme, with_results(text, render(rows, notes, "md"), options.readme))
        if not options.no_plots:
            draw(groups, choices, options.out, options.tolerance)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 2 if problems else 0


def with_results(text: str, table: str, path: Path) -> str:
    """The text with the table between its two markers.

    Raises:
        ValueError: the text has not each marker once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} needs the lines {BEGIN} and {END}, once each and in this order")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n{table}{text[text.index(END) :]}"


def draw(groups: Sequence[Group], choices: Mapping[str, Sequence[Choice]], out: Path, tolerance: float) -> None:
    """Per group a scatter and the chosen ranks, over all groups the radar, as PNG in `out`."""
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
        figure = plots.layer_ranks(_configurations(chosen), title=f"{group.label}: ranks of the chosen models")
        plots.save(figure, out / f"{slug}-ranks.png")
        smallest = best["Best FLOPs Red."]
        models.append(
            plots.ModelResult(
                name=group.label,
                params_reduction=1 - smallest.params_kept,
                flops_reduction=1 - smallest.flops_kept,
                accuracy=smallest.record["accuracy"],
                baseline_accuracy=smallest.baseline["accuracy"],
                compression_rate=smallest.compression_rate,
                speedup=smallest.speedup,
            )
        )
    if models:
        figure = plots.radar_with_scatter(models, title="Best FLOPs reduction of each model")
        plots.save(figure, out / "radar.png")


def _check(path: Path, table: str) -> int:
    text = path.read_text(encoding="utf-8")
    if with_results(text, table, path) == text:
        return 0
    print(f"{path} is not up to date with its results; run analyze_results.py with --readme {path}", file=sys.stderr)
    return 1


def _configurations(chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Label -> ranks by layer; criteria that chose the same configuration share a label."""
    labels: dict[str, list[str]] = {}
    for criterion, record in chosen.items():
        labels.setdefault(record["config_str"], []).append(criterion)
    return {" = ".join(criteria): parse_config_str(text) for text, criteria in labels.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Turn the JSON of searches into tables and plots.")
    parser.add_argument(
        "inputs", nargs="*", type=Path, metavar="JSON", help="JSON files, logs or folders (default: results/)"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the output (default: results/)")
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
        "--readme", type=Path, metavar="FILE", help=f"put the Markdown table between {BEGIN} and {END} of FILE"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if --readme FILE is out of date")
    return parser


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a fraction in [0, 1); 0.02 means two percentage points")
    return value


if __name__ == "__main__":
    sys.exit(main())
