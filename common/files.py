"""Files that are whole, and folders that one process has to itself."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

PARTIAL = ".htd-partial-"
"""Start of the names of the folders in which files are written before they take their place: hidden, and folders, so
that no pattern for results matches what a killed process left."""

STALE_SECONDS = 24 * 3600
"""Age from which the leavings of another machine's process are removed."""


class SearchBusy(RuntimeError):
    """Another process is working in the same folder."""


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder for one process; the hold ends with the process, however it ends. It may be taken again inside.

    Raises:
        SearchBusy: another process holds it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / "lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise SearchBusy(f"another process is searching in {folder}: wait for it, or use another folder") from None
    try:
        remove_leavings(folder)
        yield
    finally:
        lock.release()


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; on success what is there is put on disk and takes the place of `path`, else it goes.

    The temporary name keeps that of `path`, because writers such as matplotlib choose the format by its suffix.
    Missing parent folders are made. A symbolic link stays one: the file that it points at is replaced.

    Raises:
        OSError: `path` is a folder, a pipe or a device, which a file must not replace.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is a {'folder' if path.is_dir() else 'device or pipe'}: give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / f"{PARTIAL}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    temporary = folder / path.name
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        # Some writers make private files; results are meant to be read like any other file.
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is damaged, with its path.
        OSError: it cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # neither text nor JSON
        raise ValueError(f"{path} is damaged ({error}): delete it, and what it held is made anew") from error


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8, line ends as given) to `path` in one step."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def remove_leavings(folder: Path) -> None:
    """Remove what killed processes left half written in a folder; what a living one is writing stays."""
    for left in folder.glob(f"{PARTIAL}*"):
        host, _, rest = left.name.removeprefix(PARTIAL).rpartition("-")[0].rpartition("-")
        try:
            ours = host == socket.gethostname()
            dead = not _alive(int(rest)) if ours else time.time() - left.stat().st_mtime > STALE_SECONDS
        except (ValueError, OSError):
            continue  # not of ours, or just gone
        if dead:
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
