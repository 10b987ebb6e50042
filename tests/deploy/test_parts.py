"""A batch in parts puts out what the whole does, many parts at a time, and only where that is the same and faster."""

import threading

import pytest
import torch
from torch import nn

from common.compress import factorize
from common.deploy import choose as module
from common.deploy import deploy
from common.deploy.parts import SMALL_PART, in_parts, part_sizes
from common.inputs import length
from common.ranks import uniform
from tests.helpers import relative_error


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()


class Alike(nn.Module):
    """How alike the samples of a batch are: none of its rows is of one sample alone."""

    def forward(self, x):
        flat = x.flatten(1)
        return flat @ flat.T


class Centred(nn.Module):
    """As many rows as samples, but each of all of them."""

    def forward(self, x):
        flat = x.flatten(1)
        return flat - flat.mean(0)


def preferring(*sizes):
    """In place of the timing: what is named is the faster the earlier it is named, all else is slow."""

    def measure(runs, _example, **_options):
        return {(place, size): [1.0 + sizes.index(size) if size in sizes else 99.0] for place, size in runs}

    return measure


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: 2 * x,
        lambda x: (x, x.sum(1)),
        lambda x: {"a": x, "b": [x.flatten(1)]},
    ],
    ids=["tensor", "tuple", "nested"],
)
def test_parts_are_joined_in_their_order(make, size):
    x = torch.arange(7 * 6.0).reshape(7, 2, 3)
    found, expected = in_parts(make, size, threads=3)(x), make(x)
    assert type(found) is type(expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_several_inputs_are_cut_alike():
    inputs = {"x": torch.randn(5, 2), "y": torch.randn(5, 3)}
    seen = []

    def call(part):
        seen.append({name: len(tensor) for name, tensor in part.items()})
        return torch.cat([part["x"], part["y"]], 1)

    assert torch.equal(in_parts(call, 2, threads=1)(inputs), torch.cat([inputs["x"], inputs["y"]], 1))
    assert seen == [{"x": 2, "y": 2}, {"x": 2, "y": 2}, {"x": 1, "y": 1}]


def test_as_many_run_at_a_time_as_there_are_threads():
    together = threading.Barrier(3, timeout=20)

    def call(part):
        together.wait()  # lets nobody go on before three are here
        return part

    x = torch.arange(6.0)
    assert torch.equal(in_parts(call, 1, threads=3)(x), x)


def test_an_error_in_a_part_is_the_callers():
    def call(part):
        raise ValueError("cannot run")

    with pytest.raises(ValueError, match="cannot run"):
        in_parts(call, 1, threads=2)(torch.zeros(4))


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 16, 17, 64])
@pytest.mark.parametrize("threads", [1, 2, 5, 64])
def test_parts_that_are_tried_are_smaller_than_the_batch_and_few(batch, threads):
    sizes = part_sizes(batch, threads)
    assert all(1 <= size < batch for size in sizes)
    assert len(set(sizes)) == len(sizes) <= 2
    assert (batch == 1) == (sizes == []) or (threads, batch) == (1, SMALL_PART)
    if threads > 1 and batch > 1:
        assert -(-batch // sizes[-1]) <= threads


@pytest.mark.parametrize("size", [None, 2, 4])
def test_the_fastest_is_taken_and_is_right_at_any_batch_size(monkeypatch, size):
    monkeypatch.setattr(module, "interleaved", preferring(size))
    model, images = network(), torch.randn(8, 3, 6, 6)
    done = deploy(model, images, runtime="onnxruntime", threads=2)
    assert done.part == size
    assert (f"in parts of {size}," in done.report()) == (size is not None)
    for batch in (1, 2, 5, 8, 11):
        given = torch.randn(batch, 3, 6, 6)
        torch.testing.assert_close(done(given), model(given), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("seconds", "size"), [({2: 1.01, 4: 2, None: 1}, 2), ({2: 1.1, 4: 1.1, None: 1}, None)])
def test_parts_are_taken_where_the_whole_batch_is_hardly_faster(monkeypatch, seconds, size):
    monkeypatch.setattr(module, "interleaved", lambda runs, *_, **__: {one: [seconds[one[1]]] for one in runs})
    assert deploy(network(), torch.randn(8, 3, 6, 6), runtime="onnxruntime", threads=2).part == size


@pytest.mark.parametrize("mixing", [Alike, Centred])
def test_a_network_that_looks_at_the_samples_together_stays_whole(monkeypatch, mixing):
    monkeypatch.setattr(module, "interleaved", preferring(2, 4))
    model, images = nn.Sequential(network(), mixing()), torch.randn(8, 3, 6, 6)
    done = deploy(model, images, runtime="onnxruntime", threads=2)
    assert done.part is None
    torch.testing.assert_close(done(images), model(images), rtol=1e-3, atol=1e-3)


class OfOneSize(nn.Module):
    """Made for batches of eight."""

    def forward(self, x):
        return x.reshape(8, -1, x.shape[-1]).reshape(x.shape)


def test_a_network_of_one_batch_size_is_refused_by_name_whatever_its_parts_say():
    layers = nn.Sequential(OfOneSize(), network())
    with pytest.raises(ValueError, match="cannot be exported to ONNX"):
        deploy(layers, torch.randn(8, 3, 6, 6), runtime="onnxruntime", threads=2, rounds=1)


@pytest.mark.parametrize("threads_of_best", [1, 2])
def test_plans_are_timed_on_a_part_too_and_the_faster_network_is_taken(monkeypatch, threads_of_best):
    """Pretends that on one thread each layer's last plan is the fastest, and on all its first."""
    timed = {}

    def timer(_, target):
        def measure(modules, inputs):
            timed[target.threads] = len(inputs)
            best = list(modules)[-1 if target.threads == 1 else 0]
            return {name: [1.0 if name == best else 2.0] * 3 for name in modules}

        return measure

    monkeypatch.setattr(module.Chooser, "_timer", timer)
    best = {2: (0, None), 1: (1, SMALL_PART)}[threads_of_best]
    monkeypatch.setattr(module, "interleaved", lambda runs, *_, **__: {way: [float(way != best)] for way in runs})
    small = factorize(network(), input_shape=(3, 6, 6))
    small = small.compress(uniform(small, 0.5)).eval()
    done = deploy(small, torch.randn(8, 3, 6, 6), runtime="onnxruntime", threads=2, rounds=1)
    assert timed == {2: 8, 1: SMALL_PART}
    assert done.part == best[1]
    for choice in done.layers.values():
        assert choice.plan == list(choice.timings)[-1 if threads_of_best == 1 else 0]


def test_one_image_makes_no_parts(monkeypatch):
    monkeypatch.setattr(module, "interleaved", preferring())
    assert deploy(network(), torch.randn(1, 3, 6, 6), runtime="onnxruntime", threads=2).part is None


def test_torch_takes_the_batch_as_it_is(monkeypatch):
    monkeypatch.setattr(module, "interleaved", preferring(2, 4))
    assert deploy(network(), torch.randn(8, 3, 6, 6), runtime="torch").part is None


@pytest.mark.apart
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_openvino_runs_parts_at_a_time(monkeypatch, precision):
    pytest.importorskip("openvino")
    monkeypatch.setattr(module, "interleaved", preferring(2))
    model, images = network(), torch.randn(16, 3, 6, 6)
    options = {"int8": images} if precision == "int8" else {}
    if options:
        pytest.importorskip("nncf")
    done = deploy(model, images, runtime="openvino", threads=2, **options)
    assert done.part == 2
    expected = model(images)
    for _ in range(20):  # two threads in one request would mix their maps up
        assert relative_error(done(images), expected) < (0.1 if options else 1e-3)
    assert length(done(images[:5])) == 5
