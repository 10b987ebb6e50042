"""What the notebooks show: tables as data frames, and plain data for the figures of `common.reports.plots`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .compress import Factors, ModelFactors
from .configuration import KernelRanks, MatrixRanks
from .experiment import Experiment
from .presets import RunSettings
from .ranks import Menus, rank_grid
from .reports import pareto_front
from .reports.plots import classified
from .run import Run
from .search import Policy


def settings_table(settings: RunSettings) -> pd.DataFrame:
    """One row per knob."""
    return pd.DataFrame(settings.rows(), columns=["knob", "value"]).set_index("knob")


def layer_table(factors: ModelFactors) -> pd.DataFrame:
    """One row per layer: what it is, its full ranks, what it costs dense; layers that stay dense with the reason."""
    rows = [
        {
            "layer": name,
            "kernel": " x ".join(map(str, layer.shape)),
            "full ranks": str(layer.full_ranks),
            "parameters": layer.dense_params,
            "share of parameters": layer.dense_params / factors.dense_params,
            "FLOPs": layer.dense_flops,
            "share of FLOPs": layer.dense_flops / factors.dense_flops,
            "stays dense because": "",
        }
        for name, layer in factors.layers.items()
    ]
    rows += [{"layer": name, "stays dense because": reason} for name, reason in factors.skipped.items()]
    return pd.DataFrame(rows).set_index("layer")


def styled(table: pd.DataFrame) -> Any:
    """The table with numbers as people read them: shares in percent, counts with separators."""
    percent = [c for c in table.columns if "share" in c or "saved" in c]
    counts = [c for c in table.columns if c in ("parameters", "FLOPs")]
    formats = dict.fromkeys(percent, "{:.1%}") | dict.fromkeys(counts, "{:,.0f}")
    formats |= {c: "{:.4f}" for c in table.columns if "accuracy" in c or "score" in c}
    formats |= {c: "{:.2f}x" for c in table.columns if c == "speed-up"}
    formats |= {c: "{:.2f}" for c in table.columns if c == "ms per batch"}
    formats |= {c: "{:.4f}" for c in table.columns if "divergence" in c}
    return table.style.format(formats, na_rep="")


def styled_text(table: pd.DataFrame) -> str:
    """The same as plain text, for a terminal."""
    return styled(table).to_string(delimiter="  ")


def error_curves(factors: Mapping[str, ModelFactors], layer: str) -> dict[str, tuple[list[int], list[float]]]:
    """Label -> (ranks, relative errors of the layer's output) when all of its ranks are cut to the same number.

    The error is the root of the discarded share of energy, in the metric of each label's factors.
    """
    curves = {}
    for label, model in factors.items():
        one = model.layers[layer]
        ranks = list(rank_grid(_largest_common_rank(one)))
        curves[label] = (ranks, [one.output_error(_same(one, rank)) ** 0.5 for rank in ranks])
    return curves


def _largest_common_rank(layer: Factors) -> int:
    full = layer.full_ranks
    return full.rank if isinstance(full, MatrixRanks) else min(full.rank_in, full.rank_out)


def _same(layer: Factors, rank: int) -> KernelRanks | MatrixRanks:
    return MatrixRanks(rank) if layer.is_matrix else KernelRanks(rank, rank, rank)


def spectra(factors: ModelFactors, layer: str) -> dict[str, list[float]]:
    """Edge of the layer's dimension tree -> singular values of its matricization, in falling order."""
    one = factors.layers[layer]
    edges = {"edge": "mid"} if one.is_matrix else {"(in)": "in", "(in, kh)": "mid", "(out)": "out"}
    found = {label: one.edge_energies(edge).sqrt().tolist() for label, edge in edges.items()}
    return {label: [value for value in values if value > 0] for label, values in found.items()}


def menu_labels(menus: Menus) -> dict[str, list[str]]:
    """Layer -> what each entry of its menu is called in a heat map."""
    return {
        name: ["dense" if entry.ranks is None else str(entry.ranks) for entry in menu] for name, menu in menus.items()
    }


def policy_rows(policy: Policy) -> dict[str, list[float]]:
    """Layer -> probabilities along its menu."""
    return {name: [float(p) for p in row] for name, row in policy.probabilities.items()}


def baseline_point(factors: ModelFactors, accuracy: float) -> dict[str, float]:
    """The dense network as the figures want it."""
    return {"params": factors.dense_params, "flops": factors.dense_flops, "accuracy": accuracy}


def candidate_table(records: Sequence[Mapping[str, Any]], factors: ModelFactors) -> pd.DataFrame:
    """One row per screened candidate; failed ones show their reason."""
    rows = []
    for record in records:
        row = {"candidate": record["trial"], "status": record["status"]}
        if record["status"] == "failed":
            row["reason"] = record["reason"]
        else:
            row |= {
                "share of parameters": record["params"] / factors.dense_params,
                "share of FLOPs": record["flops"] / factors.dense_flops,
                "validation accuracy": record["val_accuracy"],
                "divergence": round(record["divergence"], 4),
            }
        rows.append(row)
    return pd.DataFrame(rows).set_index("candidate")


def cost_table(seconds: Mapping[str, float]) -> pd.DataFrame:
    """One row per step of a search with its time; see `common.search.clock.search_seconds`."""
    labels = {
        "factorize": "factorise the dense network once",
        "sensitivity": "measure sensitivities",
        "screen": "screen every candidate",
        "finetune": "fine-tune the promoted",
        "total": "the search, in all",
        "exhaustive": "fine-tuning every candidate instead (estimate)",
    }
    rows = [(label, duration(seconds[name])) for name, label in labels.items() if name in seconds]
    return pd.DataFrame(rows, columns=["step", "time"]).set_index("step")


def duration(seconds: float) -> str:
    """`4.2 s` up to two minutes, then `37 min`."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def against_uniform(experiment: Experiment) -> pd.DataFrame:
    """One row per budget: what the policy's best candidate and uniform ranks of the same cost screen at."""
    rows = []
    for budget, uniform in experiment.screen_uniform().items():
        own = [r for r in experiment.screen() if r["budget"] == budget and r["status"] == "screened"]
        best = min(own, key=lambda record: record["divergence"], default=None)
        row: dict[str, Any] = {"budget": budget}
        if best is not None:
            row |= {"policy: validation accuracy": best["val_accuracy"], "policy: divergence": best["divergence"]}
        if isinstance(uniform, str):
            row["uniform failed"] = uniform
        else:
            row |= {"uniform: validation accuracy": uniform.accuracy, "uniform: divergence": uniform.divergence}
        rows.append(row)
    return pd.DataFrame(rows).set_index("budget")


def file_table(files: Mapping[str, Path]) -> pd.DataFrame:
    """One row per file with its size."""
    rows = [(name, str(path), f"{path.stat().st_size / 1e6:.2f} MB") for name, path in files.items()]
    return pd.DataFrame(rows, columns=["what", "path", "size"]).set_index("what")


def classify_one(experiment: Experiment, networks: Mapping[str, Callable[[Tensor], Tensor]]) -> Figure:
    """The first image of the validation split, and what each network takes it for."""
    dataset = experiment.load_data()
    images = next(iter(dataset.val.batches(1))).images
    with torch.no_grad():
        probabilities = {name: run(images).float().softmax(1)[0].tolist() for name, run in networks.items()}
    mean, std = (images.new_tensor(numbers).view(1, -1, 1, 1) for numbers in (dataset.mean, dataset.std))
    picture = (images * std + mean).clamp(0, 1)[0].permute(1, 2, 0).cpu().numpy()
    return classified(picture, probabilities, dataset.classes)


def rank_rows(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Candidate -> layer -> ranks."""
    return {record["trial"]: record["config"].as_tuples() for record in records}


def full_rank_rows(factors: ModelFactors) -> dict[str, tuple[int, ...]]:
    """Layer -> full ranks, as the outline in a figure of ranks."""
    return factors.full_ranks().as_tuples()


def summary(experiment: Run) -> list[dict[str, Any]]:
    """One row per finalist, the dense network first; see `Run.summary`."""
    return experiment.summary()


def front(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The screened candidates that no other beats in FLOPs and validation accuracy."""
    screened = [record for record in records if record["status"] == "screened"]
    picked = pareto_front([r["flops"] for r in screened], [r["val_accuracy"] for r in screened])
    return [screened[i] for i in picked]
