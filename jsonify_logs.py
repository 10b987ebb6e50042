"""Turns the text logs of searches into JSON: python jsonify_logs.py LOG... [--out DIR]"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from common.files import write_text
from common.reports import ParsedLog, read_log, to_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes one JSON file per log; returns the exit code: 0, or 2 when an input could not be used at all."""
    options = _parser().parse_args(arguments)
    code = 0
    try:
        paths = log_paths(options.logs or [Path("logs")])
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in paths:
        try:
            parsed = read_log(path)
            target = options.out / f"{path.stem}.json"
            write_text(target, json.dumps(to_json(parsed), indent=1, allow_nan=False) + "\n")
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
            continue
        for warning in parsed.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        print(f"{path} -> {target}: {_summary(parsed)}")
    return code


def log_paths(inputs: Sequence[Path]) -> list[Path]:
    """The logs that files and folders (their `*.log`) name, in order.

    Raises:
        ValueError: an input is missing, a folder has no log, or two logs would become the same JSON file.
    """
    paths: list[Path] = []
    for given in inputs:
        found = sorted(given.glob("*.log")) if given.is_dir() else [given]
        if not found:
            raise ValueError(f"no *.log in folder {given}; name the logs, or the folder that has them")
        if not given.exists():
            raise ValueError(f"no file or folder {given}; name logs or a folder of *.log")
        paths += found
    paths = list(dict.fromkeys(paths))
    by_stem: dict[str, Path] = {}
    for path in paths:
        other = by_stem.setdefault(path.stem, path)
        if other != path:
            raise ValueError(f"{other} and {path} would both become {path.stem}.json; convert them with two --out")
    return paths


def _summary(parsed: ParsedLog) -> str:
    counts = parsed.counts()
    return (
        f"{len(parsed.candidates)} records of {counts['tried']} tried candidates "
        f"({counts['fine_tuned']} fine-tuned, {counts['screened']} screened only, {counts['failed']} failed), "
        f"{counts['damaged']} damaged blocks left out"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Turn the text logs of searches into JSON, one file per log.")
    parser.add_argument("logs", nargs="*", type=Path, metavar="LOG", help="a log or a folder (default: logs/)")
    parser.add_argument("--out", type=Path, default=Path("analysis"), help="folder for the JSON (default: analysis/)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
