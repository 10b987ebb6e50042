"""What this processor has: its name, and the instructions that decide the speed of int8 and of bfloat16."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

INSTRUCTIONS = {
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "bfloat16": ("avx512_bf16", "amx_bf16"),
    "AMX": ("amx_tile",),
}
"""What people call them -> what torch does. VNNI adds products of int8 in 32 bits, and so does AMX."""


def has(name: str) -> bool:
    """Whether torch finds the instructions of this name, one of INSTRUCTIONS, here.

    torch 2.6 to 2.9 cannot tell: then it is False.
    """
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(kind) for kind in INSTRUCTIONS[name])


def is_x86() -> bool:
    """Whether it is of the family of Intel's and AMD's 64-bit processors."""
    return platform.machine().lower() in ("x86_64", "amd64")


def processor() -> str:
    """Name and widest instructions: on rented machines one name stands for many processors."""
    found = [torch.backends.cpu.get_cpu_capability(), *(name for name in INSTRUCTIONS if has(name))]
    return f"{processor_name()} ({', '.join(found)})"


def processor_name() -> str:
    """As far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
