"""How much the network's output suffers when one layer alone is compressed: the first of the policy's two heuristics.

Three measures, all per menu entry and zero for dense: the *proxy* is the relative error of the layer's own output, free
of charge; the *measured* one is the KL divergence of the network's output from the dense network's, on calibration
images; the *blended* one is their geometric mean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from ..compress import ModelFactors, Targets, reconstructed_outputs
from ..files import write_text
from ..inputs import Inputs, channels_last
from ..modules import copy_with, laid_out
from ..ranks import MenuEntry, Menus
from .divergence import Reference

Sensitivities = Mapping[str, tuple[float, ...]]
"""Layer name -> one number >= 0 per entry of its menu, falling with the error; 0 for dense."""


def proxy_sensitivity(menus: Menus) -> dict[str, tuple[float, ...]]:
    """The relative squared error of the layer's output, as it stands in the menus."""
    return {name: tuple(entry.error for entry in menu) for name, menu in menus.items()}


def measured_sensitivity(
    factors: ModelFactors,
    menus: Menus,
    images: Inputs,
    *,
    anchors: int = 5,
    kind: str = "kl",
    cache: Path | None = None,
    progress: bool = True,
) -> dict[str, tuple[float, ...]]:
    """Divergence of the network's output with this layer alone compressed, at each entry of its menu.

    The layer is fitted to the dense one's outputs on `images`, as it will be in a candidate. Of each menu, `anchors`
    entries are measured, one pass each; between them the divergence is interpolated in the layer's output error. Noise
    is taken out by making it fall monotonically from the cheapest entry to dense.

    Args:
        images: ``(N, C, H, W)``, or several inputs, see `common.inputs`.
        kind: of divergence, see `common.search.divergence`.
        cache: a JSON file; measured values found there are used again, if they belong to the same network, images
            and menus.
    """
    fingerprint = _fingerprint(factors, menus, images, anchors, kind)
    if cache is not None and (known := _read_cache(cache, fingerprint)) is not None:
        return known
    targets = Targets.of(factors, channels_last(images))
    work = laid_out(copy_with(factors.model, {}), channels_last=True)
    dense = Reference.of(reconstructed_outputs(work, targets), kind)
    result = {}
    for name, menu in tqdm(menus.items(), desc="sensitivity", unit="layer", disable=not progress):
        compressed = [entry for entry in menu if entry.ranks is not None]
        picked = sorted({round(i) for i in np.linspace(0, len(compressed) - 1, anchors)}) if compressed else []
        known = {i: _divergence(factors, work, name, compressed[i], targets, dense) for i in picked}
        result[name] = _interpolated(menu, known)
    if cache is not None:
        write_text(cache, json.dumps({"fingerprint": fingerprint, "sensitivity": result}, indent=1))
    return result


def blended_sensitivity(menus: Menus, measured: Sensitivities) -> dict[str, tuple[float, ...]]:
    """The geometric mean of the measured divergence and the output error.

    The divergence of one layer alone tells the layers apart, but is small and noisy for each of them, and says little
    about how they will add up once all are compressed. The output error is smooth and the same for every layer. In the
    logarithm each is a noisy estimate of what the network loses, and their mean errs less than either:
    `benchmarks/rank_selection.py` compares the three.
    """
    proxy = proxy_sensitivity(menus)
    return {
        name: tuple(float(np.sqrt(error * value)) for error, value in zip(proxy[name], values, strict=True))
        for name, values in measured.items()
    }


def _divergence(
    factors: ModelFactors, work: nn.Module, name: str, entry: MenuEntry, targets: Targets, dense: Reference
) -> float:
    original = work.get_submodule(name)
    layer = factors.layers[name].layer(entry.ranks)
    work.set_submodule(name, laid_out(layer.to(tree_leaves(targets.images)[0].device), channels_last=True))
    try:
        logits = reconstructed_outputs(work, targets)
    finally:
        work.set_submodule(name, original)
    found = dense.distance(logits)
    return found if np.isfinite(found) else float(np.finfo(np.float32).max)


def _interpolated(menu: tuple[MenuEntry, ...], known: Mapping[int, float]) -> tuple[float, ...]:
    if not known:
        return (0.0,) * len(menu)
    errors = [0.0, *(menu[i].error for i in reversed(known))]
    values = np.maximum.accumulate([0.0, *(max(value, 0.0) for value in reversed(known.values()))])
    return tuple(float(v) for v in np.interp([entry.error for entry in menu], errors, values))


def _fingerprint(factors: ModelFactors, menus: Menus, images: Inputs, anchors: int, kind: str) -> str:
    digest = hashlib.sha256()
    for tensor in (*factors.model.state_dict().values(), *tree_leaves(images)):
        if isinstance(tensor, Tensor):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    entries = {name: [str(entry.ranks) for entry in menu] for name, menu in menus.items()}
    digest.update(repr((anchors, entries) if kind == "kl" else (anchors, entries, kind)).encode())
    return digest.hexdigest()


def _read_cache(cache: Path, fingerprint: str) -> dict[str, tuple[float, ...]] | None:
    """The cached values; None if there are none, they belong to something else, or the file is damaged."""
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
        if content["fingerprint"] != fingerprint:
            return None
        return {name: tuple(float(value) for value in values) for name, values in content["sensitivity"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
