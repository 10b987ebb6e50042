"""Makes the measured parts of README.md and docs/ from the files under results/: python tools/update_docs.py [--check]

Prose states no measured figure of its own, in the documents as in the notebooks.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `common` and the two log scripts are found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.files import write_text
from common.reports import load_runs
from tools import benchmark_parts, command_parts, documents, run_parts

DOCUMENTS = (
    "README.md",
    "results/README.md",
    "docs/method.md",
    "docs/notebooks.md",
    "docs/reliability.md",
    "docs/scale.md",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 1 when `--check` finds something to do; 2 when a file cannot be used."""
    options = _parser().parse_args(arguments)
    found = []
    try:
        parts = sections(options.root / "results")
        for name in DOCUMENTS:
            path = options.root / name
            text = path.read_text(encoding="utf-8")
            new = documents.fill(text, parts)
            loose = documents.untraced(new)
            found += [_stray(name, line) for line in loose]
            if new != text and options.check:
                found.append(f"{name} is not up to date with results/; run python tools/update_docs.py")
            elif new != text:
                write_text(path, new)
                print(f"{name} brought up to date")
        for path in sorted(options.root.glob("htd-*-res.ipynb")):
            cells = documents.read_json(path)["cells"]
            prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
            found += [_stray(path.name, line) for line in documents.untraced(prose)]
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


def _stray(name: str, line: str) -> str:
    return f"{name} states a measured figure outside its markers: {line}"


def sections(results: Path) -> Mapping[str, Callable[[], str]]:
    """Name of a part -> what makes it."""
    runs, problems, _ = load_runs(documents.run_folders(results))
    if problems:
        raise ValueError("; ".join(problems))
    published = documents.read_json(results / "published.json")
    compared = sorted((results / "rank-selection").glob("*"))
    files = {f"rules-{folder.name}": folder / "table.md" for folder in compared}
    files |= {f"ablation-{folder.name}": folder / "ablation.md" for folder in compared}
    files |= {path.parent.name: path for path in sorted(results.glob("latency-*/latency.md"))}
    files |= {name: results / f"{name}.md" for name in ("other-tasks", "every-network")}
    files["scale"] = results / "scale" / "scale.md"
    files["calibration"] = results / "calibration" / "calibration.md"
    series = {
        "published-networks": sorted(results.glob("published-networks*/table.md")),
        "published-speed": sorted(results.glob("published-networks*/speed.md")),
        "run-peers": sorted(results.glob("run-peers-*/run-peers.md")),
        "own-networks": sorted((results / "own-networks").glob("*.md")),
        "runtimes": sorted(results.glob("runtimes-*/runtimes.md")),
        "roofline": sorted(results.glob("roofline-*/roofline.md")),
        "parts": sorted(results.glob("parts-*/parts.md")),
        "latency-intel": sorted(results.glob("latency-*-intel/latency.md")),
        "latency-search": sorted(results.glob("latency-search-*/latency-search.md")),
    }
    largest = run_parts.largest(runs)
    smaller = [run for run in runs if run not in largest]
    rules = {f"fine-tuned-{folder.name}": folder / "rows.json" for folder in compared}
    return {
        "networks": lambda: run_parts.networks(runs, published["dataset"]),
        **{name: partial(_fine_tuned, path) for name, path in rules.items()},
        "headline": lambda: run_parts.headline(largest, run_parts.STRICT),
        "headline-loose": lambda: run_parts.headline(largest, run_parts.LOOSE),
        "headline-smaller": lambda: run_parts.headline(smaller, run_parts.STRICT),
        "published": lambda: run_parts.against_published(runs, published),
        "published-cifar10": lambda: benchmark_parts.published_on_cifar10(published),
        "beside-others": lambda: benchmark_parts.beside_others(
            documents.read_json(results / "published-networks" / "rows.json"),
            "ResNet-20",
            documents.read_json(results / "published-networks-tuned" / "rows.json")["rows"],
        ),
        "origin": lambda: run_parts.origin(runs),
        "seeds": lambda: run_parts.seeds(runs),
        "search-costs": lambda: run_parts.search_costs(runs, published),
        "commands": lambda: command_parts.commands(results),
        "reliability": lambda: benchmark_parts.reliability(documents.read_json(results / "reliability.json")),
        "factorisation": lambda: benchmark_parts.factorisation(documents.read_json(results / "factorize_speed.json")),
        **{name: partial(path.read_text, encoding="utf-8") for name, path in files.items()},
        **{name: partial(_in_a_row, paths) for name, paths in series.items()},
    }


def _in_a_row(paths: Sequence[Path]) -> str:
    return "\n\n".join(path.read_text(encoding="utf-8").strip() for path in paths) + "\n"


def _fine_tuned(path: Path) -> str:
    return benchmark_parts.fine_tuned(documents.read_json(path))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make the measured parts of README.md and docs/ from results/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if something would change")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the repository")
    return parser


if __name__ == "__main__":
    sys.exit(main())
