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


def said(error: ValidationError) -> str:
    """The first of what a pydantic model found wrong, in one line: the field, what is legal, the value."""
    first = error.errors(include_url=False, include_context=False)[0]
    # Alternatives of a type (int or float, or None) are steps of the path too; fields and places are what helps.
    place = ".".join(str(step) for step in first["loc"] if "[" not in str(step) and step not in ("int", "float", "str"))
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    return f"has {place or 'a value'} {short(first['input'])}: {message}"


def short(value: Any) -> str:
    """A value for a message, of 60 characters at most."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python prints, or endless nesting
        return f"of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


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
