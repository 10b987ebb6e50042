"""What the notebooks show: tables of a real small network, checked against its layers one by one."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from common import notebook
from common.configuration import Configuration
from common.cost import count_flops, count_params
from common.deployed_set import DeployedSet
from common.ranks import uniform
from common.run import Run
from common.search import CONTROL, Policy, Screening


def test_the_layer_table_gives_each_layer_its_share_of_parameters_and_of_flops(factors, network):
    table = notebook.layer_table(factors)
    assert list(table.index) == [*factors.layers, *factors.skipped]
    for name in factors.layers:
        layer = network.get_submodule(name)
        own = sum(parameter.numel() for parameter in layer.parameters())
        assert table.loc[name, "parameters"] == own
        assert table.loc[name, "share of parameters"] == pytest.approx(own / count_params(network))
        flops = table.loc[name, "FLOPs"]
        assert table.loc[name, "share of FLOPs"] == pytest.approx(flops / count_flops(network, (3, 16, 16)))
    assert (table["share of parameters"] != table["share of FLOPs"]).any()
    for name, reason in factors.skipped.items():
        assert table.loc[name, "stays dense because"] == reason


@pytest.fixture
def finished(factors):
    """An experiment that is done: two finalists, one of which failed."""
    config = uniform(factors, 0.4)
    costs = {"params": factors.params(config), "flops": factors.flops(config)}
    done = {"trial": "0.5-1", "config": config, "status": "fine-tuned", "accuracy": 0.8, "accepted": True, **costs}
    failed = {"trial": "0.5-2", "config": config, "status": "failed", "reason": "NaN"}
    seconds = {"dense": 0.03, "0.5-1": 0.01}
    deployed = DeployedSet(dict.fromkeys(seconds), seconds, 16)
    return SimpleNamespace(
        factorize=lambda: factors,
        deploy=lambda: deployed,
        dense_score=lambda: 0.9,
        dense_control=lambda: {"accuracy": 0.92},
        score_name="test accuracy",
        finetune=lambda: [SimpleNamespace(record=done, path="x"), SimpleNamespace(record=failed, path=None)],
    )


def test_the_summary_says_what_was_saved_and_not_what_was_kept(finished, factors):
    dense, control, done, failed = Run.summary(finished)
    assert control == dense | {"network": CONTROL, "test accuracy": 0.92}
    assert dense["parameters saved"] == dense["FLOPs saved"] == 0
    model = factors.compress(uniform(factors, 0.4))
    assert done["parameters saved"] == pytest.approx(1 - count_params(model) / factors.dense_params)
    assert done["FLOPs saved"] == pytest.approx(1 - count_flops(model, (3, 16, 16)) / factors.dense_flops)
    assert done["parameters saved"] > 0.2
    assert (done["ms per batch"], done["speed-up"], done["test accuracy"]) == (10, pytest.approx(3.0), 0.8)
    assert failed == {"network": "0.5-2", "failed": "NaN"}


def test_the_front_is_built_on_flops():
    records = [
        {"trial": "few FLOPs", "flops": 10, "params": 90, "val_accuracy": 0.8, "status": "screened"},
        {"trial": "few parameters", "flops": 20, "params": 10, "val_accuracy": 0.7, "status": "screened"},
        {"trial": "accurate", "flops": 30, "params": 95, "val_accuracy": 0.9, "status": "screened"},
        {"trial": "failed", "status": "failed"},
    ]
    assert [record["trial"] for record in notebook.front(records)] == ["few FLOPs", "accurate"]


def test_the_candidate_table_shows_failures_with_their_reason(factors):
    half = {"params": factors.dense_params // 2, "flops": factors.dense_flops // 4}
    records = [
        {"trial": "a", "status": "screened", "val_accuracy": 0.5, "divergence": 0.1, **half},
        {"trial": "b", "status": "failed", "reason": "out of memory"},
    ]
    table = notebook.candidate_table(records, factors)
    assert table.loc["a", "share of FLOPs"] == pytest.approx(0.25, rel=1e-3)
    assert table.loc["a", "share of parameters"] == pytest.approx(0.5, rel=1e-3)
    assert table.loc["b", "reason"] == "out of memory"


def test_uniform_stands_beside_the_best_of_each_budget():
    screened = [
        {"budget": 0.3, "status": "screened", "val_accuracy": 0.7, "divergence": 0.2},
        {"budget": 0.3, "status": "screened", "val_accuracy": 0.8, "divergence": 0.1},
        {"budget": 0.1, "status": "screened", "val_accuracy": 0.6, "divergence": 0.4},
    ]
    uniforms = {0.3: Screening(0.75, 0.15, 1, 1, 0.1), 0.1: "its smallest ranks are too dear"}
    table = notebook.against_uniform(SimpleNamespace(screen=lambda: screened, screen_uniform=lambda: uniforms))
    assert table.loc[0.3, "policy: validation accuracy"] == 0.8
    assert table.loc[0.3, "uniform: validation accuracy"] == 0.75
    assert table.loc[0.1, "uniform failed"] == "its smallest ranks are too dear"


@pytest.mark.parametrize(("seconds", "said"), [(0.04, "0.0 s"), (3.21, "3.2 s"), (119, "119.0 s"), (1380, "23 min")])
def test_short_times_are_said_in_seconds(seconds, said):
    assert notebook.duration(seconds) == said
    table = notebook.cost_table({"factorize": seconds, "total": 7200})
    assert list(table["time"]) == [said, "120 min"]


def test_error_curves_fall_and_end_where_nothing_is_cut(factors):
    curves = notebook.error_curves({"ours": factors}, "7")
    ranks, errors = curves["ours"]
    assert ranks == sorted(ranks)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(0, abs=1e-3)


def test_spectra_are_falling_and_of_every_edge(factors):
    found = notebook.spectra(factors, "4")
    assert list(found) == ["(in)", "(in, kh)", "(out)"]
    assert all(values == sorted(values, reverse=True) for values in found.values())


def test_ranks_and_policies_come_as_plain_numbers(factors, menus, sensitivity, costs):
    config = Configuration(uniform(factors, 0.5))
    assert notebook.rank_rows([{"trial": "t", "config": config}]) == {"t": config.as_tuples()}
    assert notebook.full_rank_rows(factors)["4"] == (12, 36, 36)
    policy = Policy.solve(sensitivity, costs, 0.5)
    rows, labels = notebook.policy_rows(policy), notebook.menu_labels(menus)
    assert all(len(rows[name]) == len(labels[name]) for name in menus)
    assert all(row[-1] == "dense" for row in labels.values())


def test_one_image_is_classified_by_every_network(digits, network):
    experiment = SimpleNamespace(load_data=lambda: digits)
    figure = notebook.classify_one(experiment, {"dense": network, "again": network})
    bars = [bar.get_height() for bar in figure.axes[1].patches]
    assert len(bars) == 10
    images = next(iter(digits.val.batches(1))).images
    with torch.no_grad():
        assert max(bars) == pytest.approx(float(network(images).softmax(1).max()), rel=1e-4)
    picture = figure.axes[0].images[0].get_array()
    assert picture.shape == (16, 16, 3)
    assert 0 <= picture.min() <= picture.max() <= 1


def test_files_are_listed_with_their_size(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x" * 2_500_000)
    assert notebook.file_table({"weights": tmp_path / "a.bin"}).loc["weights", "size"] == "2.50 MB"


def test_numbers_are_written_as_people_read_them():
    row = {"parameters": 12345, "share of FLOPs": 0.256, "test accuracy": 0.98765, "speed-up": 3.14159}
    table = pd.DataFrame([row])
    text = notebook.styled(table).to_html()
    for written in ("12,345", "25.6%", "0.9877", "3.14x"):
        assert written in text
