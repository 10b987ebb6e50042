"""What the tests of the search share: one small trained network, its factors, menus and sensitivities."""

import pytest
import torch
from torch import nn

from common.compress import factorize
from common.data import load
from common.finetune import TrainSettings, train
from common.ranks import build_menus
from common.search import MenuCosts, Screener, measured_sensitivity

torch.set_num_threads(1)


def small_network() -> nn.Module:
    """A layer of every kind that has ranks, all widths different: kernels, a 1 x 1, a wide mode, a flattened map."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(12, 36, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(36),
            nn.ReLU(),
            nn.Conv2d(36, 40, 1),
            nn.ReLU(),
            nn.Conv2d(40, 72, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(72 * 2 * 2, 34),
            nn.ReLU(),
            nn.Linear(34, 10),
        )


@pytest.fixture(scope="session")
def digits():
    """scikit-learn's digits at 16 px, 400 of them for training."""
    return load("digits", image_size=16, train_limit=400)


@pytest.fixture(scope="session")
def calibration(digits):
    return digits.train.sample(128, 0)


@pytest.fixture(scope="session")
def network(digits):
    model = small_network()
    train(model, digits, TrainSettings(epochs=3, batch_size=32, learning_rate=0.05), progress=False)
    return model


@pytest.fixture(scope="session")
def factors(network, calibration):
    return factorize(network, calibration)


@pytest.fixture(scope="session")
def menus(factors):
    return build_menus(factors, size=8)


@pytest.fixture(scope="session")
def sensitivity(factors, menus, calibration):
    return measured_sensitivity(factors, menus, calibration, progress=False)


@pytest.fixture(scope="session")
def costs(factors, menus):
    return MenuCosts.of(factors, menus)


@pytest.fixture(scope="session")
def screener(factors, calibration, digits):
    return Screener(factors, calibration, digits.val, limit=64)


def pytest_collection_modifyitems(items):
    """The notebooks first: they take longest, and one that runs last runs alone."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")
