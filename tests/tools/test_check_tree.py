"""What should not be tracked is named; what may be large is not."""

from tools.check_tree import LARGEST, LARGEST_README, problems


def test_large_files_binaries_at_the_root_and_a_long_readme_are_named(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "common").mkdir()
    sizes = {"results/a.json": 2 * LARGEST, "a.ipynb": 2 * LARGEST, "common/data.py": 2 * LARGEST, "README.md": 20_000}
    for name, size in sizes.items():
        (tmp_path / name).write_text("x" * size)
    (tmp_path / "tool.whl").write_bytes(b"PK\0\1")
    (tmp_path / "common" / "picture.png").write_bytes(b"\x89PNG\0")
    tracked = [*sizes, "tool.whl", "common/picture.png", "deleted.py"]
    found = problems(tmp_path, tracked)
    assert [line.split(" ")[0] for line in found] == ["common/data.py", "README.md", "tool.whl"]
    (tmp_path / "README.md").write_text("x" * LARGEST_README)
    assert problems(tmp_path, ["README.md"]) == []
