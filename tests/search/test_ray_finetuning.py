"""Fine-tuning on Ray's workers: the same networks, whoever dies on the way, with and without a common folder."""

import json
import os
import random
import shutil
import signal
import threading
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from common.finetune import TrainSettings, evaluate
from common.models import load_compressed
from common.reports import RunLog
from common.search import AcceptanceRule, BatchTrainer, Finetuning, finetune_with
from common.search.executor import LocalExecutor
from common.search.finetuning import stem_of
from common.search.ray_executor import TrainingWorker
from common.search.storage import Storage

pytest.importorskip("ray")
pytestmark = [pytest.mark.apart, pytest.mark.xdist_group("ray")]


class Accuracy:
    def __init__(self, split):
        self.split = split

    def __call__(self, model):
        return evaluate(model, self.split).accuracy


@pytest.fixture
def trainer(network, digits):
    settings = TrainSettings(epochs=3, batch_size=64, learning_rate=0.01, distill_weight=0.5, amp=False)
    return BatchTrainer(network, digits.train, settings, "kl", Accuracy(digits.val), score=Accuracy(digits.test))


@pytest.fixture
def finetune(promoted, screener, trainer):
    def run(folder, executor):
        folder.mkdir(parents=True, exist_ok=True)
        with RunLog(folder / "run.log") as log:
            rule = AcceptanceRule(0.9, 0.5)
            return finetune_with(promoted, screener, trainer, rule, folder, log, executor=executor, progress=False)

    return run


@pytest.fixture
def local(finetune, screener, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield finetune(tmp_path / "local", LocalExecutor(screener))
    torch.set_num_threads(before)


def without_time(finalists):
    return [{key: value for key, value in one.record.items() if key != "finetune_seconds"} for one in finalists]


def assert_same(found, expected, network):
    assert without_time(found) == without_time(expected)
    for one, other in zip(found, expected, strict=True):
        mine, theirs = (load_compressed(each.path, model=network)[0].state_dict() for each in (one, other))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_workers_train_the_very_same_networks(workers, finetune, local, network, tmp_path):
    found = finetune(tmp_path / "spread", workers(2))
    assert_same(found, local, network)
    assert (tmp_path / "spread" / "run.log").read_text().count("Gave up") == 1
    assert len(list((tmp_path / "spread").glob("candidate-*.epochs.json"))) == 3


def test_killed_workers_go_on_from_their_last_epoch(workers, finetune, local, network, tmp_path):
    executor, done, kills = workers(2), threading.Event(), []

    def kill_at_random():
        chance = random.Random(1)
        while len(kills) < 5 and not done.wait(chance.uniform(0.3, 1.0)):
            if executor._trainers:
                process = chance.choice(executor.processes())
                os.kill(process, signal.SIGKILL)
                kills.append(process)

    killer = threading.Thread(target=kill_at_random)
    killer.start()
    try:
        found = finetune(tmp_path / "killed", executor)
    finally:
        done.set()
        killer.join()
    assert kills
    assert_same(found, local, network)


@pytest.mark.parametrize("lost", ["nothing", "the folder"])
def test_a_storage_takes_the_place_of_a_common_folder(workers, finetune, local, network, tmp_path, lost):
    executor, folder = workers(2, storage=str(tmp_path / "storage")), tmp_path / "mine"

    class Interrupted:
        def finetune_all(self, common, records, epoch):
            if epoch == 2:
                raise KeyboardInterrupt
            return executor.finetune_all(common, records, epoch)

    with pytest.raises(KeyboardInterrupt):
        finetune(folder, Interrupted())
    assert len(list((tmp_path / "storage").glob("candidate-*.unfinished.pt"))) == 3
    if lost == "the folder":
        shutil.rmtree(folder)
    began = {path.name: json.loads(path.read_text()) for path in (tmp_path / "storage").glob("*.epochs.json")}
    found = finetune(folder, executor)
    assert_same(found, local, network)
    for name, epochs in began.items():  # not trained a second time: not even the seconds differ
        assert json.loads((folder / name).read_text())[: len(epochs)] == epochs
    left = {path.name for path in (tmp_path / "storage").iterdir()}
    assert not {name for name in left if name.startswith("partial-")}
    assert not {one.path.with_suffix(".unfinished.pt").name for one in found} & left


@dataclass(frozen=True)
class WritesAFile:
    """In place of `Finetuning`: an epoch is a file, or an error."""

    folder: Path
    error: Exception | None = None

    def until(self, record, _epoch):
        (self.folder / f"{stem_of(record)}.epochs.json").write_text("[1]")
        if self.error is not None:
            raise self.error
        return {}


@pytest.mark.parametrize("error", [None, ArithmeticError("a loss that is no number")])
def test_a_worker_with_a_storage_leaves_nothing_on_its_own_machine(tmp_path, monkeypatch, error):
    own, record = tmp_path / "own", {"trial": "0.5-0"}
    own.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(own))
    storage = Storage(str(tmp_path / "storage"))
    worker = TrainingWorker(WritesAFile(tmp_path, error), storage, torch.get_num_threads())
    with pytest.raises(ArithmeticError) if error else nullcontext():
        worker.until(record, 1)
    assert not list(own.iterdir())
    assert (tmp_path / "storage" / f"{stem_of(record)}.epochs.json").exists() == (error is None)


def test_a_folder_that_workers_do_not_see_is_named(workers, screener, trainer, tmp_path):
    executor = workers(1)
    common = Finetuning(screener, trainer, AcceptanceRule(0.9, 0.5), tmp_path)
    executor._trainers = executor._start(
        TrainingWorker, replace(common, folder=tmp_path / "another machine"), None, most=1
    )
    with pytest.raises(ValueError, match="give storage="):
        executor._check_folder(tmp_path)


def test_an_unknown_kind_of_storage_is_named(workers):
    with pytest.raises(ValueError, match="storage 'nowhere://x' cannot be opened"):
        workers(1, storage="nowhere://x")
