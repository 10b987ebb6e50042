"""Progress bars, for a reader at a terminal or in a notebook, and for a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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


OnBatch = Callable[[float], None]
"""What is called after a batch of a training, with the share of an epoch that the batch is."""


class EpochsBar:
    """A bar over the epochs of several trainings, which moves with every batch.

    A batch tells its share of an epoch, so that the time left can be told from the first one on. Trainings that tell
    nothing (elsewhere, or somebody's own) move it by whole epochs.
    """

    def __init__(self, epochs: int, description: str, *, shown: bool) -> None:
        form = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total_fmt} epochs [{elapsed}<{remaining}{postfix}]"
        self._bar = progress_bar(total=epochs, desc=description, bar_format=form, shown=shown)
        self._done = 0

    def __enter__(self) -> EpochsBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def batch(self, share: float) -> None:
        """A part of an epoch is done."""
        self._move(self._bar.n + share)

    def epochs(self, number: int = 1, said: str = "") -> None:
        """So many more are done as a whole, whatever was told of their batches."""
        self._done += number
        self._bar.set_postfix_str(said, refresh=False)
        self._move(self._done)

    def give_up(self, number: int) -> None:
        """So many will not be trained."""
        self._bar.total -= number
        self._bar.refresh()

    def _move(self, place: float) -> None:
        self._bar.update(min(place, self._bar.total) - self._bar.n)


@dataclass(frozen=True)
class Watchers:
    """Who follows a training batch by batch: a bar of its own, and whoever started it."""

    bar: tqdm
    on_batch: OnBatch | None = None

    def batch(self, share: float) -> None:
        """A batch is done, which is this share of an epoch."""
        self.bar.update()
        if self.on_batch is not None:
            self.on_batch(share)
