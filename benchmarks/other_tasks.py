"""Networks that are no image classifiers, each trained here in a minute and compressed by one call.

    python benchmarks/other_tasks.py [--tasks sound clips masks comparison]

    sound       classes of noisy tones       convolutions of one axis, some grouped
    clips       directions of movement       convolutions of three axes
    masks       segmentation, a U-Net        transposed convolutions; its own `evaluate` and `finetune`
    comparison  is a digit above a number?   two inputs, an image and a vector

The data are made up from a seed, but for scikit-learn's digits. Writes results/other-tasks.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `common` is found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import compress_network
from common.files import write_text
from common.inputs import like_model, run
from common.provenance import provenance

BATCH = 32


class Sound(nn.Module):
    """Raw sound (N, 1, length) -> logits of five tones."""

    shape = (1, 400)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv1d(1, 32, 9, 2, 4), nn.BatchNorm1d(32)
        self.grouped = nn.Conv1d(32, 64, 5, 2, 2, groups=2)
        self.wide, self.point = nn.Conv1d(64, 64, 5, padding=2), nn.Conv1d(64, 64, 1)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.norm(self.stem(x)))))
        return self.head(F.relu(self.point(F.relu(self.wide(x)))).mean(-1))


class Clips(nn.Module):
    """Clips (N, 1, frames, height, width) -> logits of four directions."""

    shape = (1, 6, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv3d(1, 24, 3, (1, 2, 2), 1, bias=False), nn.BatchNorm3d(24)
        self.second = nn.Conv3d(24, 40, 3, 1, 1)
        self.point, self.head = nn.Conv3d(40, 40, 1), nn.Linear(40, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.norm(self.stem(x)))))
        return self.head(F.relu(self.point(x)).mean((2, 3, 4)))


class UNet(nn.Module):
    """Images (N, 3, height, width) -> logits of the mask (N, 1, height, width); one level down and up again."""

    shape = (3, 32, 40)

    def __init__(self) -> None:
        super().__init__()
        self.left, self.down = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, 2, 1)
        self.bottom = nn.Conv2d(64, 64, 3, padding=1)
        self.up, self.norm = nn.ConvTranspose2d(64, 32, 3, 2, 1, output_padding=1, bias=False), nn.BatchNorm2d(32)
        self.right, self.out = nn.Conv2d(64, 32, 3, padding=1), nn.Conv2d(32, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.left(x))
        x = F.relu(self.norm(self.up(F.relu(self.bottom(F.relu(self.down(left)))))))
        return self.out(F.relu(self.right(torch.cat([left, x], 1))))


class Comparison(nn.Module):
    """An image (N, 1, 8, 8) and a number's one-hot vector (N, 10) -> logits of (not above, above)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, 2, 1)
        self.hidden, self.head = nn.Linear(64 * 16 + 10, 64), nn.Linear(64, 2)

    def forward(self, image: Tensor, number: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(image)))).flatten(1)
        return self.head(F.relu(self.hidden(torch.cat([x, number], 1))))


@dataclass(frozen=True)
class Task:
    """What `compress_network` is given.

    Attributes:
        model: an untrained network.
        splits: training, validation and test data: lists of batches (inputs, targets).
        loss: (output, targets) -> scalar, what the network is trained on here.
        options: further arguments of the call.
    """

    model: nn.Module
    splits: tuple[list[Any], list[Any], list[Any]]
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    options: dict[str, Any] = field(default_factory=dict)


def sound(seed: int) -> Task:
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        classes = torch.randint(5, (count,), generator=generator)
        phase = 6.3 * torch.rand(count, 1, generator=generator)
        wave = torch.sin(torch.arange(400) * (0.1 + 0.04 * classes[:, None]) + phase)
        return (wave + 1.5 * torch.randn(count, 400, generator=generator))[:, None], classes

    torch.manual_seed(seed)
    return Task(Sound(), _splits(draw))


def clips(seed: int) -> Task:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]])

    def draw(count: int) -> tuple[Tensor, Tensor]:
        classes = torch.randint(4, (count,), generator=generator)
        frames = 0.7 * torch.randn(count, 1, 6, 16, 16, generator=generator)
        start = torch.randint(16, (count, 2), generator=generator)
        for time in range(6):
            rows, columns = ((start + 2 * time * steps[classes]) % 16).T
            for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
                place = (rows + corner[0]) % 16, (columns + corner[1]) % 16
                frames[torch.arange(count), 0, time, place[0], place[1]] += 2
        return frames, classes

    torch.manual_seed(seed)
    return Task(Clips(), _splits(draw))


def masks(seed: int) -> Task:
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(40.0), indexing="ij")

    def draw(count: int) -> tuple[Tensor, Tensor]:
        middle = torch.rand(count, 2, 1, 1, generator=generator) * torch.tensor([32.0, 40.0]).reshape(2, 1, 1)
        radius = 4 + 8 * torch.rand(count, 2, 1, 1, generator=generator)
        inside = ((y - middle[:, 0]) / radius[:, 0]) ** 2 + ((x - middle[:, 1]) / radius[:, 1]) ** 2 < 1
        colour = torch.randn(count, 3, 1, 1, generator=generator)
        images = torch.randn(count, 3, 32, 40, generator=generator) + colour * inside[:, None]
        return images, inside[:, None].float()

    splits = _splits(draw, train=1024)

    def overlap(model: nn.Module) -> float:
        """Intersection over union of the masks of the validation split."""
        both = either = 0.0
        with torch.no_grad():
            for images, truth in splits[1]:
                found = model(like_model(images, model)) > 0
                both += float((found & (truth > 0.5)).sum())
                either += float((found | (truth > 0.5)).sum())
        return both / either

    def finetune(model: nn.Module, teacher: nn.Module, epochs: int) -> None:
        """The user's own loop: half from the masks, half from the dense network's outputs."""
        _train(model, splits[0], epochs, 2e-3, lambda output, truth, images: (
            F.binary_cross_entropy_with_logits(output, truth) + F.mse_loss(output, teacher(images)) / 10
        ))  # fmt: skip

    torch.manual_seed(seed)
    options = {"evaluate": overlap, "finetune": finetune}
    return Task(UNet(), splits, F.binary_cross_entropy_with_logits, options)


def comparison(seed: int) -> Task:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    numbers = torch.randint(10, (len(images),), generator=generator)
    vectors = F.one_hot(numbers, 10).float()
    targets = (labels > numbers).long()

    def part(first: int, last: int) -> list[Any]:
        chosen = order[first:last].split(BATCH)
        return [((images[rows], vectors[rows]), targets[rows]) for rows in chosen]

    torch.manual_seed(seed)
    return Task(Comparison(), (part(0, 1200), part(1200, 1500), part(1500, len(images))))


TASKS: dict[str, Callable[[int], Task]] = {"sound": sound, "clips": clips, "masks": masks, "comparison": comparison}


def _splits(draw: Callable[[int], tuple[Tensor, Tensor]], train: int = 2048) -> tuple[list, list, list]:
    """Training, validation and test data as lists of batches."""
    train_part, val, test = (
        list(DataLoader(TensorDataset(*draw(count)), batch_size=BATCH)) for count in (train, 512, 512)
    )
    return train_part, val, test


def _train(model: nn.Module, data: list[Any], epochs: int, rate: float, loss: Callable) -> None:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    model.train()
    for _ in range(epochs):
        for inputs, targets in data:
            optimizer.zero_grad()
            loss(run(model, inputs), targets, inputs).backward()
            optimizer.step()
    model.eval()


def compressed(name: str, folder: Path, *, epochs: int, seed: int, budgets: tuple[float, ...]) -> list[dict[str, Any]]:
    """Train one task's network, compress it, and say what came of it: a row for the dense one and for each finalist."""
    task = TASKS[name](seed)
    _train(task.model, task.splits[0], epochs, 2e-3, lambda output, targets, _: task.loss(output, targets))
    train, val, test = task.splits
    found = compress_network(
        task.model,
        train,
        val,
        test=None if "evaluate" in task.options else test,
        budgets=budgets,
        folder=folder / name,
        candidates=8,
        calibration_images=512,
        screen_images=256,
        promote=1,
        seed=seed,
        progress=False,
        **task.options,
    )
    rows = found.table().reset_index().to_dict("records")
    return [{"task": name, **row, "layers factorised": len(found.factorize().layers)} for row in rows]


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.3, 0.15], help="shares of the dense FLOPs")
    parser.add_argument("--epochs", type=int, default=8, help="of the dense network's training (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--folder", type=Path, default=Path("runs/other-tasks"), help="logs and state of the runs")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for name in options.tasks:
        budgets = tuple(options.budgets)
        rows += compressed(name, options.folder, epochs=options.epochs, seed=options.seed, budgets=budgets)
    content = {"rows": rows, "provenance": provenance("cpu", options.seed)}
    write_text(options.out / "other-tasks.json", json.dumps(content, indent=1) + "\n")
    write_text(options.out / "other-tasks.md", table(rows) + "\n")
    print(table(rows))
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """One line per network."""
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".4g")


if __name__ == "__main__":
    sys.exit(main())
