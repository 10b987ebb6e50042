"""The smallest network within a loss: the budget that is found is the edge, whatever was tried on the way is kept."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import compress_network
from common.knee import CLOSE, MOST_BUDGETS, budget_of_speedup, seek
from common.ranks.menus import RANK_MULTIPLE, WIDE_FROM
from common.reports import read_log
from tests.helpers import fitted, loaders_of

QUICK = {"candidates": 3, "latency_batch": 4, "calibration_images": 64, "screen_images": 48, "promote": 1}
QUICK |= {"sensitivity": "proxy", "progress": False}


class Pretended:
    """A run whose finalists score what a curve says; `least` is the cost of its smallest ranks."""

    def __init__(self, curve, least, dense=0.9):
        self.curve, self.least, self.dense, self.budgets, self.said = curve, least, dense, (), []

    def dense_validation(self):
        return self.dense

    def price_menus(self):
        return {"layer": ()}, SimpleNamespace()

    def factorize(self):
        return None

    def use_budgets(self, budgets):
        self.budgets = budgets

    def finetune(self):
        return [
            SimpleNamespace(record={"budget": b, "val_accuracy": self.curve(b)}, path="there") for b in self.budgets
        ]

    def open_log(self):
        return SimpleNamespace(info=self.said.append)


@pytest.fixture
def least(monkeypatch):
    def pretend(value):
        costs = SimpleNamespace(of=lambda *_: SimpleNamespace(least=value))
        monkeypatch.setattr("common.knee.MenuCosts", costs)
        return value

    return pretend


@pytest.mark.parametrize("edge", [0.02, 0.07, 0.3, 0.8])
def test_the_edge_is_found_within_a_tenth(least, edge):
    run = Pretended(lambda budget: 0.9 if budget >= edge else 0.5, least(0.01))
    tried = seek(run, 0.005)
    held = min(budget for budget in (*tried, 1.0) if budget >= edge)
    assert held / edge <= CLOSE * 1.02
    assert len(tried) <= MOST_BUDGETS
    assert len(run.said) == len(tried)  # nothing of the menus' end
    assert all(words in "".join(run.said) for words in ("holds", "loses too much"))


@pytest.mark.parametrize(("score", "end"), [(0.9, "least"), (0.1, "dense")])
def test_where_everything_or_nothing_holds_it_goes_to_the_end(least, score, end):
    run = Pretended(lambda _: score, least(0.05))
    tried = seek(run, 0.005)
    assert (min(tried) < 0.06) if end == "least" else (max(tried) > 0.9)
    assert ("ended at the smallest ranks of the menus (0.05 of the cost)" in run.said[-1]) == (end == "least")


def test_a_budget_without_finalists_counts_as_lost(least):
    run = Pretended(lambda _: 0.9, least(0.05))
    run.finetune = list
    assert list(seek(run, 0.01)) == sorted(seek(run, 0.01))
    assert "no finalist" in run.said[0]


def test_it_needs_a_score(least):
    with pytest.raises(ValueError, match="max_loss needs a score"):
        seek(Pretended(lambda _: 0.9, least(0.05), dense=None), 0.01)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 40, 3, 2, 1)
        self.head = nn.Linear(40, 10)

    def forward(self, x):
        return self.head(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def task(digits):
    loaders = loaders_of(digits)
    torch.manual_seed(0)
    return fitted(Net(), loaders[0], epochs=6), *loaders


def test_a_run_finds_the_smallest_network_by_validation_and_resumes(task, tmp_path, monkeypatch):
    monkeypatch.setattr("common.knee.MOST_BUDGETS", 3)
    run = compress_network(*task, max_loss=0.03, folder=tmp_path, epochs=0, **QUICK)
    dense = run.dense_validation()
    small = run.best()
    assert small.record["val_accuracy"] >= dense - 0.03 - 1e-9
    finished = [one for one in run.finetune() if one.path is not None]
    cheaper = [one for one in finished if one.record["flops"] < small.record["flops"]]
    assert all(one.record["val_accuracy"] < dense - 0.03 for one in cheaper)
    assert len({one.record["budget"] for one in finished}) <= 3
    log = read_log(run.settings.log_path)
    assert log.warnings == []
    run.close()

    def refuse(*_):
        raise AssertionError("it was screened before")

    monkeypatch.setattr("common.search.screening.Screener.screen", refuse)
    again = compress_network(*task, max_loss=0.03, folder=tmp_path, epochs=0, **QUICK)
    assert again.best().record["trial"] == small.record["trial"]
    again.close()
    with pytest.raises(ValueError, match="another max_loss"):
        compress_network(*task, max_loss=0.01, folder=tmp_path, epochs=0, **QUICK)


@pytest.mark.parametrize(("target", "narrow"), [({"max_loss": 0.03}, True), ({"budgets": (0.5,)}, False)])
def test_only_its_menus_go_below_the_ranks_that_kernels_like(digits, tmp_path, monkeypatch, target, narrow):
    monkeypatch.setattr("common.knee.MOST_BUDGETS", 1)
    wide = nn.Sequential(nn.Conv2d(3, WIDE_FROM, 3), nn.ReLU(), nn.Conv2d(WIDE_FROM, WIDE_FROM, 3))
    net = nn.Sequential(wide, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDE_FROM, 10))
    run = compress_network(net, *loaders_of(digits), folder=tmp_path, epochs=0, **target, **QUICK)
    ranks = [entry.ranks for entry in run.menus()["0.2"] if entry.ranks is not None]
    assert any(one.rank_out < RANK_MULTIPLE for one in ranks) == narrow
    run.close()


def test_two_targets_at_once_are_refused(task, tmp_path):
    with pytest.raises(ValueError, match="two targets"):
        compress_network(*task, max_loss=0.01, speedup=2, folder=tmp_path)


def test_the_budget_of_a_speedup_is_kept_and_a_damaged_file_of_it_is_named(tmp_path):
    known = tmp_path / "speedup.json"
    found = budget_of_speedup(2, lambda budget: 0.9 / budget, 0.01, known)
    assert budget_of_speedup(2, None, 0.01, known) == found == pytest.approx(0.45, rel=0.1)
    known.write_text(known.read_text()[:20])
    with pytest.raises(ValueError, match=r"speedup\.json is damaged .*: delete it"):
        budget_of_speedup(2, None, 0.01, known)
