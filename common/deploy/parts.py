"""A batch in parts: each runs through the whole network on one thread, as many at a time as there are threads.

Where all threads work on one batch, every layer reads feature maps that other cores have made, and waits for the last
of them. A part stays on its core, and a small one in that core's cache. Networks of few FLOPs, which wait for memory
and for one another, gain most by it; dense ones, whose classifiers' weights are read anew for every part, may lose.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..compress.proof import output_tensors, outputs_differ
from ..inputs import Inputs, joined, length, split
from .runtimes import Run, Session

SMALL_PART = 2
"""Samples of a part that is to stay in a core's cache, and still does more than one row of each matrix product."""


def in_parts(call: Run, size: int, threads: int) -> Run:
    """A function of a batch that deals parts of `size` samples to threads, and joins what they put out, in order.

    call: of a part; may be called from several threads at once, and has the batch as the first axis of all it puts out.
    """
    pool = ThreadPoolExecutor(threads)

    def dealt(inputs: Inputs) -> Any:
        return joined(pool.map(call, split(inputs, size)))

    return dealt


def part_sizes(batch: int, threads: int) -> list[int]:
    """Sizes of parts that are worth trying: small ones, and a part for each thread."""
    share = -(-batch // threads)
    return [size for size in dict.fromkeys((min(share, SMALL_PART), share)) if size < batch]


def ways(session: Session, example: Inputs, threads: int, most: float | None) -> dict[int | None, Run]:
    """Size of the parts -> what runs a batch in them; last None, the whole batch: in the order of preference.

    Parts are preferred where they are as fast: on processors of several dies what works on a batch whole depends on
    where the system puts its threads (`benchmarks/parts.py`), and parts hardly do. A network that looks at the samples
    of a batch together puts out something else in parts, and stays whole.

    Args:
        most: by how much outputs may differ and be the same, see `outputs_differ`.
    """
    sizes = part_sizes(length(example), threads)
    if not sizes:
        return {None: session.call}
    alone, expected = session.alone(), session(example)
    parted = {size: in_parts(alone, size, threads) for size in sizes}
    same = {size: run for size, run in parted.items() if _same(expected, run, example, most)}
    return same | {None: session.call}


def _same(expected: Any, run: Run, example: Inputs, most: float | None) -> bool:
    try:
        found = run(example)
    except (ValueError, RuntimeError):  # a graph of one batch size, or outputs that cannot be joined
        return False
    return outputs_differ(output_tensors(expected), output_tensors(found), most=most) is None
