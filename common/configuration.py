"""A rank configuration: layer name -> ranks. One frozen type from the draw of a candidate to the file that is shipped.

Text is for the edges: logs and files hold ``layer1.0.conv1:(16, 24, 16), fc:(8)``, and `Configuration.parse` reads it.
Imports nothing heavy, so that the scripts which read logs start at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from types import MappingProxyType

_LAYER = re.compile(r"\s*(?P<name>[^\s:,()]+)\s*:\s*\((?P<ranks>[\d\s,]*)\)\s*(?:,|$)")
_RANKS = re.compile(r"\s*(?:\d+\s*(?:,\s*\d+\s*)*,?\s*)?")

LONGEST_RANK = 20
"""Characters of one rank, spaces included; a layer has no more channels than that."""


@dataclass(frozen=True)
class KernelRanks:
    """HT ranks of a kernel: of the node (in), of the edge between (in, kh) and (kw, out), of the node (out)."""

    rank_in: int
    rank_mid: int
    rank_out: int

    def __str__(self) -> str:
        return f"({self.rank_in}, {self.rank_mid}, {self.rank_out})"


@dataclass(frozen=True)
class MatrixRanks:
    """The one rank of a matrix layer."""

    rank: int

    def __str__(self) -> str:
        return f"({self.rank})"


Ranks = KernelRanks | MatrixRanks


class Configuration(Mapping[str, Ranks]):
    """A frozen mapping of layer names to ranks, in the order in which it was given; a layer without ranks stays dense.

    Two are equal, and of one hash, if they give every layer the same ranks, whatever the order.
    """

    __slots__ = ("_hash", "_ranks")

    def __init__(self, ranks: Mapping[str, Ranks] | None = None) -> None:
        self._ranks = MappingProxyType(dict(ranks or {}))
        self._hash = hash(frozenset(self._ranks.items()))

    def __getitem__(self, layer: str) -> Ranks:
        return self._ranks[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranks)

    def __len__(self) -> int:
        return len(self._ranks)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return dict(self) == dict(other) if isinstance(other, Mapping) else NotImplemented

    def __reduce__(self) -> tuple:
        return Configuration, (dict(self),)

    def __str__(self) -> str:
        """``layer1.0.conv1:(16, 24, 16), fc:(8)``: the form that logs hold; "" for the dense model."""
        return ", ".join(f"{name}:{ranks}" for name, ranks in self.items())

    def __repr__(self) -> str:
        return f"Configuration({self})"

    def as_tuples(self) -> dict[str, tuple[int, ...]]:
        """Layer name -> its ranks as plain numbers, (rank_in, rank_mid, rank_out) or (rank,)."""
        return {name: astuple(ranks) for name, ranks in self.items()}

    @classmethod
    def parse(cls, text: str) -> Configuration:
        """The inverse of `str`.

        Raises:
            ValueError: the text is not a configuration, or a layer has neither three ranks nor one.
        """
        ranks: dict[str, Ranks] = {}
        for name, numbers in parse_config_str(text).items():
            if len(numbers) not in (1, 3):
                raise ValueError(f"layer {name}: a configuration has three ranks or one per layer; got {numbers}")
            ranks[name] = KernelRanks(*numbers) if len(numbers) == 3 else MatrixRanks(*numbers)
        return cls(ranks)


def parse_config_str(text: str) -> dict[str, tuple[int, ...]]:
    """Layer name -> its ranks, from `layer1.0.conv1:(16, 24, 16), fc:(8)`, as any log may hold them.

    Three ranks are (rank_in, rank_mid, rank_out), one is the single inner rank of a linear layer or a 1x1
    convolution, two are the pair of the earlier two-rank scripts, none (`fc:()`) a layer left dense.

    Raises:
        ValueError: the text is not of this form, or names a layer twice.
    """
    config: dict[str, tuple[int, ...]] = {}
    position, end = 0, len(text.rstrip())
    while position < end:
        match = _LAYER.match(text, position)
        if match is None or not _RANKS.fullmatch(match["ranks"]):
            raise ValueError(
                f"cannot read rank configuration at {text[position : position + 40]!r}; "
                "expected 'layer:(rank, ...), layer:(rank, ...)'"
            )
        if match["name"] in config:
            raise ValueError(f"layer {match['name']!r} is named twice in rank configuration {text[:80]!r}")
        if max(map(len, match["ranks"].split(","))) > LONGEST_RANK:
            raise ValueError(f"layer {match['name']!r} has a rank of more than {LONGEST_RANK} digits")
        config[match["name"]] = tuple(int(rank) for rank in match["ranks"].split(",") if rank.strip())
        position = match.end()
    return config


def format_config_str(config: Mapping[str, Sequence[int]]) -> str:
    """The inverse of `parse_config_str`: `layer1.0.conv1:(16, 24, 16), fc:(8)`."""
    return ", ".join(f"{name}:({', '.join(str(int(rank)) for rank in ranks)})" for name, ranks in config.items())
