"""Progress bars: alive for a reader, short in a file."""

import io
import re
import sys

import pytest

from common.progress import FILE_SECONDS, EpochsBar, progress_bar


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


def states(text):
    """The epochs done, of so many, that a bar has shown."""
    return [tuple(map(float, found)) for found in re.findall(r"([\d.]+)/(\d+) epochs", text)]


def test_a_bar_of_epochs_moves_with_every_batch_and_ends_at_whole_ones(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with EpochsBar(3, "training", shown=True) as bar:
        bar._bar.mininterval = 0.0
        for _ in range(3):
            for _ in range(7):
                bar.batch(1 / 7)
            bar.epochs(said="0.91")
    shown = states(sys.stderr.getvalue())
    assert shown[-1] == (3, 3)
    assert any(0 < done < 1 for done, _ in shown)
    assert [done for done, _ in shown] == sorted(done for done, _ in shown)
    assert "0.91" in sys.stderr.getvalue()


def test_epochs_that_were_done_before_or_elsewhere_count_and_those_given_up_do_not(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with EpochsBar(6, "training", shown=True) as bar:
        bar.epochs(2)  # nothing was told of their batches
        bar.batch(0.5)
        bar.batch(0.9)  # more than there was left of it
        bar.epochs()
        bar.give_up(2)
        bar.epochs()
    assert states(sys.stderr.getvalue())[-1] == (4, 4)


def test_a_bar_of_epochs_that_is_not_asked_for_writes_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with EpochsBar(2, "training", shown=False) as bar:
        bar.batch(0.5)
        bar.epochs(2, "done")
        bar.give_up(1)
    assert sys.stderr.getvalue() == ""
