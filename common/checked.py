"""Settings that are right from the moment they exist: each field's type and range, said once, checked at the door."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model


def check_fields(settings: Any) -> None:
    """Check a frozen data class's fields against their annotations; whole numbers for floats become floats.

    A field is annotated with its type and `pydantic.Field(..., description="what is legal, in words")`.

    Raises:
        ValueError: one line that names the field, the value and what is legal.
    """
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    problem = None
    try:
        checked = _schema(type(settings)).model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = str(first["loc"][0])
        legal = _schema(type(settings)).model_fields[name].description
        legal = legal or first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        problem = f"{name} must be {legal}; got {values[name]!r}"
    if problem is not None:
        raise ValueError(problem)
    for name in values:
        object.__setattr__(settings, name, getattr(checked, name))


def from_text(value: Any) -> Any:
    """A list, or a number, that came as text, as papermill's `-p BUDGETS [0.3]` gives it; other things as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


@cache
def _schema(kind: type) -> type[BaseModel]:
    hints = get_type_hints(kind, include_extras=True)
    config = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
    fields: dict[str, Any] = {field.name: (hints[field.name], ...) for field in dataclasses.fields(kind)}
    return create_model(kind.__name__, __config__=config, **fields)
