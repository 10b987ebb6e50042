"""Files are written whole or not at all; what a killed process leaves is no result; a folder has one owner."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.files import PARTIAL, SearchBusy, atomic_path, exclusive, read_json, remove_leavings, write_text

ROOT = Path(__file__).resolve().parent.parent


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("no space left")

    with pytest.raises(RuntimeError, match="no space left"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_readable_and_in_folders_that_are_made(tmp_path):
    path = tmp_path / "deep" / "er" / "a.txt"
    write_text(path, "x")
    assert path.read_text() == "x"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe{}"])
def test_a_damaged_json_file_is_named(content, tmp_path):
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.json is damaged .*: delete it") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)
    write_text(path, '{"a": [1]}')
    assert read_json(path) == {"a": [1]}


def test_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "real.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_folders_pipes_and_devices_are_never_replaced(tmp_path, kind):
    path = Path("/dev/null") if kind == "device" else tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(OSError, match="give the name of a file"):
        write_text(path, "x")
    assert path.exists()
    assert not path.is_file()


def killed_while_writing(folder):
    """A process that dies in the middle of a write."""
    code = f"""
import os, signal
from common.files import atomic_path
with atomic_path({str(folder / "results.json")!r}) as temporary:
    temporary.write_text('{{"half": ')
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)


def test_what_a_killed_process_leaves_matches_no_pattern_and_is_removed_at_the_next_start(tmp_path):
    killed_while_writing(tmp_path)
    assert len(list(tmp_path.glob(f"{PARTIAL}*"))) == 1
    assert list(tmp_path.glob("*.json")) == []
    with exclusive(tmp_path):
        assert list(tmp_path.glob(f"{PARTIAL}*")) == []


def test_what_a_living_process_is_writing_stays(tmp_path):
    with atomic_path(tmp_path / "a.json") as temporary:
        remove_leavings(tmp_path)
        temporary.write_text("x")
    assert (tmp_path / "a.json").read_text() == "x"
    of_elsewhere = tmp_path / f"{PARTIAL}some-other-host-1-abcdef01"
    of_elsewhere.mkdir()
    remove_leavings(tmp_path)
    assert of_elsewhere.exists()
    os.utime(of_elsewhere, (time.time() - 1e6,) * 2)
    remove_leavings(tmp_path)
    assert not of_elsewhere.exists()


def test_a_folder_is_held_by_one_process_and_again_within_it(tmp_path):
    code = (
        f"from common.files import exclusive\nfrom pathlib import Path\nwith exclusive(Path({str(tmp_path)!r})): pass"
    )
    with exclusive(tmp_path), exclusive(tmp_path):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert SearchBusy.__name__ in done.stderr
        assert "another process is searching in" in done.stderr.splitlines()[-1]
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
