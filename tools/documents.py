"""Documents whose measured parts are made anew: between two markers, such as `<!-- headline:begin -->` and
`<!-- headline:end -->`, stands what `fill` is told to write there; and the files under results/ that it is made from.

The parts: of runs `run_parts.py`, of benchmarks `benchmark_parts.py`, of commands `command_parts.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RUN_FOLDER = re.compile(r"(digits|mnist|fashion-mnist|cifar10)-\d+")
MARKER = re.compile(r"<!-- (?P<name>[\w-]+):begin -->\n(?P<text>.*?)<!-- (?P=name):end -->", re.DOTALL)
MEASURED = re.compile(r"\d[\d.,]*(?:x\b|\s?(?:%|points?\b|minutes?\b|seconds?\b|ms\b|MB\b))")
"""What a measured figure looks like. Outside the markers there may be none, unless the line says it is a knob."""


def fill(text: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """The text with each marked part made anew.

    Raises:
        ValueError: a marker names a part that nobody makes.
    """

    def made(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in parts:
            raise ValueError(f"no part is called {name!r}; there are {', '.join(parts)}")
        return f"<!-- {name}:begin -->\n{parts[name]().rstrip()}\n<!-- {name}:end -->"

    return MARKER.sub(made, text)


def untraced(text: str) -> list[str]:
    """The lines outside markers and code that state something like a measured figure."""
    prose = re.sub(r"```.*?```", "", MARKER.sub("", text), flags=re.DOTALL)
    prose = re.sub(r"`[^`\n]*`", "", prose)
    return [line.strip() for line in prose.splitlines() if MEASURED.search(line)]


def run_folders(results: Path) -> list[Path]:
    """`results/<dataset>-<size>`, the folders that hold runs."""
    return sorted(path for path in results.iterdir() if path.is_dir() and RUN_FOLDER.fullmatch(path.name))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file.

    Raises:
        ValueError: it is missing or damaged, with its path.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
