"""The budget that a target asks for: of the smallest network that loses at most so much, of one that is so much faster.

The smallest network is found by bisection on validation.

A run with fixed budgets ends at the last one that somebody typed. Here the interval between a share of the cost that
loses too much and one that does not is halved, in the logarithm; at each share the candidates are screened and the best
fine-tuned. Everything tried is kept in the run's folder, as with fixed budgets.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .files import read_json, write_text
from .search import MenuCosts

if TYPE_CHECKING:
    from .run import Run

CLOSE = 1.1
"""Budgets whose ratio is below this are one: the cost of the network found is known to a tenth."""

MARGIN, MOST_TIMED = 1.1, 6
"""A speed-up up to a tenth above the one asked for is it; budgets timed at most on the way there."""

MOST_BUDGETS = 7
"""Tried at most: enough to come from the whole dense network to a hundredth of it within a tenth."""


def seek(run: Run, max_loss: float) -> tuple[float, ...]:
    """Move the run's budgets to the smallest one at which a finalist loses at most this much of the validation score.

    Returns:
        the budgets tried, in order; they are the run's from then on.

    Raises:
        ValueError: the task has no score.
    """
    dense = run.dense_validation()
    if dense is None:
        raise ValueError("max_loss needs a score: give evaluate=, or budgets in its place")
    menus, cost = run.price_menus()
    least = MenuCosts.of(run.factorize(), menus, cost).least
    fails, holds = least, 1.0
    tried: list[float] = []
    while len(tried) < MOST_BUDGETS and holds / fails > CLOSE:
        budget = float(f"{(fails * holds) ** 0.5:.3g}")
        if budget in tried or not fails < budget < holds:
            break
        tried.append(budget)
        run.use_budgets(tuple(tried))
        scores = [one.record["val_accuracy"] for one in run.finetune() if one.path and one.record["budget"] <= budget]
        best = max(scores, default=None)
        good = best is not None and best >= dense - max_loss
        said = "no finalist" if best is None else f"validation {best:.4f}"
        run.open_log().info(f"Budget {budget:g}: {said}, dense {dense:.4f}: {'holds' if good else 'loses too much'}")
        fails, holds = (fails, budget) if good else (budget, holds)
    if fails == least and tried:
        run.open_log().info(
            f"No budget lost too much: the search ended at the smallest ranks of the menus ({least:.3g} of the cost), "
            "not where accuracy breaks"
        )
    return tuple(tried)


def budget_of_speedup(speedup: float, measured: Callable[[float], float], least: float, known: Path) -> float:
    """The share of the dense time at which the policy's mode, deployed, is measured to be this many times faster.

    Layers timed one by one do not add up to a network: their maps come in another layout and out of another cache. So
    the budget begins at what they promise, and is moved by what the network does.

    Args:
        measured: budget -> speed-up; no training is needed for it.
        least: the smallest budget there is.
        known: a JSON file; a budget found there is taken as it is, so that a resumed search goes on at the same one.

    Raises:
        ValueError: not even the smallest ranks are so fast.
    """
    if known.exists():
        return read_json(known)["budget"]
    budget, tried = 1 / speedup, {}
    for _ in range(MOST_TIMED):
        budget = max(float(f"{budget:.3g}"), least)
        if budget not in tried:
            tried[budget] = measured(budget)
        if speedup <= tried[budget] <= speedup * MARGIN or (budget == least and tried[budget] < speedup):
            break
        budget *= tried[budget] / (speedup * MARGIN**0.5)
    reached = {budget: found for budget, found in tried.items() if found >= speedup}
    if not reached:
        fastest = max(tried.values())
        raise ValueError(
            f"a speed-up of {speedup:g} cannot be reached: the fastest network tried, at {min(tried):.3f} of the dense "
            f"network's time by its layers, is measured at a speed-up of {fastest:.2f}"
        )
    found = max(reached)
    write_text(known, json.dumps({"speedup": speedup, "budget": found, "tried": tried}, indent=1))
    return found
