"""Latency of dense and compressed networks, deployed alike and timed interleaved, in every runtime there is.

    python benchmarks/latency.py                                     # three networks, batch 1 and 16, 224 px
    python benchmarks/latency.py --models resnet18 --config uniform:0.25 --runtimes onnxruntime
    python benchmarks/latency.py --models vgg16 --config found.safetensors
    python benchmarks/latency.py --models vgg16 --config results/mnist-224/vgg16-mnist-224-cpu-seed0.json:0.0325-7

Writes latency.json after every measured case, and tables and plots from it. The same command goes on where an
interrupted one stopped. Weights are random unless a file is given: latency does not depend on them. Let nothing else
run at the time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `common` and `benchmarks` are found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.latency_peers import PEERS, Subject
from benchmarks.latency_report import write_report
from benchmarks.peers import versions
from common.compress import factorize
from common.configuration import Configuration
from common.cost import count_flops, count_params, latency_samples, summarise
from common.deploy import Deployed, Target, deploy, median_and_error
from common.files import write_text
from common.models import build_model, canonical_name, load_compressed
from common.provenance import provenance
from common.ranks import CostMeasure, build_menus, uniform
from common.search import MenuCosts, Policy, configuration, proxy_sensitivity

RUNTIMES: dict[str, dict[str, Any]] = {
    "torch": {},
    "compile": {"compile": True},
    "cuda-graph": {"cuda_graph": True},
    "onnxruntime": {"runtime": "onnxruntime"},
    "openvino": {"runtime": "openvino"},
}
"""Name -> what `deploy` is asked for."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

FLOPS_KEPT = {"alexnet": 0.20, "vgg16": 0.15}
"""Share of the dense FLOPs that the default configuration may keep; 0.20 for the other networks."""


@dataclass(frozen=True)
class Case:
    """One setting in which networks are compared."""

    runtime: str
    dtype: str
    batch: int

    def __str__(self) -> str:
        return f"{self.runtime}, {self.dtype}, batch {self.batch}"

    @property
    def in_torch(self) -> bool:
        """Other runtimes lay out feature maps by themselves, and take float32."""
        return RUNTIMES[self.runtime].get("runtime", "torch") == "torch"


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """The options of a benchmark on one network, which `Network.of` takes."""
    parser.add_argument("--model", default="resnet18", help="network by name (default: resnet18)")
    parser.add_argument("--config", help="as in latency.py: uniform:FRACTION, ranks, LOG.json:TRIAL, a file")
    parser.add_argument("--image-size", type=int, default=224, metavar="PIXELS")
    parser.add_argument("--num-classes", type=int, default=10, help="outputs of the network (default 10)")


class Network:
    """A dense network and its compressed copy, on the CPU."""

    @classmethod
    def of(cls, options: argparse.Namespace) -> Network:
        """As `add_network_options` says; random weights are of seed 0."""
        return cls(options.model, options.config, options.image_size, options.num_classes, seed=0)

    def __init__(self, name: str | None, config: str | None, image_size: int, num_classes: int, seed: int) -> None:
        """name: None where `config` is a file of save_compressed, which says it, as it does the number of classes."""
        self.image_size, self.num_classes, self.seed = image_size, num_classes, seed
        self.trained = config is not None and config.endswith(".safetensors")
        if self.trained:
            self.compressed, info = load_compressed(config)
            self.name = info["architecture"] if name is None else canonical_name(name)
            if info["architecture"] != self.name:
                raise ValueError(f"{config} holds a {info['architecture']}, but {self.name} was asked for")
            self.num_classes, self.config = info["num_classes"], str(info["config"])
        elif name is None:
            raise ValueError("--model is needed: only a file of save_compressed says which network it holds")
        else:
            self.name = canonical_name(name)
            factors = factorize(self.dense, input_shape=self.input_shape)
            chosen = _configuration(factors, config, FLOPS_KEPT.get(self.name, 0.20))
            self.compressed, self.config = factors.compress(chosen).eval(), str(chosen)

    @cached_property
    def dense(self) -> nn.Module:
        """Of random weights; `trained` says whether the compressed network's came from a file."""
        return build_model(self.name, self.num_classes, image_size=self.image_size, seed=self.seed).eval()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return 3, self.image_size, self.image_size

    @cached_property
    def sizes(self) -> dict[str, dict[str, int]]:
        """Parameters and multiply-accumulates for one image of both networks."""
        return {name: self.size_of(model) for name, model in (("dense", self.dense), ("compressed", self.compressed))}

    def size_of(self, model: nn.Module) -> dict[str, int]:
        return {"params": count_params(model), "flops": count_flops(model, self.input_shape)}

    def peers(self) -> Iterator[tuple[str, nn.Module | str]]:
        """Name -> the peer's network, or the reason why there is none."""
        example = torch.zeros(2, *self.input_shape)
        subject = Subject(self.dense, self.compressed, example, self.sizes["compressed"]["flops"])
        for name, make in PEERS.items():
            try:
                yield name, make(subject)
            except ImportError:
                yield name, "not installed"
            except Exception as error:  # a peer that fails must not end the run; the report says why
                yield name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _configuration(factors: Any, text: str | None, kept: float) -> dict:
    """`uniform:FRACTION`, a configuration as logs hold it, `LOG.json:TRIAL`, or by default the policy's mode within the
    FLOPs kept."""
    if text is not None and text.startswith("uniform:"):
        return uniform(factors, float(text.removeprefix("uniform:")))
    if text is not None and ".json:" in text:
        path, trial = text.rsplit(":", 1)
        records = json.loads(Path(path).read_text(encoding="utf-8"))["candidates"]
        found = [record["config_str"] for record in records if record["trial"] == trial]
        if not found:
            raise ValueError(f"{path} has no candidate {trial}")
        text = found[-1]
    if text is not None:
        return Configuration.parse(text)
    cost = CostMeasure(flops=1, params=1)
    menus = build_menus(factors, cost=cost)
    costs, sensitivity = MenuCosts.of(factors, menus, cost), proxy_sensitivity(menus)
    budget = kept
    while True:
        choice = Policy.solve(sensitivity, costs, max(budget, costs.least)).mode()
        config = configuration(menus, choice)
        if factors.flops(config) <= kept * factors.dense_flops or budget <= costs.least:
            return config
        budget *= 0.9


def measure_case(network: Network, case: Case, rounds: int, device: torch.device, peers: dict) -> dict[str, Any]:
    """Everything about one network in one case, as JSON: times of all variants, and of each layer."""
    dtype = DTYPES[case.dtype]
    example = torch.randn(case.batch, *network.input_shape, generator=torch.Generator().manual_seed(0))
    example = example.to(device=device, dtype=dtype)
    options = {**RUNTIMES[case.runtime], "dtype": dtype, "rounds": rounds}
    if case.in_torch:
        options["memory_format"] = "measure"

    deployed = {"dense": deploy(network.dense, example, **options)}
    deployed["compressed"] = deploy(network.compressed, example, **options)
    notes = {name: peer for name, peer in peers.items() if isinstance(peer, str)}
    for name in peers.keys() - notes.keys() if case.runtime != "compile" else ():
        try:
            deployed[name] = deploy(peers[name], example, **{**options, "plans": "keep"})
        except ValueError as error:
            notes[name] = str(error)
    samples = latency_samples({name: model.run for name, model in deployed.items()}, example, rounds=rounds)
    return {
        "variants": {name: asdict(summarise(values, case.batch)) for name, values in samples.items()},
        "notes": notes,
        "memory_format": {name: model.memory_format for name, model in deployed.items()},
        "parts": {name: model.part for name, model in deployed.items()},
        "predicted": deployed["compressed"].predicted_seconds,
        "plans": deployed["compressed"].plans,
        "layers": measure_layers(deployed["dense"], deployed["compressed"], case, example, rounds),
        "report": deployed["compressed"].report(),
    }


def measure_layers(
    dense: Deployed, compressed: Deployed, case: Case, example: Tensor, rounds: int
) -> dict[str, dict[str, Any]]:
    """Layer -> median seconds PER BATCH and its standard error, dense and deployed, interleaved and never compiled."""
    options = {"runtime": "torch", "compile": False, "cuda_graph": False, **RUNTIMES[case.runtime]}
    target = Target(**{**options, "compile": False}, threads=torch.get_num_threads())
    known: dict[str, dict[str, Any]] = {}
    layers = {}
    for name, choice in compressed.layers.items():
        pair = {"dense": dense.model.get_submodule(name), "deployed": compressed.model.get_submodule(name)}
        key = f"{pair}{choice.input_shape}"
        if key not in known:
            inputs = torch.randn(case.batch, *choice.input_shape, generator=torch.Generator().manual_seed(0))
            inputs = inputs.to(example)
            if inputs.ndim == 4 and compressed.memory_format == "channels_last":
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            runs = {kind: target.layer_run(module, inputs) for kind, module in pair.items()}
            samples = latency_samples(runs, inputs, rounds=rounds)
            known[key] = {kind: median_and_error(values) for kind, values in samples.items()}
        layers[name] = {"plan": choice.plan, "input": choice.input_shape, **known[key]}
    return layers


class Results:
    """The JSON file: read at the start, written after every case."""

    def __init__(self, folder: Path, settings: dict[str, Any], origin: dict[str, Any]) -> None:
        self.path = folder / "latency.json"
        self.data: dict[str, Any] = {"settings": settings, "provenance": origin, "networks": {}}
        if self.path.exists():
            known = json.loads(self.path.read_text(encoding="utf-8"))
            if known["settings"] != settings:
                raise ValueError(
                    f"{self.path} was measured with {known['settings']}, not {settings}: use another --out"
                )
            self.data["networks"] = known["networks"]

    def network(self, network: Network) -> dict[str, Any]:
        entry = {"config": network.config, "sizes": network.sizes, "cases": {}}
        return self.data["networks"].setdefault(network.name, entry)

    def has(self, model: str, cases: list[Case]) -> bool:
        done = self.data["networks"].get(canonical_name(model), {}).get("cases", {})
        return all(str(case) in done for case in cases)

    def save(self) -> None:
        write_text(self.path, json.dumps(self.data, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    device = torch.device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    settings = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "image_size": options.image_size,
        "num_classes": options.num_classes,
        "rounds": options.rounds,
        "config": options.config or "policy",
    }
    folder = Path(options.out)
    cases = [Case(r, d, b) for r in options.runtimes for d in options.dtypes for b in options.batches]
    cases = [case for case in cases if case.in_torch or case.dtype == "float32"]
    try:
        origin = provenance(device, options.seed) | ({"peers": versions()} if options.peers else {})
        results = Results(folder, settings, origin)
        for model in options.models:
            if results.has(model, cases):
                print(f"{model}: measured before, in {results.path}")
                continue
            _measure_network(model, options, cases, device, results)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(write_report(results.data, folder))
    return 0


def _measure_network(
    model: str, options: argparse.Namespace, cases: list[Case], device: torch.device, results: Results
) -> None:
    network = Network(model, options.config, options.image_size, options.num_classes, options.seed)
    entry = results.network(network)
    peers = dict(network.peers()) if options.peers else {}
    entry["sizes"] |= {name: network.size_of(peer) for name, peer in peers.items() if isinstance(peer, nn.Module)}
    for case in cases:
        if str(case) in entry["cases"]:
            continue
        start = time.perf_counter()
        load = {"load_average": os.getloadavg()[0]}
        try:
            entry["cases"][str(case)] = load | measure_case(network, case, options.rounds, device, peers)
        except ValueError as error:
            entry["cases"][str(case)] = load | {"failed": str(error)}
        results.save()
        print(f"{network.name}, {case}: {time.perf_counter() - start:.0f} s", flush=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", default=["resnet18", "alexnet", "vgg16"], help="networks by name")
    parser.add_argument(
        "--config",
        help="uniform:FRACTION, a configuration as logs hold it, LOG.json:TRIAL, or a file of save_compressed; by "
        "default the policy's choice at 20 %% of the dense FLOPs (VGG16: 15 %%)",
    )
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default 224)")
    parser.add_argument("--num-classes", type=int, default=10, help="outputs of the networks (default 10)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256] if on_gpu else [1, 16])
    parser.add_argument(
        "--runtimes",
        nargs="+",
        choices=RUNTIMES,
        default=["torch", "compile", "cuda-graph"] if on_gpu else ["torch", "compile", "onnxruntime"],
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES) if on_gpu else ["float32"])
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds of each measurement (default 15)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="dense and compressed only")
    parser.add_argument("--out", default="results/latency", help="folder (default results/latency)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
