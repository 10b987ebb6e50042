"""From the JSON of logs to the table of results: which candidates are acceptable, and which is best at what.

The rule `is_accepted` is the only one: a search uses it to accept, a table to select. What is chosen is chosen by
validation accuracy, and test accuracy is reported; only logs that do not tell the dense network's validation accuracy,
as those of earlier scripts, leave nothing but test to choose by.
"""

import csv
import html
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .log_format import status_of

COLUMNS = (
    "Model",
    "Criterion",
    "Params Red.",
    "FLOPs Red.",
    "Accuracy",
    "Speedup",
    "Parameters",
    "FLOPs",
    "Comp. Rate",
)
NONE_ACCEPTED = "none within tolerance"
TIE_RULES = ("first", "accuracy")
_MEASURES = {
    (False, False): "test accuracy",
    (True, True): "validation accuracy (of test is what is shown)",
    (
        False,
        True,
    ): "validation accuracy (of test is what is shown), or test accuracy where a log has no other of the dense "
    "network,",
}
"""What was chosen by, in words: whether the least and the most of the candidates of a table have it from validation."""
# Accuracies are ratios of counts, printed and parsed: a difference this small is rounding, not a candidate.
_ROUNDING = 1e-9


def is_accepted(accuracy: float | None, baseline_accuracy: float, tolerance: float) -> bool:
    """The acceptance rule: accuracy (None: not known) at least baseline - tolerance, all as fractions."""
    return accuracy is not None and accuracy >= baseline_accuracy - tolerance - _ROUNDING


def standard(baseline: Mapping[str, Any]) -> float:
    """The accuracy that losses are counted from: the better of the dense network's and, where a run has it, the same
    network's trained on as long as the candidates."""
    return max(baseline["accuracy"], baseline.get("control_accuracy", 0.0))


@dataclass(frozen=True)
class Candidate:
    """One tested candidate beside the dense model of its own log. FLOPs are multiply-accumulates per image."""

    record: Mapping[str, Any]
    baseline: Mapping[str, Any]

    @property
    def params_kept(self) -> float:
        return self.record["params"] / self.baseline["params"]

    @property
    def flops_kept(self) -> float:
        return self.record["flops"] / self.baseline["flops"]

    @property
    def speedup(self) -> float | None:
        """Dense time / compressed time of the same run, None where one of them was not measured."""
        dense = self.record.get("baseline_inference_time") or self.baseline["inference_time"]
        own = self.record.get("inference_time")
        return dense / own if dense and own else None

    @property
    def compression_rate(self) -> float:
        return self.record.get("compression_rate") or 1 / self.params_kept

    @property
    def chosen_on_validation(self) -> bool:
        """Whether its log has what it takes: validation accuracy of the candidate and of the dense network."""
        return self.record.get("val_accuracy") is not None and "val_accuracy" in self.baseline

    def is_accepted(self, tolerance: float) -> bool:
        if status_of(self.record) != "fine-tuned":
            return False
        if self.chosen_on_validation:
            return is_accepted(self.record["val_accuracy"], self.baseline["val_accuracy"], tolerance)
        return is_accepted(self.record["accuracy"], standard(self.baseline), tolerance)


@dataclass(frozen=True)
class Group:
    """The runs of one model family on one data set at one image size; `label` names it in tables and plots."""

    label: str
    runs: tuple[Mapping[str, Any], ...]

    def records(self) -> list[Mapping[str, Any]]:
        return [record for run in self.runs for record in run["candidates"]]

    def tested(self) -> list[Candidate]:
        """The fine-tuned candidates, in the order of the logs."""
        return [
            Candidate(record, run["baseline"])
            for run in self.runs
            for record in run["candidates"]
            if status_of(record) == "fine-tuned" and record.get("accuracy") is not None
        ]

    def counts(self) -> str:
        total = {key: sum(run["counts"][key] for run in self.runs) for key in self.runs[0]["counts"]}
        damaged = f", {total['damaged']} damaged blocks left out" if total["damaged"] else ""
        return (
            f"{self.label}: {total['tried']} tried, {total['fine_tuned']} fine-tuned, "
            f"{total['screened']} screened only, {total['failed']} failed{damaged}"
        )


@dataclass(frozen=True)
class Choice:
    """The best candidate of a group by one criterion, or None if no candidate is acceptable and measured."""

    group: Group
    criterion: str
    best: Candidate | None

    def cells(self) -> tuple[str, ...]:
        if self.best is None:
            return (self.group.label, self.criterion, NONE_ACCEPTED, *("-" for _ in COLUMNS[3:]))
        record, speedup = self.best.record, self.best.speedup
        return (
            self.group.label,
            self.criterion,
            f"{1 - self.best.params_kept:.2%}",
            f"{1 - self.best.flops_kept:.2%}",
            f"{record['accuracy']:.3f}",
            "not measured" if speedup is None else f"{speedup:.2f}x",
            f"{record['params']:,}",
            f"{record['flops']:,}",
            f"{self.best.compression_rate:.2f}",
        )


CRITERIA: Mapping[str, Callable[[Candidate], float | None]] = {
    "Best Params Red.": lambda candidate: candidate.params_kept,
    "Best FLOPs Red.": lambda candidate: candidate.flops_kept,
    "Best Speedup": lambda candidate: None if candidate.speedup is None else 1 / candidate.speedup,
}


def family(architecture: str) -> str:
    """`Resnet` of `resnet` and `resnet18`, `Vgg` of `vgg16_bn`: the letters before the first digit or sign."""
    match = re.match(r"[a-z]+", architecture.lower())
    return match.group().capitalize() if match else architecture


def group_runs(runs: Iterable[Mapping[str, Any]]) -> list[Group]:
    """Runs of one family, data set and image size together, in the order of their first run.

    The label is the family's name; where several data sets or sizes (or a log that names none) meet in one table,
    it says which.
    """
    members: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for run in runs:
        members[family(run["baseline"]["architecture"]), _setting(run["header"])].append(run)
    several = len({setting for _, setting in members}) > 1
    return [
        Group(f"{name} ({setting})" if several and setting else name, tuple(group))
        for (name, setting), group in members.items()
    ]


def choose(group: Group, tolerance: float, ties: str = "first") -> list[Choice]:
    """For each criterion the group's best candidate among those that `is_accepted` accepts.

    Ties go to the earlier place in the log, as in the earlier scripts' published tables; with `ties="accuracy"` to
    higher accuracy, then to shorter inference time, and only then to the earlier place.

    Raises:
        ValueError: `ties` is neither.
    """
    if ties not in TIE_RULES:
        raise ValueError(f"unknown rule for ties {ties!r}; legal are {', '.join(TIE_RULES)}")
    accepted = [candidate for candidate in group.tested() if candidate.is_accepted(tolerance)]
    choices = []
    for criterion, cost in CRITERIA.items():
        measured = [candidate for candidate in accepted if cost(candidate) is not None]
        best = min(measured, key=lambda one: (cost(one), *_tie_break(one, ties)), default=None)
        choices.append(Choice(group, criterion, best))
    return choices


def best_of(run: Mapping[str, Any], criterion: str, tolerance: float) -> Candidate | None:
    """The best candidate of one run by one of CRITERIA, as `choose` takes it; None where none is accepted."""
    return next(one.best for one in choose(Group("", (run,)), tolerance) if one.criterion == criterion)


def caption(groups: Sequence[Group], tolerance: float, ties: str = "first") -> list[str]:
    """The lines under a table: what was selected how, and how many candidates were tried, fine-tuned and failed."""
    settings = {_setting(run["header"]) for group in groups for run in group.runs} - {""}
    order = "higher accuracy, then shorter inference time" if ties == "accuracy" else "the earlier place in the log"
    kinds = {candidate.chosen_on_validation for group in groups for candidate in group.tested()}
    measure = _MEASURES[min(kinds, default=False), max(kinds, default=False)]
    data = f"Data: {next(iter(settings))}. " if len(settings) == 1 else ""
    return [
        f"{data}Criterion: {measure} at least baseline - {tolerance:g}; ties go to {order}.",
        "FLOPs are multiply-accumulates of convolutions and linear layers for one image; "
        "Speedup is dense time / compressed time.",
        *(_baseline_line(group) for group in groups),
        *(group.counts() for group in groups),
    ]


def render(rows: Sequence[Sequence[str]], notes: Sequence[str], style: str) -> str:
    """The table in `style` txt, csv, md or html. CSV has no room for the notes."""
    if style == "csv":
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([COLUMNS, *rows])
        return buffer.getvalue()
    if style == "html":
        return _html(rows, notes)
    from tabulate import tabulate

    formats = {"txt": "pretty", "md": "github"}
    table = tabulate(rows, headers=COLUMNS, tablefmt=formats[style], disable_numparse=True, stralign="left")
    separator = "\n\n" if style == "md" else "\n"
    return table + separator + "\n".join(f"- {note}" if style == "md" else note for note in notes) + "\n"


def pareto_front(costs: Sequence[float], accuracies: Sequence[float]) -> list[int]:
    """Indices of the points that no other point beats (cost not higher, accuracy higher), by rising cost."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda one: (costs[one], -accuracies[one])):
        if not front or accuracies[index] > accuracies[front[-1]]:
            front.append(index)
    return front


def _tie_break(candidate: Candidate, ties: str) -> tuple[float, ...]:
    if ties == "first":
        return ()
    return (-candidate.record["accuracy"], candidate.record.get("inference_time") or float("inf"))


def _setting(header: Mapping[str, Any]) -> str:
    """`mnist 32 px`, or as much of it as the log says."""
    size = header.get("image_size")
    return " ".join(str(part) for part in (header.get("dataset"), f"{size} px" if size else None) if part)


def _baseline_line(group: Group) -> str:
    baselines = [run["baseline"] for run in group.runs]
    first = baselines[0]
    controls = [baseline["control_accuracy"] for baseline in baselines if "control_accuracy" in baseline]
    trained_on = f"; trained on as long as the candidates {_range(controls)}" if controls else ""
    return (
        f"{group.label} baseline: {first['params']:,} parameters, {first['flops']:,} FLOPs, "
        f"accuracy {_range([baseline['accuracy'] for baseline in baselines])}{trained_on}"
    )


def _range(accuracies: Sequence[float]) -> str:
    shown = sorted(f"{accuracy:.4f}" for accuracy in accuracies)
    return " to ".join(dict.fromkeys((shown[0], shown[-1])))


def _html(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    items = "\n".join(f"<li>{html.escape(note)}</li>" for note in notes)
    head = f"<thead>\n{line(COLUMNS, 'th')}\n</thead>"
    return f"<table>\n{head}\n<tbody>\n{body}\n</tbody>\n</table>\n<ul>\n{items}\n</ul>\n"
