"""Training, evaluation, dense baselines."""

from .baselines import SAVED_MODELS, Baseline, baseline, given_baseline, train_baseline
from .evaluation import check_head, evaluate, predict_logits, teacher_logits
from .features import FeatureMaps
from .precision import autocast
from .settings import UNNORMALISED, TrainSettings, recipe
from .state import StateMismatch, TrainState
from .training import EpochRecord, TrainingDiverged, distillation, make_optimizer, train

__all__ = [
    "SAVED_MODELS",
    "UNNORMALISED",
    "Baseline",
    "EpochRecord",
    "FeatureMaps",
    "StateMismatch",
    "TrainSettings",
    "TrainState",
    "TrainingDiverged",
    "autocast",
    "baseline",
    "check_head",
    "distillation",
    "evaluate",
    "given_baseline",
    "make_optimizer",
    "predict_logits",
    "recipe",
    "teacher_logits",
    "train",
    "train_baseline",
]
