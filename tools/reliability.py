"""What a run survives, counted: python tools/reliability.py [--out results/reliability.json]

Damages logs, JSON and model files from seeds, kills runs at random moments and lets files grow no further; then counts
tracebacks, intact records that were lost, and anything taken for right that differs. All of these must be 0.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `common` and the two log scripts are found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import analyze_results
from common import compress_network
from common.compress import factorize
from common.files import write_text
from common.models import CheckpointError, load_compressed, save_compressed
from common.provenance import provenance
from common.ranks import uniform
from common.reports import RunLog, read_log, to_json

POISON = (b"1e999", b"9" * 5000, b"[" * 3000, b"NaN", b"\x00", b"\xff\xfe", b'"', b"}\n", b"{\n", b"\x1b[31m", b"-1")
NONE_WANTED = ("tracebacks", "intact records lost", "altered and accepted", "differing after a kill")


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content after one to three accidents: cuts, flips, repeats, and what programs and people write into files."""
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(content) + 1)
        length = chance.choice((1, 2, 5, 20, 200))
        kind = chance.randrange(7)
        if kind == 0:
            content = content[:place]
        elif kind == 1:
            content = content[:place] + content[place + length :]
        elif kind == 2 and place < len(content):
            flipped = content[place] ^ (1 << chance.randrange(8))
            content = content[:place] + bytes([flipped]) + content[place + 1 :]
        elif kind == 3:
            content = content[:place] + chance.choice(POISON) + content[place:]
        elif kind == 4:
            content = content[:place] + content[place : place + length] + content[place:]
        elif kind == 5:
            content = content[:place] + bytes(chance.randrange(256) for _ in range(length)) + content[place + length :]
        else:
            digits = [at for at, byte in enumerate(content) if 48 <= byte <= 57]
            if digits:
                at = chance.choice(digits)
                content = content[:at] + str(chance.randrange(10)).encode() + content[at + 1 :]
        content = content or b" "
    return content


def sample_log(path: Path) -> dict[str, bytes]:
    """A log of six candidates; trial -> the bytes of its block."""
    with RunLog(path) as log:
        log.header({"model": "net", "dataset": "own", "image_size": 32, "seed": 0})
        log.baseline("net", 1000, 10_000, 0.9, 0.05)
        for number in range(6):
            record: dict[str, Any] = {
                "config_str": f"a:({number + 1}, 2, 3), fc:(4)",
                "trial": f"0.3-{number}",
                "seed": 0,
            }
            record |= {"params": 500 - number, "flops": 3000 + number, "accuracy": 0.88, "inference_time": 0.02}
            log.candidate({**record, "compression_rate": 2.0, "accepted": True, "status": "fine-tuned"})
    blocks = path.read_bytes().split(b"compressed_model:\n")[1:]
    return {f"0.3-{number}": block[: block.index(b"\n}\n") + 3] for number, block in enumerate(blocks)}


def damaged_logs(count: int, seed: int = 0) -> Counter[str]:
    """Read `count` damaged logs."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.log"
        blocks = sample_log(path)
        original, known = path.read_bytes(), {one["trial"]: one for one in read_log(path).candidates}
        for number in range(count):
            content = damaged(original, random.Random(f"log {seed} {number}"))
            path.write_bytes(content)
            found["logs"] += 1
            try:
                records = read_log(path).candidates
            except ValueError:
                found["refused"] += 1
                records = []
            except Exception as error:
                found["tracebacks"] += 1
                print(f"log {number}: {error!r}", file=sys.stderr)
                continue
            read = {json.dumps(one, sort_keys=True) for one in records}
            for trial, block in blocks.items():
                # Intact means: every byte there, on lines of its own behind its marker.
                if b"compressed_model:\n" + block in content:
                    found["intact records"] += 1
                    found["intact records lost"] += json.dumps(known[trial], sort_keys=True) not in read
            wanted = {json.dumps(one, sort_keys=True) for one in known.values()}
            found["altered and accepted"] += len(read - wanted)
    return found


def damaged_json(count: int, seed: int = 0) -> Counter[str]:
    """Give `count` damaged JSON files to analyze_results.py."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        log, path = Path(folder) / "run.log", Path(folder) / "run.json"
        sample_log(log)
        original = json.dumps(to_json(read_log(log)), indent=1).encode()
        for number in range(count):
            path.write_bytes(damaged(original, random.Random(f"json {seed} {number}")))
            found["JSON files"] += 1
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                try:
                    code = analyze_results.main([str(path), "--out", folder, "--no-plots"])
                except Exception as error:
                    found["tracebacks"] += 1
                    print(f"JSON {number}: {error!r}", file=sys.__stderr__)
                    continue
            found["refused"] += code != 0
    return found


def small_network() -> nn.Module:
    """What is searched and saved here."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 40, 3, 2, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 4),
        ).eval()  # fmt: skip


def damaged_models(count: int, seed: int = 0) -> Counter[str]:
    """Load `count` damaged model files."""
    found: Counter[str] = Counter()
    dense = small_network()
    factors = factorize(dense, input_shape=(3, 16, 16))
    network = factors.compress(uniform(factors, 0.4))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        save_compressed(network, path, dense=dense)
        original = path.read_bytes()
        expected = network.state_dict()
        for number in range(count):
            path.write_bytes(damaged(original, random.Random(f"model {seed} {number}")))
            found["model files"] += 1
            try:
                loaded, _ = load_compressed(path, model=small_network)
            except CheckpointError as error:
                found["refused"] += 1
                found["tracebacks"] += path.name not in str(error)
            except Exception as error:
                found["tracebacks"] += 1
                print(f"model {number}: {error!r}", file=sys.stderr)
            else:
                state = loaded.state_dict()
                found["altered and accepted"] += not all(torch.equal(state[name], expected[name]) for name in expected)
    return found


def searched(folder: str, **more: Any) -> None:
    """A small run from its beginning, or from where it was left; more: knobs of `compress_network`."""
    torch.set_num_threads(1)
    batches = []
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(24, 3, 16, 16, generator=generator)
        batches.append((images, torch.randint(0, 4, (24,), generator=generator)))
    knobs = {
        "candidates": 6,
        "promote": 1,
        "latency_batch": 2,
        "runtime": "torch",
        "tolerance": 0.99,
        "progress": False,
        **more,
    }
    compress_network(small_network(), batches, batches, folder=folder, budgets=(0.6,), epochs=2, **knobs).close()


def outcome(folder: Path) -> list[Any]:
    """What a finished run's log says, less what a clock says."""
    clocked = ("seconds", "inference_time", "baseline_inference_time", "finetune_seconds")
    (log,) = folder.glob("*.log")
    records = read_log(log).candidates
    plain = [{key: value for key, value in one.items() if key not in clocked} for one in records]
    return sorted(plain, key=lambda one: (one["trial"], one["status"]))


def killed_runs(count: int, seed: int = 0, limit: Callable[[random.Random], None] | None = None) -> Counter[str]:
    """Kill `count` runs at random moments, each as often as it takes, and compare what comes of them."""
    found: Counter[str] = Counter()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as base:
        started = time.perf_counter()
        searched(str(Path(base) / "whole"))
        whole, duration = outcome(Path(base) / "whole"), time.perf_counter() - started
        for number in range(count):
            chance = random.Random(f"kill {seed} {number}")
            folder = Path(base) / str(number)
            for _ in range(4):
                process = context.Process(target=searched, args=(str(folder),))
                process.start()
                process.join(chance.uniform(0.05, 0.8) * duration)
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                    found["kills"] += 1
                process.join()
            searched(str(folder))
            found["runs killed"] += 1
            found["differing after a kill"] += outcome(folder) != whole
            left = list(folder.rglob(".htd-partial-*"))
            found["temporary files left"] += len(left)
    return found


def full_disks(count: int, seed: int = 0) -> Counter[str]:
    """Let files of `count` runs grow no further than some size, then go on without that."""
    found: Counter[str] = Counter()
    context = multiprocessing.get_context("fork")

    def limited(folder: str, size: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error, as on a full disk, and no signal
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            searched(folder)
        except Exception:
            os._exit(3)

    with tempfile.TemporaryDirectory() as base:
        searched(str(Path(base) / "whole"))
        whole = outcome(Path(base) / "whole")
        for number in range(count):
            folder = Path(base) / str(number)
            size = int(10 ** random.Random(f"disk {seed} {number}").uniform(3, 5.3))
            process = context.Process(target=limited, args=(str(folder), size))
            process.start()
            process.join()
            found["full disks"] += 1
            searched(str(folder))
            found["differing after a full disk"] += outcome(folder) != whole
    return found


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0; 1 where something was lost, altered or not caught."""
    parser = argparse.ArgumentParser(description="Damage files and kill runs, and count what is lost.")
    parser.add_argument("--logs", type=int, default=1000)
    parser.add_argument("--json", type=int, default=500)
    parser.add_argument("--models", type=int, default=500)
    parser.add_argument("--runs", type=int, default=12, help="killed up to four times each")
    parser.add_argument("--disks", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/reliability.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    counts = {
        "damaged logs": damaged_logs(options.logs, options.seed),
        "damaged JSON": damaged_json(options.json, options.seed),
        "damaged model files": damaged_models(options.models, options.seed),
        "killed runs": killed_runs(options.runs, options.seed),
        "full disks": full_disks(options.disks, options.seed),
    }
    content = {"counts": counts, "provenance": provenance("cpu", options.seed)}
    write_text(options.out, json.dumps(content, indent=1) + "\n")
    for name, found in counts.items():
        print(f"{name}: {dict(found)}")
    bad = sum(found[key] for found in counts.values() for key in (*NONE_WANTED, "differing after a full disk"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
