"""Rows that a benchmark writes one by one: how its command ends and goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from common.files import SearchBusy, exclusive, write_text
from common.reports import plots


def command(
    out: Path,
    name: str,
    run: Callable[[], dict[str, Any]],
    table: Callable[[Mapping[str, Any]], str],
    figure: Callable[[Mapping[str, Any]], Figure] | None = None,
) -> int:
    """A command that goes on where it was: make the rows, then `name`.md of them, printed too, and `name`.png.

    Returns:
        The exit code: 0, 2 for bad input, 130 when interrupted.
    """
    try:
        with exclusive(out):
            content = run()
        text = table(content)
        write_text(out / f"{name}.md", text + "\n")
        if figure is not None:
            plots.save(figure(content), out / f"{name}.png")
        print(text)
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on where it was.", file=sys.stderr)
        return 130
    except (ValueError, OSError, SearchBusy) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def resumed(target: Path, fresh: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier run left in this file; `fresh` where there is none.

    Args:
        fresh: what a run begins with: its settings as "asked", its "provenance", and what is empty yet.

    Raises:
        ValueError: the rows are of other settings, or of another revision of the code.
    """
    if not target.exists():
        return dict(fresh)
    known = json.loads(target.read_text(encoding="utf-8"))
    if known["asked"] != fresh["asked"]:
        raise ValueError(f"{target} has rows of other settings, {known['asked']}: give another --out")
    if known["provenance"]["git_revision"] != fresh["provenance"]["git_revision"]:
        raise ValueError(f"{target} is of revision {known['provenance']['git_revision']}: give another --out")
    return known
