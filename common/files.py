"""Files that are whole, and folders that one process has to itself."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it takes the place of `path`, on failure it is removed.

    The temporary name keeps the suffix of `path`, because writers such as matplotlib choose the format by it.
    Missing parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp, and some writers, make private files; results are meant to be read like any other file.
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8, line ends as given) to `path` in one step."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


class SearchBusy(RuntimeError):
    """Another process is working in the same folder."""


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder for one process; the hold ends with the process, however it ends.

    Raises:
        SearchBusy: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise SearchBusy(f"another process is searching in {folder}: wait for it, or use another folder") from None
    try:
        yield
    finally:
        lock.release()
