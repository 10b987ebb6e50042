"""One run on a named network and data set, as the notebooks show it.

experiment = Experiment(preset("quick", "resnet18"))
experiment.prepare_baseline()
experiment.factorize()
experiment.screen()
experiment.finetune()
experiment.deploy()
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .data import Dataset, load
from .deployed_set import DeployedSet
from .finetune import Baseline, baseline, evaluate, given_baseline, recipe
from .presets import RunSettings
from .run import Run, step
from .search import Screener, Trainer, split_trainer

__all__ = ["DeployedSet", "Experiment"]


class Experiment(Run):
    """The steps of one run; see `Run` for those that are not special to a named network.

    Args:
        settings: see `RunSettings`.
        progress: show progress bars.
    """

    settings: RunSettings

    @property
    def device(self) -> torch.device:
        s = self.settings
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if s.device == "auto" else s.device)

    @step
    def load_data(self) -> Dataset:
        """The splits, on the device."""
        s = self.settings
        return load(
            s.dataset,
            s.data_root,
            image_size=s.image_size,
            seed=s.split_seed,
            device=self.device,
            train_limit=s.train_limit,
        )

    @step
    def prepare_baseline(self) -> Baseline:
        """The trained dense network: loaded, or trained now if there is no checkpoint of it (it says which); without
        epochs to train it, the given weights as they are."""
        s, dataset = self.settings, self.load_data()
        if s.baseline_epochs == 0:
            return given_baseline(s.model, dataset, s.weights)
        train = recipe(s.model, pretrained=s.weights != "none", train_images=len(dataset.train))
        train = replace(train, epochs=s.baseline_epochs, val_images=s.val_images, seed=s.split_seed)
        return baseline(s.model, dataset, train, weights=s.weights, folder=Path(s.baselines), progress=self.progress)

    def dense_model(self) -> nn.Module:
        return self.prepare_baseline().model

    def dense_score(self) -> float:
        return self.prepare_baseline().test_accuracy

    def final_score(self, model: nn.Module) -> float:
        return evaluate(model, self.load_data().test).accuracy

    def validate_dense(self) -> float:
        return self.prepare_baseline().val_accuracy

    @step
    def draw_calibration(self) -> Tensor:
        """Training images `(N, C, H, W)` for moments, batch norm and biases; never validation or test."""
        train = self.load_data().train
        return train.sample(min(self.settings.calibration_images, len(train)), self.settings.seed)

    @step
    def make_screener(self) -> Screener:
        """What compresses a configuration and says what it is worth."""
        factors, calibration = self.factorize(), self.draw_calibration()
        return Screener(factors, calibration, self.load_data().val, limit=self.settings.screen_images)

    @step
    def make_trainer(self) -> Trainer:
        """Trains by the model's recipe, distilling from the dense network; tests once, on test."""
        s, dataset = self.settings, self.load_data()
        recipe = s.finetune_recipe(len(dataset.train))
        return split_trainer(self.dense_model(), dataset, recipe, s.model, s.state_folder, progress=self.progress)

    def header(self) -> dict[str, Any]:
        s = self.settings
        used = self.prepare_baseline()
        return {
            "model": s.model,
            "dataset": s.dataset,
            "image_size": s.image_size,
            "preset": s.preset,
            "baseline_checkpoint": used.checkpoint.name,
            "baseline_fingerprint": used.fingerprint,
        }
