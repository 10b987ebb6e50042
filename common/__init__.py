"""CNN compression with hierarchical Tucker decomposition.

`compress_network` is loaded when it is asked for: the scripts that read logs stay free of torch.
"""

from typing import Any

__all__ = ["compress_network"]


def __getattr__(name: str) -> Any:
    if name == "compress_network":
        from .own_network import compress_network

        return compress_network
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
