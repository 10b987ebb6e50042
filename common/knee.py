"""The smallest network that loses at most so much: the budget is moved until it is found, by bisection on validation.

A run with fixed budgets ends at the last one that somebody typed. Here the interval between a share of the cost that
loses too much and one that does not is halved, in the logarithm; at each share the candidates are screened and the best
fine-tuned. Everything tried is kept in the run's folder, as with fixed budgets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .search import MenuCosts

if TYPE_CHECKING:
    from .run import Run

CLOSE = 1.1
"""Budgets whose ratio is below this are one: the cost of the network found is known to a tenth."""

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
    fails, holds = MenuCosts.of(run.factorize(), menus, cost).least, 1.0
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
    return tuple(tried)
