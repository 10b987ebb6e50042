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

from .processor import processor

LIBRARIES = ("torch", "torchvision", "numpy", "tensorly", "optuna", "scikit-learn", "onnxruntime")


def provenance(device: str | torch.device, seed: int) -> dict:
    """Describe this process; every value can be written as JSON."""
    device = torch.device(device)
    return {
        "machine": processor(),
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
