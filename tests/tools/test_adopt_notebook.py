"""An executed notebook comes to the root without what papermill notes, and says which command it is of."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools.adopt_notebook import NOTE, ROOT, adopted, main, with_note, without_note


def notebooks(**changes):
    current = new_notebook(cells=[new_markdown_cell("# Title"), new_code_cell("A = 1"), new_code_cell("A")])
    executed = nbformat.from_dict(
        new_notebook(
            cells=[
                new_markdown_cell("# Title"),
                new_code_cell(
                    "A = 1", execution_count=1, metadata={"tags": ["parameters"], "papermill": {"duration": 1}}
                ),
                new_code_cell("A = 5", execution_count=2, metadata={"tags": ["injected-parameters"]}),
                new_code_cell("A", execution_count=3, outputs=[new_output("execute_result", {"text/plain": "5"})]),
            ],
            metadata={
                "papermill": {"parameters": {"A": 5, "B": [0.1], "PROGRESS": False}, "input_path": "/home/x.ipynb"}
            },
        )
    )
    executed.cells[3].update(changes)
    return executed, current


def test_outputs_stay_and_notes_go():
    executed, current = notebooks()
    made = adopted(executed, current, "x.ipynb")
    assert [without_note(cell.source) for cell in made.cells] == ["# Title", "A = 1", "A"]
    assert made.cells[2].outputs[0]["data"]["text/plain"] == "5"
    text = nbformat.writes(made)
    assert "/home" not in text
    assert "duration" not in text
    assert "papermill x.ipynb out.ipynb -p A 5 -y 'B: [0.1]'`" in made.cells[0].source
    assert [cell.execution_count for cell in made.cells[1:]] == [1, 2]
    again = adopted(notebooks()[0], made, "x.ipynb")
    assert again.cells[0].source == made.cells[0].source


def test_a_notebook_that_was_run_with_the_outputs_of_another_run_in_it_is_taken():
    executed, current = notebooks()
    noted = f"# Title\n\n{NOTE} `papermill x.ipynb out.ipynb -p A 9`."
    executed.cells[0].source = current.cells[0].source = noted
    made = adopted(executed, current, "x.ipynb")
    assert made.cells[0].source.count(NOTE) == 1
    assert "-p A 5" in made.cells[0].source


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"execution_count": None}, "not run to its end"),
        ({"outputs": [new_output("error", ename="E", evalue="", traceback=[])]}, "not run to its end"),
        ({"source": "B"}, "other cells"),
    ],
)
def test_unfinished_or_foreign_notebooks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        adopted(*notebooks(**changes), "x.ipynb")


def test_the_executed_notebook_itself_says_whose_outputs_it_holds(tmp_path):
    executed, _ = notebooks()
    executed.cells[0].source += f"\n\n{NOTE} `papermill x.ipynb out.ipynb -p A 9`."
    path = tmp_path / "x.ipynb"
    nbformat.write(executed, path)
    for _ in range(2):
        assert main([str(path), "--note-alone"]) == 0
        told = nbformat.read(path, as_version=4)
        assert told.cells[0].source.count(NOTE) == 1
        assert "-p A 5" in told.cells[0].source
    assert told.cells[1:] == executed.cells[1:]


def test_a_refused_notebook_stays_as_it_was(tmp_path, capsys):
    path = tmp_path / "htd-resnet-res.ipynb"
    nbformat.write(notebooks()[0], path)
    before = path.read_bytes()
    assert main([str(path)]) == 2
    assert "other cells" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_no_committed_notebook_is_said_to_be_of_another_command():
    paths = sorted((ROOT / "results").glob("*/htd-*.ipynb"))
    noted = [(path, nbformat.read(path, as_version=4)) for path in paths]
    noted = [(path, one) for path, one in noted if NOTE in one.cells[0].source]
    assert noted
    for path, executed in noted:
        assert executed.cells[0].source == with_note(executed, path.name)
