"""Every knob of a run in one record, and the presets that set them: quick, cpu and full."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any

from pydantic import Field

from .checked import check_fields, from_text
from .finetune import UNNORMALISED, TrainSettings, recipe
from .knobs import SearchKnobs
from .models import canonical_name, check_image_size

PRESETS = ("quick", "cpu", "full")
"""quick: scikit-learn's digits, minutes on a laptop · cpu: MNIST, about an hour on two cores ·
full: 224 px on a GPU."""


@dataclass(frozen=True)
class RunSettings(SearchKnobs):
    """Everything that a run on a named network and data set depends on; see also `SearchKnobs`.

    Attributes:
        model: architecture or family: resnet18, vgg16, alexnet, or any torchvision classification CNN.
        dataset: digits, mnist, fashion-mnist, cifar10, folder:PATH.
        image_size: height and width in pixels.
        preset: the preset this came from, for the log.
        data_root: where the data set lies; None: $HTD_DATA, else data.
        weights: what the baseline starts from: imagenet, none, or the path of a checkpoint.
        train_limit: stratified subset of the training images used, None for all.
        baseline_epochs: of the dense network, when it has to be trained; 0: `weights`, a trained checkpoint, as it is.
        val_images: validation images evaluated after each epoch of training but the last, None for all; they give up
            candidates half-way. What losses are counted by is of all validation images.
        finetune_epochs: at most; 3 is the protocol's limit.
        split_seed: of the validation split, the training subset and the baseline's training. Runs that differ in `seed`
            alone share it: what one of them validates on was never trained on by their common baseline.
        baselines: where checkpoints of dense networks lie.
        control: see `SearchKnobs`; part of the protocol here.
    """

    model: str
    dataset: Annotated[str, Field(min_length=1, description="the name of a data set, or folder:PATH")]
    image_size: Annotated[int, Field(ge=8, le=4096, description="8 to 4096 pixels")]
    preset: str = "custom"
    data_root: str | None = None
    weights: Annotated[str, Field(min_length=1, description="none, imagenet or the path of a checkpoint")] = "none"
    train_limit: Annotated[int | None, Field(ge=1, description="a number of images, at least 1, or None")] = None
    baseline_epochs: Annotated[int, Field(ge=0, le=10_000, description="a number of epochs, 0 to 10000")] = 3
    val_images: Annotated[int | None, Field(ge=1, description="a number of images, at least 1, or None")] = None
    finetune_epochs: Annotated[int, Field(ge=1, le=3, description="1 to 3 epochs")] = 3
    split_seed: Annotated[int, Field(ge=0, lt=2**32, description="a whole number from 0 to 4294967295")] = 0
    baselines: str = "finetuned/saved_models"
    control: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", canonical_name(self.model))
        budgets = from_text(self.budgets)
        object.__setattr__(self, "budgets", tuple(budgets) if isinstance(budgets, list | tuple) else budgets)
        check_fields(self)
        self.check_int8()
        check_image_size(self.model, self.image_size)
        if self.baseline_epochs == 0 and self.weights in ("none", "imagenet"):
            raise ValueError(
                f"baseline_epochs=0 takes a trained network as it is: weights must be its path, got {self.weights!r}"
            )

    @property
    def name(self) -> str:
        """What the run's log and folder are called."""
        dataset = self.dataset.removeprefix("folder:").strip("/").replace("/", "-")
        return f"{self.model}-{dataset}-{self.image_size}-{self.preset}-seed{self.seed}"

    def finetune_recipe(self, train_images: int) -> TrainSettings:
        """How candidates are fine-tuned: the baseline's recipe, gentler, with distillation and without augmentation.

        The teacher's outputs are computed once, for the images as they are: they are no target for shifted ones.
        """
        settings = recipe(self.model, train_images=train_images)
        gentler = 1.0 if self.model in UNNORMALISED else 0.4
        return replace(
            settings,
            epochs=self.finetune_epochs,
            val_images=self.val_images,
            learning_rate=settings.learning_rate * gentler,
            weight_decay=1e-4,
            augment=False,
            distill_weight=0.8,
            seed=self.seed,
        )


_IMAGE_SIZES = {
    "quick": {"alexnet": 64},
    "cpu": {"alexnet": 224},
    "full": {},
}
_DEFAULT_SIZE = {"quick": 32, "cpu": 32, "full": 224}

CLASSIFIER_HEAVY = ("alexnet", "vgg")
"""Networks whose parameters sit in the classifier and whose FLOPs in the convolutions: both count as cost."""

LARGE_FROM = 64
"""Image side from which two cores need fewer images of everything to be done within the hour."""


def preset(name: str, model: str, **overrides: Any) -> RunSettings:
    """The settings of a preset for a model; overrides that are None leave the preset's value.

    Raises:
        ValueError: an unknown preset, model or knob, or a value out of its range.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
    known = {field.name for field in fields(RunSettings)}
    if unknown := set(overrides) - known:
        raise ValueError(f"unknown knob {sorted(unknown)[0]!r}; there are {', '.join(sorted(known))}")
    overrides = {key: value for key, value in overrides.items() if value is not None}
    model = canonical_name(model)
    size = overrides.get("image_size", _IMAGE_SIZES[name].get(model, _DEFAULT_SIZE[name]))
    make = {"quick": _quick, "cpu": _cpu, "full": _full}[name]
    settings = make(model, size)
    if model.startswith(CLASSIFIER_HEAVY):
        settings = replace(settings, cost="mix")
    return replace(settings, preset=name, **overrides)


def _quick(model: str, size: int) -> RunSettings:
    heavy = model.startswith(CLASSIFIER_HEAVY)
    return RunSettings(
        model,
        "digits",
        size,
        # Steps of the large classifiers are slow whatever the batch; without batch norm it takes more passes.
        train_limit=640 if heavy else None,
        baseline_epochs=8 if heavy else 6,
        budgets=(0.30, 0.15),
        candidates=6,
        calibration_images=128 if heavy else 512,
        screen_images=140 if heavy else 256,
        promote=1,
        finetune_epochs=2,
    )


def _cpu(model: str, size: int) -> RunSettings:
    settings = RunSettings(model, "mnist", size, budgets=(0.20, 0.10, 0.05), promote=1)
    if size >= LARGE_FROM or model != "resnet18":
        limit = 12_000 if model == "alexnet" else 8_000
        # Fewer than CALIBRATION_IMAGES: every candidate is fitted on them, and at this size that takes the hours.
        images = {"calibration_images": 512, "screen_images": 512, "val_images": 1000}
        settings = replace(settings, train_limit=limit, baseline_epochs=4, **images)
    return settings


def _full(model: str, size: int) -> RunSettings:
    return RunSettings(model, "mnist", size, weights="imagenet", latency_batch=64, runtime="torch")
