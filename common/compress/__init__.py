"""The method: a network factorised once, compressed for any rank configuration."""

from .dimension_tree import DimensionTree
from .factors import KernelFactors, MatrixFactors
from .geometry import CONVOLUTIONS, TRANSPOSED, Geometry, paddings, scale_outputs
from .grouped import GroupedFactors
from .htucker import HTucker, hsvd
from .layers import STAGES, HTLayer
from .model_factors import Factors, ModelFactors
from .network import factorize
from .recalibration import recalibrate
from .reconstruction import reconstruct, reconstructed_outputs
from .selection import choose_layers
from .targets import Targets
from .trace import trace_layers

__all__ = [
    "CONVOLUTIONS",
    "STAGES",
    "TRANSPOSED",
    "DimensionTree",
    "Factors",
    "Geometry",
    "GroupedFactors",
    "HTLayer",
    "HTucker",
    "KernelFactors",
    "MatrixFactors",
    "ModelFactors",
    "Targets",
    "choose_layers",
    "factorize",
    "hsvd",
    "paddings",
    "recalibrate",
    "reconstruct",
    "reconstructed_outputs",
    "scale_outputs",
    "trace_layers",
]
