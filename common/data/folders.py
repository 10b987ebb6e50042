"""Image folders: PATH/train/<class>/* and PATH/test/<class>/*, in memory where they fit, else from disk."""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .splits import ImageFormat, Split

MEMORY_LIMIT = 2 * 2**30
"""Bytes of decoded images above which a split stays on disk."""

BATCHES_AHEAD = 2
"""Batches of a split on disk that are decoded while one is in use."""

HASHED_FILES = 256
"""Files whose bytes enter the digest of a split on disk, spread evenly over it; of the others, names and sizes."""

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class FolderSource:
    """Image files of one split, not read yet. labels: (N,) int64, one per file."""

    files: tuple[Path, ...]
    labels: np.ndarray
    memory_limit: int

    def rows(self, rows: np.ndarray) -> FolderSource:
        """Pick rows, in the order given."""
        return FolderSource(tuple(self.files[row] for row in rows), self.labels[rows], self.memory_limit)

    def open(self, image_format: ImageFormat, device: torch.device) -> Split:
        """Decode the images to the device, or leave them on disk when they take more than the memory limit."""
        labels = torch.from_numpy(self.labels).to(device)
        decoder = _Decoder(self.files, image_format)
        if len(self.files) * image_format.channels * math.prod(image_format.size) > self.memory_limit:
            return StreamedSplit(decoder, labels, image_format)
        with ThreadPoolExecutor() as pool:
            images = torch.stack(list(pool.map(decoder.__getitem__, range(len(decoder)))))
        return Split(images.to(device), labels, image_format)


class StreamedSplit(Split):
    """A split that stays on disk: same order, same batches as one in memory, decoded ahead by a few threads."""

    def __init__(self, decoder: _Decoder, labels: Tensor, image_format: ImageFormat):
        super().__init__(torch.empty(0, dtype=torch.uint8), labels, image_format)
        self._decoder = decoder

    def _add_images(self, digest: hashlib._Hash) -> None:
        files = self._decoder.files
        for path in files:
            digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size}\n".encode())
        for path in files[:: -(-len(files) // HASHED_FILES)]:
            digest.update(path.read_bytes())

    def _raw_batches(self, chunks: list[Tensor]) -> Iterator[Tensor]:
        # Threads, as Pillow decodes without the interpreter's lock: some runtimes' own threads do not survive a fork.
        pool = ThreadPoolExecutor(max(1, _workers(sum(len(chunk) for chunk in chunks))))
        waiting: deque[list[Future[Tensor]]] = deque()
        try:
            for chunk in chunks:
                waiting.append([pool.submit(self._decoder.__getitem__, row) for row in chunk.tolist()])
                if len(waiting) > BATCHES_AHEAD:
                    yield self._stacked(waiting.popleft())
            while waiting:
                yield self._stacked(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _stacked(self, decoding: list[Future[Tensor]]) -> Tensor:
        images = torch.stack([one.result() for one in decoding])
        images = images.pin_memory() if self.device.type == "cuda" else images
        return images.to(self.device, non_blocking=True)


@dataclass(frozen=True)
class _Decoder(torch.utils.data.Dataset):
    """Row -> (C, H, W) uint8: the middle of the image, as large as the format asks for."""

    files: tuple[Path, ...]
    image_format: ImageFormat

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Tensor:
        (height, width), mode = self.image_format.size, "L" if self.image_format.channels == 1 else "RGB"
        try:
            with Image.open(self.files[row]) as image:
                fitted = _middle(_eight_bits(image).convert(mode), (width, height), self.image_format.shorter_side)
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.files[row]} is not a readable image: {error}") from None
        pixels = torch.from_numpy(np.array(fitted))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def _middle(image: Image.Image, size: tuple[int, int], resize: int | None) -> Image.Image:
    """The image's middle at ``size``, (width, height): what is left of it once its shorter side is `resize` pixels."""
    if resize is None:
        return ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    scale = min(image.size) / resize
    kept = [side * scale for side in size]
    corner = [(whole - part) / 2 for whole, part in zip(image.size, kept, strict=True)]
    if min(corner) < 0:
        raise ValueError(f"at {resize} pixels on its shorter side it is smaller than {size[0]} x {size[1]}")
    box = (*corner, *(start + part for start, part in zip(corner, kept, strict=True)))
    return image.resize(size, Image.Resampling.BILINEAR, box=box)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image with 8 bits a channel: PIL would cut 16-bit shades off at 255.

    Raises:
        ValueError: pixels whose range the file does not say (32-bit integers, floating point).
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        shades = np.asarray(image, dtype=np.int64)
        return Image.fromarray(((shades + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {image.mode!r}, whose range is not known: save it with 8 or 16 bits")
    return image


def read_folder(path: Path, memory_limit: int) -> tuple[tuple[str, ...], FolderSource, FolderSource]:
    """List the images below PATH/train and PATH/test; the folders of train name the classes.

    Raises:
        ValueError: a folder is missing or empty, or train and test have different classes.
    """
    train_classes, test_classes = _class_names(path / "train"), _class_names(path / "test")
    if train_classes != test_classes:
        odd = ", ".join(sorted(set(train_classes) ^ set(test_classes)))
        raise ValueError(f"{path}: train and test need the same class folders; only one of them has {odd}")
    train, test = (_list_files(path / part, train_classes, memory_limit) for part in ("train", "test"))
    return train_classes, train, test


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: an image folder holds train/<class>/* and test/<class>/*")
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."))
    if not names:
        raise ValueError(f"{folder} is empty: it needs one folder of images per class")
    return names


def _list_files(folder: Path, classes: tuple[str, ...], memory_limit: int) -> FolderSource:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(file for file in (folder / name).rglob("*") if _is_image(file, folder))
        if not found:
            raise ValueError(f"{folder / name} has no image ({', '.join(SUFFIXES)})")
        files += found
        labels += [label] * len(found)
    return FolderSource(tuple(files), np.asarray(labels, dtype=np.int64), memory_limit)


def _is_image(file: Path, folder: Path) -> bool:
    """Whether this is a plain file with an image's suffix; hidden files and folders (`._a.png`) are not data."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix.lower() in SUFFIXES and not hidden and file.is_file()


def _workers(count: int) -> int:
    """Threads that decode: none of their own for a handful of images, where one is enough."""
    return 0 if count < 256 else min(8, os.cpu_count() or 1)
