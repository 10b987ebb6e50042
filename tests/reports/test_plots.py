"""Figures: built from plain data, with labels and units, the baseline drawn, nothing global touched."""

import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from common.reports import pareto_front, plots

ROOT = Path(__file__).resolve().parents[2]
BASELINE = {"params": 1000, "flops": 10_000, "accuracy": 0.99}
CANDIDATES = [
    {"params": 100, "flops": 3000, "accuracy": 0.98},
    {"params": 200, "flops": 2000, "accuracy": 0.97},
    {"params": 300, "flops": 4000, "accuracy": 0.2},
    {"params": 50, "flops": 800, "accuracy": None, "val_accuracy": 0.96, "divergence": 0.02, "budget": 0.1},
    {"params": 10, "flops": 100, "accuracy": None, "val_accuracy": None, "status": "failed"},
]
MODELS = [
    plots.ModelResult("Resnet", 0.9, 0.8, 0.985, 0.99, 3.0),
    plots.ModelResult("Vgg", 0.5, 0.4, 0.5, 0.99),
]
PROBABILITIES = {"conv1": [0.2, 0.8], "fc": [0.1, 0.2, 0.7]}
FIGURES = {
    "accuracy_cost_scatter": lambda: plots.accuracy_cost_scatter(
        CANDIDATES, BASELINE, tolerance=0.02, chosen={"best": CANDIDATES[0]}
    ),
    "scatter_nothing_tested": lambda: plots.accuracy_cost_scatter(CANDIDATES[3:], BASELINE),
    "radar": lambda: plots.radar(MODELS),
    "radar_with_scatter": lambda: plots.radar_with_scatter(MODELS),
    "layer_ranks": lambda: plots.layer_ranks({"a": {"conv1": (3, 8, 16), "fc": (8,)}, "b": {"fc": ()}}),
    "singular_values": lambda: plots.singular_values({"conv1": [3.0, 1.0, 0.0]}),
    "error_against_rank": lambda: plots.error_against_rank({"conv1": ([1, 2, 3], [0.5, 0.1, 0.0])}),
    "policy_heatmap": lambda: plots.policy_heatmap(PROBABILITIES),
    "training_curve": lambda: plots.training_curve(
        [{"epoch": 1, "train_loss": 1.0}, {"epoch": 2, "train_loss": 0.5, "val_accuracy": 0.9}]
    ),
    "correlation": lambda: plots.correlation([0.1, 0.2, 0.3], [0.8, 0.9, 0.85]),
    "latency_bars": lambda: plots.latency_bars({"dense": 0.07, "ours": 0.02}, baseline="dense", batch_size=16),
}


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws_and_is_saved(tmp_path, name):
    figure = FIGURES[name]()
    assert isinstance(figure, Figure)
    path = tmp_path / "new" / "figure.png"
    plots.save(figure, path, dpi=40)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", sorted(set(FIGURES) - {"radar"}))
def test_every_axis_has_a_label(name):
    for axes in FIGURES[name]().axes:
        if axes.name == "polar" or axes.get_label() == "<colorbar>":
            continue
        shared_x = any(other is not axes for other in axes.get_shared_x_axes().get_siblings(axes))
        shared_y = any(other is not axes for other in axes.get_shared_y_axes().get_siblings(axes))
        assert axes.get_xlabel() or shared_x
        assert axes.get_ylabel() or shared_y or name == "latency_bars"


def test_flops_are_said_to_be_multiply_accumulates():
    for name in ("accuracy_cost_scatter", "radar_with_scatter"):
        assert "multiply-accumulates" in texts(FIGURES[name]())


def test_pareto_front_has_no_beaten_point():
    costs, accuracies = [3, 1, 2, 2, 5, 1], [0.9, 0.5, 0.8, 0.7, 0.9, 0.4]
    assert pareto_front(costs, accuracies) == [1, 2, 0]
    assert pareto_front([], []) == []


def test_points_far_below_are_counted_on_the_figure():
    assert "1 below 0.930" in texts(FIGURES["accuracy_cost_scatter"]())


def test_baseline_is_in_the_picture():
    figure = FIGURES["accuracy_cost_scatter"]()
    tested, screened = figure.axes[:2], figure.axes[2:]
    for axes, cost in zip(tested, ("flops", "params"), strict=True):
        offsets = [tuple(point) for collection in axes.collections for point in collection.get_offsets()]
        assert (BASELINE[cost], BASELINE["accuracy"]) in offsets
    assert len(screened) == 2
    assert "dense baseline" in texts(FIGURES["radar"]())


def test_screened_candidates_are_drawn_by_what_ranked_them_and_apart_from_the_tested():
    figure = FIGURES["accuracy_cost_scatter"]()
    for axes, cost in zip(figure.axes[2:], ("flops", "params"), strict=True):
        assert [tuple(point) for one in axes.collections for point in one.get_offsets()] == [
            (CANDIDATES[3][cost], CANDIDATES[3]["divergence"])
        ]
    assert "Divergence" in figure.axes[2].get_ylabel()
    without = plots.accuracy_cost_scatter([{**CANDIDATES[3], "divergence": None}], BASELINE)
    assert without.axes[0].get_ylabel() == "Top-1 accuracy on validation"
    assert not any(line.get_linestyle() == "--" for line in without.axes[0].lines)  # no line of test accuracy there


def test_radar_says_its_scales_and_what_was_not_measured():
    published = {"Vgg": plots.ModelResult("published", 0.1, 0.69, speedup=0.26)}
    figure = plots.radar(MODELS, published=published)
    said = texts(figure)
    for words in ("0.25x to 64x, log", "-4 to 0", "10x", "clipped", "Vgg (speed-up not measured)", "published"):
        assert words in said
    assert len(figure.axes) == len(MODELS)
    for axes in figure.axes:
        for line in axes.lines:
            values = line.get_ydata()
            assert all(0 <= value <= 1 for value in values if value == value)


def test_radar_puts_the_slower_inside_the_dense_ring_and_the_smaller_outside():
    slow = plots.ModelResult("Vgg", 0.75, 0.0, 0.99, 0.99, 0.5)
    dense, own = plots.radar([slow]).axes[0].lines
    parameters, flops, accuracy, speed, _ = (own.get_ydata() - dense.get_ydata()).tolist()
    assert parameters > 0
    assert flops == accuracy == 0
    assert speed < 0


def test_layer_ranks_keep_network_order_and_show_dense_layers():
    figure = plots.layer_ranks({"a": {"conv1": (3, 8, 16), "fc": (8,)}, "b": {"conv1": (2, 4, 5), "conv2": (7, 9, 11)}})
    assert [tick.get_text() for tick in figure.axes[-1].get_xticklabels()] == ["conv1", "conv2", "fc"]
    assert texts(figure).count("dense") == 2
    assert sorted(bar.get_height() for bar in figure.axes[0].patches) == [3, 8, 8, 16]


def test_layer_ranks_are_shares_of_the_full_ranks_where_those_are_known():
    full = {"conv1": (6, 16, 64), "fc": (512,)}
    figure = plots.layer_ranks({"a": {"conv1": (3, 4, 16), "fc": (8,)}}, full_ranks=full)
    assert sorted(bar.get_height() for bar in figure.axes[0].patches) == pytest.approx([1.5625, 25, 25, 50])
    assert "% of full rank" in figure.axes[0].get_ylabel()


def test_heatmap_says_the_most_probable_entry_of_each_row():
    said = texts(plots.policy_heatmap(PROBABILITIES, {"conv1": ["(2, 3, 4)", "dense"], "fc": ["(8)", "(16)", "(24)"]}))
    assert "dense" in said
    assert "(24)" in said
    assert "(2, 3, 4)" not in said


@pytest.mark.parametrize(
    ("second", "rho"), [([1, 2, 3, 4], "1.00"), ([4, 3, 2, 1], "-1.00"), ([1, 2, 2, 3], "0.95"), ([1, 1, 1, 1], None)]
)
def test_correlation_is_of_ranks_with_ties_shared(second, rho):
    said = texts(plots.correlation([0.1, 0.2, 0.5, 0.9], second))
    assert (f"rho = {rho}" in said) if rho else ("rho" not in said)


def test_latency_bars_say_batch_and_speedup():
    said = texts(FIGURES["latency_bars"]())
    assert "3.50x" in said
    assert "batch of 16" in said
    own = {"a: dense": "a: dense", "a: ours": "a: dense", "b: dense": "b: dense", "b: ours": "b: dense"}
    times = {"a: dense": 0.08, "a: ours": 0.02, "b: dense": 0.04, "b: ours": 0.02}
    said = texts(plots.latency_bars(times, baseline=own))
    assert "4.00x" in said
    assert "2.00x" in said
    with pytest.raises(ValueError, match="'tiny' was not measured; measured are dense"):
        plots.latency_bars({"dense": 1.0}, baseline="tiny")


def test_plots_touch_neither_pyplot_nor_torch():
    code = "import sys, common.reports.plots; print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_face_of_the_reports_imports_neither_torch_nor_matplotlib():
    code = "import sys, common.reports; print([m for m in ('torch', 'matplotlib', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
