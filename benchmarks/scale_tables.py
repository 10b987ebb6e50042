"""Tables of how a search grows, from the JSON files that `scale.py` and `tools/ray_kills.py` have left."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from common.search import MOST_SENSITIVITY_IMAGES


def tables(folder: Path) -> str:
    """What the commands have left in a folder, as Markdown."""
    parts = []
    for name, shown in (
        ("steps", _steps),
        ("simulate", _simulated),
        ("workers", _measured),
        ("overhead", _overhead),
        ("sensitivity", _sensitivity),
        ("kills", _kills),
    ):
        place = "tools" if name == "kills" else "benchmarks"
        path = folder / f"{name}.json"
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            facts = content["provenance"]
            told = f"`python {place}/{facts['command']}`, {facts['machine']}, {facts['git_revision']}."
            parts.append(f"{shown(content)}\n\n{told}")
    return "\n\n".join(parts)


def _steps(content: Mapping[str, Any]) -> str:
    lines = [[f"{v:.2f}" if isinstance(v, float) else v for v in row.values()] for row in content["rows"]]
    heads = [head if place < 4 else f"{head}, s" for place, head in enumerate(content["rows"][0])]
    note = (
        "Seconds of each step; entries are those of all menus together, images those of the layers' fits and of "
        f"screening. Sensitivity is measured on a quarter of them, at most {MOST_SENSITIVITY_IMAGES}."
    )
    return f"{tabulate(lines, heads, tablefmt='github', disable_numparse=True)}\n\n{note}"


def _simulated(content: Mapping[str, Any]) -> str:
    rows = content["rows"]
    counts = list(rows[0]["makespan"])
    lines = []
    for row in rows:
        each = 1e3 * row["driver"] / row["candidates"]
        whole = (f"{row['driver'] + row['makespan'][count]:,.0f} ({_efficiency(row, count):.0%})" for count in counts)
        limit = f"{row['makespan']['1'] / row['driver']:,.0f}"
        lines.append([row["generation"], row["candidates"], f"{each:.1f}", limit, f"{row['opening']:.1f}", *whole])
    heads = [
        "generation",
        "candidates",
        "driver, ms each",
        "workers it feeds",
        "opening, s",
        *(f"{count} worker{'' if count == '1' else 's'}, s" for count in counts),
    ]
    note = (
        f"Seconds of a search whose candidates take {content['median_seconds']:g} s (median; the logarithm's standard "
        f"deviation {content['spread']:g}) for {content['layers']} layers: the driver's, measured, and the workers', "
        "simulated; in brackets the share of the workers' time in use. With more workers than it feeds, the driver is "
        "the limit."
    )
    return f"{tabulate(lines, heads, tablefmt='github', disable_numparse=True)}\n\n{note}"


def _efficiency(row: Mapping[str, Any], count: str) -> float:
    work = row["makespan"]["1"]
    return work / (int(count) * (row["driver"] + row["makespan"][count]))


def _measured(content: Mapping[str, Any]) -> str:
    lines = [
        [r["workers"], r["candidates"], f"{r['seconds']:.1f}", f"{r['ideal'] / r['seconds']:.0%}", f"{r['start']:.0f}"]
        for r in content["rows"]
    ]
    heads = ["workers", "candidates", "s", "of the ideal", "start, s"]
    note = f"Candidates that sleep for {content['seconds']:g} s, on Ray's workers of one machine."
    return f"{tabulate(lines, heads, tablefmt='github', disable_numparse=True)}\n\n{note}"


def _overhead(content: Mapping[str, Any]) -> str:
    c = content
    return (
        f"{c['network']}, {c['candidates']} candidates on {c['images']} images, generations in turn: "
        f"{c['local']:.0f} s in one process of {c['threads_local']} threads, {c['ray']:.0f} s on {c['workers']} "
        f"workers ({c['ray'] / c['local'] - 1:+.0%}); with Ray's start of {c['start']:.0f} s "
        f"{(c['ray'] + c['start']) / c['local'] - 1:+.0%}."
    )


def _sensitivity(content: Mapping[str, Any]) -> str:
    medians = {name: statistics.median(values) for name, values in content["seconds"].items()}
    slowest = max(medians.values())
    lines = [[name, f"{value:.1f}", f"{slowest / value:.1f}x"] for name, value in medians.items()]
    heads = [f"sensitivity of {content['network']}", "s", "faster"]
    rounds = len(next(iter(content["seconds"].values())))
    note = (
        f"{content['layers']} layers, {content['images']} images, {content['threads_local']} threads in all; median of "
        f"{rounds} rounds, in turn."
    )
    return f"{tabulate(lines, heads, tablefmt='github', disable_numparse=True)}\n\n{note}"


def _kills(content: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{count} {what}" for what, count in content["counts"].items())
    return f"A cluster of three nodes on this machine, whose workers, nodes and driver are killed: {counts}."
