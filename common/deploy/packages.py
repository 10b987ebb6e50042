"""Packages of the extras, loaded when they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType


def package(name: str, extra: str) -> ModuleType:
    """A package, or a module of one, that an extra of ours installs.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = name.partition(".")[0]
        raise ValueError(
            f"{missing} is not installed: pip install 'htd-cnn-compression[{extra}]', or take another runtime"
        ) from error
