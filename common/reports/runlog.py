"""The text log of a search: written here, read by `read_log`; design of the format in `common.logformat`.

with RunLog("logs/resnet18.log") as log:
    log.header({"model": "resnet18", "dataset": "mnist", "image_size": 32, "seed": 0})
    log.baseline("resnet18", params=11_181_642, flops=1_813_561_354, accuracy=0.9955, inference_time=0.072)
    log.candidate({"config_str": "conv1:(8, 16, 8)", "params": ..., ...})
parsed = read_log("logs/resnet18.log")
"""

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .log_format import CANDIDATE_MARKER, CHECKSUM, CHECKSUMS_FOLLOW, checksum, format_value, without_nonfinite
from .schema import record_problem


class RunLog:
    """Appends events and candidates to a log file; whatever a call has written survives a `kill -9`.

    With `append=False` an existing file is emptied first. A log whose last line was cut off is continued on a
    fresh line, so that what was lost is that one block and not the next.
    """

    def __init__(self, path: str | os.PathLike, *, append: bool = True, process_name: str = "MainProcess"):
        self.path = Path(path)
        self._process_name = process_name
        self._promised = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_off = append and _ends_in_mid_line(self.path)
        self._file = open(self.path, "ab" if append else "wb")  # noqa: SIM115 (open until close())
        if cut_off:
            self._write("\n")

    def info(self, message: str) -> None:
        self._event("INFO", message)

    def warning(self, message: str) -> None:
        self._event("WARNING", message)

    def header(self, items: Mapping[str, Any]) -> None:
        """One line per item: model, dataset, image_size, preset, seed, device, threads, versions, revision...

        Raises:
            ValueError: a key is not one word of letters, digits, `_`, `.` or `-`.
        """
        for key, value in items.items():
            if not re.fullmatch(r"[\w.-]+", key):
                legal = re.sub(r"[^\w.-]+", "_", key)
                raise ValueError(f"header key {key!r} is not one word; use e.g. {legal!r}")
            self._event("INFO", f"Header {key}: {format_value(value)}")

    def baseline(
        self, architecture: str, params: int, flops: int, accuracy: float, inference_time: float | None
    ) -> None:
        """The dense model: FLOPs are multiply-accumulates per image, accuracy is top-1 on test, time is seconds
        per batch (None where it was not measured).
        """
        seconds = "null" if inference_time is None else f"{float(inference_time)!r}s"
        self._event(
            "INFO",
            f"Baseline {architecture}: params={int(params)}, FLOPs={int(flops)}, "
            f"accuracy={float(accuracy)!r}, inference_time={seconds}",
            durable=True,
        )

    def candidate(self, record: Mapping[str, Any]) -> None:
        """One evaluated candidate, as a JSON block that is on disk when the call returns.

        Keys: config_str, params, flops, accuracy (None if only screened), inference_time (None if not measured),
        compression_rate, accepted; further keys (val_accuracy, status, reason, seed, trial, stage, budget,
        baseline_inference_time...) are kept, and a checksum is added. A NaN or an infinity is written as null and
        makes the record `failed`.

        Raises:
            ValueError: the record lacks a key or a value is out of range; only `config_str` is needed of a failed one.
        """
        clean = without_nonfinite({key: _plain(value) for key, value in record.items()})
        problem = record_problem(clean)
        if problem is not None:
            raise ValueError(f"candidate cannot be logged: it {problem}")
        clean = {key: value for key, value in clean.items() if key != CHECKSUM}
        clean[CHECKSUM] = checksum(json.loads(json.dumps(clean, allow_nan=False)))
        if not self._promised:
            self._event("INFO", CHECKSUMS_FOLLOW)
            self._promised = True
        members = [f"    {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in clean.items()]
        block = "{\n" + ",\n".join(members) + "\n}\n"
        self._write(self._line("INFO", CANDIDATE_MARKER) + block, durable=True)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _event(self, level: str, message: str, durable: bool = False) -> None:
        lines = str(message).splitlines() or [""]
        self._write("".join(self._line(level, line) for line in lines), durable)

    def _line(self, level: str, message: str) -> str:
        now = time.time()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        return f"{stamp},{int(now % 1 * 1000):03d} - {self._process_name} - {level} - {message}\n"

    def _write(self, text: str, durable: bool = False) -> None:
        """One write for the whole text: the buffer is empty before it and flushed after it.

        Raises:
            FileNotFoundError: somebody deleted the log; what is written would be lost.
        """
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise FileNotFoundError(f"{self.path} was deleted while it was being written: the run stops here")
        self._file.write(text.encode("utf-8", errors="backslashreplace"))
        self._file.flush()
        if durable:
            os.fsync(self._file.fileno())


def _ends_in_mid_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _plain(value: Any) -> Any:
    """numpy and torch scalars as the Python numbers that JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value
