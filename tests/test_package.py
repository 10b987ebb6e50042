"""The wheel: built, installed elsewhere, and used from another folder, where nothing is called `common`."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import importlib.util, sys
import torch
from torch import nn
from htd import compress_network
from htd.models import load_compressed

assert importlib.util.find_spec("common") is None
torch.manual_seed(0)
def make():
    return nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 48, 3, 2, 1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4))
model = make().eval()
batches = [(torch.randn(16, 3, 16, 16), torch.randint(0, 4, (16,))) for _ in range(2)]
run = compress_network(model, batches, batches, budgets=(0.6,), candidates=2, epochs=1, tolerance=0.99, promote=1,
                       sensitivity="proxy", latency_batch=2, progress=False)
path = run.best().save("small.safetensors")
loaded, _ = load_compressed(path, model=make)
print("compressed", loaded(batches[0][0]).shape)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel's packages; what they need comes from this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = folder / "source"  # a copy: building leaves folders beside what it builds
    shutil.copytree(ROOT / "common", source / "common", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, capture_output=True)
    return target


def test_the_wheel_compresses_a_network_from_another_folder(installed, tmp_path):
    environment = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "compressed torch.Size([16, 4])" in done.stdout
    assert (tmp_path / "small.safetensors").stat().st_size > 1000
    assert not (installed / "common").exists()


def test_every_room_is_packed_and_the_requirements_are_the_packages_own():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    rooms = {"htd", *(f"htd.{path.parent.name}" for path in (ROOT / "common").glob("*/__init__.py"))}
    assert set(project["tool"]["setuptools"]["packages"]) == rooms
    wanted = {*project["project"]["dependencies"]}
    extras = project["project"]["optional-dependencies"]
    for name in extras.keys() - {"peers"}:  # other people's methods, which `make peers` installs
        wanted |= set(extras[name])
    lines = {line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"}
    assert lines == wanted
