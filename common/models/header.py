"""What the header of a compressed network's file must look like: said once, checked before anything is built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..checked import said
from ..configuration import Configuration, KernelRanks, MatrixRanks
from .architectures import canonical_name
from .specs import Size

COMPRESSED_FORMAT = "htd-compressed-1"
"""Header field `format`; dense checkpoints carry another one."""

OWN_FORMAT = "htd-compressed-own-1"
"""The same of a network that is not torchvision's: loading needs its class, or a function that makes it."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _KernelRanks(_Strict):
    rank_in: Size
    rank_mid: Size
    rank_out: Size


class _MatrixRanks(_Strict):
    rank: Size


class _Own(_Strict):
    """A network of somebody's own."""

    config: dict[str, _KernelRanks | _MatrixRanks]
    modules: dict[str, Any]
    channels_last: list[str]
    metadata: dict[str, Any]


class _Known(_Own):
    """A network of torchvision's."""

    num_classes: Size
    input_shape: Annotated[list[Size], Field(min_length=3, max_length=3)]


def parsed(header: Mapping[str, str]) -> dict[str, Any]:
    """The header's fields: config as a `Configuration`, the modules' descriptions as they are; see `specs.build`.

    Raises:
        ValueError: a field that is missing, no JSON, of the wrong type or out of range; the message says which.
    """
    kinds = {COMPRESSED_FORMAT: _Known, OWN_FORMAT: _Own}
    kind = kinds.get(header.get("format", "none"))
    if kind is None:
        raise ValueError(f"format {COMPRESSED_FORMAT!r} was expected, {header.get('format', 'none')!r} found")
    names = [*kind.model_fields, *(["architecture"] if kind is _Known else [])]
    if missing := [name for name in names if name not in header]:
        raise ValueError(f"its header has no {', '.join(sorted(missing))}")
    problem = None
    try:
        content = kind.model_validate({name: json.loads(header[name]) for name in kind.model_fields})
    except RecursionError:
        problem = "is nested too deeply"
    except ValidationError as error:
        problem = said(error)
    if problem is not None:
        raise ValueError(f"its header {problem}")
    info = {name: getattr(content, name) for name in kind.model_fields}
    made = {_KernelRanks: KernelRanks, _MatrixRanks: MatrixRanks}
    info["config"] = Configuration({name: made[type(r)](**r.model_dump()) for name, r in content.config.items()})
    if kind is _Known:
        info["input_shape"] = tuple(content.input_shape)
        info["architecture"] = canonical_name(header["architecture"])
    return info
