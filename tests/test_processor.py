"""Which instructions a processor has, as torch tells; where torch cannot tell, none."""

import pytest
import torch

from common.processor import INSTRUCTIONS, has, processor


@pytest.mark.parametrize(
    ("known", "found"),
    [
        ({}, set()),
        ({"avx2": True, "avx_vnni": True}, {"VNNI"}),
        ({"avx512_vnni": True, "avx512_bf16": True, "amx_tile": False}, {"VNNI", "bfloat16"}),
        ({"avx512_vnni": True, "amx_bf16": True, "amx_tile": True}, {"VNNI", "bfloat16", "AMX"}),
    ],
)
def test_what_torch_finds_is_named(known, found, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert {name for name in INSTRUCTIONS if has(name)} == found
    assert {name for name in INSTRUCTIONS if name in processor().rpartition("(")[2]} == found


def test_older_torch_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not any(has(name) for name in INSTRUCTIONS)
