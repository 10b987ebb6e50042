"""Every figure of results: pure functions from plain data to a matplotlib Figure, gathered here.

No pyplot and no files but in `save`, so that a notebook can show a figure and a script can store it. Figures are
readable in grey: series differ by marker, hatch or line style, not by colour alone.
"""

import os

from matplotlib.figure import Figure

from ..files import atomic_path
from .accuracy_plots import accuracy_cost_scatter
from .method_plots import (
    classified,
    correlation,
    error_against_rank,
    latency_bars,
    policy_heatmap,
    singular_values,
    training_curve,
)
from .radar_plots import ModelResult, radar, radar_with_scatter
from .rank_plots import layer_ranks

__all__ = [
    "ModelResult",
    "accuracy_cost_scatter",
    "classified",
    "correlation",
    "error_against_rank",
    "latency_bars",
    "layer_ranks",
    "policy_heatmap",
    "radar",
    "radar_with_scatter",
    "save",
    "singular_values",
    "training_curve",
]


def save(figure: Figure, path: str | os.PathLike, dpi: int = 130) -> None:
    """Writes the figure in one step, in the format that the suffix of `path` names."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi, bbox_inches="tight")
