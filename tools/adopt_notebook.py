"""Puts an executed notebook's outputs into the notebook at the root: python tools/adopt_notebook.py EXECUTED...

The cell in which papermill notes what it was called with goes, and so do its notes of times and paths; a line at the
top says which command the outputs are of, in the executed notebook too, which was run from a root with outputs of its
own. Refuses a notebook that was not run to its end, or whose cells are not those of the one at the root.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where the other tools are found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.files import write_text
from tools.command_parts import UNTOLD_KNOBS

ROOT = Path(__file__).resolve().parent.parent
NOTE = "*The outputs below are of*"


def adopted(executed: Any, current: Any, name: str) -> Any:
    """The executed notebook as it stands at the root.

    Raises:
        ValueError: an error in it, a cell that was not run, or cells that differ from the current ones.
    """
    noted = executed.metadata.get("papermill", {})
    cells = [cell for cell in executed.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    if noted.get("exception") or any(
        cell.cell_type == "code" and (cell.execution_count is None or _failed(cell)) for cell in cells
    ):
        raise ValueError(f"{name} was not run to its end")
    for cell in cells:
        cell.source = without_note(cell.source)  # it was run from a root that had outputs of its own
    if [cell.source for cell in cells] != [without_note(cell.source) for cell in current.cells]:
        raise ValueError(f"{name} has other cells than the one at the root: run that one again")
    for cell, old in zip(cells, current.cells, strict=True):
        cell.id = old.id
        cell.metadata = nbformat.from_dict({"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {})
    cells[0].source = with_note(executed, name)
    metadata = {key: executed.metadata[key] for key in ("kernelspec",) if key in executed.metadata}
    made = nbformat.v4.new_notebook(cells=cells, metadata={**metadata, "language_info": {"name": "python"}})
    for number, cell in enumerate([cell for cell in cells if cell.cell_type == "code"], start=1):
        cell.execution_count = number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    nbformat.validate(made)
    return made


def with_note(executed: Any, name: str) -> str:
    """The first cell's text, with the line that says which command the outputs are of."""
    parameters = executed.metadata.get("papermill", {}).get("parameters", {})
    return f"{without_note(executed.cells[0].source)}\n\n{NOTE} `{command(name, parameters)}`."


def without_note(source: str) -> str:
    """A cell's text without the line that says which command its outputs are of."""
    return source.partition(f"\n\n{NOTE}")[0]


def command(name: str, parameters: dict[str, Any]) -> str:
    """The papermill command that was given, less the knobs that change nothing in the results."""
    told = {key: value for key, value in parameters.items() if key not in UNTOLD_KNOBS}
    words = [
        word
        for key, value in told.items()
        for word in (["-y", f"{key}: {value}"] if isinstance(value, list) else ["-p", key, str(value)])
    ]
    return shlex.join(["papermill", name, "out.ipynb", *words])


def _failed(cell: Any) -> bool:
    return any(output.output_type == "error" for output in cell.outputs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 when a notebook could not be taken."""
    parser = argparse.ArgumentParser(description="Put executed notebooks' outputs into those at the root.")
    parser.add_argument("executed", nargs="+", type=Path)
    parser.add_argument("--note-alone", action="store_true", help="the root's stays: say whose outputs EXECUTED holds")
    options = parser.parse_args(arguments)
    for path in options.executed:
        try:
            executed = nbformat.read(path, as_version=4)
            executed.cells[0].source = with_note(executed, path.name)
            told = nbformat.writes(executed) + "\n"
            if not options.note_alone:
                made = adopted(executed, nbformat.read(ROOT / path.name, as_version=4), path.name)
        except (OSError, ValueError, nbformat.ValidationError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        write_text(path, told)
        if options.note_alone:
            continue
        write_text(ROOT / path.name, nbformat.writes(made) + "\n")
        print(f"{path} -> {ROOT.name}/{path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
