"""Data sets by name: seeded, stratified train, validation and test splits of uint8 images on the device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision import datasets

from .folders import MEMORY_LIMIT, FolderSource, read_folder
from .splits import Augmentation, Batch, ImageFormat, Split, both_sides

__all__ = ["DATASETS", "Batch", "DataUnavailable", "Dataset", "Split", "load"]

DIGITS_TEST_SEED = 20120501
"""Digits has no test split of its own: this fixed seed makes one, the same in every run whatever its seed."""


class DataUnavailable(ValueError):
    """The files of a data set are not there and cannot be downloaded."""


@dataclass(frozen=True)
class Dataset:
    """Train, validation and test splits; `mean` and `std` are those of pixels in 0..1, one per channel."""

    name: str
    classes: tuple[str, ...]
    image_size: int | tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    val: Split
    test: Split

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def example_shape(self) -> tuple[int, int, int]:
        """Shape of one image as the network sees it: (channels, H, W)."""
        return (len(self.mean), *both_sides(self.image_size))

    @property
    def device(self) -> torch.device:
        return self.train.device


@dataclass(frozen=True)
class ArraySource:
    """Images in memory. images: (N, C, H, W) uint8, C 1 or 3 · labels: (N,) int64."""

    images: Tensor
    labels: np.ndarray

    def rows(self, rows: np.ndarray) -> ArraySource:
        """Pick rows, in the order given."""
        return ArraySource(self.images[torch.from_numpy(rows)], self.labels[rows])

    def open(self, image_format: ImageFormat, device: torch.device) -> Split:
        """Put the images on the device as a split, in gray where the format has one channel."""
        images = self.images
        if image_format.channels == 1 and images.shape[1] == 3:
            images = images.float().mean(dim=1, keepdim=True).round().to(torch.uint8)
        return Split(images.to(device), torch.from_numpy(self.labels).to(device), image_format)


@dataclass(frozen=True)
class RawData:
    """A data set before it is split: train and test sources, pixel statistics, augmentation that suits it."""

    classes: tuple[str, ...]
    train: ArraySource | FolderSource
    test: ArraySource | FolderSource
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation


def load(
    name: str,
    root: str | Path | None = None,
    *,
    image_size: int | tuple[int, int] = 32,
    seed: int = 0,
    val_fraction: float = 0.1,
    device: str | torch.device = "cpu",
    train_limit: int | None = None,
    augment: bool = True,
    channels: int = 3,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    resize: int | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> Dataset:
    """Load a data set and split it.

    Args:
        image_size: side of square images, or (height, width), in pixels.
        name: one of `DATASETS`, or "folder:PATH" with PATH/train/<class>/* and PATH/test/<class>/*.
        root: folder of torchvision's data sets; None takes $HTD_DATA, else "data".
        seed: of the validation part and of `train_limit`; the test split does not depend on it.
        val_fraction: share of the training images that becomes the validation split, stratified.
        train_limit: keep a stratified subset of this many training images (after validation was taken).
        augment: False makes `batches(augment=True)` leave the images as they are.
        channels: of the batches, 3 or 1: gray images are repeated, colour images averaged.
        mean, std: of pixels in 0..1, one per channel; None takes the data set's own (ImageNet's for folders).
        resize: of an image folder: pixels that an image's shorter side is scaled to before its middle is cut out, such
            as 256 for 224; None takes the largest middle of the right proportions.
        memory_limit: bytes; splits of an image folder above it are read from disk batch by batch.

    Raises:
        ValueError: unknown name, argument out of range, empty folder, class missing from a split.
        DataUnavailable: files are missing and could not be downloaded.
    """
    if min(both_sides(image_size)) < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if resize is not None and (not name.startswith("folder:") or resize < max(both_sides(image_size))):
        raise ValueError(f"resize is for image folders, and at least the image_size, {image_size}; got {resize}")
    raw = _read(name, Path(root or os.environ.get("HTD_DATA") or "data"), memory_limit)
    mean, std = (_as_channels(tuple(numbers), channels) for numbers in (mean or raw.mean, std or raw.std))
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ValueError(f"mean and std need {channels} numbers each, std above 0; got {mean} and {std}")
    image_format = ImageFormat(image_size, channels, mean, std, raw.augmentation if augment else Augmentation(), resize)

    rest, val_rows = _stratify(raw.train.labels, raw.classes, val_fraction, seed, "validation")
    train_rows = _limit(rest, raw.train.labels, raw.classes, train_limit, seed)
    sources = {"train": raw.train.rows(train_rows), "val": raw.train.rows(val_rows), "test": raw.test}
    for split_name, source in sources.items():
        _check_labels(source.labels, raw.classes, split_name)
    splits = {key: source.open(image_format, torch.device(device)) for key, source in sources.items()}
    return Dataset(name, raw.classes, image_size, mean, std, **splits)


def _as_channels(numbers: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Pixel statistics for gray (1) or colour (3) batches, from those of the source."""
    if len(numbers) == channels:
        return numbers
    return numbers * 3 if channels == 3 else (sum(numbers) / len(numbers),)


def _stratify(
    labels: np.ndarray, classes: tuple[str, ...], held_out: int | float, seed: int, purpose: str
) -> tuple[np.ndarray, np.ndarray]:
    """Split row numbers into (rest, held-out part), both in random order, each class in proportion.

    held_out: a share, or a number of images. The random order makes any first rows a fair sample.
    """
    _check_labels(labels, classes, "train")
    count = held_out if isinstance(held_out, int) else max(1, round(len(labels) * held_out))
    smallest = np.bincount(labels, minlength=len(classes)).argmin()
    if (labels == smallest).sum() < 2:
        raise ValueError(f"class {classes[smallest]!r} has 1 training image: it takes 2 to make a {purpose} split")
    if not len(classes) <= count <= len(labels) - len(classes):
        raise ValueError(
            f"a {purpose} split of {count} out of {len(labels)} images cannot hold all {len(classes)} classes "
            f"on both sides: take {len(classes)} to {len(labels) - len(classes)} images"
        )
    rest, held = train_test_split(
        np.arange(len(labels)), test_size=count, random_state=seed, stratify=labels, shuffle=True
    )
    return rest, held


def _limit(rows: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], count: int | None, seed: int) -> np.ndarray:
    """Keep a stratified subset of `count` rows; None keeps all."""
    if count is None or count == len(rows):
        return rows
    if not len(classes) <= count <= len(rows):
        raise ValueError(f"train_limit must lie in {len(classes)}..{len(rows)} images, got {count}")
    if len(rows) - count < len(classes):
        return rows[:count]
    _, kept = _stratify(labels[rows], classes, count, seed, "train_limit")
    return rows[kept]


def _check_labels(labels: np.ndarray, classes: tuple[str, ...], split_name: str) -> None:
    if len(labels) == 0:
        raise ValueError(f"the {split_name} split is empty")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(
            f"labels of the {split_name} split run from {labels.min()} to {labels.max()}; "
            f"{len(classes)} classes allow 0 to {len(classes) - 1}"
        )
    missing = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if len(missing):
        names = ", ".join(repr(classes[index]) for index in missing)
        raise ValueError(f"the {split_name} split has no image of class {names}")


def _read(name: str, root: Path, memory_limit: int) -> RawData:
    if name.startswith("folder:"):
        classes, train, test = read_folder(Path(name.removeprefix("folder:")), memory_limit)
        # ImageNet's statistics: photographs, and the ones that pretrained weights expect.
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        return RawData(classes, train, test, mean, std, Augmentation(0.08, flip=True, padding_mode="reflection"))
    if name not in _READERS:
        raise ValueError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)} or folder:PATH")
    return _READERS[name](root)


def _read_digits(root: Path) -> RawData:
    """scikit-learn's digits, 1797 images of 8 x 8: bundled, `root` is not read."""
    bundled = load_digits()
    images = torch.from_numpy((bundled.images * (255 / 16)).round().astype(np.uint8))[:, None]
    source = ArraySource(images, bundled.target.astype(np.int64))
    classes = tuple(str(digit) for digit in bundled.target_names)
    train_rows, test_rows = _stratify(source.labels, classes, 0.2, DIGITS_TEST_SEED, "test")
    # A shift of one of the eight pixels.
    augmentation = Augmentation(shift=0.125)
    return RawData(classes, source.rows(train_rows), source.rows(test_rows), (0.305,), (0.376,), augmentation)


def _read_mnist(root: Path) -> RawData:
    classes, train, test = _read_torchvision(datasets.MNIST, root, "MNIST/raw/{train,t10k}-*-ubyte")
    return RawData(classes, train, test, (0.1307,), (0.3081,), Augmentation(0.08, rotation=10, scale=0.08))


def _read_fashion(root: Path) -> RawData:
    classes, train, test = _read_torchvision(datasets.FashionMNIST, root, "FashionMNIST/raw/{train,t10k}-*-ubyte")
    return RawData(classes, train, test, (0.2860,), (0.3530,), Augmentation(0.08, flip=True))


def _read_cifar10(root: Path) -> RawData:
    classes, train, test = _read_torchvision(
        datasets.CIFAR10, root, "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}"
    )
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return RawData(classes, train, test, mean, std, Augmentation(0.125, flip=True, padding_mode="reflection"))


def _read_torchvision(dataset_class: type, root: Path, files: str) -> tuple[tuple[str, ...], ArraySource, ArraySource]:
    """Read one of torchvision's data sets; a download is tried only where files are missing."""

    def part(train: bool):
        try:
            return dataset_class(root, train=train, download=False)
        except RuntimeError:
            return dataset_class(root, train=train, download=True)

    try:
        train, test = part(True), part(False)
    except Exception as error:
        # Whatever fails on the way (network, rights, a damaged archive), the cure is the same.
        raise DataUnavailable(
            f"{dataset_class.__name__} is neither in {str(root)!r} nor could it be downloaded "
            f"({_one_line(error)}): put {files} there, or point $HTD_DATA at a folder that has them"
        ) from error
    return tuple(train.classes), _as_source(train), _as_source(test)


def _as_source(part) -> ArraySource:
    images = torch.as_tensor(part.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return ArraySource(images, np.asarray(part.targets, dtype=np.int64))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


_READERS = {
    "digits": _read_digits,
    "mnist": _read_mnist,
    "fashion-mnist": _read_fashion,
    "cifar10": _read_cifar10,
}
DATASETS = tuple(_READERS)
