"""From runs to logs, tables and figures; free of torch, and of matplotlib until a figure is drawn."""

from .log_reader import SCHEMA, VERSION, ParsedLog, read_log, to_json
from .runlog import RunLog
from .runs import load_runs
from .schema import record_problem
from .seeds import mean_and_deviation, seeds_behind
from .tables import (
    TIE_RULES,
    Candidate,
    Choice,
    Group,
    best_of,
    caption,
    choose,
    family,
    group_runs,
    is_accepted,
    pareto_front,
    render,
    standard,
)

__all__ = [
    "SCHEMA",
    "TIE_RULES",
    "VERSION",
    "Candidate",
    "Choice",
    "Group",
    "ParsedLog",
    "RunLog",
    "best_of",
    "caption",
    "choose",
    "family",
    "group_runs",
    "is_accepted",
    "load_runs",
    "mean_and_deviation",
    "pareto_front",
    "read_log",
    "record_problem",
    "render",
    "seeds_behind",
    "standard",
    "to_json",
]
