"""Data sets: splits that are seeded, stratified and apart; batches that are what the format promises."""

import os
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import Augmentation, DataUnavailable, ImageFormat, Split, datasets, load, splits
from common.data import folders as folder_data


@pytest.fixture(scope="module")
def digits():
    return load("digits", image_size=16)


@pytest.fixture
def image_folder(tmp_path):
    """Three classes of unequal size; images of unequal shape whose red channel tells the class."""
    generator = np.random.default_rng(0)
    for part, counts in (("train", (12, 8, 20)), ("test", (3, 4, 5))):
        for label, (name, count) in enumerate(zip(("ant", "bee", "cat"), counts, strict=True)):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (20 + index, 31, 3), dtype=np.uint8)
                pixels[..., 0] = 100 * label
                Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return tmp_path


def raw_rows(split: Split) -> set[bytes]:
    return {batch.images.numpy().tobytes() for batch in split.batches(1)}


def test_splits_are_disjoint_and_cover_everything(digits):
    train, val, test = (raw_rows(split) for split in (digits.train, digits.val, digits.test))
    assert len(digits.train) + len(digits.val) + len(digits.test) == 1797
    assert not train & test
    assert not val & test
    assert not train & val


def test_splits_are_stratified(digits):
    total = sum(torch.bincount(split.labels) for split in (digits.train, digits.val, digits.test))
    for split in (digits.train, digits.val, digits.test):
        share = torch.bincount(split.labels) / len(split)
        assert (share - total / 1797).abs().max() < 0.005


def test_seed_moves_validation_but_never_test():
    first, again, other = (load("digits", seed=seed, image_size=8) for seed in (3, 3, 4))
    for name in ("train", "val", "test"):
        assert torch.equal(getattr(first, name).labels, getattr(again, name).labels)
    assert raw_rows(first.val) == raw_rows(again.val) != raw_rows(other.val)
    assert raw_rows(first.test) == raw_rows(other.test)


def test_train_limit_keeps_validation_and_proportions():
    full, small = load("digits", image_size=8), load("digits", image_size=8, train_limit=200)
    assert len(small.train) == 200
    assert raw_rows(small.train) < raw_rows(full.train)
    assert raw_rows(small.val) == raw_rows(full.val)
    counts = torch.bincount(small.train.labels)
    assert counts.min() >= 18
    assert counts.max() <= 22


def test_dataset_describes_its_batches(digits):
    batch = next(digits.train.batches(7))
    assert digits.example_shape == (3, 16, 16)
    assert batch.images.shape == (7, *digits.example_shape)
    assert batch.images.dtype == torch.float32
    assert digits.num_classes == 10
    assert torch.equal(batch.images[:, 0], batch.images[:, 2])
    gray = load("digits", image_size=16, channels=1)
    assert gray.example_shape == (1, 16, 16)
    assert torch.equal(next(gray.train.batches(7)).images, batch.images[:, :1])


def test_normalised_pixels_have_zero_mean_and_unit_spread():
    digits = load("digits", image_size=8)
    pixels = digits.train.sample(1000, seed=0)
    assert abs(pixels.mean()) < 0.02
    assert abs(pixels.std() - 1) < 0.02


def test_batches_are_shuffled_only_by_a_generator(digits):
    def order(seed):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return torch.cat([batch.indices for batch in digits.val.batches(32, generator=generator)])

    rows = torch.arange(len(digits.val))
    assert torch.equal(order(None), rows)
    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))
    assert torch.equal(order(1).sort().values, rows)


def test_indices_lead_back_to_images_and_labels(digits):
    straight = torch.cat([batch.images for batch in digits.val.batches(50)])
    for batch in digits.val.batches(50, generator=torch.Generator().manual_seed(0)):
        assert torch.equal(batch.images, straight[batch.indices])
        assert torch.equal(batch.labels, digits.val.labels[batch.indices])


@pytest.mark.parametrize(("limit", "drop_last"), [(None, False), (None, True), (70, False), (70, True), (20, False)])
def test_num_batches_counts_what_batches_yields(digits, limit, drop_last):
    sizes = [len(batch.labels) for batch in digits.val.batches(32, limit=limit, drop_last=drop_last)]
    assert len(sizes) == digits.val.num_batches(32, limit=limit, drop_last=drop_last)
    if not drop_last:
        assert sum(sizes) == min(limit or len(digits.val), len(digits.val))


def test_augmentation_follows_the_generator_and_can_be_switched_off(digits):
    def images(dataset, seed):
        return next(dataset.train.batches(64, generator=torch.Generator().manual_seed(seed), augment=True)).images

    plain = load("digits", image_size=16, augment=False)
    assert torch.equal(images(digits, 1), images(digits, 1))
    untouched = next(plain.train.batches(64, generator=torch.Generator().manual_seed(1))).images
    assert torch.allclose(images(plain, 1), untouched, atol=1e-5)
    assert not torch.allclose(images(digits, 1), untouched, atol=1e-5)


def test_shift_moves_whole_pixels_and_flip_mirrors():
    images = torch.rand(200, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    shifted = Augmentation(shift=0.1).apply(images, torch.Generator().manual_seed(0))
    candidates = [
        torch.nn.functional.pad(images, (1, 1, 1, 1))[:, :, row : row + 10, column : column + 10]
        for row in range(3)
        for column in range(3)
    ]
    matches = torch.stack([(shifted == candidate).flatten(1).all(dim=1) for candidate in candidates])
    assert matches.any(dim=0).all()
    assert matches.any(dim=1).all()
    flipped = Augmentation(flip=True).apply(images, torch.Generator().manual_seed(0))
    is_mirror = (flipped == images.flip(-1)).flatten(1).all(dim=1)
    is_same = (flipped == images).flatten(1).all(dim=1)
    assert (is_mirror ^ is_same).all()
    assert 60 < is_mirror.sum() < 140


def test_split_too_large_for_the_cache_gives_the_same_batches(monkeypatch):
    kept = load("digits", image_size=24)
    monkeypatch.setattr(splits, "CACHE_BYTES", 0)
    resized = load("digits", image_size=24)
    for first, second in zip(kept.val.batches(64), resized.val.batches(64), strict=True):
        assert torch.equal(first.images, second.images)
    assert resized.val._images.shape[-1] == 8


def test_sample_is_seeded_without_repetition_and_not_capped(digits):
    sample = digits.val.sample(100, seed=1)
    assert torch.equal(sample, digits.val.sample(100, seed=1))
    assert not torch.equal(sample, digits.val.sample(100, seed=2))
    assert len({image.numpy().tobytes() for image in sample}) == 100
    with pytest.raises(ValueError, match=r"100000 images.*holds 144"):
        digits.val.sample(100000, seed=1)


def test_image_folder_reads_classes_and_labels(image_folder):
    dataset = load(f"folder:{image_folder}", image_size=16, val_fraction=0.25)
    assert dataset.classes == ("ant", "bee", "cat")
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (30, 10, 12)
    for batch in dataset.test.batches(5):
        red = (batch.images[:, 0] * dataset.std[0] + dataset.mean[0]) * 255
        assert torch.allclose(red.mean(dim=(1, 2)), 100.0 * batch.labels, atol=1)


@pytest.mark.parametrize(("channels", "workers"), [(1, 0), (3, 2)])
def test_folder_on_disk_gives_the_batches_of_one_in_memory(monkeypatch, image_folder, channels, workers):
    monkeypatch.setattr(folder_data, "_workers", lambda count: workers)
    kept, streamed = (
        load(f"folder:{image_folder}", image_size=16, channels=channels, val_fraction=0.2, memory_limit=limit)
        for limit in (2**20, 0)
    )
    assert isinstance(streamed.train, folder_data.StreamedSplit)
    assert not isinstance(kept.train, folder_data.StreamedSplit)
    torch.manual_seed(0)
    pairs = zip(
        kept.train.batches(8, generator=torch.Generator().manual_seed(5), augment=True),
        streamed.train.batches(8, generator=torch.Generator().manual_seed(5), augment=True),
        strict=True,
    )
    for first, second in pairs:
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.labels, second.labels)
    assert torch.equal(kept.test.sample(6, seed=1), streamed.test.sample(6, seed=1))
    # Streaming must not use up torch's global random numbers, or dropout would depend on where the data lies.
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_data_set_in_memory(monkeypatch, tmp_path, channels):
    class TwoColours:
        classes = ("dark", "light")

        def __init__(self, root, train, download):
            self.targets = [0, 1] * 20
            self.data = np.zeros((40, 32, 32, 3), dtype=np.uint8)
            self.data[1::2, ..., 1] = 240

    monkeypatch.setattr(datasets.datasets, "CIFAR10", TwoColours)
    dataset = load("cifar10", tmp_path, image_size=8, channels=channels)
    batch = next(dataset.test.batches(2))
    mean, std = torch.tensor(dataset.mean), torch.tensor(dataset.std)
    pixels = batch.images[1].permute(1, 2, 0) * std + mean
    expected = [240 / 255 / 3] if channels == 1 else [0, 240 / 255, 0]
    assert torch.allclose(pixels[0, 0], torch.tensor(expected), atol=1e-5)


def test_missing_files_say_what_belongs_where_and_download_is_the_last_resort(monkeypatch, tmp_path):
    tried = []

    class Unreachable:
        def __init__(self, root, train, download):
            tried.append(download)
            raise RuntimeError("no\nnetwork" if download else "not found")

    monkeypatch.setattr(datasets.datasets, "FashionMNIST", Unreachable)
    with pytest.raises(DataUnavailable, match=r"FashionMNIST/raw.*\$HTD_DATA") as caught:
        load("fashion-mnist", tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert tried == [False, True]


def test_root_comes_from_the_environment(monkeypatch, tmp_path):
    def read(root):
        raise DataUnavailable(str(root))

    monkeypatch.setitem(datasets._READERS, "mnist", read)
    monkeypatch.setenv("HTD_DATA", str(tmp_path))
    with pytest.raises(DataUnavailable, match=str(tmp_path)):
        load("mnist")
    with pytest.raises(DataUnavailable, match="elsewhere"):
        load("mnist", "elsewhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "minst"}, "unknown data set 'minst'.*digits, mnist, fashion-mnist, cifar10 or folder:PATH"),
        ({"image_size": 0}, "image_size.*got 0"),
        ({"val_fraction": 1.0}, "val_fraction.*got 1.0"),
        ({"val_fraction": 0.001}, "validation split of 1 .*10 classes"),
        ({"channels": 2}, "channels.*got 2"),
        ({"train_limit": 9}, "train_limit must lie in 10..1294 images, got 9"),
        ({"train_limit": 5000}, "train_limit must lie in 10..1294 images, got 5000"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**{"name": "digits", **arguments})


def test_batches_refuse_nonsense(digits):
    with pytest.raises(ValueError, match="batch_size"):
        digits.val.batches(0)
    with pytest.raises(ValueError, match="limit"):
        digits.val.batches(8, limit=0)
    with pytest.raises(ValueError, match="generator"):
        digits.val.batches(8, augment=True)


def test_folder_errors_name_the_folder(image_folder, tmp_path):
    name = f"folder:{image_folder}"
    with pytest.raises(ValueError, match=r"nowhere.*not a folder"):
        load(f"folder:{tmp_path / 'nowhere'}")
    broken = image_folder / "train" / "ant" / "00.png"
    broken.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"00\.png is not a readable image"):
        load(name, val_fraction=0.25)
    for file in (image_folder / "test" / "bee").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="bee has no image"):
        load(name)
    (image_folder / "test" / "bee").rmdir()
    with pytest.raises(ValueError, match="only one of them has bee"):
        load(name)


def test_empty_folder_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match="train is empty"):
        load(f"folder:{tmp_path}")


def test_class_that_cannot_be_split_is_named(image_folder):
    for file in sorted((image_folder / "train" / "bee").iterdir())[1:]:
        file.unlink()
    with pytest.raises(ValueError, match="class 'bee' has 1 training image"):
        load(f"folder:{image_folder}", val_fraction=0.25)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 2, 0, 2], "test split has no image of class 'one'"),
        ([0, 1, 2, 3], "labels of the test split run from 0 to 3; 3 classes allow 0 to 2"),
        ([-1, 0, 1, 2], "run from -1 to 2"),
        ([], "test split is empty"),
    ],
)
def test_labels_that_do_not_fit_the_classes_are_refused(monkeypatch, labels, message):
    def source(labels):
        return datasets.ArraySource(
            torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8), np.asarray(labels, dtype=np.int64)
        )

    parts = source([0, 1, 2] * 10), source(labels)
    raw = datasets.RawData(("zero", "one", "two"), *parts, (0.5,), (0.5,), Augmentation())
    monkeypatch.setitem(datasets._READERS, "digits", lambda root: raw)
    with pytest.raises(ValueError, match=message):
        load("digits")


def test_resize_keeps_a_constant_image_constant():
    image_format = ImageFormat(image_size=9, channels=1, mean=(0.0,), std=(1.0,))
    for size in (4, 9, 30):
        resized = image_format.resize(torch.full((2, 1, size, size), 77, dtype=torch.uint8))
        assert resized.shape == (2, 1, 9, 9)
        assert (resized == 77).all()


def test_images_need_not_be_square(tmp_path):
    dataset = load("digits", image_size=(12, 20), train_limit=60)
    batch = next(dataset.train.batches(8, generator=torch.Generator().manual_seed(0), augment=True))
    assert batch.images.shape == (8, 3, 12, 20)
    assert dataset.example_shape == (3, 12, 20)
    for part in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            for number in range(5):
                Image.new("RGB", (40, 30), (50 * number, 0, 0)).save(tmp_path / part / label / f"{number}.png")
    folder = load(f"folder:{tmp_path}", image_size=(12, 20), val_fraction=0.4, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert next(folder.train.batches(4)).images.shape == (4, 3, 12, 20)
    assert folder.mean == (0.5, 0.5, 0.5)


def test_the_middle_is_cut_out_of_an_image_of_the_size_asked_for(tmp_path):
    """As torchvision's Resize and CenterCrop do: at 32 pixels a crop of 28 loses the outer sixteenth on each side."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, :48] = 250  # left half
    pixels[:4] = pixels[-4:] = 99  # what the crop loses, above and below
    for part, name in product(("train", "test"), "ab"):
        (tmp_path / part / name).mkdir(parents=True)
        for place in range(10):
            Image.fromarray(pixels).save(tmp_path / part / name / f"{place}.png")
    options = {"image_size": 28, "mean": (0,) * 3, "std": (1,) * 3}
    whole, cropped = (
        next(load(f"folder:{tmp_path}", resize=resize, **options).test.batches(1)).images[0] for resize in (None, 32)
    )
    assert whole.shape == cropped.shape == (3, 28, 28)
    assert (whole[:, 0] - 99 / 255).abs().max() < 0.05
    assert (cropped[:, 2:-2, :12] - 250 / 255).abs().max() < 0.01
    assert cropped[:, 2:-2, 16:].abs().max() < 0.01
    assert (cropped[:, :, :12] > 0.5).all()


@pytest.mark.parametrize(("name", "resize"), [("digits", 64), ("folder:nowhere", 16)])
def test_a_resize_that_makes_no_sense_is_refused(name, resize):
    with pytest.raises(ValueError, match="resize is for image folders, and at least the image_size"):
        load(name, image_size=32, resize=resize)


@pytest.mark.parametrize("numbers", [{"mean": (0.5, 0.5)}, {"std": (1.0, 1.0, 0.0)}])
def test_normalisation_that_fits_no_image_is_refused(numbers):
    with pytest.raises(ValueError, match="mean and std need 3 numbers"):
        load("digits", **numbers)


def test_hidden_files_pipes_and_other_folders_are_no_images(tmp_path):
    for part in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (8, 8), (50 * number, 0, 0)).save(tmp_path / part / label / f"{number}.png")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "a" / "._0.png").write_bytes(b"resource fork")
    (tmp_path / "train" / "a" / ".thumbs").mkdir()
    (tmp_path / "train" / "a" / ".thumbs" / "x.png").write_bytes(b"thumb")
    os.mkfifo(tmp_path / "train" / "a" / "pipe.png")
    dataset = load(f"folder:{tmp_path}", image_size=8, val_fraction=0.25)
    assert dataset.classes == ("a", "b")
    assert len(dataset.train) + len(dataset.val) == 8


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_shades_come_through(tmp_path, suffix):
    shades = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for part in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            for number in range(4):
                Image.fromarray(shades).save(tmp_path / part / label / f"{number}.{suffix}")
    split = load(f"folder:{tmp_path}", image_size=8, val_fraction=0.25).test
    seen = next(iter(split.batches(1))).images[0, 0] * 0.229 + 0.485
    assert torch.allclose(seen, torch.from_numpy(shades / 65535).float(), atol=1 / 255)


def test_an_image_without_a_known_range_or_too_large_is_named(tmp_path, monkeypatch):
    for part in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (8, 8)).save(tmp_path / part / label / f"{number}.png")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "test" / "a" / "9.tiff")
    with pytest.raises(ValueError, match=r"9\.tiff is not a readable image.*mode 'F'"):
        load(f"folder:{tmp_path}", image_size=8, val_fraction=0.25)
    (tmp_path / "test" / "a" / "9.tiff").unlink()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"\.png is not a readable image"):
        load(f"folder:{tmp_path}", image_size=8, val_fraction=0.25)


def test_a_folder_on_disk_travels_as_the_names_of_its_files(image_folder):
    """Workers of a cluster are sent the split: each reads the images where they lie."""
    split = load(f"folder:{image_folder}", image_size=64, memory_limit=1).train
    sent = pickle.dumps(split)
    assert len(sent) < len(split) * 500 < len(split) * 3 * 64 * 64
    arrived = pickle.loads(sent)
    for here, there in zip(split.batches(8), arrived.batches(8), strict=True):
        assert torch.equal(here.images, there.images)
        assert torch.equal(here.labels, there.labels)


def test_a_folder_on_disk_is_read_without_a_fork(monkeypatch, image_folder):
    """The threads of OpenVINO, for one, do not survive it: the process would end without a word."""
    monkeypatch.setattr(folder_data, "_workers", lambda count: 2)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a fork"))
    split = load(f"folder:{image_folder}", image_size=16, memory_limit=1).train
    assert isinstance(split, folder_data.StreamedSplit)
    batches = split.batches(2)
    next(batches)
    batches.close()  # what is decoded ahead is given up
    assert sum(len(batch.images) for batch in split.batches(2)) == len(split)
