"""Training, evaluation, dense baselines."""

from .baselines import SAVED_MODELS, Baseline, baseline, train_baseline
from .evaluation import check_head, evaluate, predict_logits, teacher_logits
from .settings import UNNORMALISED, TrainSettings, recipe
from .state import StateMismatch
from .training import EpochRecord, TrainingDiverged, train

__all__ = [
    "SAVED_MODELS",
    "UNNORMALISED",
    "Baseline",
    "EpochRecord",
    "StateMismatch",
    "TrainSettings",
    "TrainingDiverged",
    "baseline",
    "check_head",
    "evaluate",
    "predict_logits",
    "recipe",
    "teacher_logits",
    "train",
    "train_baseline",
]
