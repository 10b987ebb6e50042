"""The format of the text log: what its writer (`common.runlog`) and its reader (`common.logreader`) share.

One event a line, `time - process - LEVEL - message`; each evaluated candidate is an event `compressed_model:`
followed by a JSON block. Imports nothing heavy, so that the scripts which read logs start at once.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from ..configuration import parse_config_str

CANDIDATE_MARKER = "compressed_model:"
EVENT = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) - (?P<process>.+?) - (?P<level>[A-Z]+) - (?P<message>.*)"
)
BASELINE = re.compile(
    r"Baseline (?P<architecture>\S+): params=(?P<params>[^,]+), FLOPs=(?P<flops>[^,]+), "
    r"accuracy=(?P<accuracy>[^,]+), inference_time=(?P<inference_time>null|\S+s)$"
)
HEADER = re.compile(r"Header (?P<key>[\w.-]+): (?P<value>.*)$")
STATUSES = ("screened", "fine-tuned", "failed")
# `accepted` is the writer's own verdict; a table decides anew with the tolerance it is asked for.
RECORD_KEYS = ("config_str", "params", "flops", "accuracy", "inference_time", "compression_rate")


def status_of(record: Mapping[str, Any]) -> str:
    """`screened`, `fine-tuned` or `failed`; records of earlier scripts carry no status and are told by accuracy."""
    if record.get("status") is not None:
        return record["status"]
    return "screened" if record.get("accuracy") is None else "fine-tuned"


def without_nonfinite(record: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which NaN and infinities are None; a record that had any is `failed`, with the keys as `reason`.

    JSON has no NaN, and a candidate whose numbers are not numbers must not look like a result.
    """
    clean = {key: _finite(value) for key, value in record.items()}
    spoilt = [key for key, value in record.items() if clean[key] != value]
    if spoilt:
        found = f"not finite: {', '.join(spoilt)}"
        earlier = clean.get("reason")
        clean |= {"status": "failed", "reason": f"{earlier}; {found}" if earlier else found}
    return clean


def record_problem(record: Any) -> str | None:
    """What is wrong with a candidate's record, in a few words, or None. A failed one needs only `config_str`."""
    if not isinstance(record, Mapping):
        return f"is a {type(record).__name__}, not a JSON object"
    config = record.get("config_str")
    if not isinstance(config, str):
        return "has no config_str"
    try:
        parse_config_str(config)
    except ValueError as error:
        return str(error)
    if record.get("status") not in (None, *STATUSES):
        return f"has status {record['status']!r}, expected one of {', '.join(STATUSES)}"
    if record.get("status") == "failed":
        return None
    missing = [key for key in RECORD_KEYS if key not in record]
    if missing:
        return f"lacks {', '.join(missing)}"
    return _bad_number(record)


def _bad_number(record: Mapping[str, Any]) -> str | None:
    legal = {
        "params": lambda value: _is_number(value) and value > 0,
        "flops": lambda value: _is_number(value) and value >= 0,
        "accuracy": lambda value: value is None or (_is_number(value) and 0 <= value <= 1),
        "val_accuracy": lambda value: value is None or (_is_number(value) and 0 <= value <= 1),
        "inference_time": lambda value: value is None or (_is_number(value) and value > 0),
        "baseline_inference_time": lambda value: value is None or (_is_number(value) and value > 0),
        "compression_rate": lambda value: value is None or (_is_number(value) and value > 0),
    }
    for key, is_legal in legal.items():
        if key in record and not is_legal(record[key]):
            return f"has {key} {record[key]!r}, out of its range"
    return None


def format_value(value: Any) -> str:
    """A header value on one line: a string as it stands unless it would read back as something else, else JSON."""
    if isinstance(value, str) and value.isprintable() and value == value.strip() and parse_value(value) == value:
        return value
    return json.dumps(value, default=str)


def parse_value(text: str) -> Any:
    """The inverse of `format_value`."""
    try:
        return json.loads(text, parse_constant=str)
    except json.JSONDecodeError:
        return text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite(value: Any) -> Any:
    """NaN and infinities as None, in nested lists and mappings too."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_finite(item) for item in value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def is_member(text: str) -> bool:
    """Whether a line is whole members of a JSON object, such as `"params": 12, "flops": 34,`.

    Asked before a line is searched for an event, because a reason may quote one.
    """
    stripped = text.strip()
    if not stripped.startswith('"'):
        return False
    try:
        json.loads("{" + stripped.removesuffix(",") + "}")
    except json.JSONDecodeError:
        return False
    return True


def decode_block(lines: list[tuple[int, str]]) -> tuple[dict[str, Any] | None, str, list[int]]:
    """A block's record, or None and what is wrong; and the numbers of the alien lines that had to be skipped.

    A line that a quote makes look like a member of the record is never skipped: a record without it would be
    another record.
    """
    try:
        return _load(lines), "", []
    except ValueError as error:
        problem = f"is not valid JSON ({error})"
    alien = {number for number, text in lines if not (is_member(text) or text.strip() in ("{", "}"))}
    if any('"' in text for number, text in lines if number in alien):
        return None, problem, []
    try:
        return _load([(number, text) for number, text in lines if number not in alien]), "", sorted(alien)
    except ValueError:
        return None, problem, []


def _load(lines: list[tuple[int, str]]) -> dict[str, Any]:
    return json.loads("\n".join(text for _, text in lines), object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key stands twice")
    return record
