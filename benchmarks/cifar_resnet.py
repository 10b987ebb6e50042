"""CIFAR-10's small residual networks (He et al. 2016, arXiv:1512.03385, section 4.2), compressed from a checkpoint.

    python benchmarks/cifar_resnet.py --checkpoint resnet20.th --data folder:PATH --budgets 0.5 0.35

The checkpoint is a state dict, as people publish them; how deep the network is follows from its names.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

if __package__ in (None, ""):
    # Run as a script: the repository root, not this folder, is where `common` is found.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import compress_network
from common.data import load
from common.files import SearchBusy, write_text
from common.models import read_state_dict
from common.own_network import NetworkRun
from common.provenance import provenance
from common.take_home import Small

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What the published checkpoints were trained with."""


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters ("option A")."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:  # (N, inputs, H, W) -> (N, outputs, H / stride, W / stride)
        shortcut = x
        if self.stride > 1:
            half = self.added // 2
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + shortcut)


class CifarResNet(nn.Module):
    """Three stages of `blocks` basic blocks with 16, 32 and 64 channels: ResNet-20 for 3, ResNet-56 for 9."""

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, 32, 32) -> (N, classes)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def network_name(model: CifarResNet) -> str:
    """What the paper calls a network of this depth, such as ResNet-20."""
    return f"ResNet-{6 * len(model.layer1) + 2}"


def from_checkpoint(path: str | Path) -> CifarResNet:
    """The network that a published state dict holds, in eval mode.

    Raises:
        CheckpointError: a damaged or foreign file.
    """
    state = read_state_dict(path)
    blocks = 1 + max(int(match[1]) for name in state if (match := re.match(r"layer1\.(\d+)\.", name)))
    model = CifarResNet(blocks, state["linear.weight"].shape[0])
    model.load_state_dict(state)
    return model.eval()


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for bad input."""
    options = _parser().parse_args(arguments)
    started = time.perf_counter()
    try:
        model = from_checkpoint(options.checkpoint)
        data = load(options.data, image_size=32, mean=MEAN, std=STD)
        blocks = len(model.layer1)
        run = compress_network(
            model,
            data.train,
            data.val,
            test=data.test,
            folder=options.folder or f"runs/resnet{6 * blocks + 2}",
            budgets=options.budgets,
            epochs=options.epochs,
            candidates=options.candidates,
            seed=options.seed,
            promote=1,
            details={"classes": list(data.classes), "mean": list(data.mean), "std": list(data.std)},
        )
        small = run.best(max_loss=options.max_loss)
        path = small.save(Path(run.settings.folder) / "small.safetensors")
        written = [Path(options.checkpoint), path, small.export_onnx(path.with_suffix(".onnx"))]
        text = report(run, small, written, time.perf_counter() - started)
        print(text)
        if options.report is not None:
            write_text(options.report, text + "\n")
    except (ValueError, OSError, SearchBusy) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def report(run: NetworkRun, small: Small, written: list[Path], seconds: float) -> str:
    """The run's table as Markdown, what was chosen, how large the files are, and how long it took where."""
    table = run.table()
    shown = table.assign(
        **{column: table[column].map("{:,.0f}".format) for column in ("parameters", "FLOPs")},
        **{column: table[column].map("{:.1%}".format) for column in ("parameters saved", "FLOPs saved")},
        **{
            "ms per batch": table["ms per batch"].map("{:.2f}".format),
            "speed-up": table["speed-up"].map("{:.2f}x".format),
        },
        **{run.score_name: table[run.score_name].map("{:.4f}".format)},
    )
    facts, s = provenance("cpu", run.settings.seed), run.settings
    files = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.2f} MB" for path in written)
    notes = [
        f"Taken: {small.record['trial']}. Files: {files}.",
        f"{seconds / 60:.1f} minutes in all; {s.candidates} candidates a budget, {s.finetune_epochs} epochs, "
        f"seed {s.seed}; speed in {s.runtime}, batch {s.latency_batch}.",
        f"{facts['machine']}, revision {facts['git_revision']}.",
    ]
    lines = "\n".join(f"- {note}" for note in notes)
    return f"{tabulate(shown, headers='keys', tablefmt='github', disable_numparse=True)}\n\n{lines}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compress a CIFAR-10 residual network from its checkpoint.")
    parser.add_argument("--checkpoint", required=True, help="state dict of ResNet-20, ResNet-56 or the like")
    parser.add_argument("--data", default="cifar10", help="cifar10 or folder:PATH (default: cifar10)")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5], help="shares of the dense FLOPs")
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning (default: 1)")
    parser.add_argument("--candidates", type=int, default=24, help="screened per budget (default: 24)")
    parser.add_argument("--max-loss", type=float, default=0.02, help="accuracy that may be lost (default: 0.02)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="default: runs/resnetN")
    parser.add_argument("--report", type=Path, metavar="PATH", help="Markdown of what came of it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
