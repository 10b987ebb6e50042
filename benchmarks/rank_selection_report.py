"""The rows of `rank_selection.py` as tables (Markdown, text) and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from scipy.stats import spearmanr
from tabulate import tabulate

from common.files import write_text
from common.reports import mean_and_deviation, plots

HYPERVOLUME_BELOW = 0.1
"""How far below the dense network's accuracy the hypervolume starts to count."""


def write_report(content: Mapping[str, Any], out: Path) -> str:
    """Write table.md, ablation.md, table.txt and accuracy.png into `out`; returns the text."""
    rules = [row for row in content["rows"] if row["table"] == "rules"]
    ablations = [row for row in content["rows"] if row["table"] == "ablation"]
    dense = content["dense_test"]
    texts = []
    for style in ("github", "pretty"):
        parts = [
            rule_table(rules, style, dense),
            lead_table(rules, style),
            by_budget(rules, "flops_kept", "share of FLOPs kept", style, "{:.1%}"),
            by_budget(rules, "params_kept", "share of parameters kept", style, "{:.1%}"),
            note(rules, dense),
        ]
        write_text(out / ("table.md" if style == "github" else "table.txt"), "\n\n".join(parts) + "\n")
        texts.append("\n".join(parts))
    if ablations:
        write_text(out / "ablation.md", ablation_table(ablations, "github") + "\n")
        texts[-1] += "\n" + ablation_table(ablations, "pretty")
    plots.save(accuracy_plot(rules, dense), out / "accuracy.png")
    done = [row for row in rules if row.get("test_accuracy") is not None]
    figure = plots.correlation([r["val_screened"] for r in done], [r["test_accuracy"] for r in done])
    plots.save(figure, out / "screening.png")
    return texts[-1]


def rule_table(rows: Sequence[Mapping[str, Any]], style: str, dense: float) -> str:
    """One line per rule; per budget accuracy screened and after fine-tuning, mean and spread over the seeds; what the
    choice cost."""
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        line: list[str] = [name]
        for budget in budgets:
            own = [row for row in rows if row["name"] == name and row["budget"] == budget]
            line += [mean_spread(own, "val_screened"), mean_spread(own, "test_accuracy")]
        points = [row for row in rows if row["name"] == name]
        lines.append(
            [
                *line,
                _mean_hypervolume(points, dense - HYPERVOLUME_BELOW),
                _mean(points, "search_seconds", "{:.0f} s"),
                _mean(points, "image_passes", "{:,.0f}") if all("image_passes" in row for row in points) else "-",
            ]
        )
    heads = ["rule"]
    for budget in budgets:
        heads += [f"{budget:.0%}: screened", f"{budget:.0%}: fine-tuned"]
    heads += ["hypervolume", "search", "image passes"]
    return tabulate(lines, headers=heads, tablefmt=style, disable_numparse=True)


def lead_table(rows: Sequence[Mapping[str, Any]], style: str, leader: str = "policy") -> str:
    """By how many points of accuracy the policy leads each rule, seed by seed: mean and spread of the differences."""
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    keys = {"screened": "val_screened", "fine-tuned": "test_accuracy"}
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows if not row["name"].startswith(leader)):
        cells = [_lead(rows, leader, name, budget, key) for budget in budgets for key in keys.values()]
        lines.append([name, *cells])
    heads = [f"{budget:.0%}: {label}" for budget in budgets for label in keys]
    return tabulate(lines, headers=["policy's lead over", *heads], tablefmt=style, disable_numparse=True)


def _lead(rows: Sequence[Mapping[str, Any]], leader: str, name: str, budget: float, key: str) -> str:
    found: dict[str, dict[int, float]] = {leader: {}, name: {}}
    for row in rows:
        if row["name"] in found and row["budget"] == budget and row.get(key) is not None:
            found[row["name"]][row["seed"]] = 100 * row[key]
    differences = [found[leader][seed] - value for seed, value in found[name].items() if seed in found[leader]]
    if not differences:
        return "-"
    mean = f"{statistics.mean(differences):+.2f}"
    return f"{mean} ± {statistics.stdev(differences):.2f}" if len(differences) > 1 else mean


def ablation_table(rows: Sequence[Mapping[str, Any]], style: str) -> str:
    """One line per thing taken away; accuracy screened per budget, mean and spread over the seeds."""
    return by_budget(rows, "val_screened", "ablation", style)


def by_budget(rows: Sequence[Mapping[str, Any]], key: str, head: str, style: str, form: str = "{:.4f}") -> str:
    """One line per name; something measured, per budget, mean and spread over the seeds."""
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        lines.append([name, *(mean_spread([r for r in own if r["budget"] == b], key, form) for b in budgets)])
    return tabulate(lines, headers=[head, *(f"{b:.0%}" for b in budgets)], tablefmt=style, disable_numparse=True)


def correlations(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Spearman's rank correlation of what screening saw with test accuracy after fine-tuning, over all fine-tuned rows.

    "accuracy" and "divergence" (its negative) over all budgets, and "accuracy at B" within one budget, where the
    candidates differ in their ranks alone and the agreement is harder. Fewer than 3 rows have no correlation.
    """
    done = [row for row in rows if row.get("test_accuracy") is not None]
    parts = {
        "accuracy": (done, lambda row: row["val_screened"]),
        "divergence": (done, lambda row: -row["divergence"]),
    }
    for budget in sorted({row["budget"] for row in done}, reverse=True):
        own = [row for row in done if row["budget"] == budget]
        parts[f"accuracy at {budget:.0%}"] = (own, lambda row: row["val_screened"])
    return {
        label: float(spearmanr([seen(row) for row in own], [row["test_accuracy"] for row in own]).statistic)
        for label, (own, seen) in parts.items()
        if len(own) >= 3
    }


def note(rows: Sequence[Mapping[str, Any]], dense: float) -> str:
    """What the numbers are."""
    seeds = sorted({row["seed"] for row in rows})
    failed = sum(row["status"] == "failed" for row in rows)
    agreement = ", ".join(f"{label} {value:.2f}" for label, value in correlations(rows).items())
    return (
        "Columns are shares of the dense FLOPs (multiply-accumulates). Screened: validation accuracy, no training; "
        f"fine-tuned: test accuracy; leads in points. Mean ± standard deviation over {len(seeds)} seeds. "
        f"Dense: {dense:.4f} on test. "
        f"Hypervolume of (FLOPs saved, accuracy) from ten points below dense. {len(rows)} rows, {failed} failed. "
        "Image passes: images through a network for one choice; of the policy's, those of its sensitivities, which "
        "serve all its budgets and are not in the seconds of its search. "
        f"Spearman's correlation of screened with fine-tuned test accuracy: {agreement or 'too few rows'}."
    )


def mean_spread(rows: Sequence[Mapping[str, Any]], key: str, form: str = "{:.4f}") -> str:
    """Mean ± standard deviation of what was measured."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return "failed" if rows and not values else mean_and_deviation(values, form)


def hypervolume(points: Sequence[tuple[float, float]], floor: float) -> float:
    """Area that points (share of FLOPs saved, accuracy) dominate above `floor`, as a share of that up to 1."""
    area, reached = 0.0, floor
    for saved, accuracy in sorted(points, reverse=True):
        area += saved * max(0.0, accuracy - reached)
        reached = max(reached, accuracy)
    return area / (1 - floor)


def accuracy_plot(rows: Sequence[Mapping[str, Any]], dense: float) -> Figure:
    """Error (1 - accuracy) screened and after fine-tuning against the share of FLOPs kept, one line per rule.

    On a logarithmic axis, since what the rules differ in is how many of the few errors they add.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = {"val_screened": "Screened, no training (validation)", "test_accuracy": "After fine-tuning (test)"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for place, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
            points = _points([row for row in rows if row["name"] == name], key)
            axes.errorbar(
                [100 * x for x, _, _ in points],
                [100 * (1 - y) for _, y, _ in points],
                yerr=[100 * e for _, _, e in points],
                marker="osD^vPX*"[place % 8],
                linestyle="-" if name == "policy" else ("--", "-.", ":")[place % 3],
                linewidth=2.2 if name == "policy" else 1.0,
                capsize=3,
                label=name,
            )
        axes.axhline(100 * (1 - dense), color="0.6", linewidth=1)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(title)
        axes.set_xlabel("FLOPs kept, % of dense (multiply-accumulates)")
        axes.set_ylabel("Top-1 error, % (log scale; grey line: dense, test)")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    return figure


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float, float]]:
    """(mean share of FLOPs kept, mean, standard deviation) per budget."""
    points = []
    for budget in sorted({row["budget"] for row in rows}):
        own = [row for row in rows if row["budget"] == budget and row.get(key) is not None]
        if own:
            values = [row[key] for row in own]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            points.append((statistics.mean(row["flops_kept"] for row in own), statistics.mean(values), deviation))
    return points


def _mean_hypervolume(rows: Sequence[Mapping[str, Any]], floor: float) -> str:
    volumes = []
    for seed in sorted({row["seed"] for row in rows}):
        own = [row for row in rows if row["seed"] == seed and row.get("test_accuracy") is not None]
        volumes.append(hypervolume([(1 - row["flops_kept"], row["test_accuracy"]) for row in own], floor))
    return f"{statistics.mean(volumes):.4f}"


def _mean(rows: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    return form.format(statistics.mean(row[key] for row in rows))
