"""A network made fast where it runs."""

from .fold import fold_batch_norm
from .network import Deployed, deploy
from .onnx_export import export_onnx, export_program
from .onnx_run import onnx_session
from .plans import Measure, choose_plan, median_and_error, plain_layer, timer
from .runtimes import Target

__all__ = [
    "Deployed",
    "Measure",
    "Target",
    "choose_plan",
    "deploy",
    "export_onnx",
    "export_program",
    "fold_batch_norm",
    "median_and_error",
    "onnx_session",
    "plain_layer",
    "timer",
]
