"""A candidate's record: a dictionary with its `Configuration` under "config"; as text only in logs and files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..configuration import Configuration

Record = dict[str, Any]
"""`config`, `trial`, `budget`, `seed`, `status` and what was found; see `common.reports.log_format`."""


def stored(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as JSON holds it: the configuration as its text, under `config_str`."""
    return {"config_str": str(record["config"]), **{key: value for key, value in record.items() if key != "config"}}


def restored(content: Mapping[str, Any]) -> Record:
    """The inverse of `stored`.

    Raises:
        ValueError: the text is not a configuration.
    """
    rest = {key: value for key, value in content.items() if key != "config_str"}
    return {"config": Configuration.parse(content["config_str"]), **rest}
