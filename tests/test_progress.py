"""Progress bars: alive for a reader, short in a file."""

import io
import sys

import pytest

from common.progress import FILE_SECONDS, progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def written_by_thirty_seconds(monkeypatch, stream, **options):
    """What a bar that is moved a hundred times a second for half a minute leaves in a stream."""
    clock = [0.0]
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    bar = progress_bar(total=3000, **options)
    bar._time = lambda: clock[0]
    bar.start_t = bar.last_print_t = 0.0
    with bar:
        for _ in range(3000):
            clock[0] += 0.01
            bar.update()
    return stream.getvalue()


def test_a_file_gets_a_state_every_few_seconds_and_the_last_one(monkeypatch):
    text = written_by_thirty_seconds(monkeypatch, io.StringIO())
    assert 2 <= text.count("\r") <= 30 / FILE_SECONDS + 3
    assert "3000/3000" in text


def test_a_reader_sees_the_bar_move(monkeypatch):
    assert written_by_thirty_seconds(monkeypatch, Terminal()).count("\r") > 100


def test_a_reader_of_a_notebook_sees_the_bar_move(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    assert progress_bar(total=2).mininterval < 1


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_bar_that_is_not_asked_for_writes_nothing(monkeypatch, stream):
    assert written_by_thirty_seconds(monkeypatch, stream(), shown=False) == ""


def test_what_is_iterated_over_passes_through(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(progress_bar("abc", desc="letters")) == ["a", "b", "c"]
