"""Reads the text log back, whatever a kill, an editor or another program did to it.

Every undamaged record is kept; each damaged one costs itself and a warning that names file and line.
"""

import ast
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..configuration import format_config_str
from .log_format import (
    BASELINE,
    CANDIDATE_MARKER,
    CHECKSUM,
    CHECKSUMS_FOLLOW,
    EVENT,
    HEADER,
    checksum,
    decode_block,
    is_member,
    parse_value,
    status_of,
    without_nonfinite,
)
from .schema import Baseline, ScoredBaseline, problem, record_problem

SCHEMA = "htd-run"
VERSION = 1
_FAILURE = re.compile(r"Error processing config: (?P<config>\{.*?\})\. Error: (?P<reason>.*)")
# What a run killed while it wrote its first line leaves: a date and time, perhaps the process and level after it.
_FIRST_LINE_CUT = re.compile(r"\d{1,4}(-[\d \-:,]*( - [^\n]*)?)?")
# A log is about one network on one data set; an item that changes in the middle means two runs share a file.
_FIXED_ITEMS = ("model", "dataset", "image_size")


@dataclass(frozen=True)
class ParsedLog:
    """What a log says.

    baseline: architecture, params, flops (multiply-accumulates per image), accuracy, inference_time (seconds per
        batch, or None). A resumed run measures the dense model again: the last line holds for the log, and a
        candidate measured in an earlier run keeps the time of its own run as `baseline_inference_time`.
    candidates: the records, in the order of the file. Of records with the same trial, seed, configuration and
        status the last one is kept, in the place of the first.
    failures: `config_str` and `reason` of the error lines in which earlier scripts noted a failed candidate.
    """

    path: Path
    header: dict[str, Any]
    baseline: dict[str, Any] | None
    candidates: list[dict[str, Any]]
    warnings: list[str]
    failures: list[dict[str, Any]] = field(default_factory=list)
    damaged: int = 0

    def counts(self) -> dict[str, int]:
        """tried = succeeded + failed, where succeeded = fine_tuned + screened; `damaged` blocks are beside these.

        A trial that was screened and then fine-tuned is one trial, of its last status.
        """
        last_status = {_trial_key(record, place): status_of(record) for place, record in enumerate(self.candidates)}
        by_status = Counter(last_status.values())
        failed = by_status["failed"] + len(self.failures)
        return {
            "tried": len(last_status) + len(self.failures),
            "succeeded": by_status["fine-tuned"] + by_status["screened"],
            "failed": failed,
            "fine_tuned": by_status["fine-tuned"],
            "screened": by_status["screened"],
            "damaged": self.damaged,
        }


def read_log(path: str | os.PathLike) -> ParsedLog:
    """Parses a log of this repository or of the earlier scripts in its style.

    Raises:
        OSError: the file cannot be read.
        ValueError: there is text in it, but nothing of a log.
    """
    path = Path(path)
    reader = _Reader(path)
    text = _text(path.read_bytes(), path)
    for number, line in _lines(text):
        reader.take(number, line)
    parsed = reader.finish()
    if text.strip() and not reader.events and not _FIRST_LINE_CUT.fullmatch(text.strip()):
        raise ValueError(f"{path} is no log: it has text, but no line of the form 'time - process - LEVEL - message'")
    return parsed


def to_json(parsed: ParsedLog) -> dict[str, Any]:
    """The log as the JSON document that `jsonify_logs.py` writes and `analyze_results.py` reads."""
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "source": parsed.path.name,
        "header": parsed.header,
        "baseline": parsed.baseline,
        "counts": parsed.counts(),
        "warnings": parsed.warnings,
        "candidates": parsed.candidates,
        "failures": parsed.failures,
    }


class _Reader:
    """Takes a log line by line. `block` holds the lines of the JSON block that is open, if one is."""

    def __init__(self, path: Path):
        self.path = path
        self.header: dict[str, Any] = {}
        self.baseline: dict[str, Any] | None = None
        self.records: dict[Any, dict[str, Any]] = {}
        self.times: dict[Any, float | None] = {}
        self.failures: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.damaged = 0
        self.checksums = False  # from where the log says so, or has one: what is older in a continued log has none
        self.events = 0  # lines and blocks that belong to a log
        self.marker_line: int | None = None
        self.block: list[tuple[int, str]] = []

    def take(self, number: int, text: str) -> None:
        if self.block and is_member(text):
            self.block.append((number, text))
        elif event := EVENT.search(text):
            if self.block and text[: event.start()].strip():
                self.block.append((number, text[: event.start()]))
            self._take_event(number, event["message"].rstrip())
        elif text.startswith("{"):
            self._abandon_block(keep_marker=True)
            self.block = [(number, text)]
            if text.rstrip().endswith("}"):
                self._close_block()
        elif self.block:
            self.block.append((number, text))
            if text.rstrip() == "}":
                self._close_block()

    def finish(self) -> ParsedLog:
        self._abandon_block()
        self._give_records_their_own_baseline_time()
        if self.baseline is None:
            self._warn(None, "no line with a Baseline")
        return ParsedLog(
            path=self.path,
            header=self.header,
            baseline=self.baseline,
            candidates=list(self.records.values()),
            warnings=self.warnings,
            failures=self.failures,
            damaged=self.damaged,
        )

    def _take_event(self, number: int, message: str) -> None:
        self.events += 1
        if message == CANDIDATE_MARKER:
            self._abandon_block()
            self.marker_line = number
        elif message == CHECKSUMS_FOLLOW:
            self.checksums = True
        elif match := HEADER.match(message):
            self._take_header(number, match["key"], parse_value(match["value"]))
        elif match := BASELINE.match(message):
            self._take_baseline(number, match.groupdict())
        elif message.startswith("Baseline "):
            self._warn(number, f"unreadable baseline {message!r}, ignored")
        elif match := _FAILURE.match(message):
            self._take_failure(match["config"], match["reason"])

    def _take_header(self, number: int, key: str, value: Any) -> None:
        if key in _FIXED_ITEMS and self.header.get(key, value) != value:
            self._warn(
                number, f"{key} changes from {self.header[key]} to {value}; write one log per network and data set"
            )
        self.header[key] = value

    def _take_baseline(self, number: int, fields: dict[str, str]) -> None:
        try:
            seconds = fields["inference_time"].removesuffix("s")
            baseline = {
                "architecture": fields["architecture"],
                "params": int(fields["params"]),
                "flops": int(fields["flops"]),
                "accuracy": float(fields["accuracy"]),
                "inference_time": None if seconds == "null" else float(seconds),
            }
        except ValueError:
            baseline = None
        wrong = (
            "has no numbers"
            if baseline is None
            else problem(ScoredBaseline if "metric" in self.header else Baseline, baseline)
        )
        if wrong is not None:
            self._warn(number, f"baseline with values out of range, it {wrong}; ignored")
        elif self.baseline is not None and baseline["architecture"] != self.baseline["architecture"]:
            self._warn(
                number,
                f"baseline of {baseline['architecture']} in a log of {self.baseline['architecture']}, ignored; "
                "write one log per network",
            )
        else:
            self.baseline = baseline

    def _take_failure(self, config: str, reason: str) -> None:
        try:
            config = format_config_str(ast.literal_eval(config))
        except (ValueError, SyntaxError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError):
            reason = f"{reason} (its configuration could not be read)"
        self.failures.append({"config_str": config, "reason": reason})

    def _abandon_block(self, keep_marker: bool = False) -> None:
        """The block that is open was cut off; so was a marker that no block followed, unless its block is at hand."""
        if self.block:
            self._damage(self.block[0][0], "is cut off")
        elif self.marker_line is not None and not keep_marker:
            self._damage(self.marker_line, "is missing after its marker")
        if self.block or not keep_marker:
            self.marker_line = None
        self.block = []

    def _close_block(self) -> None:
        lines, marked = self.block, self.marker_line is not None
        self.marker_line, self.block = None, []
        number = lines[0][0]
        record, wrong, aliens = decode_block(lines)
        if record is None and not marked and not any("config_str" in text for _, text in lines):
            return  # some other program's JSON
        if record is None:
            self._damage(number, wrong)
            return
        self.events += marked or "config_str" in record
        if CHECKSUM in record or self.checksums:
            self.checksums = True
            if record.get(CHECKSUM) != checksum(record):
                self._damage(number, "was altered: its checksum does not agree with its values")
                return
            del record[CHECKSUM]
        for alien in aliens:
            self._warn(alien, "alien line inside a candidate's block, skipped")
        clean = without_nonfinite(record)
        wrong = record_problem(clean)
        if wrong is not None:
            self._damage(number, wrong)
            return
        if clean != record:
            self._warn(number, f"candidate kept as failed: {clean['reason']}")
        key = (*_trial_key(clean, number), status_of(clean))
        self.records[key] = clean
        self.times[key] = None if self.baseline is None else self.baseline["inference_time"]

    def _give_records_their_own_baseline_time(self) -> None:
        for key, record in self.records.items():
            own = self.times[key]
            if own is not None and own != self.baseline["inference_time"]:
                record.setdefault("baseline_inference_time", own)

    def _damage(self, number: int, problem: str) -> None:
        self.damaged += 1
        self._warn(number, f"damaged candidate, left out: the block {problem}")

    def _warn(self, number: int | None, message: str) -> None:
        place = self.path.name if number is None else f"{self.path.name}:{number}"
        self.warnings.append(f"{place}: {message}")


_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def _text(raw: bytes, path: Path) -> str:
    """The text of a log, whatever wrote it: UTF-8, or the UTF-16 of PowerShell's `>`; without a terminal's colours.

    Raises:
        ValueError: UTF-16 that cannot be decoded.
    """
    encoding = "utf-8-sig"
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    elif raw[1:2] == b"\0" or raw[:1] == b"\0":
        encoding = "utf-16-le" if raw[1:2] == b"\0" else "utf-16-be"
    try:
        text = raw.decode(encoding, errors="replace")
    except UnicodeError as error:
        raise ValueError(f"{path} looks like UTF-16 and cannot be read as such: {error}") from error
    return _COLOURS.sub("", text)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines without line ends. A bare carriage return (a progress bar) divides a line too."""
    for number, line in enumerate(text.split("\n"), start=1):
        for part in line.removesuffix("\r").split("\r"):
            yield number, part


def _trial_key(record: Mapping[str, Any], place: int) -> tuple[Any, ...]:
    """What makes two records the same trial; a record without a trial number is its own."""
    if record.get("trial") is None:
        return ("place", place)
    return ("trial", record["trial"], record.get("seed"), record["config_str"])
