"""Candidates: proposed by a policy, screened, promoted, fine-tuned."""

from .clock import StepClock, search_seconds
from .divergence import accuracy, kind_for
from .executor import EXECUTORS, Executor, LocalExecutor
from .finetuning import CONTROL, AcceptanceRule, Finalist, Finetuning
from .policy import MenuCosts, Policy, configuration
from .promotion import (
    epoch_seconds,
    finetune_with,
    promote,
    split_trainer,
    train_control,
)
from .ray_executor import RayExecutor, RaySettings
from .records import Record
from .samplers import SAMPLERS, UPDATE_RATE, make_sampler, search_space, within_budget
from .screening import CandidateFailed, Screener, Screening
from .sensitivity import (
    MOST_SENSITIVITY_IMAGES,
    blended_sensitivity,
    measured_sensitivity,
    proxy_sensitivity,
    sensitivity_images,
)
from .study import GENERATION, Search, SearchSettings
from .trainers import BatchTrainer, CallbackTrainer, Trainer
from .tuning import CalibrationPasses, CalibrationTrainer, for_tuning

__all__ = [
    "CONTROL",
    "EXECUTORS",
    "GENERATION",
    "MOST_SENSITIVITY_IMAGES",
    "SAMPLERS",
    "UPDATE_RATE",
    "AcceptanceRule",
    "BatchTrainer",
    "CalibrationPasses",
    "CalibrationTrainer",
    "CallbackTrainer",
    "CandidateFailed",
    "Executor",
    "Finalist",
    "Finetuning",
    "LocalExecutor",
    "MenuCosts",
    "Policy",
    "RayExecutor",
    "RaySettings",
    "Record",
    "Screener",
    "Screening",
    "Search",
    "SearchSettings",
    "StepClock",
    "Trainer",
    "accuracy",
    "blended_sensitivity",
    "configuration",
    "epoch_seconds",
    "finetune_with",
    "for_tuning",
    "kind_for",
    "make_sampler",
    "measured_sensitivity",
    "promote",
    "proxy_sensitivity",
    "search_seconds",
    "search_space",
    "sensitivity_images",
    "split_trainer",
    "train_control",
    "within_budget",
]
