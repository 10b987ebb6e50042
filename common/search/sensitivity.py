"""How much the network's output suffers when one layer alone is compressed: the first of the policy's two heuristics.

Three measures, all per menu entry and zero for dense: the *proxy* is the relative error of the layer's own output, free
of charge; the *measured* one is the KL divergence of the network's output from the dense network's, on calibration
images; the *blended* one is their geometric mean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..compress import ModelFactors, Targets, reconstructed_outputs
from ..files import write_text
from ..inputs import Inputs, channels_last, first, length, run
from ..modules import copy_with, hooked, laid_out
from ..progress import progress_bar
from ..ranks import MenuEntry, Menus
from .divergence import Reference
from .prefix import Prefix, Unrepeatable

ANCHORS = 5
"""Entries of each menu whose divergence is measured."""

MOST_SENSITIVITY_IMAGES = 256
"""There is one pass per measured entry: more images than these, or than a quarter of the calibration images, cost more
than they tell."""

SAME = 1e-6
"""Divergence from rounding alone."""

Sensitivities = Mapping[str, tuple[float, ...]]
"""Layer name -> one number >= 0 per entry of its menu, falling with the error; 0 for dense."""


def sensitivity_images(calibration: Inputs) -> Inputs:
    """The calibration images that sensitivities are measured on: a quarter of them, at most MOST_SENSITIVITY_IMAGES."""
    return first(calibration, min(MOST_SENSITIVITY_IMAGES, -(-length(calibration) // 4)))


def proxy_sensitivity(menus: Menus) -> dict[str, tuple[float, ...]]:
    """The relative squared error of the layer's output, as it stands in the menus."""
    return {name: tuple(entry.error for entry in menu) for name, menu in menus.items()}


def measured_sensitivity(
    factors: ModelFactors,
    menus: Menus,
    images: Inputs,
    *,
    anchors: int = ANCHORS,
    kind: str = "kl",
    cache: Path | None = None,
    progress: bool = True,
    spread: Callable[[Menus, Inputs, str, int], dict[str, dict[int, float]]] | None = None,
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
        spread: in place of `divergences` in this process: the same, of workers.
    """
    fingerprint = _fingerprint(factors, menus, images, anchors, kind)
    if cache is not None and (known := _read_cache(cache, fingerprint)) is not None:
        return known
    if spread is not None:
        found = spread(menus, images, kind, anchors)
    else:
        found = divergences(factors, menus, images, kind, anchors, progress=progress)
    result = {name: _interpolated(menu, found[name]) for name, menu in menus.items()}
    if cache is not None:
        write_text(cache, json.dumps({"fingerprint": fingerprint, "sensitivity": result}, indent=1))
    return result


def divergences(
    factors: ModelFactors,
    menus: Menus,
    images: Inputs,
    kind: str,
    anchors: int,
    *,
    whole: bool = False,
    progress: bool = True,
) -> dict[str, dict[int, float]]:
    """What `measured_sensitivity` interpolates between: layer -> {index into its menu: divergence}.

    whole: run the whole network for each of them, as is done anyway where its beginning cannot be kept.
    """
    measured = _Measured(factors, menus, Targets.of(factors, channels_last(images)), kind, anchors, progress)
    if whole:
        return measured.from_whole_passes()
    try:
        return measured.from_prefixes()
    except Unrepeatable:
        return measured.from_whole_passes()


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


class _Measured:
    """The divergence at the anchors of each menu: layer -> {index into the menu: divergence}."""

    def __init__(
        self, factors: ModelFactors, menus: Menus, targets: Targets, kind: str, anchors: int, progress: bool
    ) -> None:
        self._factors, self._targets, self._kind, self._progress = factors, targets, kind, progress
        self._work = laid_out(copy_with(factors.model, {}), channels_last=True)
        self._anchors = {name: _anchors(menu, anchors) for name, menu in menus.items()}

    def from_whole_passes(self) -> dict[str, dict[int, float]]:
        with hooked(self._work, {}):
            dense = Reference.of(run(self._work, self._targets.images), self._kind)
        return {name: self._layer(name, self._targets, dense, nullcontext) for name in self._bar(self._anchors)}

    def from_prefixes(self) -> dict[str, dict[int, float]]:
        """Likewise, with what the network computes before the layer computed once.

        Raises:
            Unrepeatable: it cannot be known what that is.
        """
        prefix = Prefix.of(self._work, self._targets.images, [*self._anchors, *self._targets.norms])
        dense, found = Reference.of(prefix.output, self._kind), {}
        for name in self._bar(sorted(self._anchors, key=prefix.starts.__getitem__)):
            prefix.advance(name)
            # What the norms before the layer read has not changed.
            behind = {n: norm for n, norm in self._targets.norms.items() if prefix.starts[n] >= prefix.starts[name]}
            found[name] = self._layer(name, replace(self._targets, norms=behind), dense, prefix.replayed)
        with prefix.replayed():  # up to the last layer: all that is ever kept
            again = dense.distance(reconstructed_outputs(self._work, replace(self._targets, norms={})))
        if not abs(again) < SAME:
            raise Unrepeatable(f"the outputs that came from kept results differ by a divergence of {again}")
        return found

    def _bar(self, names: Iterable[str]) -> Iterable[str]:
        return progress_bar(names, desc="sensitivity", unit="layer", shown=self._progress)

    def _layer(
        self, name: str, targets: Targets, dense: Reference, around: Callable[[], AbstractContextManager]
    ) -> dict[int, float]:
        work, original = self._work, self._work.get_submodule(name)
        device, found = tree_leaves(targets.images)[0].device, {}
        for index, entry in self._anchors[name].items():
            layer = self._factors.layers[name].layer(entry.ranks)
            work.set_submodule(name, laid_out(layer.to(device), channels_last=True))
            try:
                with around():
                    output = reconstructed_outputs(work, targets)
            finally:
                work.set_submodule(name, original)
            divergence = dense.distance(output)
            found[index] = divergence if np.isfinite(divergence) else float(np.finfo(np.float32).max)
        for norm, before in targets.norms.items():
            work.get_submodule(norm).running_mean.copy_(before.running_mean)
            work.get_submodule(norm).running_var.copy_(before.running_variance)
        return found


def _anchors(menu: tuple[MenuEntry, ...], number: int) -> dict[int, MenuEntry]:
    """So many of the menu's compressed entries, evenly spread, the cheapest and the dearest among them."""
    compressed = [entry for entry in menu if entry.ranks is not None]
    picked = sorted({round(i) for i in np.linspace(0, len(compressed) - 1, number)}) if compressed else []
    return {index: compressed[index] for index in picked}


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
