"""The notebooks are thin, share their code, and the smallest of them runs from its first cell to its last."""

import re
from pathlib import Path

import nbformat
import papermill
import pytest

from common.presets import preset

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(ROOT.glob("htd-*-res.ipynb"))
OWN = re.compile(r'^(MODEL|LAYER) = ".*"$', re.MULTILINE)


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


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
    parameters, *others = sorted(code_cells(path), key=lambda cell: "parameters" not in cell.metadata.get("tags", []))
    used = "\n".join(cell.source for cell in others)
    for name in re.findall(r"^([A-Z_]+) =", parameters.source, re.MULTILINE):
        assert re.search(rf"\b{name}\b", used), name


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_runs_end_to_end(path, tmp_path):
    parameters = {"CANDIDATES": 2, "BUDGETS": [0.3], "FINETUNE_EPOCHS": 1, "FOLDER": str(tmp_path / "logs")}
    done = papermill.execute_notebook(path, tmp_path / "out.ipynb", parameters=parameters, cwd=ROOT, progress_bar=False)
    (table,) = (tmp_path / "logs").glob("*/table.md")
    family = path.stem.split("-")[1].capitalize()
    assert table.read_text().count(family) >= 3
    assert table.parent.name == preset("quick", family.lower()).name
    assert any("image/png" in output.get("data", {}) for cell in done.cells for output in cell.get("outputs", []))
