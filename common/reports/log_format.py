"""The format of the text log: what its writer (`common.runlog`) and its reader (`common.logreader`) share.

One event a line, `time - process - LEVEL - message`; each evaluated candidate is an event `compressed_model:`
followed by a JSON block. Imports nothing heavy, so that the scripts which read logs start at once.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

CANDIDATE_MARKER = "compressed_model:"
EVENT = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) - (?P<process>.{1,120}?) - "
    r"(?P<level>[A-Z]{1,20}) - (?P<message>.*)"
)
BASELINE = re.compile(
    r"Baseline (?P<architecture>\S+): params=(?P<params>[^,]+), FLOPs=(?P<flops>[^,]+), "
    r"accuracy=(?P<accuracy>[^,]+), inference_time=(?P<inference_time>null|\S+s)$"
)
HEADER = re.compile(r"Header (?P<key>[\w.-]+): (?P<value>.*)$")
CHECKSUM = "checksum"
"""Key of a block that says what the others come to: a value that something altered on the way is found by it."""


CHECKSUMS_FOLLOW = "Every block from here on has a checksum"
"""Event after which a block without one has lost it."""


def checksum(record: Mapping[str, Any]) -> str:
    """What a record's members but the checksum come to, whatever their order."""
    rest = {key: value for key, value in record.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]


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


def format_value(value: Any) -> str:
    """A header value on one line: a string as it stands unless it would read back as something else, else JSON."""
    if isinstance(value, str) and value.isprintable() and value == value.strip() and parse_value(value) == value:
        return value
    return json.dumps(value, default=str)


def parse_value(text: str) -> Any:
    """The inverse of `format_value`."""
    try:
        value = json.loads(text, parse_constant=str)
        json.dumps(value, allow_nan=False)  # 1e999 is read as an infinity, and nothing could write it again
    except (ValueError, RecursionError):
        return text
    return value


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
    except (ValueError, RecursionError):
        return False
    return True


def decode_block(lines: list[tuple[int, str]]) -> tuple[dict[str, Any] | None, str, list[int]]:
    """A block's record, or None and what is wrong; and the numbers of the alien lines that had to be skipped.

    A line that a quote makes look like a member of the record is never skipped: a record without it would be
    another record.
    """
    try:
        return _load(lines), "", []
    except RecursionError:
        return None, "is nested too deeply", []
    except ValueError as error:
        problem = f"is not valid JSON ({error})"
    alien = {number for number, text in lines if not (is_member(text) or text.strip() in ("{", "}"))}
    if any('"' in text for number, text in lines if number in alien):
        return None, problem, []
    try:
        return _load([(number, text) for number, text in lines if number not in alien]), "", sorted(alien)
    except (ValueError, RecursionError):
        return None, problem, []


def _load(lines: list[tuple[int, str]]) -> dict[str, Any]:
    return json.loads("\n".join(text for _, text in lines), object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key stands twice")
    return record
