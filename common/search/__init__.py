"""Candidates: proposed by a policy, screened, promoted, fine-tuned."""

from .clock import StepClock, search_seconds
from .policy import MenuCosts, Policy, configuration
from .promotion import Finalist, FinetuneSettings, epoch_seconds, finetune_promoted, promote
from .records import Record
from .samplers import SAMPLERS, UPDATE_RATE, make_sampler, search_space, within_budget
from .screening import CandidateFailed, Screener, Screening
from .sensitivity import blended_sensitivity, measured_sensitivity, proxy_sensitivity
from .study import Search, SearchSettings

__all__ = [
    "SAMPLERS",
    "UPDATE_RATE",
    "CandidateFailed",
    "Finalist",
    "FinetuneSettings",
    "MenuCosts",
    "Policy",
    "Record",
    "Screener",
    "Screening",
    "Search",
    "SearchSettings",
    "StepClock",
    "blended_sensitivity",
    "configuration",
    "epoch_seconds",
    "finetune_promoted",
    "make_sampler",
    "measured_sensitivity",
    "promote",
    "proxy_sensitivity",
    "search_seconds",
    "search_space",
    "within_budget",
]
