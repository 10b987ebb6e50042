"""Dense networks by name and their checkpoints: what is saved comes back, what does not fit is refused."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from common.files import atomic_path, write_text
from common.models import (
    FAMILIES,
    CheckpointError,
    architectures,
    build,
    build_model,
    canonical_name,
    check_image_size,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
)

CLASSES = ("one", "two", "three")
SMALL = "squeezenet1_1"  # the quickest of the architectures to build and save


@pytest.fixture
def saved(tmp_path):
    """A checkpoint, the model in it and a batch of images."""
    model = build_model(SMALL, len(CLASSES), seed=1).eval()
    path = tmp_path / "models" / "small.safetensors"
    save_checkpoint(model, path, architecture=SMALL, classes=CLASSES, metadata={"val_accuracy": 0.75})
    return path, model, torch.randn(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))


def test_families_stand_for_architectures():
    assert [canonical_name(name) for name in ("alexnet", "vgg", "resnet", "ResNet18", "vgg16_bn")] == [
        "alexnet",
        "vgg16",
        "resnet18",
        "resnet18",
        "vgg16_bn",
    ]
    assert all(canonical_name(family) == architecture for family, architecture in FAMILIES.items())


@pytest.mark.parametrize("name", ["resnet18", SMALL, "mobilenet_v2", "googlenet", "densenet121", "regnet_y_400mf"])
def test_head_has_the_asked_number_of_classes_in_both_modes(name):
    model = build_model(name, 7, image_size=64, seed=0)
    images = torch.randn(2, 3, 64, 64)
    assert model(images).shape == (2, 7)
    assert model.eval()(images).shape == (2, 7)


def test_seed_fixes_the_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    first, again, other = (build_model("resnet18", 3, seed=seed).conv1.weight for seed in (5, 5, 6))
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("name", ["resnet18", SMALL, "mobilenet_v2"])
def test_imagenet_weights_get_a_new_head_only(monkeypatch, name):
    """The download is replaced by random weights in torchvision's own shape."""
    pretrained = architectures.construct(name)
    expected = {key: tensor.clone() for key, tensor in pretrained.state_dict().items()}
    monkeypatch.setattr(build, "construct", lambda architecture, weights=None: pretrained)
    model = build_model(name, 5, weights="imagenet", seed=0)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    changed = {
        key.rpartition(".")[0]
        for key, parameter in model.named_parameters()
        if not torch.equal(parameter, expected[key])
    }
    assert changed == {architectures.head_name(model)}


@pytest.mark.parametrize("classes", [len(CLASSES), 5])
def test_a_checkpoint_is_a_start_and_keeps_its_head_where_it_fits(saved, classes):
    path, trained, _ = saved
    model = build_model(SMALL, classes, weights=str(path), seed=0)
    assert model.training
    head = architectures.head_name(model)
    kept, expected = model.state_dict(), trained.state_dict()
    differing = {key for key in kept if kept[key].shape != expected[key].shape or not kept[key].equal(expected[key])}
    assert differing == (set() if classes == len(CLASSES) else {f"{head}.weight", f"{head}.bias"})


def test_a_start_that_is_missing_or_of_another_network_is_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        build_model(SMALL, 3, weights=str(tmp_path / "none.safetensors"))
    with pytest.raises(CheckpointError, match="holds a squeezenet1_1, but resnet18"):
        build_model("resnet18", 3, weights=str(saved[0]))


def test_unreachable_weights_give_one_line(monkeypatch, tmp_path):
    def unreachable(*arguments, **options):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"resnet18 could not be loaded.*put https://.*pth into") as caught:
        build_model("resnet18", 10, weights="imagenet")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet81", {}, "unknown model 'resnet81'.*alexnet, vgg16, resnet18.*such as"),
        ("fasterrcnn_resnet50_fpn", {}, "unknown model"),
        ("resnet18", {"weights": "cifar"}, "unknown weights 'cifar'"),
        ("alexnet", {"image_size": 32}, "alexnet cannot take 32 x 32.*sizes that work: 64, "),
    ],
)
def test_bad_requests_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, 10, **options)


def test_one_class_is_no_classifier():
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        build_model("resnet18", 1)


@pytest.mark.parametrize(("name", "too_small", "smallest"), [("alexnet", 62, 63), ("vgg", 31, 32)])
def test_smallest_image_is_known_exactly(name, too_small, smallest):
    check_image_size(name, smallest)
    with pytest.raises(ValueError, match=f"cannot take {too_small} x {too_small}"):
        check_image_size(name, too_small)


def test_checkpoint_round_trip(saved):
    path, model, images = saved
    loaded, metadata = load_checkpoint(path, architecture=SMALL, num_classes=3)
    assert torch.equal(loaded(images), model(images))
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert metadata == {
        "val_accuracy": 0.75,
        "architecture": SMALL,
        "classes": list(CLASSES),
        "num_classes": 3,
    }
    assert load_checkpoint(path)[1] == metadata


def test_checkpoint_can_be_read_by_others(saved):
    assert saved[0].stat().st_mode & 0o444 == 0o444


def test_loaded_tensors_share_no_storage(saved):
    loaded, _ = load_checkpoint(saved[0])
    storages = {parameter.untyped_storage().data_ptr() for parameter in loaded.parameters()}
    assert len(storages) == len(list(loaded.parameters()))


def test_tied_and_channels_last_tensors_are_saved(tmp_path):
    model = build_model("resnet18", 3, seed=0).eval().to(memory_format=torch.channels_last)
    model.layer1[0].conv2.weight = model.layer1[0].conv1.weight
    path = tmp_path / "tied.safetensors"
    save_checkpoint(model, path, architecture="resnet", classes=CLASSES)
    loaded, _ = load_checkpoint(path)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(loaded(images), model(images), rtol=1e-4, atol=1e-5)


def test_state_dict_is_read_without_pickle(saved, tmp_path):
    _, model, images = saved
    path = tmp_path / "small.pth"
    torch.save(model.state_dict(), path)
    loaded, metadata = load_checkpoint(path, architecture=SMALL)
    assert torch.equal(loaded(images), model(images))
    assert metadata == {"architecture": SMALL, "classes": None, "num_classes": 3}
    with pytest.raises(CheckpointError, match="does not say its architecture"):
        load_checkpoint(path)


def test_pickled_model_is_refused(tmp_path):
    path = tmp_path / "pickled.pth"
    torch.save(nn.Linear(2, 3), path)
    with pytest.raises(CheckpointError, match=r"pickled\.pth.*pickled objects"):
        load_checkpoint(path, architecture="resnet18")


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.zeros(2)], {"weights": {"a": torch.zeros(1)}}])
def test_pth_without_a_state_dict_is_refused(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="not a state dict"):
        load_checkpoint(path, architecture="resnet18")


def test_wrong_architecture_and_wrong_head_are_refused(saved, tmp_path):
    path, model, _ = saved
    with pytest.raises(CheckpointError, match=f"holds a {SMALL}, but resnet18 was asked for"):
        load_checkpoint(path, architecture="resnet")
    with pytest.raises(CheckpointError, match="head of 3 classes, but 10 were asked for"):
        load_checkpoint(path, num_classes=10)
    state_dict = tmp_path / "state.pth"
    torch.save(model.state_dict(), state_dict)
    with pytest.raises(CheckpointError, match=r"does not hold a resnet18: it has no tensor 'fc.weight'"):
        load_checkpoint(state_dict, architecture="resnet18")
    with pytest.raises(CheckpointError, match=r"does not hold a squeezenet1_0: tensor .* should be"):
        load_checkpoint(state_dict, architecture="squeezenet1_0")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0, 5, 2000])
def test_damaged_file_is_refused(saved, tmp_path, suffix, keep):
    path, model, _ = saved
    whole = tmp_path / "whole.pth"
    torch.save(model.state_dict(), whole)
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes((path if suffix == ".safetensors" else whole).read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"cut{suffix}.*damaged"):
        load_checkpoint(cut, architecture=SMALL)


def test_foreign_safetensors_and_missing_file_are_refused(tmp_path):
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not a dense checkpoint"):
        load_checkpoint(path)
    safetensors.torch.save_file(
        {"a": torch.zeros(2)}, path, metadata={"format": checkpoints.DENSE_FORMAT, "architecture": SMALL}
    )
    with pytest.raises(CheckpointError, match="damaged header"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "nothing.safetensors")


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_text(path, json.dumps({"a": 1}))

    def fail():
        with atomic_path(path) as temporary:
            assert temporary.parent.parent == path.parent  # of one file system
            assert temporary.suffix == ".json"
            temporary.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]
