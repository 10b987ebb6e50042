"""The short form of `make reliability`: damaged files and killed runs cost no more than what was damaged."""

import random

import pytest

from tools import reliability


def nothing_of(found, *unwanted):
    return {key: found[key] for key in unwanted if found[key]}


def test_damaged_logs_lose_no_intact_record_and_give_no_altered_one():
    found = reliability.damaged_logs(150, seed=1)
    assert found["intact records"] > 300
    assert nothing_of(found, "tracebacks", "intact records lost", "altered and accepted") == {}


def test_damaged_json_ends_in_no_traceback():
    found = reliability.damaged_json(80, seed=1)
    assert found["refused"] > 20
    assert nothing_of(found, "tracebacks") == {}


def test_damaged_model_files_are_refused_by_name_or_are_what_they_were():
    found = reliability.damaged_models(80, seed=1)
    assert found["refused"] > 40
    assert nothing_of(found, "tracebacks", "altered and accepted") == {}


@pytest.mark.slow
def test_a_run_that_was_killed_comes_to_the_same():
    found = reliability.killed_runs(1, seed=1)
    assert found["kills"] >= 1
    assert nothing_of(found, "differing after a kill", "temporary files left") == {}


@pytest.mark.slow
def test_a_run_whose_disk_was_full_comes_to_the_same():
    assert nothing_of(reliability.full_disks(1, seed=1), "differing after a full disk") == {}


def test_the_accidents_follow_from_their_seed_and_change_something():
    content = b"some text with 12 numbers" * 4
    made = [reliability.damaged(content, random.Random(seed)) for seed in range(50)]
    assert made == [reliability.damaged(content, random.Random(seed)) for seed in range(50)]
    assert sum(one != content for one in made) > 40
