"""Data sets and their splits."""

from .datasets import DATASETS, Dataset, DataUnavailable, load
from .splits import Augmentation, Batch, ImageFormat, Split

__all__ = [
    "DATASETS",
    "Augmentation",
    "Batch",
    "DataUnavailable",
    "Dataset",
    "ImageFormat",
    "Split",
    "load",
]
