"""Dense networks, their checkpoints, and files of compressed ones."""

from .architectures import FAMILIES, canonical_name, check_image_size
from .build import build_model
from .checkpoints import CheckpointError, load_checkpoint, read_state_dict, save_checkpoint
from .compressed import load_compressed, save_compressed

__all__ = [
    "FAMILIES",
    "CheckpointError",
    "build_model",
    "canonical_name",
    "check_image_size",
    "load_checkpoint",
    "load_compressed",
    "read_state_dict",
    "save_checkpoint",
    "save_compressed",
]
