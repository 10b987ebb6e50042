"""Screening on Ray's workers comes to the same candidates and records, whoever dies on the way."""

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from common.reports import RunLog, read_log
from common.search import CandidateFailed, Search, SearchSettings, measured_sensitivity
from common.search.executor import LocalExecutor
from common.search.ray_executor import RaySettings

ray = pytest.importorskip("ray")
from common.search.ray_executor import KEEPS_MEMORY, RayExecutor, dealt  # noqa: E402

pytestmark = [pytest.mark.apart, pytest.mark.xdist_group("ray")]

SETTINGS = SearchSettings(budgets=(0.5, 0.3), candidates=8, generation=4, seed=3)


def without_time(records):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def search(screener, menus, sensitivity, executor=None, folder=None):
    if folder is None:
        return Search(screener, menus, sensitivity, SETTINGS, executor=executor).run(progress=False)
    with RunLog(folder / "run.log") as log:
        found = Search(screener, menus, sensitivity, SETTINGS, folder / "state", log, executor)
        return found.run(progress=False)


@pytest.fixture(scope="module")
def local(screener, menus, sensitivity):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield search(screener, menus, sensitivity)
    torch.set_num_threads(before)


@pytest.mark.parametrize("number", [2, 4])
def test_any_number_of_workers_comes_to_the_same_records(workers, local, screener, menus, sensitivity, number):
    executor = workers(number)
    assert (executor.workers, len(set(executor.processes()))) == (number, number)
    assert without_time(search(screener, menus, sensitivity, executor)) == without_time(local)


def test_workers_that_are_killed_cost_no_record_and_no_duplicate(
    workers, local, screener, menus, sensitivity, tmp_path
):
    executor, done, kills = workers(2), threading.Event(), []

    def kill_at_random():
        chance = random.Random(0)
        while len(kills) < 4 and not done.wait(chance.uniform(0.1, 0.6)):
            process = chance.choice(executor.processes())
            os.kill(process, signal.SIGKILL)
            kills.append(process)

    killer = threading.Thread(target=kill_at_random)
    killer.start()
    try:
        time.sleep(0.5)
        records = search(screener, menus, sensitivity, executor, tmp_path)
    finally:
        done.set()
        killer.join()
    assert kills
    assert without_time(records) == without_time(local)
    logged = [record["trial"] for record in read_log(tmp_path / "run.log").candidates]
    assert logged == [record["trial"] for record in local]


def test_sensitivities_are_those_of_this_process(workers, local, factors, menus, calibration):
    here = measured_sensitivity(factors, menus, calibration[:32], anchors=2, progress=False)
    spread = workers(2).divergences
    assert measured_sensitivity(factors, menus, calibration[:32], anchors=2, progress=False, spread=spread) == here


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_layers_are_dealt_once_and_what_lies_behind_them_evenly(number):
    layers = [str(place) for place in range(53)]
    hands = dealt(layers, number)
    assert sorted((layer for hand in hands for layer in hand), key=int) == layers
    behind = [sum(len(layers) - int(layer) for layer in hand) for hand in hands]
    assert max(behind) - min(behind) <= len(layers)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_workers_on_processors_keep_the_memory_of_feature_maps(workers):
    for process in workers(2).processes():
        environment = Path(f"/proc/{process}/environ").read_text().split("\0")
        assert {f"{name}={value}" for name, value in KEEPS_MEMORY.items()} <= set(environment)


def test_nothing_is_started_for_a_search_that_is_finished(cluster, screener):
    executor = RayExecutor(screener, RaySettings(workers=2, threads=1), most=4)
    assert list(executor.screen_all([])) == []
    assert executor._actors == []
    executor.close()


class Failing:
    """Fails where a configuration has an odd number of parameters, and errs where it is told to."""

    def __init__(self, screener, *, error=None):
        self.factors, self.targets, self.scored, self.error = screener.factors, screener.targets, False, error
        self._screener = screener

    def screen(self, config):
        if self.error is not None:
            raise self.error
        if self.factors.params(config) % 2:
            raise CandidateFailed("out of memory: too odd")
        return self._screener.screen(config)


def test_failures_come_back_as_records_and_errors_as_errors(workers, screener, menus, sensitivity):
    failing = Failing(screener)
    found = search(failing, menus, sensitivity, workers(2, failing))
    assert without_time(found) == without_time(search(failing, menus, sensitivity))
    assert {record["status"] for record in found} <= {"failed", "screened"}
    with pytest.raises(ZeroDivisionError):
        search(screener, menus, sensitivity, workers(1, Failing(screener, error=ZeroDivisionError("own measure"))))


def test_a_generation_is_screened_in_whatever_order(local, screener, menus, sensitivity):
    class Backwards(LocalExecutor):
        def screen_all(self, configs):
            yield from reversed(list(super().screen_all(configs)))

    assert without_time(search(screener, menus, sensitivity, Backwards(screener))) == without_time(local)


def test_a_cluster_that_is_not_there_and_ray_that_is_missing_are_named(screener, monkeypatch):
    with pytest.raises(ValueError, match="at least 1"):
        RaySettings(workers=0)
    monkeypatch.setattr("importlib.import_module", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name)))
    with pytest.raises(ValueError, match=r"pip install 'htd-cnn-compression\[ray\]'"):
        RayExecutor(screener, RaySettings(), most=2)
