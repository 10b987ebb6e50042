"""The latency benchmark: from command line to tables, going on where it stopped, saying what it could not measure."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.latency import Network, main
from benchmarks.latency_peers import PEERS, Subject, tensorly_torch
from benchmarks.latency_report import figures, is_slower, layer_rows, notes, variant_rows
from common.cost import count_flops
from common.models import save_compressed

SMALL = ["--models", "squeezenet1_1", "--image-size", "64", "--batches", "1", "--runtimes", "torch", "--rounds", "1"]
UNIFORM = ["--config", "uniform:0.25"]


def run(folder, *options):
    return main([*SMALL, "--out", str(folder), *options])


def test_measures_writes_and_goes_on(tmp_path, capsys, monkeypatch):
    for library in ("tltorch", "torch_pruning"):
        monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    assert run(tmp_path, *UNIFORM) == 0
    data = json.loads((tmp_path / "latency.json").read_text())
    case = data["networks"]["squeezenet1_1"]["cases"]["torch, float32, batch 1"]
    assert set(case["variants"]) == {"dense", "compressed", "chain everywhere", "Tucker-2 everywhere"}
    assert case["notes"] == {"tensorly-torch Tucker": "not installed", "torch-pruning": "not installed"}
    assert set(case["layers"]) == set(case["plans"])
    expected = {"latency.json", "latency.md", "latency.txt", "layers.md", "layers.txt", "squeezenet1_1_batch1.png"}
    assert {file.name for file in tmp_path.iterdir()} == expected
    assert "Not measured: squeezenet1_1, torch-pruning: not installed." in capsys.readouterr().out

    before = (tmp_path / "latency.json").read_bytes()
    assert run(tmp_path, *UNIFORM) == 0
    assert "measured before" in capsys.readouterr().out
    assert (tmp_path / "latency.json").read_bytes() == before
    assert run(tmp_path, "--config", "uniform:0.5") == 2
    assert "use another --out" in capsys.readouterr().err


def test_a_case_that_cannot_be_measured_is_reported(tmp_path, capsys):
    assert run(tmp_path, *UNIFORM, "--runtimes", "cuda-graph", "--no-peers") == 0
    assert "Not measured: squeezenet1_1, cuda-graph, float32, batch 1: CUDA graphs need" in capsys.readouterr().out


def test_configurations_by_text_file_and_policy(tmp_path):
    text = "features.0:(3, 5, 9), features.3.expand3x3:(8, 12, 16)"
    by_text = Network("squeezenet1_1", text, 64, 10, seed=0)
    assert by_text.config == text
    path = tmp_path / "m.safetensors"
    save_compressed(by_text.compressed, path, architecture="squeezenet1_1", num_classes=10, image_size=64)
    by_file = Network("squeezenet1_1", str(path), 64, 10, seed=0)
    assert by_file.sizes == by_text.sizes
    log = tmp_path / "run.json"
    log.write_text(json.dumps({"candidates": [{"trial": "0.3-1", "config_str": text}]}))
    assert Network("squeezenet1_1", f"{log}:0.3-1", 64, 10, seed=0).config == text
    with pytest.raises(ValueError, match=r"has no candidate 0\.3-2"):
        Network("squeezenet1_1", f"{log}:0.3-2", 64, 10, seed=0)
    by_policy = Network("squeezenet1_1", None, 64, 10, seed=0)
    share = by_policy.sizes["compressed"]["flops"] / by_policy.sizes["dense"]["flops"]
    assert 0.1 < share <= 0.20
    with pytest.raises(ValueError, match="holds a squeezenet1_1, but resnet18 was asked for"):
        Network("resnet18", str(path), 64, 10, seed=0)


@pytest.mark.apart
def test_openvino_beside_the_others(tmp_path):
    assert run(tmp_path, *UNIFORM, "--runtimes", "openvino", "--no-peers") == 0
    cases = json.loads((tmp_path / "latency.json").read_text())["networks"]["squeezenet1_1"]["cases"]
    assert set(cases["openvino, float32, batch 1"]["variants"]) == {"dense", "compressed"}


def test_peers_use_the_flops_allowed(monkeypatch):
    class TuckerConv(nn.Sequential):
        """What tensorly-torch computes, as three convolutions."""

        @classmethod
        def from_conv(cls, conv, *, rank, factorization, implementation, decompose_weights):
            rank_out, rank_in, *window = rank
            assert (factorization, implementation, tuple(window)) == ("tucker", "factorized", conv.kernel_size)
            return cls(
                nn.Conv2d(conv.in_channels, rank_in, 1),
                nn.Conv2d(rank_in, rank_out, conv.kernel_size, conv.stride, conv.padding),
                nn.Conv2d(rank_out, conv.out_channels, 1),
            )

    monkeypatch.setitem(sys.modules, "tltorch", SimpleNamespace(FactorizedConv=TuckerConv))
    network = Network("squeezenet1_1", "uniform:0.25", 64, 10, seed=0)
    subject = Subject(
        network.dense, network.compressed, torch.zeros(1, 3, 64, 64), network.sizes["compressed"]["flops"]
    )
    flops = count_flops(tensorly_torch(subject), (3, 64, 64))
    assert 0.95 * subject.flops < flops <= subject.flops
    assert count_flops(PEERS["chain everywhere"](subject), (3, 64, 64)) == subject.flops


def measured(dense, deployed, error=0.0):
    return {"plan": "tucker", "input": [3, 8, 8], "dense": [dense, error], "deployed": [deployed, error]}


@pytest.mark.parametrize(
    ("times", "slower"),
    [
        (measured(1.0, 0.5), False),
        (measured(1.0, 1.01), False),
        (measured(1.0, 1.1), True),
        (measured(1.0, 1.1, error=0.05), False),
        (measured(1.0, 1.2, error=0.05), True),
    ],
)
def test_slower_means_beyond_noise(times, slower):
    assert is_slower(times) == slower


def test_tables_and_figures_from_data():
    latency = {"median": 2e-3, "p10": 1e-3, "p90": 3e-3, "batch_size": 4}
    data = {
        "settings": {"threads": 2, "image_size": 64, "rounds": 3},
        "provenance": {
            "machine": "a CPU",
            "device": "cpu",
            "git_revision": "abc",
            "versions": {"torch": "2", "onnxruntime": "1"},
        },
        "networks": {
            "resnet18": {
                "sizes": {"dense": {"params": 1000, "flops": 100}, "compressed": {"params": 50, "flops": 20}},
                "cases": {
                    "torch, float32, batch 4": {
                        "load_average": 0.1,
                        "variants": {"dense": latency, "compressed": {**latency, "median": 5e-4}},
                        "parts": {"dense": None, "compressed": 2},
                        "layers": {"conv1": measured(1e-3, 2e-3)},
                    }
                },
            }
        },
    }
    assert variant_rows(data)[2] == [
        "resnet18",
        "torch, float32, batch 4",
        "compressed",
        "5.0 %",
        "20.0 %",
        "2",
        "0.50",
        "1.00 to 3.00",
        "4.00x",
    ]
    assert variant_rows(data)[1][5] == "whole"
    assert layer_rows(data)[1][-4:] == ["1.000", "2.000", "0.50x", "yes"]
    assert "load average before each case at most 0.1" in notes(data)[0]
    assert list(figures(data)) == ["resnet18_batch4"]
