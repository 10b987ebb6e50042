"""The method: a network factorised once, compressed for any rank configuration."""

from .factors import KernelFactors, MatrixFactors
from .htucker import DimensionTree, HTucker, hsvd
from .layers import Geometry, HTLayer
from .model_factors import ModelFactors
from .network import factorize
from .recalibration import calibrated_outputs, recalibrate
from .selection import choose_layers
from .trace import trace_layers

__all__ = [
    "DimensionTree",
    "Geometry",
    "HTLayer",
    "HTucker",
    "KernelFactors",
    "MatrixFactors",
    "ModelFactors",
    "calibrated_outputs",
    "choose_layers",
    "factorize",
    "hsvd",
    "recalibrate",
    "trace_layers",
]
