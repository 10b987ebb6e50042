"""The notebooks are thin, share their code, and the smallest of them runs from its first cell to its last."""

import re
from pathlib import Path

import nbformat
import papermill
import pytest

from common.presets import preset

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(ROOT.glob("htd-*-res.ipynb"))
OWN = re.compile(r"^(MODEL|LAYER)\b.*$", re.MULTILINE)
SMALL = {
    "TRAIN_LIMIT": 96,
    "BASELINE_EPOCHS": 1,
    "CANDIDATES": 2,
    "BUDGETS": [0.7],  # AlexNet's classifier, left dense here, is 58 % of its FLOPs at this size
    "CALIBRATION_IMAGES": 48,
    "SCREEN_IMAGES": 32,
    "SENSITIVITY": "proxy",
    "FINETUNE_EPOCHS": 1,
    "TOLERANCE": 0.99,
    "LATENCY_BATCH": 2,
    "LAYERS": "convs",  # the eigenvectors of classifiers of 4096 features take a minute; unit tests have narrow ones
    "COST": "flops",
    "PROGRESS": False,
}
"""Knobs of the smallest run: every cell does its work, and none of it is worth reporting."""


def code_cells(path):
    """The code cells but for the one in which papermill notes what it was called with."""
    cells = nbformat.read(path, as_version=4).cells
    return [c for c in cells if c.cell_type == "code" and "injected-parameters" not in c.metadata.get("tags", [])]


def test_there_is_one_notebook_for_each_network():
    assert [path.name for path in NOTEBOOKS] == ["htd-alexnet-res.ipynb", "htd-resnet-res.ipynb", "htd-vgg-res.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_valid_and_thin(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    cells = code_cells(path)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1
    for cell in cells:
        assert not re.search(r"^\s*(def|class) ", cell.source, re.MULTILINE)
        assert not any(output.output_type == "error" for output in cell.outputs)


def test_notebooks_differ_in_their_parameters_and_words_only():
    sources = [[OWN.sub(r"\1", cell.source) for cell in code_cells(path)] for path in NOTEBOOKS]
    assert sources[0] == sources[1] == sources[2]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_knob_of_the_parameters_cell_is_used(path):
    sources = [cell.source for cell in code_cells(path)]
    last = next(i for i, c in enumerate(code_cells(path)) if "parameters" in c.metadata.get("tags", []))
    knobs = re.findall(r"^([A-Z_]+) =", sources[last], re.MULTILINE)
    assert len(knobs) > 20
    assert knobs == re.findall(r"^([A-Z_]+) =", "\n".join(sources), re.MULTILINE)
    assert knobs == list(papermill.inspect_notebook(path))  # what `papermill --help-notebook` lists
    for name in knobs:
        assert re.search(rf"\b{name}\b", "\n".join(sources[last + 1 :])), name


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_runs_end_to_end(path, tmp_path, monkeypatch):
    # One thread: a kernel beside the tests on two cores is slowed down several times over by a second one.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = set(ROOT.glob("finetuned/saved_models/*"))
    parameters = {"FOLDER": str(tmp_path / "logs"), "BASELINES": str(tmp_path / "baselines"), **SMALL}
    done = papermill.execute_notebook(path, tmp_path / "out.ipynb", parameters=parameters, cwd=ROOT, progress_bar=False)
    (table,) = (tmp_path / "logs").glob("*/table.md")
    family = path.stem.split("-")[1].capitalize()
    assert table.read_text().count(family) >= 3
    assert table.parent.name == preset("quick", family.lower()).name
    assert any("image/png" in output.get("data", {}) for cell in done.cells for output in cell.get("outputs", []))
    assert len(list((tmp_path / "logs").glob("*/candidate-*.onnx"))) == 1
    assert set(ROOT.glob("finetuned/saved_models/*")) == before


OWN_NETWORK = ROOT / "htd-own-network.ipynb"


def test_the_notebook_on_an_own_network_runs_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for cell in code_cells(OWN_NETWORK):
        assert not re.search(r"^\s*(def|class) ", cell.source, re.MULTILINE)
    small = {"FOLDER": str(tmp_path / "run"), "CANDIDATES": 2, "BUDGETS": [0.5], "EPOCHS": 1, "PROGRESS": False}
    out = tmp_path / "out.ipynb"
    done = papermill.execute_notebook(OWN_NETWORK, out, parameters=small, cwd=ROOT, progress_bar=False)
    said = "".join(output.get("text", "") for cell in done.cells for output in cell.get("outputs", []))
    assert said.count("right") == 3
    assert {path.suffix for path in (tmp_path / "run").glob("small.*")} == {".safetensors", ".onnx", ".pt2"}
