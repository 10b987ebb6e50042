"""Progress bars, for a reader at a terminal or in a notebook, and for a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

FILE_SECONDS = 10.0
"""Between two states of a bar that goes into a file: a run over night would fill it with tens of megabytes."""


def progress_bar(over: Iterable[Any] | None = None, *, shown: bool = True, **options: Any) -> tqdm:
    """A bar on standard error, whose state is written at most every FILE_SECONDS where nobody watches.

    Args:
        over: what is iterated over; None: the bar is moved by `update`.
        options: tqdm's own.
    """
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    pause = {} if watched else {"mininterval": FILE_SECONDS, "maxinterval": FILE_SECONDS}
    return tqdm(over, disable=not shown, **(pause | options))
