"""Tables and plots of a latency.json: pure functions from the data to text and figures, and one that writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from common.files import write_text
from common.reports import plots

SAME_SPEED = 0.02
"""Share of the dense layer's time by which a deployed one may differ and still count as equally fast."""

Row = list[str]


def write_report(data: Mapping[str, Any], folder: Path) -> str:
    """Write latency.md and .txt, layers.md and .txt and a plot per network and batch; return the text of the first."""
    sections = {"latency": (variant_rows(data), notes(data)), "layers": (layer_rows(data), layer_notes(data))}
    for name, (rows, remarks) in sections.items():
        write_text(folder / f"{name}.md", render(rows, remarks, "github"))
        write_text(folder / f"{name}.txt", render(rows, remarks, "simple"))
    for name, figure in figures(data).items():
        plots.save(figure, folder / f"{name}.png")
    return render(*sections["latency"], "simple")


def variant_rows(data: Mapping[str, Any]) -> list[Row]:
    """A header, and one row for each variant of each network in each case."""
    rows = [["network", "runtime", "variant", "params", "FLOPs", "parts", "ms per batch", "10 % to 90 %", "speed-up"]]
    for network, entry in data["networks"].items():
        dense_size = entry["sizes"]["dense"]
        for case, measured in entry["cases"].items():
            for variant, latency in measured.get("variants", {}).items():
                size = entry["sizes"][variant]
                dense = measured["variants"]["dense"]["median"]
                rows.append(
                    [
                        network,
                        case,
                        variant,
                        f"{100 * size['params'] / dense_size['params']:.1f} %",
                        f"{100 * size['flops'] / dense_size['flops']:.1f} %",
                        str(measured.get("parts", {}).get(variant) or "whole"),
                        f"{1e3 * latency['median']:.2f}",
                        f"{1e3 * latency['p10']:.2f} to {1e3 * latency['p90']:.2f}",
                        f"{dense / latency['median']:.2f}x",
                    ]
                )
    return rows


def notes(data: Mapping[str, Any]) -> list[str]:
    """What the table cannot say: where it was measured, and what could not be."""
    origin, settings = data["provenance"], data["settings"]
    versions = origin["versions"]
    loads = [measured["load_average"] for entry in data["networks"].values() for measured in entry["cases"].values()]
    lines = [
        f"{origin['machine']}, {origin['device']}, {settings['threads']} threads, load average before each case at "
        f"most {max(loads, default=0.0):.1f}; torch {versions['torch']}, onnxruntime {versions['onnxruntime']}, "
        f"revision {origin['git_revision']}.",
        f"{settings['image_size']} px, median of {settings['rounds']} interleaved rounds; every variant deployed "
        "alike: batch norm folded, faster memory format, same runtime. Speed-up is dense time / time, in the same run.",
        "parts: a batch goes through whole, on all threads, or in parts of so many images with a thread each, whichever"
        " was measured to be faster.",
        "params and FLOPs (multiply-accumulates of convolutions and linear layers for one image) in % of dense. "
        "compressed is ours, with execution plans chosen by measurement.",
    ]
    if origin.get("peers"):
        lines.append("Peers: " + ", ".join(f"{name} {version}" for name, version in origin["peers"].items()) + ".")
    found: dict[str, str] = {}
    for network, entry in data["networks"].items():
        for case, measured in entry["cases"].items():
            if "failed" in measured:
                found[f"{network}, {case}"] = measured["failed"]
            found |= {f"{network}, {peer}": reason for peer, reason in measured.get("notes", {}).items()}
    return lines + [f"Not measured: {what}: {reason}." for what, reason in found.items()]


def layer_rows(data: Mapping[str, Any]) -> list[Row]:
    """A header, and one row for each factorised layer of each network in each case."""
    rows = [["network", "runtime", "layer", "input", "plan", "dense ms", "deployed ms", "speed-up", "slower"]]
    for network, entry in data["networks"].items():
        for case, measured in entry["cases"].items():
            for layer, times in measured.get("layers", {}).items():
                (dense, _), (deployed, _) = times["dense"], times["deployed"]
                shape = " x ".join(map(str, times["input"]))
                ms = [f"{1e3 * seconds:.3f}" for seconds in (dense, deployed)]
                verdict = "yes" if is_slower(times) else "no"
                rows.append([network, case, layer, shape, times["plan"], *ms, f"{dense / deployed:.2f}x", verdict])
    return rows


def is_slower(times: Mapping[str, Any]) -> bool:
    """Whether the deployed layer takes longer than the dense one beyond noise: two standard errors and SAME_SPEED."""
    (dense, dense_error), (deployed, error) = times["dense"], times["deployed"]
    noise = 2 * (dense_error**2 + error**2) ** 0.5
    return deployed - dense > max(noise, SAME_SPEED * dense)


def layer_notes(data: Mapping[str, Any]) -> list[str]:
    layers = [
        times
        for entry in data["networks"].values()
        for measured in entry["cases"].values()
        for times in measured.get("layers", {}).values()
    ]
    slower = sum(map(is_slower, layers))
    return [
        f"{len(layers)} layers, of which {slower} slower than dense beyond noise (two standard errors, and 2 %).",
        "Each layer alone, never compiled, dense and deployed interleaved; milliseconds per batch.",
    ]


def figures(data: Mapping[str, Any]) -> dict[str, Any]:
    """Name of a file -> figure: all runtimes of one network at one batch size, each against its own dense time."""
    found: dict[str, dict[str, Any]] = {}
    for network, entry in data["networks"].items():
        for case, measured in entry["cases"].items():
            runtime, _, batch = case.rpartition(", batch ")
            for variant, latency in measured.get("variants", {}).items():
                found.setdefault(f"{network}_batch{batch}", {})[f"{runtime}: {variant}"] = latency
    drawn = {}
    for name, times in found.items():
        seconds = {variant: latency["median"] for variant, latency in times.items()}
        drawn[name] = plots.latency_bars(
            seconds,
            baseline={variant: f"{variant.partition(': ')[0]}: dense" for variant in seconds},
            batch_size=next(iter(times.values()))["batch_size"],
            spread={variant: (latency["p10"], latency["p90"]) for variant, latency in times.items()},
            title=f"{name.partition('_')[0]}, {data['settings']['image_size']} px, {data['provenance']['machine']}",
        )
    return drawn


def render(rows: list[Row], remarks: list[str], style: str) -> str:
    """The table in a style of tabulate's, and the remarks below it."""
    table = tabulate(rows[1:], headers=rows[0], tablefmt=style, disable_numparse=True)
    bullet = "- " if style == "github" else ""
    return "\n".join([table, "", *(bullet + remark for remark in remarks)]) + "\n"
