"""Where workers without a common file system leave what they have trained: any place that fsspec opens."""

from __future__ import annotations

import importlib
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Storage:
    """A place such as "s3://bucket/runs/mine" or "file:///mnt/all/mine"; one for each run.

    Raises:
        ValueError: nothing here opens such places.
    """

    url: str

    def __post_init__(self) -> None:
        self._opened()

    def fetch(self, stem: str, folder: Path) -> None:
        """Copy all files whose names begin with `stem` into the folder, those that are there already too."""
        files, place = self._opened()
        folder.mkdir(parents=True, exist_ok=True)
        for path in files.glob(f"{place}/{stem}.*"):
            name = path.rsplit("/", 1)[-1]
            files.get_file(path, str(folder / f".{name}"))
            (folder / f".{name}").replace(folder / name)

    def send(self, stem: str, folder: Path) -> None:
        """Make the place hold what the folder holds of `stem`: copied whole before it gets its name."""
        files, place = self._opened()
        files.makedirs(place, exist_ok=True)
        mine = [path for path in folder.glob(f"{stem}.*") if path.is_file()]
        for path in mine:
            partial = f"{place}/partial-{uuid.uuid4().hex}"
            files.put_file(str(path), partial)
            files.mv(partial, f"{place}/{path.name}")
        names = {path.name for path in mine}
        for path in files.glob(f"{place}/{stem}.*"):
            if path.rsplit("/", 1)[-1] not in names:
                files.rm_file(path)

    def _opened(self) -> tuple[Any, str]:
        try:
            files, place = importlib.import_module("fsspec.core").url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ValueError(f"storage {self.url!r} cannot be opened: {error}") from error
        return files, place.rstrip("/")
