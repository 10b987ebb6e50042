"""The policy: one categorical pdf per layer over its menu, built from sensitivity and size, solved for a budget.

    pi_l(k) ~ exp(-(alpha s_l(k) + lambda c_l(k)) / T)

s_l(k) is the layer's sensitivity at entry k, c_l(k) its size: the share of the network's cost that the entry keeps.
lambda is solved so that the expected cost meets the budget; T sets how far from its mode the pdf explores. After
screening, the pdf may be pulled towards the elite (cross-entropy method: Rubinstein and Kroese, 2004).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..compress import ModelFactors
from ..configuration import Configuration
from ..ranks import CostMeasure, Menus

Choice = Mapping[str, int]
"""Layer name -> index into its menu."""

TEMPERATURE = 0.25
"""Of the pdf, in multiples of the mean sensitivity per layer; colder proposes little new, hotter wastes candidates."""

LARGEST_LAMBDA = 1e12


@dataclass(frozen=True)
class MenuCosts:
    """Shares of the dense network's cost (1 for the whole dense network).

    Attributes:
        entries: layer name -> cost of each menu entry.
        fixed: what no menu decides about: layers that stay dense.
    """

    entries: Mapping[str, np.ndarray]
    fixed: float

    @classmethod
    def of(cls, factors: ModelFactors, menus: Menus, cost: CostMeasure | None = None) -> MenuCosts:
        cost = cost or CostMeasure()
        entries = {name: np.array([cost.of_entry(entry, factors) for entry in menu]) for name, menu in menus.items()}
        # Layers timed alone may sum to a little more than the network they are in.
        return cls(entries, max(0.0, 1.0 - sum(shares[-1] for shares in entries.values())))

    def of_choice(self, choice: Choice) -> float:
        return self.fixed + sum(self.entries[name][index] for name, index in choice.items())

    @property
    def least(self) -> float:
        """The cost of the cheapest configuration there is."""
        return self.fixed + sum(shares.min() for shares in self.entries.values())

    def check(self, budget: float) -> None:
        """Raise ValueError unless some configuration costs at most `budget`."""
        if not self.least <= budget <= 1:
            raise ValueError(
                f"a budget must lie between {self.least:.4f}, which the smallest menu entries keep of the dense cost, "
                f"and 1; got {budget}"
            )


@dataclass(frozen=True)
class Policy:
    """A pdf over configurations: independent over the layers, categorical over each menu.

    Attributes:
        probabilities: layer name -> pdf over its menu, from the cheapest entry to dense; sums to one.
        sensitivity: layer name -> alpha s_l(k), what a choice is judged by when it must be brought within the budget.
        costs: the costs of the menus' entries.
        budget: share of the dense cost that a sample may keep.
        trade: lambda, the price of cost in units of sensitivity.
        temperature: T, in units of sensitivity.
    """

    probabilities: Mapping[str, np.ndarray]
    sensitivity: Mapping[str, np.ndarray]
    costs: MenuCosts
    budget: float
    trade: float
    temperature: float

    @classmethod
    def solve(
        cls,
        sensitivity: Mapping[str, Sequence[float]],
        costs: MenuCosts,
        budget: float,
        *,
        temperature: float = TEMPERATURE,
        use_sensitivity: bool = True,
        use_size: bool = True,
    ) -> Policy:
        """The policy whose expected cost is `budget`.

        Args:
            temperature: T as a multiple of the mean sensitivity per layer at the best configuration for this budget, so
                that one setting suits every network and budget.
            use_sensitivity: False sets alpha = 0 (ablation): only sizes count.
            use_size: False replaces c_l(k) by the share of the layer's own cost, as if all layers were of one size.

        Raises:
            ValueError: a budget that no configuration meets, a temperature that is not positive.
        """
        costs.check(budget)
        if not temperature > 0:
            raise ValueError(f"temperature must be positive; got {temperature}")
        names = list(costs.entries)
        s = {name: np.asarray(sensitivity[name], float) * use_sensitivity for name in names}
        sizes = costs.entries if use_size else {n: c / c.max() / len(names) for n, c in costs.entries.items()}
        _, coldest = _solve_trade(s, sizes, costs, budget, 0.0)
        scale = sum(float(s[name] @ coldest[name]) for name in names) / len(names)
        absolute = temperature * scale if scale > 0 else 1.0
        trade, probabilities = _solve_trade(s, sizes, costs, budget, absolute)
        return cls(probabilities, s, costs, budget, trade, absolute)

    def expected_cost(self) -> float:
        """Mean share of the dense cost over the pdf."""
        return _expected_cost(self.probabilities, self.costs)

    def mode(self) -> dict[str, int]:
        """The most probable configuration, brought within the budget."""
        return self.repaired({name: int(p.argmax()) for name, p in self.probabilities.items()})

    def sample(self, generator: np.random.Generator) -> dict[str, int]:
        """One configuration drawn from the pdf and brought within the budget."""
        drawn = {name: int(generator.choice(len(p), p=p)) for name, p in self.probabilities.items()}
        return self.repaired(drawn)

    def repaired(self, choice: Choice) -> dict[str, int]:
        """The choice brought to the budget, step by step along the menus: down where a step costs the least
        sensitivity per cost saved, then up where it gains the most and still fits. Without any sensitivity it goes up
        where the layer keeps the least share of its own cost.
        """
        choice = dict(choice)
        while self.costs.of_choice(choice) > self.budget:
            steps = self._steps(choice, -1)
            name = min(steps, key=lambda n: steps[n][0] / max(steps[n][1], 1e-15))
            choice[name] -= 1
        while True:
            room = self.budget - self.costs.of_choice(choice)
            fitting = {name: step for name, step in self._steps(choice, 1).items() if step[1] <= room}
            gains = {name: loss / max(cost, 1e-15) for name, (loss, cost) in fitting.items()}
            if not any(s.any() for s in self.sensitivity.values()):
                kept = {name: self.costs.entries[name][choice[name]] for name in fitting}
                gains = {name: self.costs.entries[name][-1] / max(kept[name], 1e-15) for name in fitting}
            name = max(gains, key=gains.get, default=None)
            if name is None or gains[name] <= 0:
                return choice
            choice[name] += 1

    def _steps(self, choice: Choice, direction: int) -> dict[str, tuple[float, float]]:
        """Layer -> (change of sensitivity, change of cost), both as positive numbers, of one step along its menu."""
        steps = {}
        for name, index in choice.items():
            other = index + direction
            if 0 <= other < len(self.costs.entries[name]):
                loss = abs(self.sensitivity[name][other] - self.sensitivity[name][index])
                steps[name] = (loss, abs(self.costs.entries[name][other] - self.costs.entries[name][index]))
        return steps

    def updated(self, elite: Sequence[Choice], rate: float = 0.5) -> Policy:
        """The pdf pulled towards the choices of the elite: (1 - rate) pi + rate * their frequencies.

        Raises:
            ValueError: unless 0 <= rate <= 1.
        """
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be in [0, 1]; got {rate}")
        if not elite:
            return self
        pulled = {}
        for name, p in self.probabilities.items():
            counts = np.bincount([choice[name] for choice in elite], minlength=len(p))
            pulled[name] = (1 - rate) * p + rate * counts / counts.sum()
        return replace(self, probabilities=pulled)

    def loosened(self, layers: int = 1) -> Policy:
        """The pdf mixed with the even one, so that a draw departs from it in about this many layers."""
        share = min(1.0, layers / len(self.probabilities))
        mixed = {name: (1 - share) * p + share / len(p) for name, p in self.probabilities.items()}
        return replace(self, probabilities=mixed)

    def entropy(self) -> float:
        """Mean entropy per layer in nats: 0 when the policy has made up its mind."""
        return float(np.mean([-(p[p > 0] * np.log(p[p > 0])).sum() for p in self.probabilities.values()]))

    def __str__(self) -> str:
        """A table: each layer's mode and the probabilities along its menu, from the cheapest entry to dense."""
        width = max(map(len, self.probabilities))
        lines = [
            f"{name:<{width}}  mode {int(p.argmax()) + 1:>2}/{len(p):<2}  " + " ".join(f"{x:.2f}" for x in p)
            for name, p in self.probabilities.items()
        ]
        head = (
            f"budget {self.budget:.3f}  lambda {self.trade:.4g}  T {self.temperature:.3g}  entropy {self.entropy():.2f}"
        )
        return "\n".join([head, *lines])


def configuration(menus: Menus, choice: Choice) -> Configuration:
    """The rank configuration that a choice stands for; dense layers are left out."""
    picked = {name: menus[name][index].ranks for name, index in choice.items()}
    return Configuration({name: ranks for name, ranks in picked.items() if ranks is not None})


def _solve_trade(
    sensitivity: Mapping[str, np.ndarray],
    sizes: Mapping[str, np.ndarray],
    costs: MenuCosts,
    budget: float,
    temperature: float,
) -> tuple[float, dict[str, np.ndarray]]:
    """The smallest lambda whose pdf costs at most the budget in the mean, by bisection on its logarithm."""
    low, high = 1e-12, LARGEST_LAMBDA
    if _expected_cost(found := _pdf(sensitivity, sizes, 0.0, temperature), costs) <= budget:
        return 0.0, found
    for _ in range(100):
        middle = float(np.sqrt(low * high))
        found = _pdf(sensitivity, sizes, middle, temperature)
        low, high = (low, middle) if _expected_cost(found, costs) <= budget else (middle, high)
    return high, _pdf(sensitivity, sizes, high, temperature)


def _pdf(
    sensitivity: Mapping[str, np.ndarray], sizes: Mapping[str, np.ndarray], trade: float, temperature: float
) -> dict[str, np.ndarray]:
    """Per layer, the softmax of -(s + lambda c) / T; at T = 0 all mass on the smallest."""
    result = {}
    for name, s in sensitivity.items():
        objective = s + trade * sizes[name]
        objective = objective - objective.min()
        weights = np.exp(-objective / temperature) if temperature > 0 else (objective == 0).astype(float)
        result[name] = weights / weights.sum()
    return result


def _expected_cost(probabilities: Mapping[str, np.ndarray], costs: MenuCosts) -> float:
    return costs.fixed + sum(float(p @ costs.entries[name]) for name, p in probabilities.items())
