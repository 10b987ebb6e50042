"""A pass whose beginning is kept puts out what a whole pass does, computes none of the beginning, and keeps little."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.compress import factorize
from common.modules import hooked
from common.ranks import build_menus
from common.search import measured_sensitivity
from common.search.prefix import Prefix, Unrepeatable
from common.search.sensitivity import divergences


class Residual(nn.Module):
    """In-place activations and sums, a shortcut that runs after the main branch, a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.main, self.shortcut = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.twice, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu_(self.norm(self.stem(x)))
        y = self.main(x)
        y += self.shortcut(x)
        y.relu_()
        y = self.twice(self.twice(y)).relu_()
        return self.head(y.mean((2, 3)))


class Joined(nn.Module):
    """Views, concatenation of early and late maps, and an early map among the outputs."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.three, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        early = self.one(x)
        left, right = early.chunk(2, dim=1)
        right.mul_(0.5)  # in a view of what is read later
        late = self.two(left)
        joined = torch.cat([late, early], dim=1)
        return {"early": early.flatten(1), "out": self.head(self.three(joined).flatten(2).transpose(1, 2).mean(1))}


class Attention(nn.Module):
    """Tokens through torch's own attention, and a residual sum."""

    def __init__(self):
        super().__init__()
        self.inner, self.mixing = nn.Linear(6, 12), nn.MultiheadAttention(12, 2, batch_first=True)
        self.wide, self.head = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = self.inner(x)
        x = x + self.mixing(x, x, x, need_weights=False)[0]
        return self.head(self.wide(x).mean(1))


CASES = {
    "residual": (Residual, (3, 8, 8), ("stem", "main", "shortcut", "twice", "head")),
    "joined": (Joined, (3, 8, 8), ("one", "two", "three", "head")),
    "attention": (Attention, (5, 6), ("inner", "wide", "head")),
}


@pytest.fixture(params=CASES)
def case(request):
    make, shape, layers = CASES[request.param]
    torch.manual_seed(0)
    return make().eval(), torch.randn(3, *shape), layers


def outputs(model, inputs):
    with hooked(model, {}):
        found = model(inputs)
    return list(found.values()) if isinstance(found, dict) else [found]


def replayed(prefix, model, inputs):
    with prefix.replayed():
        return outputs(model, inputs)


def changed(layer, seed):
    torch.manual_seed(seed)
    other = copy.deepcopy(layer)
    nn.init.normal_(other.weight)
    return other


def test_the_outputs_are_those_of_a_whole_pass(case):
    model, inputs, layers = case
    dense, prefix = outputs(model, inputs), Prefix.of(model, inputs, layers)
    for name in sorted(layers, key=prefix.starts.__getitem__):
        prefix.advance(name)
        original = model.get_submodule(name)
        for seed in range(2):
            model.set_submodule(name, changed(original, seed))
            whole = outputs(model, inputs)
            for a, b in zip(replayed(prefix, model, inputs), whole, strict=True):
                assert torch.equal(a, b), (name, seed)
        model.set_submodule(name, original)
        for a, b in zip(replayed(prefix, model, inputs), dense, strict=True):
            assert torch.equal(a, b), name
        assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), dense, strict=True))


def test_nothing_before_the_layer_is_computed_again(case):
    model, inputs, layers = case
    prefix = Prefix.of(model, inputs, layers)
    *before, last = sorted(layers, key=prefix.starts.__getitem__)
    prefix.advance(last)
    dense = outputs(model, inputs)
    with torch.no_grad():
        for name in before:
            model.get_submodule(name).weight.fill_(torch.nan)
    for a, b in zip(replayed(prefix, model, inputs), dense, strict=True):
        assert torch.equal(a, b)


def test_only_what_will_be_read_is_kept():
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()))).eval()
    inputs = torch.randn(2, 4, 16, 16)
    prefix = Prefix.of(model, inputs, ["10"])
    prefix.advance("10")
    storages = {kept.untyped_storage().data_ptr(): kept.untyped_storage().nbytes() for kept in prefix._kept}
    assert sum(storages.values()) < 2.1 * inputs.nbytes  # the one map that layer 10 reads, and one for all the others


class Fickle(nn.Module):
    """Takes another way each time."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.three, self.head = nn.Conv2d(32, 32, 3), nn.Linear(32, 4)

    def forward(self, x):
        self.calls += 1
        x = self.one(x)
        x = F.relu(x) if self.calls % 2 else x.clamp_min(0)
        return self.head(self.three(F.relu(self.two(x))).mean((2, 3)))


def test_a_network_that_takes_another_way_is_noticed_and_measured_by_whole_passes(monkeypatch):
    torch.manual_seed(0)
    model, images = Fickle().eval(), torch.randn(16, 3, 8, 8)
    prefix = Prefix.of(model, images, ["one", "two", "head"])
    prefix.advance("one")
    outputs(model, images)
    with pytest.raises(Unrepeatable, match="operation"):
        prefix.advance("two")

    factors = factorize(model, images)
    menus = build_menus(factors)
    found = measured_sensitivity(factors, menus, images, anchors=2, progress=False)

    def unrepeatable(*_arguments):
        raise Unrepeatable

    monkeypatch.setattr(Prefix, "of", unrepeatable)
    assert found == measured_sensitivity(factors, menus, images, anchors=2, progress=False)
    assert max(max(values) for values in found.values()) > 0


def test_measured_from_prefixes_it_is_what_whole_passes_measure(monkeypatch):
    torch.manual_seed(0)
    model, images = Residual().eval(), torch.randn(64, 3, 8, 8)
    for layer in (model.main, model.twice):
        nn.init.orthogonal_(layer.weight)
    factors = factorize(model, images, layers=["stem", "main", "twice"])
    menus = build_menus(factors)
    norm = {name: buffer.clone() for name, buffer in factors.model.norm.named_buffers()}
    found = measured_sensitivity(factors, menus, images, progress=False)
    assert all(torch.equal(buffer, norm[name]) for name, buffer in factors.model.norm.named_buffers())

    def unrepeatable(*_arguments):
        raise Unrepeatable

    monkeypatch.setattr(Prefix, "of", unrepeatable)
    whole = measured_sensitivity(factors, menus, images, progress=False)
    for name, values in whole.items():
        assert found[name] == pytest.approx(values, abs=1e-6), name


def test_whole_passes_may_be_asked_for(monkeypatch):
    torch.manual_seed(0)
    model, images = Residual().eval(), torch.randn(16, 3, 8, 8)
    factors = factorize(model, images, layers=["main"])
    menus = build_menus(factors)
    kept = divergences(factors, menus, images, "kl", 2, progress=False)
    monkeypatch.setattr(Prefix, "of", None)
    whole = divergences(factors, menus, images, "kl", 2, whole=True, progress=False)
    assert whole["main"] == pytest.approx(kept["main"], abs=1e-6)
