"""What several test modules do alike: differences, small networks trained on digits, ranks cut in half."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from common.configuration import KernelRanks, MatrixRanks


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest that was expected; shapes and numbers must be of one kind."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def halved(factors) -> dict:
    """About half of every full rank."""
    config = {}
    for name, full in factors.full_ranks().items():
        if isinstance(full, MatrixRanks):
            config[name] = MatrixRanks(max(1, full.rank // 2))
        else:
            leaf_in, leaf_out = max(1, full.rank_in // 2), max(1, full.rank_out // 2)
            config[name] = KernelRanks(leaf_in, max(1, min(leaf_in, leaf_out, full.rank_mid // 2)), leaf_out)
    return config


def loaders_of(dataset) -> list[DataLoader]:
    """Training and validation data as a user's loaders."""
    pairs = [next(split.batches(len(split))) for split in (dataset.train, dataset.val)]
    return [DataLoader(TensorDataset(one.images, one.labels), batch_size=32) for one in pairs]


def fitted(model: nn.Module, loader: DataLoader, epochs: int) -> nn.Module:
    """The classifier, trained in a plain loop."""
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model
