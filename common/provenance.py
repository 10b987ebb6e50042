"""Where a number comes from: machine, device, threads, library versions, git revision, seed."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

LIBRARIES = ("torch", "torchvision", "numpy", "tensorly", "optuna", "scikit-learn", "onnxruntime")

INSTRUCTIONS = {
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "bfloat16": ("avx512_bf16", "amx_bf16"),
    "AMX": ("amx_tile",),
}
"""What decides the speed of int8 and of bfloat16 -> what torch calls it."""


def provenance(device: str | torch.device, seed: int) -> dict:
    """Describe this process; every value can be written as JSON."""
    device = torch.device(device)
    return {
        "machine": machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
        "git_revision": git_revision(),
        "seed": seed,
        "command": command(),
    }


def command() -> str:
    """The command line of this process; a notebook's kernel has none that anyone could give again.

    Of a path from the root on, only its last name is kept: where a file lay on one machine helps nobody on another.
    """
    name = Path(sys.argv[0]).name
    if name.startswith("ipykernel"):
        return "notebook"
    return shlex.join([name, *(re.sub(r"(^|[=:])/(?:[^/]*/)*", r"\1", word) for word in sys.argv[1:])])


def machine() -> str:
    """The processor and its widest instructions: on rented machines one name stands for many processors."""
    return f"{cpu_model()} ({', '.join(instructions())})"


def instructions() -> list[str]:
    """The vector instructions that torch uses here, and those of INSTRUCTIONS that it finds."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 to 2.9 cannot tell
    more = [name for name, kinds in INSTRUCTIONS.items() if any(known.get(kind) for kind in kinds)]
    return [torch.backends.cpu.get_cpu_capability(), *more]


def cpu_model() -> str:
    """Name of the processor, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def git_revision() -> str:
    """Commit of this repository, with "-dirty" where tracked files were changed; "unknown" outside a checkout."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return "unknown"
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--match=", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
