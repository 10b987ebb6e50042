"""What a search cost: timed once, kept over interruptions, summed with what was screened and fine-tuned."""

import pytest

from common.search import StepClock, search_seconds


def test_a_step_is_timed_once_and_kept(tmp_path):
    path = tmp_path / "seconds.json"
    with StepClock(path).step("factorize"):
        pass
    first = StepClock(path).seconds()
    with StepClock(path).step("factorize"):
        sum(range(100_000))
    with StepClock(path).step("sensitivity"):
        pass
    assert StepClock(path).seconds()["factorize"] == first["factorize"]
    assert set(StepClock(path).seconds()) == {"factorize", "sensitivity"}


def test_a_step_that_was_interrupted_is_not_noted(tmp_path):
    clock = StepClock(tmp_path / "seconds.json")
    with pytest.raises(KeyboardInterrupt), clock.step("factorize"):
        raise KeyboardInterrupt
    assert clock.seconds() == {}


def test_the_sums_and_the_exhaustive_estimate():
    screened = [{"seconds": 1.0}, {"seconds": 2.0}, {"status": "failed"}]
    found = search_seconds({"factorize": 3.0, "sensitivity": 4.0}, screened, [10.0, 20.0], most_epochs=3)
    assert found["screen"] == 3.0
    assert found["finetune"] == 30.0
    assert found["total"] == 3.0 + 4.0 + 3.0 + 30.0
    assert found["exhaustive"] == 3.0 + 3 * 3 * 15.0


def test_without_fine_tuning_there_is_nothing_to_extrapolate():
    assert search_seconds({"factorize": 3.0}, [], [], most_epochs=3)["exhaustive"] == 3.0
