"""Nothing stray in git: python tools/check_tree.py

No tracked file of more than 200 KB outside results/, docs/ and the notebooks, no binary file at the root, and a README
that is read to its end.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LARGEST = 200_000
LARGEST_README = 10_240
ROOMY = ("results/", "docs/")


def problems(root: Path, tracked: list[str]) -> list[str]:
    """One line for each tracked file that should not be there, or not be so large."""
    found = []
    for name in tracked:
        path = root / name
        if not path.is_file():
            continue  # deleted, but not committed yet
        size = path.stat().st_size
        if size > LARGEST and not name.startswith(ROOMY) and not name.endswith(".ipynb"):
            found.append(f"{name} has {size:,} bytes; what is larger than {LARGEST:,} does not belong into git")
        if "/" not in name and b"\0" in path.read_bytes()[:8192]:
            found.append(f"{name} is a binary file at the root")
        if name == "README.md" and size > LARGEST_README:
            found.append(f"README.md has {size:,} bytes, {size - LARGEST_README:,} more than is read to its end")
    return found


def main() -> int:
    """Exit code: 0; 1 where something is stray."""
    root = Path(__file__).resolve().parent.parent
    listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=True)
    found = problems(root, [name for name in listed.stdout.split("\0") if name])
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
