"""Data sets and their splits."""

from .datasets import DATASETS, DataUnavailable, Dataset, load
from .splits import Augmentation, Batch, ImageFormat, Split

__all__ = [
    "Augmentation",
    "Batch",
    "DATASETS",
    "DataUnavailable",
    "Dataset",
    "ImageFormat",
    "Split",
    "load",
]
