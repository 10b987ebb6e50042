"""What a log's records, a log's baseline and the JSON made from a log must look like: said once, checked everywhere.

Strict about types and ranges; what is wrong is said in one line that names the field, the value and what is legal.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationError

from ..checked import said, short
from ..configuration import parse_config_str

STATUSES = ("screened", "fine-tuned", "failed")
REQUIRED = ("config_str", "params", "flops", "accuracy", "inference_time", "compression_rate")
"""Keys that every record has, but for a failed one, which needs the configuration alone. `accepted` is the writer's own
verdict; a table decides anew with the tolerance it is asked for."""

LARGEST_COUNT = 10**15
"""No network has as many parameters, nor as many FLOPs an image."""


def _configuration(text: str) -> str:
    parse_config_str(text)
    return text


Configured = Annotated[str, AfterValidator(_configuration)]
Count = Annotated[StrictInt | StrictFloat, Field(gt=0, le=LARGEST_COUNT)]
Share = Annotated[StrictInt | StrictFloat, Field(ge=0, le=1)]
Seconds = Annotated[StrictInt | StrictFloat, Field(gt=0, le=1e9)]
Ratio = Annotated[StrictInt | StrictFloat, Field(gt=0, le=LARGEST_COUNT)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class FailedRecord(_Strict):
    """A candidate that could not be used."""

    config_str: Configured
    trial: str | int | None = None
    seed: int | None = None
    status: Literal["failed"]
    reason: str | None = None


class CandidateRecord(_Strict):
    """A screened or fine-tuned candidate; FLOPs are multiply-accumulates per image, times seconds per batch."""

    config_str: Configured
    params: Count
    flops: Annotated[StrictInt | StrictFloat, Field(ge=0, le=LARGEST_COUNT)]
    accuracy: Share | None
    inference_time: Seconds | None
    compression_rate: Ratio | None
    trial: str | int | None = None
    seed: int | None = None
    status: Literal["screened", "fine-tuned"] | None = None
    val_accuracy: Share | None = None
    baseline_inference_time: Seconds | None = None


class Baseline(_Strict):
    """The dense network's line."""

    architecture: str
    params: Count
    flops: Count
    accuracy: Annotated[StrictInt | StrictFloat, Field(gt=0, le=1)]
    inference_time: Seconds | None


class ScoredRecord(CandidateRecord):
    """A candidate judged by somebody's own measure, which may lie anywhere; `metric` names it."""

    metric: str
    accuracy: StrictInt | StrictFloat | None
    val_accuracy: StrictInt | StrictFloat | None = None


class ScoredBaseline(Baseline):
    """The dense network's line in a log whose header names a metric."""

    accuracy: StrictInt | StrictFloat


class Counts(_Strict):
    """How many candidates came to what."""

    tried: Annotated[int, Field(ge=0)]
    succeeded: Annotated[int, Field(ge=0)]
    failed: Annotated[int, Field(ge=0)]
    fine_tuned: Annotated[int, Field(ge=0)]
    screened: Annotated[int, Field(ge=0)]
    damaged: Annotated[int, Field(ge=0)]


class Header(_Strict):
    """Where a run comes from, as far as the log says; tables read these items."""

    model: str | None = None
    dataset: str | None = None
    image_size: int | None = None
    seed: int | None = None
    full_ranks: Configured | None = None


class RunDocument(_Strict):
    """The JSON that `jsonify_logs.py` writes and `analyze_results.py` reads; records are checked one by one."""

    header: Header
    baseline: Baseline | ScoredBaseline | None
    counts: Counts
    candidates: list[dict[str, Any]]


def problem(kind: type[BaseModel], content: Any) -> str | None:
    """What is wrong with a document of this kind, in one line, or None."""
    try:
        kind.model_validate(content)
    except ValidationError as error:
        return said(error)
    except RecursionError:
        return "is nested too deeply"
    return None


def record_problem(record: Any) -> str | None:
    """What is wrong with a candidate's record, in a few words, or None. A failed one needs only `config_str`."""
    if not isinstance(record, dict):
        return f"is a {type(record).__name__}, not a JSON object"
    if record.get("status") not in (None, *STATUSES):
        return f"has status {short(record['status'])}, expected one of {', '.join(STATUSES)}"
    if record.get("status") == "failed":
        return problem(FailedRecord, record)
    missing = [key for key in REQUIRED if key not in record]
    kind = ScoredRecord if "metric" in record else CandidateRecord
    return f"lacks {', '.join(missing)}" if missing else problem(kind, record)
