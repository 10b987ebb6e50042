"""Which arithmetic networks are trained and evaluated in; factorisation, screening and deployment are in float32."""

from __future__ import annotations

from functools import cache

import torch


def autocast(device: torch.device, wanted: bool | None = None) -> torch.autocast:
    """bfloat16 autocast inside. wanted: None asks for it on CUDA and on processors that have bfloat16."""
    if wanted is None:
        wanted = device.type == "cuda" or (device.type == "cpu" and _cpu_has_bfloat16())
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


@cache
def _cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; elsewhere autocast would only cost time."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 to 2.9 cannot tell
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
