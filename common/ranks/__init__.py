"""Which ranks: menus, and the classic rules."""

from .menus import CostMeasure, MenuEntry, Menus, build_menus, rank_grid
from .rules import RULES, energy, meet_budget, uniform, vbmf, worthwhile
from .timed_menus import time_menus

__all__ = [
    "RULES",
    "CostMeasure",
    "MenuEntry",
    "Menus",
    "build_menus",
    "energy",
    "meet_budget",
    "rank_grid",
    "time_menus",
    "uniform",
    "vbmf",
    "worthwhile",
]
