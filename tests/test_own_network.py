"""One call on somebody's own network and data: it searches, keeps everything, resumes, and its files load again."""

import copy
import itertools
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import analyze_results
import jsonify_logs
from common import compress_network
from common.compress import HTLayer
from common.data import load
from common.deploy import onnx_session
from common.finetune import TrainingDiverged, TrainSettings
from common.inputs import first
from common.models import CheckpointError, load_compressed
from common.own_network import NetworkRun
from common.ranks.timed_menus import MenuTimes
from common.reports import read_log
from common.search import CONTROL, BatchTrainer
from tests.helpers import fitted, loaders_of

QUICK = {
    "candidates": 3,
    "latency_batch": 4,
    "calibration_images": 64,
    "screen_images": 48,
    "promote": 1,
    "progress": False,
}
QUICK |= {"sensitivity": "proxy"}


class Net(nn.Module):
    """A small CNN of somebody's own, with a batch norm and a value that changes when it runs."""

    def __init__(self, outputs=10):
        super().__init__()
        self.first = nn.Conv2d(3, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.second = nn.Conv2d(24, 40, 3, stride=2, padding=1)
        self.head = nn.Linear(40, outputs)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return self.head(F.relu(self.second(F.relu(self.norm(self.first(x))))).mean((2, 3)))


@pytest.fixture(scope="module")
def loaders(digits):
    return loaders_of(digits)


@pytest.fixture(scope="module")
def trained(loaders):
    torch.manual_seed(0)
    return fitted(Net(), loaders[0], epochs=8)


@pytest.fixture(scope="module")
def finished(trained, loaders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    return compress_network(trained, *loaders, budgets=(0.6,), folder=folder, epochs=1, tolerance=0.5, **QUICK), folder


def test_the_table_has_the_dense_network_and_what_was_found(finished, trained):
    table = finished[0].table()
    assert list(table.index) == ["dense", table.index[1]]
    assert table["FLOPs"].iloc[1] <= 0.6 * table["FLOPs"].iloc[0]
    assert table["validation accuracy"].iloc[0] > 0.4
    assert (table["speed-up"] > 0).all()


def test_the_given_network_is_never_changed(trained, loaders, tmp_path):
    trained.train()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    compress_network(trained, *loaders, budgets=(0.6,), folder=tmp_path, epochs=1, **QUICK)
    assert trained.training
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_what_it_hands_back_is_saved_loaded_and_exported(finished, tmp_path):
    small = finished[0].best()
    images = first(small.images, 2)
    with torch.no_grad():
        expected = small.model(images)
    path = small.save(tmp_path / "small.safetensors")
    for maker in (Net, Net()):
        loaded, info = load_compressed(path, model=maker)
        with torch.no_grad():
            assert torch.equal(loaded(images), expected)
    assert info["config"] == small.record["config"]
    with pytest.raises(CheckpointError, match="give what makes the dense network"):
        load_compressed(path)
    with pytest.raises(CheckpointError, match=r"tensor 'head"):
        load_compressed(path, model=lambda: Net(7))
    found = onnx_session(small.export_onnx(tmp_path / "small.onnx"))(images)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    program = torch.export.load(small.export_program(tmp_path / "small.pt2")).module()
    assert (program(images) - expected).abs().max() < 1e-3 * expected.abs().max()
    assert small.params < 0.8 * sum(p.numel() for p in Net().parameters())


def test_its_log_becomes_a_table_as_any_other(finished, tmp_path, capsys):
    run, folder = finished
    log = read_log(run.settings.log_path)
    assert log.warnings == []
    assert log.counts()["tried"] == 3
    assert log.header["scored_on"] == "validation accuracy"
    assert jsonify_logs.main([str(folder), "--out", str(tmp_path)]) == 0
    assert analyze_results.main([str(tmp_path), "--out", str(tmp_path), "--tolerance", "0.5", "--no-plots"]) == 0
    assert "Best FLOPs Red." in capsys.readouterr().out


def test_a_second_call_does_nothing_again_and_other_settings_are_refused(finished, trained, loaders, monkeypatch):
    run, folder = finished
    run.close()
    monkeypatch.setattr("common.search.screening.Screener.screen", None)
    monkeypatch.setattr("common.search.trainers.BatchTrainer.train", None)
    again = compress_network(trained, *loaders, budgets=(0.6,), folder=folder, epochs=1, tolerance=0.5, **QUICK)
    assert [one.record["trial"] for one in again.finetune()] == [one.record["trial"] for one in run.finetune()]
    again.close()
    with pytest.raises(ValueError, match="was begun with another calibration_images"):
        compress_network(
            trained, *loaders, budgets=(0.6,), folder=folder, epochs=1, **{**QUICK, "calibration_images": 32}
        )


def test_a_damaged_file_of_a_run_is_named_and_can_be_deleted(finished, trained, loaders, tmp_path):
    run, folder = finished
    run.close()
    shutil.copytree(folder, tmp_path / "copy")
    state = tmp_path / "copy" / run.settings.state_folder.relative_to(folder)

    def again():
        options = {"budgets": (0.6,), "folder": tmp_path / "copy", "epochs": 1, "tolerance": 0.5, **QUICK}
        return compress_network(trained, *loaders, **options)

    [result] = [path for path in state.glob("candidate-*.json") if path.with_suffix(".safetensors").exists()]
    for path in (state / "settings.json", state / "seconds.json", result):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=rf"{re.escape(path.name)} is damaged .*: delete it"):
            again()
        path.unlink()
    assert again().table().loc[run.finetune()[0].record["trial"], "parameters"] == run.best(0.5).params


def test_no_training_at_all(trained, loaders, tmp_path):
    run = compress_network(trained, *loaders, budgets=(0.7,), folder=tmp_path, epochs=0, tolerance=0.9, **QUICK)
    assert run.best().record["epochs"] == 0
    assert run.best().record["accuracy"] is not None


def test_tuning_on_calibration_images_looks_at_no_label(trained, loaders, tmp_path):
    wrong = [(images, labels.flip(0)) for images, labels in loaders[0]]
    found = []
    for name, data in (("right", loaders[0]), ("wrong", wrong)):
        run = compress_network(
            trained, data, loaders[1], budgets=(0.1,), folder=tmp_path / name, epochs=0, calibration_passes=6, **QUICK
        )
        (finalist,) = run.finetune()
        found.append(finalist.load())
        record = finalist.record
        assert (record["epochs"], record["finetune"]["calibration_passes"]) == (0, 6)
        assert record["val_accuracy"] == record["accuracy"]  # both of all validation data, after the tuning
        untuned = run.make_screener().build(record["config"])
        assert run.make_screener().distance(found[-1]) < run.make_screener().distance(untuned)
    states = [model.state_dict() for model in found]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_tuning_needs_no_metric(halves, tmp_path):
    model, batches = halves
    options = {"budgets": (0.6,), "epochs": 0, "calibration_passes": 3, **QUICK}
    run = compress_network(model, batches, batches[:2], folder=tmp_path, **options)
    (finalist,) = run.finetune()
    assert finalist.record["accuracy"] is None
    assert finalist.record["finetune"]["calibration_passes"] == 3
    # The network and its images are random: if nothing is gained, it is as it was fitted.
    assert run.make_screener().distance(finalist.load()) <= finalist.record["divergence"] * (1 + 1e-6)


def test_a_control_is_trained_where_it_is_asked_for(trained, loaders, tmp_path):
    run = compress_network(trained, *loaders, budgets=(0.6,), folder=tmp_path, epochs=1, control=True, **QUICK)
    assert list(run.table().index[:2]) == ["dense", CONTROL]
    control = run.table().loc[CONTROL]
    assert control["speed-up"] == 1.0
    assert run.dense_validation() == max(run.validate_dense(), run.dense_control()["val_accuracy"])
    run.close()


def test_a_frozen_network_is_trained_as_a_control_all_the_same(trained, loaders, tmp_path):
    frozen = copy.deepcopy(trained).requires_grad_(False)
    run = compress_network(frozen, *loaders, budgets=(0.6,), folder=tmp_path, epochs=1, control=True, **QUICK)
    assert run.dense_control()["epochs"] == 1
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    run.close()


def test_a_control_that_fails_is_said_and_left_out(trained, loaders, tmp_path):
    def diverges(model, teacher, epochs):
        if not any(isinstance(module, HTLayer) for module in model.modules()):
            raise TrainingDiverged("the training loss became nan")

    run = compress_network(
        trained, *loaders, budgets=(0.6,), folder=tmp_path, epochs=1, finetune=diverges, control=True, **QUICK
    )
    assert CONTROL not in run.table().index
    assert len(run.table()) == 2
    assert (
        "the training loss became nan; losses are counted from the dense network" in run.settings.log_path.read_text()
    )
    run.close()


def test_layers_that_are_to_stay_dense_stay_so(trained, loaders, tmp_path):
    run = compress_network(
        trained, *loaders, budgets=(0.9,), folder=tmp_path, epochs=0, leave_dense=["second"], **QUICK
    )
    assert "second" not in run.factorize().layers
    with pytest.raises(ValueError, match="leave_dense names 'third'"):
        compress_network(trained, *loaders, folder=tmp_path / "b", leave_dense=["third"], **QUICK)


class Halves(nn.Module):
    """Two inputs by name, a dictionary out: a task that nobody foresaw."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 16, 5, padding=2)
        self.join = nn.Conv2d(32, 40, 3, padding=1)
        self.out = nn.Conv2d(40, 3, 3, padding=1)

    def forward(self, image, hint):
        both = torch.cat([self.left(image), self.right(hint)], 1).relu()
        return {"picture": self.out(self.join(both).relu())}


@pytest.fixture(scope="module")
def halves():
    torch.manual_seed(1)
    batches = []
    for _ in range(4):
        image, hint = torch.randn(2, 16, 3, 12, 16)
        batches.append(({"image": image, "hint": hint}, image + hint))
    return Halves().eval(), batches


def test_several_inputs_and_named_outputs_without_any_metric(halves, tmp_path):
    model, batches = halves
    run = compress_network(model, batches, batches[:2], budgets=(0.6,), folder=tmp_path, epochs=2, **QUICK)
    assert run.make_screener().kind == "relative"
    (finalist,) = run.finetune()
    assert finalist.record["divergence"] > 0
    with pytest.raises(ValueError, match="no score to choose by"):
        run.best()
    small = run.pick(finalist.record["trial"])
    loaded, _ = load_compressed(small.save(tmp_path / "s.safetensors"), model=Halves)
    inputs = batches[0][0]
    with torch.no_grad():
        expected = small.model(**inputs)["picture"]
        assert torch.equal(loaded(**inputs)["picture"], expected)
    found = onnx_session(small.export_onnx(tmp_path / "s.onnx"))(inputs)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_own_measure_loss_and_training_loop(halves, tmp_path):
    model, batches = halves
    called = []

    def evaluate(network):
        with torch.no_grad():
            return -float(sum((network(**x)["picture"] - model(**x)["picture"]).square().mean() for x, _ in batches))

    def finetune(network, teacher, epochs):
        called.append(epochs)
        assert teacher is model
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        for inputs, _ in batches:
            optimizer.zero_grad()
            F.mse_loss(network(**inputs)["picture"], teacher(**inputs)["picture"].detach()).backward()
            optimizer.step()

    options = {"budgets": (0.6,), "evaluate": evaluate, "tolerance": 0.99, **QUICK}
    run = compress_network(model, batches, batches, folder=tmp_path / "a", epochs=2, finetune=finetune, **options)
    assert called == [2]
    seconds = run.search_seconds()  # all epochs at once are one training, and not one per epoch
    assert seconds["exhaustive"] == pytest.approx(seconds["factorize"] + len(run.screen()) * seconds["finetune"])
    table = run.table()
    assert table["validation score"].iloc[0] == 0
    assert table["validation score"].iloc[1] < 0
    log = read_log(run.settings.log_path)
    assert log.baseline["accuracy"] == 0
    assert [record["status"] for record in log.candidates].count("fine-tuned") == 1

    losses = []

    def loss(output, target):
        losses.append(1)
        return (output["picture"] - target).square().mean()

    compress_network(model, batches, batches, folder=tmp_path / "b", epochs=1, loss=loss, **options)
    assert len(losses) == len(batches)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"budgets": (2,)}, "budgets must be shares of the dense cost"),
        ({"budgets": "much"}, "budgets"),
        ({"sampler": "tree"}, "sampler must be one of policy, tpe, random, nsga2; got 'tree'"),
        ({"calibration_passes": 4}, "calibration_passes is in place of epochs: give epochs=0 with it"),
        ({"calibration_passes": -1, "epochs": 0}, "calibration_passes must be a number of passes, 0 or more"),
        ({"calibration_passes": 1, "epochs": 0, "finetune": print}, "give it without finetune="),
        ({"epochs": -1}, "finetune_epochs must be a number of epochs, 0 or more"),
        ({"speedup": 0.5}, "speedup must be a number above 1"),
        ({"candidate": 3}, "unknown knob 'candidate'"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_knobs_are_refused_before_anything_is_done(trained, tmp_path, knobs, message):
    with pytest.raises(ValueError, match=message) as caught:
        compress_network(trained, None, None, folder=tmp_path / "x", **knobs)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_data_that_cannot_be_used_is_named(trained, loaders, tmp_path):
    with pytest.raises(ValueError, match="must yield pairs"):
        compress_network(trained, loaders[0], [torch.zeros(4, 3, 16, 16)], folder=tmp_path, **QUICK)
    counted_from_one = [(torch.zeros(4, 3, 16, 16), torch.tensor([1, 10, 3, 10]))]
    with pytest.raises(ValueError, match="a target is class 10, but the network's 10 outputs count from 0"):
        compress_network(trained, loaders[0], counted_from_one, folder=tmp_path, **QUICK)


def test_a_speedup_is_a_target(trained, loaders, tmp_path, monkeypatch):
    def times_as_flops(factors, menus, *_, **__):
        entries = {name: [entry.flops * 1e-9 for entry in menu] for name, menu in menus.items()}
        return MenuTimes(factors.dense_flops * 1e-9, entries)

    # The real times of so small a network are noise.
    monkeypatch.setattr("common.run.time_menus", times_as_flops)
    monkeypatch.setattr(
        NetworkRun,
        "measured_speedup",
        lambda run, config: 0.9 / (run.factorize().flops(config) / run.factorize().dense_flops),
    )
    run = compress_network(trained, *loaders, speedup=1.3, folder=tmp_path, epochs=0, tolerance=0.99, **QUICK)
    assert run.settings.cost == "latency"
    first, second = run.settings.budgets
    assert second == pytest.approx(0.9 * first)
    assert 1.3 * 0.98 <= 0.9 / first <= 1.3 * 1.15  # the network is a tenth slower than its layers promise
    assert all(record["flops"] <= first * 1.001 * run.factorize().dense_flops for record in run.screen())
    assert run.best().record["status"] == "fine-tuned"
    monkeypatch.setattr(NetworkRun, "measured_speedup", None)  # what was found is kept
    again = compress_network(trained, *loaders, speedup=1.3, folder=tmp_path, epochs=0, tolerance=0.99, **QUICK)
    assert again.settings.budgets == run.settings.budgets


def test_a_speedup_out_of_reach_is_refused_by_what_can_be_reached(trained, loaders, tmp_path, monkeypatch):
    monkeypatch.setattr(NetworkRun, "measured_speedup", lambda *_: 1.11)
    with pytest.raises(ValueError, match=r"a speed-up of 3 cannot be reached: .* a speed-up of 1\.11"):
        compress_network(trained, *loaders, speedup=3, folder=tmp_path, epochs=0, runtime="torch", **QUICK)


def test_a_measure_that_does_not_work_shows_before_the_search(trained, loaders, tmp_path):
    with pytest.raises(ValueError, match="evaluate must return a number, higher is better; got 'good'"):
        compress_network(trained, *loaders, folder=tmp_path / "x", evaluate=lambda model: "good", **QUICK)
    assert not (tmp_path / "x").exists()


def test_a_training_loop_that_ends_in_nan_is_a_failed_record(halves, tmp_path):
    model, batches = halves

    def spoil(network, teacher, epochs):
        with torch.no_grad():
            next(network.parameters()).fill_(float("nan"))

    def evaluate(network):
        with torch.no_grad():
            return float(network(**batches[0][0])["picture"].mean())

    knobs = {"budgets": (0.6,), "evaluate": evaluate, "finetune": spoil, **QUICK}
    run = compress_network(model, batches, batches, folder=tmp_path, **knobs)
    (failed,) = run.finetune()
    assert failed.record["status"] == "failed"
    assert "nan" in failed.record["reason"]
    assert "nan" in run.table()["failed"].iloc[1]


def test_a_shuffled_loader_gives_the_same_run_again(trained, loaders, tmp_path):
    shuffled = DataLoader(loaders[0].dataset, batch_size=32, shuffle=True)
    found = []
    for name in "ab":
        run = compress_network(trained, shuffled, loaders[1], folder=tmp_path / name, budgets=(0.6,), epochs=1, **QUICK)
        found.append([(r["config"], r["divergence"]) for r in run.screen()] + [run.finetune()[0].record["accuracy"]])
    assert found[0] == found[1]


class Endless:
    """A stream of batches that never ends, as data that is read from elsewhere may be."""

    def __init__(self, batches) -> None:
        self.batches, self.read = batches, 0

    def __iter__(self):
        for batch in itertools.cycle(self.batches):
            self.read += 1
            yield batch


def test_an_epoch_ends_where_it_is_told_to(trained, loaders, tmp_path):
    stream = Endless(loaders[0])
    knobs = {"budgets": (0.6,), "epochs": 2, "max_batches_per_epoch": 3, **QUICK}
    run = compress_network(trained, stream, loaders[1], folder=tmp_path, **knobs)
    (finalist,) = run.finetune()
    assert finalist.record["epochs"] == 2
    assert finalist.record["finetune"]["max_batches_per_epoch"] == 3
    assert stream.read <= 2 * 3 + 4  # and what is calibrated on


def test_an_own_training_loop_takes_no_limit_of_ours(trained, loaders, tmp_path):
    with pytest.raises(ValueError, match="max_batches_per_epoch is of our own training loop"):
        compress_network(trained, *loaders, folder=tmp_path, finetune=lambda *_: None, max_batches_per_epoch=3, **QUICK)


@pytest.mark.parametrize("augment", [True, False])
def test_our_own_splits_are_shuffled_batched_and_augmented(trained, tmp_path, augment):
    split, seen = load("digits", image_size=16, train_limit=100).train, []
    model = copy.deepcopy(trained)
    model.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()) if module.training else None)
    settings = TrainSettings(epochs=1, batch_size=32, learning_rate=1e-4, distill_weight=0.5, augment=augment)
    trainer = BatchTrainer(trained, split, settings, "kl", validate=lambda _: 0.0)
    shares = []
    trainer.train(model, tmp_path / "unfinished.pt", lambda _: True, shares.append)
    assert shares == [1 / 3] * 3
    assert [len(images) for images in seen] == [32, 32, 32]
    known = torch.cat([batch.images for batch in split.batches(100)]).flatten(1)
    distances = torch.cdist(torch.cat(seen).flatten(1), known)
    nearest, places = distances.min(1)
    if augment:
        assert (nearest > 0.1).float().mean() > 0.5
    else:
        assert nearest.max() < 0.1
        assert len(places.unique()) == 96
        assert not torch.equal(places, torch.arange(96))


@pytest.mark.apart
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_both_sides_are_measured_in_int8_too(trained, loaders, tmp_path, runtime):
    given = {"budgets": (0.6,), "epochs": 0, "tolerance": 0.99, "runtime": runtime}
    run = compress_network(trained, *loaders, folder=tmp_path, int8=True, **given, **QUICK)
    table = run.table()
    small = run.best().record["trial"]
    assert list(table.index) == ["dense", "dense int8", small, f"{small} int8"]
    assert table["speed-up"].gt(0).all()
    assert table["speed-up"]["dense"] == 1
    scores = table["validation accuracy"]
    assert abs(scores["dense int8"] - scores["dense"]) < 0.1
    assert abs(scores[f"{small} int8"] - scores[small]) < 0.2
    assert "dense int8: validation accuracy" in next(tmp_path.glob("*.log")).read_text()
    path = run.best().export_onnx(tmp_path / "int8.onnx", int8=True)
    assert path.stat().st_size < run.best().export_onnx(tmp_path / "float.onnx").stat().st_size * 1.2


def test_int8_in_a_runtime_without_it_is_refused_at_once(trained, loaders, tmp_path):
    with pytest.raises(ValueError, match="int8 is for the runtimes onnxruntime and openvino"):
        compress_network(trained, *loaders, folder=tmp_path / "x", int8=True, runtime="torch", **QUICK)
    assert not (tmp_path / "x").exists()


@pytest.mark.apart
@pytest.mark.xdist_group("ray")
def test_a_run_on_rays_workers_is_the_run_of_this_process(finished, trained, loaders, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    options = {"budgets": (0.6,), "epochs": 1, "tolerance": 0.5, "executor": "ray", "workers": 2}
    run = compress_network(trained, *loaders, folder=tmp_path, **options, **QUICK)
    ours, others = (
        [(record["config"], record["params"], record["val_accuracy"]) for record in one.screen()]
        for one in (run, finished[0])
    )
    assert ours == others
    assert [one.record["status"] for one in run.finetune()] == ["fine-tuned"] * len(run.promote())
