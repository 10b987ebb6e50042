"""One command from somebody's checkpoint to a compressed file.

    python compress.py --architecture resnet50 --checkpoint mine.pth --data folder:PATH --speedup 2

The architecture is torchvision's, or `net.py:build`, a function of one's own that makes the network. The weights are
used as they are, not trained anew before. An interrupted run goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn

from common import compress_network
from common.data import load
from common.knobs import CALIBRATION_IMAGES
from common.models import build_model, load_checkpoint, read_state_dict
from common.notebook import styled_text


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 1 when no network kept its accuracy, 2 for bad input, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on where it was.", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    image_size = options.image_size[0] if len(options.image_size) == 1 else tuple(options.image_size)
    data = load(
        options.data,
        options.data_root,
        image_size=image_size,
        mean=options.mean,
        std=options.std,
        resize=options.resize,
        train_limit=options.train_limit,
        device=options.device,
        seed=options.split_seed,
    )
    model = trained_network(options.architecture, options.checkpoint, data.num_classes).to(options.device)
    targets = {"speedup": options.speedup, "max_loss": options.max_loss if options.smallest else None}
    run = compress_network(
        model,
        data.train,
        data.val,
        test=data.test,
        folder=options.folder or options.out.with_suffix(""),
        epochs=options.epochs,
        candidates=options.candidates,
        promote=options.promote,
        calibration_images=options.calibration_images,
        screen_images=options.screen_images,
        latency_batch=options.latency_batch,
        runtime=options.runtime,
        int8=options.int8,
        executor=options.executor,
        address=options.address,
        workers=options.workers,
        threads=options.threads,
        storage=options.storage,
        learning_rate=options.learning_rate,
        tolerance=options.max_loss,
        control=options.control,
        feature_weight=options.feature_weight,
        calibration_passes=options.calibration_passes,
        augment=options.augment,
        leave_dense=options.leave_dense,
        seed=options.seed,
        details={
            "architecture": options.architecture,
            "classes": list(data.classes),
            "mean": list(data.mean),
            "std": list(data.std),
            "image_size": image_size,
            "resize": options.resize,
        },
        budgets=options.budgets,
        **targets,
    )
    print(styled_text(run.table()))
    try:
        small = run.best(options.max_loss)
    except ValueError as error:
        print(f"error: {error}: raise --max-loss, --epochs or the budgets", file=sys.stderr)
        return 1
    written = [small.save(options.out)]
    if options.onnx:
        written.append(small.export_onnx(options.out.with_suffix(".onnx")))
        if options.int8:
            written.append(small.export_onnx(options.out.with_suffix(".int8.onnx"), int8=True))
    for path in written:
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


def trained_network(architecture: str, checkpoint: Path, num_classes: int) -> nn.Module:
    """The network with the checkpoint's weights, in eval mode.

    Raises:
        ValueError: an unknown architecture, a file without such a function, weights that do not fit.
    """
    if ".py:" not in architecture:
        if checkpoint.suffix == ".safetensors":
            return load_checkpoint(checkpoint, architecture=architecture, num_classes=num_classes)[0]
        model = build_model(architecture, num_classes)
    else:
        model = _builder(architecture)()
    try:
        model.load_state_dict(read_state_dict(checkpoint))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{checkpoint} does not fit {architecture} with {num_classes} classes: {reason}") from error
    return model.eval()


def _builder(place: str) -> Callable[[], nn.Module]:
    """The function of a file: `net.py:build`."""
    path, _, name = place.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or not Path(path).is_file():
        raise ValueError(f"--architecture {place}: there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--architecture {place}: {path} has no function {name!r}")
    return getattr(module, name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", required=True, metavar="NAME", help="torchvision's name, or net.py:build")
    parser.add_argument("--checkpoint", required=True, type=Path, help=".pth or .safetensors with trained weights")
    parser.add_argument("--data", required=True, help="folder:PATH, digits, mnist, fashion-mnist or cifar10")
    parser.add_argument("--out", type=Path, default=Path("small.safetensors"), help="default: small.safetensors")
    parser.add_argument("--speedup", type=float, help="how many times faster it should be, measured on this machine")
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=[0.5, 0.3],
        help="without --speedup: shares of FLOPs (default: 0.5 0.3)",
    )
    parser.add_argument(
        "--smallest", action="store_true", help="in place of budgets: find the smallest network within --max-loss"
    )
    parser.add_argument("--max-loss", type=float, default=0.01, help="accuracy that may be lost (default: 0.01)")
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning, 0 for none (default: 3)")
    parser.add_argument(
        "--control",
        action="store_true",
        help="train the dense network on as long, and count losses from the better of the two",
    )
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument(
        "--feature-weight",
        type=float,
        default=0.0,
        help="of the dense network's feature maps in the training, such as 100 (default: 0, of its outputs alone)",
    )
    parser.add_argument(
        "--no-augment",
        dest="augment",
        action="store_false",
        help="fine-tune on the images as they are: no shift, no flip",
    )
    parser.add_argument("--image-size", type=int, nargs="+", default=[224], metavar="PIXELS", help="S, or H W")
    parser.add_argument("--resize", type=int, metavar="PIXELS", help="of the shorter side, before the crop")
    parser.add_argument("--mean", type=float, nargs="+", help="of pixels in 0..1; default: the data set's")
    parser.add_argument("--std", type=float, nargs="+", help="likewise")
    parser.add_argument("--data-root", help="default: $HTD_DATA, else data")
    parser.add_argument("--train-limit", type=int, metavar="IMAGES", help="use a stratified subset")
    parser.add_argument("--candidates", type=int, default=34, help="screened per budget (default: 34)")
    parser.add_argument("--promote", type=int, default=1, help="fine-tuned per budget (default: 1)")
    parser.add_argument("--calibration-images", type=int, default=CALIBRATION_IMAGES, help="default: %(default)s")
    parser.add_argument(
        "--calibration-passes",
        type=int,
        default=0,
        metavar="PASSES",
        help="with --epochs 0: tune finalists on the calibration images, without labels, such as 8 (default: 0)",
    )
    parser.add_argument("--screen-images", type=int, default=1000)
    parser.add_argument("--latency-batch", type=int, default=16)
    parser.add_argument("--runtime", default="onnxruntime", help="onnxruntime, openvino or torch")
    parser.add_argument("--int8", action="store_true", help="measure in int8 as well; with --onnx, write it")
    parser.add_argument("--leave-dense", nargs="*", default=[], metavar="LAYER", help="layers that are not touched")
    parser.add_argument("--onnx", action="store_true", help="write an ONNX file beside --out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--executor", default="local", help="local, or ray: workers on this machine or a cluster")
    parser.add_argument("--address", help="of a running Ray cluster, such as auto; default: one is started here")
    parser.add_argument("--workers", type=int, help="of Ray; default: one per GPU, or as many as there are processors")
    parser.add_argument("--threads", type=int, help="of each worker; default: its share of the processors")
    parser.add_argument("--storage", help="where workers without a common file system keep checkpoints, as s3://...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split-seed", type=int, default=0, help="of the validation part (default: 0)")
    parser.add_argument("--folder", help="of the run's log and state; default: --out without its suffix")
    return parser


if __name__ == "__main__":
    sys.exit(main())
