"""The plan of an experiment: words for people, and one block of JSON that the program follows."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depict_hf.configuration_depict import DECODER_TYPES
from depict_hf.labels import class_names

from ...recipe import DataSection, EvaluationSection, HardwareSection, ModelSection, OptimizationSection, Recipe

SETTINGS = re.compile(r"^## Settings\s*```json\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DatasetPlan:
    """What is planned for one data set.

    Args:
        squares_per_image: Squares of the pool that come from each training image.
        class_names: Data set whose names `depict_hf.labels.class_names` knows, or None where the data name their own.
    """

    squares_per_image: int
    class_names: str | None

    @property
    def known_names(self) -> list[str] | None:
        """Class names, where the data do not name them."""
        return None if self.class_names is None else list(class_names(self.class_names))


@dataclass(frozen=True)
class NoisePlan:
    """Noise on the decoder's attention parameters.

    Args:
        relative: Deviations as shares of the root mean square of each matrix.
        absolute: Deviations.
        draws: Draws of the noise at every level.
        images: Test images that each draw is evaluated on, evenly spaced.
    """

    relative: tuple[float, ...]
    absolute: tuple[float, ...]
    draws: int
    images: int


@dataclass(frozen=True)
class Plan:
    """Settings of all runs and tests, as a plan's block of JSON gives them.

    Args:
        encoder: Path or Hub name of the pretrained encoder.
        moving_blocks: Blocks of the encoder, counted from its end, that are trained.
        datasets: By name, what is planned for each data set.
        size, crop_size: Pixels of the photographs' shorter side, and of squares and windows.
        scale_range: Bounds of the random scale of training squares.
        batch_size: Squares of an optimiser step.
        encoder_rate: Learning rate of the encoder's last block.
        encoder_layer_decay: The rate of each block, as a share of the next one's.
        scale_rate_factor, weight_decay, warmup_steps, max_grad_norm: As in a recipe.
        learning_rates: By decoder, the rates that are tried.
        trial_seed: Seed of the trials.
        seeds: Seeds that are compared.
        resamples: Of the bootstrap.
        level: Of the tests, after correction.
        margins: Smallest differences that matter: `accuracy`, of the mIoU, and `robustness`, of the retained share.
        noise: Noise of the robustness hypotheses.
    """

    encoder: str
    moving_blocks: int
    datasets: Mapping[str, DatasetPlan]
    size: int
    crop_size: int
    scale_range: tuple[float, float]
    batch_size: int
    encoder_rate: float
    encoder_layer_decay: float
    scale_rate_factor: float
    weight_decay: float
    warmup_steps: int
    max_grad_norm: float
    learning_rates: Mapping[str, tuple[float, ...]]
    trial_seed: int
    seeds: tuple[int, ...]
    resamples: int
    level: float
    margins: Mapping[str, float]
    noise: NoisePlan

    def __post_init__(self):
        unknown = sorted(set(self.learning_rates) - set(DECODER_TYPES))
        if unknown:
            raise ValueError(f"Got decoders {unknown}, needed some of {', '.join(DECODER_TYPES)}.")
        trials = {len(rates) for rates in self.learning_rates.values()}
        if len(trials) != 1 or 0 in trials:
            raise ValueError(f"Got {sorted(trials)} learning rates for different decoders, needed as many for each.")
        if self.trial_seed in self.seeds:
            raise ValueError(f"Got seed {self.trial_seed} for trials and for what is compared, needed another one.")
        if len(set(self.seeds)) < len(self.seeds) or len(self.seeds) < 2:
            raise ValueError(f"Got seeds {list(self.seeds)}, needed at least two, each once.")
        if set(self.margins) != {"accuracy", "robustness"}:
            raise ValueError(f"Got margins {sorted(self.margins)}, needed accuracy and robustness.")

    @property
    def digest(self) -> str:
        """A short name of all settings."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def recipe(
        self, decoder_type: str, learning_rate: float, seed: int, backbone: str | None, names: Sequence[str]
    ) -> Recipe:
        """Return the recipe of one run.

        Args:
            backbone: Where the encoder lies, if not where the plan says.
            names: Class names of the data.
        """
        return Recipe(
            name=f"claims_{decoder_type}",
            data=DataSection(
                class_names=tuple(names),
                image_mean=MEAN,
                image_std=STD,
                size=self.size,
                crop_size=self.crop_size,
                scale_range=self.scale_range,
            ),
            model=ModelSection(
                backbone=backbone or self.encoder,
                decoder_type=decoder_type,
                freeze_encoder=False,
            ),
            optimization=OptimizationSection(
                epochs=1,
                batch_size=self.batch_size,
                learning_rate=learning_rate,
                encoder_rate_factor=self.encoder_rate / learning_rate,
                encoder_layer_decay=self.encoder_layer_decay,
                scale_rate_factor=self.scale_rate_factor,
                weight_decay=self.weight_decay,
                schedule="cosine",
                final_learning_rate=0.0,
                warmup_steps=self.warmup_steps,
                max_grad_norm=self.max_grad_norm,
                seed=seed,
            ),
            evaluation=EvaluationSection(window_size=self.crop_size, window_stride=self.crop_size),
            hardware=HardwareSection(precision="bf16", num_workers=0),
        )


def read_plan(path: Path) -> Plan:
    """Read the settings of a plan.

    Args:
        path: A Markdown file with a section "Settings" that begins with a block of JSON.

    Raises:
        OSError: If there is no such file.
        ValueError: If it has no such block, or fields are missing, unknown or contradict each other.
    """
    found = SETTINGS.search(path.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f'{path} has no section "Settings" with a block of JSON; see model_cards/claims/PLAN.md.')
    try:
        values = json.loads(found[1])
    except json.JSONDecodeError as error:
        raise ValueError(f"The settings in {path} are no JSON: {error}.") from error
    known = {each.name for each in dataclasses.fields(Plan)}
    if set(values) != known:
        missing, extra = sorted(known - set(values)), sorted(set(values) - known)
        raise ValueError(f"The settings in {path} lack {missing} and have the unknown {extra}.")
    datasets = {name: DatasetPlan(**each) for name, each in values["datasets"].items()}
    rates = {name: tuple(each) for name, each in values["learning_rates"].items()}
    noise = NoisePlan(**_tuples(values["noise"]))
    return Plan(**_tuples(values) | {"datasets": datasets, "learning_rates": rates, "noise": noise})


def steps_of(plan: Plan, num_squares: int) -> int:
    """Return the optimiser steps of a run: every square once, an incomplete last batch left out."""
    return num_squares // plan.batch_size


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(each) if isinstance(each, list) else each for name, each in values.items()}
