"""What the notebooks show: tables as data frames, and plain data for the figures of `common.reports.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from .compress import KernelFactors, MatrixFactors, ModelFactors
from .configuration import KernelRanks, MatrixRanks
from .experiment import Experiment
from .presets import RunSettings
from .ranks import Menus, rank_grid
from .reports import pareto_front
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
    formats |= {c: "{:.4f}" for c in table.columns if "accuracy" in c}
    formats |= {c: "{:.2f}x" for c in table.columns if c == "speed-up"}
    formats |= {c: "{:.2f}" for c in table.columns if c == "ms per batch"}
    return table.style.format(formats, na_rep="")


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


def _largest_common_rank(layer: KernelFactors | MatrixFactors) -> int:
    full = layer.full_ranks
    return full.rank if isinstance(full, MatrixRanks) else min(full.rank_in, full.rank_out)


def _same(layer: KernelFactors | MatrixFactors, rank: int) -> KernelRanks | MatrixRanks:
    return MatrixRanks(rank) if isinstance(layer, MatrixFactors) else KernelRanks(rank, rank, rank)


def spectra(factors: ModelFactors, layer: str) -> dict[str, list[float]]:
    """Edge of the layer's dimension tree -> singular values of its matricization, in falling order."""
    one = factors.layers[layer]
    edges = {"edge": "mid"} if isinstance(one, MatrixFactors) else {"(in)": "in", "(in, kh)": "mid", "(out)": "out"}
    found = {label: one.edge_energies(edge).sqrt().tolist() for label, edge in edges.items()}
    return {label: [value for value in values if value > 0] for label, values in found.items()}


def menu_labels(menus: Menus) -> dict[str, list[str]]:
    """Layer -> what each entry of its menu is called in a heat map."""
    return {
        name: ["dense" if e.ranks is None else str(e.ranks).strip("()").replace(", ", "\n") for e in menu]
        for name, menu in menus.items()
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
    """One row per step of a search with its minutes; see `common.search_cost.search_seconds`."""
    labels = {
        "factorize": "factorise the dense network once",
        "sensitivity": "measure sensitivities",
        "screen": "screen every candidate",
        "finetune": "fine-tune the promoted",
        "total": "the search, in all",
        "exhaustive": "fine-tuning every candidate instead (estimate)",
    }
    rows = [(label, round(seconds[name] / 60, 1)) for name, label in labels.items() if name in seconds]
    return pd.DataFrame(rows, columns=["step", "minutes"]).set_index("step")


def rank_rows(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Candidate -> layer -> ranks."""
    return {record["trial"]: record["config"].as_tuples() for record in records}


def full_rank_rows(factors: ModelFactors) -> dict[str, tuple[int, ...]]:
    """Layer -> full ranks, as the outline in a figure of ranks."""
    return factors.full_ranks().as_tuples()


def summary(experiment: Experiment) -> list[dict[str, Any]]:
    """One row per finalist, the dense network first: what it costs, what it is worth, how fast it runs."""
    factors, deployed = experiment.factorize(), experiment.deploy()

    def row(name: str, params: int, flops: int, accuracy: float) -> dict[str, Any]:
        return {
            "network": name,
            "parameters": params,
            "parameters saved": 1 - params / factors.dense_params,
            "FLOPs": flops,
            "FLOPs saved": 1 - flops / factors.dense_flops,
            "test accuracy": accuracy,
            "ms per batch": 1e3 * deployed.seconds[name],
            "speed-up": deployed.speedup(name),
        }

    baseline_accuracy = experiment.prepare_baseline().test_accuracy
    rows = [row("dense", factors.dense_params, factors.dense_flops, baseline_accuracy)]
    for finalist in experiment.finetune():
        record = finalist.record
        if finalist.path is None:
            rows.append({"network": record["trial"], "failed": record["reason"]})
        else:
            rows.append(row(record["trial"], record["params"], record["flops"], record["accuracy"]))
    return rows


def front(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The screened candidates that no other beats in FLOPs and validation accuracy."""
    screened = [record for record in records if record["status"] == "screened"]
    picked = pareto_front([r["flops"] for r in screened], [r["val_accuracy"] for r in screened])
    return [screened[i] for i in picked]
