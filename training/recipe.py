"""`Recipe`: every choice that a training run depends on, in sections, its derived numbers, and overrides of fields."""

import dataclasses
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from depict_hf.configuration_depict import IGNORE_LABEL
from depict_hf.loading import native_dtype, training_device
from depict_hf.ranges import check_class_name, shown

from .data import read_class_names
from .recipe_sections import DataSection, EvaluationSection, HardwareSection, ModelSection, OptimizationSection
from .settings import Section, nearest_name, parse_value, text_of


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that one training run depends on, besides the data and the number of processes.

    Raises:
        ValueError: If a value is out of its range, values contradict each other, or `batch_size` cannot be divided as
            asked.
    """

    name: str
    data: DataSection
    model: ModelSection
    optimization: OptimizationSection
    evaluation: EvaluationSection = dataclasses.field(default_factory=EvaluationSection)
    hardware: HardwareSection = dataclasses.field(default_factory=HardwareSection)

    def __post_init__(self) -> None:
        data, model, optimization = self.data, self.model, self.optimization
        if not data.class_names:
            raise ValueError("Got no class_names; give one for each class, in the order of the ids.")
        if len(set(data.class_names)) != len(data.class_names) or not all(name.strip() for name in data.class_names):
            raise ValueError("Got class_names of which some are empty or the same; give each class a name of its own.")
        for name in data.class_names:
            check_class_name(name)
        if len(data.class_names) > IGNORE_LABEL:
            raise ValueError(
                f"Got {len(data.class_names)} class_names, needed at most {IGNORE_LABEL}: labels travel as bytes, of "
                f"which {IGNORE_LABEL} means ignored; merge or leave out classes."
            )
        if data.cache_features and self.hardware.gradient_checkpointing:
            raise ValueError(
                "Got gradient_checkpointing with cache_features, where no encoder has activations to save; leave "
                "gradient_checkpointing out."
            )
        if min(data.image_std) <= 0:
            raise ValueError(
                f"Got image_std={data.image_std}, needed positive deviations, which values are divided by."
            )
        if optimization.class_weights is not None and min(optimization.class_weights) < 0:
            raise ValueError(f"Got class_weights={shown(optimization.class_weights)}, needed none below 0.")
        self._check_windows()
        if not 0 < data.scale_range[0] <= data.scale_range[1]:
            raise ValueError(f"Got scale_range={data.scale_range}, needed two positive ratios, the smaller one first.")
        if data.cache_features and not model.freeze_encoder:
            raise ValueError("Got cache_features=True with freeze_encoder=False; freeze the encoder or do not cache.")
        if model.lora_rank and model.freeze_encoder:
            raise ValueError(
                f"Got lora_rank={model.lora_rank} with freeze_encoder=True; pass freeze_encoder=false (and "
                "cache_features=false): everything of the encoder but its adapters is frozen then."
            )
        if data.streaming and (data.cache_features or optimization.class_balance):
            raise ValueError("Got streaming with cache_features or class_balance, which read all images at the start.")
        if optimization.class_weights is not None and optimization.class_balance:
            raise ValueError("Got class_weights and class_balance; give one of them.")
        if optimization.class_weights is not None and len(optimization.class_weights) != len(data.class_names):
            raise ValueError(
                f"Got {len(optimization.class_weights)} class_weights for {len(data.class_names)} classes; give one "
                "for each."
            )
        if optimization.final_learning_rate > optimization.learning_rate:
            raise ValueError(
                f"Got final_learning_rate={optimization.final_learning_rate}, needed 0 to "
                f"learning_rate={optimization.learning_rate}."
            )
        self.images_per_pass(num_processes=1)

    def _check_windows(self) -> None:
        """Refuse strides that leave pixels out."""
        evaluation = self.evaluation
        window = evaluation.window_size
        for name in ("window_stride", "final_window_stride"):
            stride = getattr(evaluation, name)
            # A window may still be to come; the model's configuration refuses a stride without one.
            if stride is None or window is None:
                continue
            if stride > window:
                raise ValueError(
                    f"Got {name}={stride} for a window_size of {window}, needed at most that, or pixels are left out; "
                    "lower the stride or enlarge the window."
                )

    def images_per_pass(self, num_processes: int) -> int:
        """Return the images in one forward pass of each of `num_processes` processes.

        Raises:
            ValueError: If `batch_size` does not divide evenly.
        """
        batch_size, accumulation_steps = self.optimization.batch_size, self.optimization.accumulation_steps
        passes = num_processes * accumulation_steps
        if batch_size % passes:
            raise ValueError(
                f"Got batch_size={batch_size} for {num_processes} processes with "
                f"accumulation_steps={accumulation_steps}, needed a multiple of {passes}; change one of them."
            )
        return batch_size // passes

    def steps_per_epoch(self, num_images: int) -> int:
        """Return the optimiser steps in a pass over `num_images`; a last incomplete batch is left out.

        Raises:
            ValueError: If there are fewer images than one batch.
        """
        batch_size = self.optimization.batch_size
        if num_images < batch_size:
            raise ValueError(
                f"Got {num_images} training images, needed at least one batch of {batch_size}; lower batch_size."
            )
        return num_images // batch_size

    def value(self, name: str) -> Any:
        """Return the value of the field that `find_field` finds."""
        section, field = find_field(name)
        return getattr(getattr(self, section), field.name)

    def replace(self, **changes: Any) -> "Recipe":
        """Return the recipe with other values: of fields, by their short names, or its `name`.

        Raises:
            ValueError: If there is no such field, or a value is out of its range.
        """
        top = {"name": changes.pop("name")} if "name" in changes else {}
        by_section: dict[str, dict[str, Any]] = {}
        for name, value in changes.items():
            section, field = find_field(name)
            by_section.setdefault(section, {})[field.name] = value
        sections = {
            section: dataclasses.replace(getattr(self, section), **values) for section, values in by_section.items()
        }
        return dataclasses.replace(self, **top, **sections)

    def override(self, assignments: Sequence[str]) -> "Recipe":
        """Return the recipe with fields replaced as texts say: `section.field=value`, or `field=value`.

        Tuples are separated by commas; None is "none".

        Raises:
            FileNotFoundError: If names of classes are to be read from a file that is not there.
            ValueError: If a text is no assignment, or a field is unknown or its value of another type.
        """
        changes: dict[str, Any] = {}
        for assignment in assignments:
            name, separator, text = assignment.partition("=")
            if not separator:
                raise ValueError(f"Got {shown(assignment)}, needed field=value.")
            section, field = find_field(name)
            if field.name == "class_names" and Path(text).suffix in (".json", ".txt"):
                changes[field.name] = read_class_names(Path(text))
            else:
                hint = typing.get_type_hints(SECTIONS[section])[field.name]
                changes[field.name] = parse_value(name, text, hint)
        return self.replace(**changes)

    def __str__(self) -> str:
        """List every field with its value, as overrides take it, and its meaning, by section."""
        lines = [self.name]
        for section, kind in SECTIONS.items():
            lines.append(f"\n{section}: {(kind.__doc__ or '').splitlines()[0]}")
            for field in dataclasses.fields(kind):
                lines.append(f"  {field.name}={text_of(getattr(getattr(self, section), field.name))}")
                lines.append(
                    textwrap.fill(field.metadata["meaning"], 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
                )
        return "\n".join(lines)


SECTIONS: dict[str, type[Section]] = {
    "data": DataSection,
    "model": ModelSection,
    "optimization": OptimizationSection,
    "evaluation": EvaluationSection,
    "hardware": HardwareSection,
}


def resolve_precision(recipe: Recipe) -> Recipe:
    """Return the recipe with a precision of its own where it was "auto", on the device that this process trains on.

    Raises:
        ValueError: If the precision is fp16 and there is no accelerator.
    """
    device = training_device()
    if recipe.hardware.precision == "fp16" and device.type == "cpu":
        raise ValueError(
            "Got precision=fp16 on a CPU, which has no fast float16 and no scaling of its gradients; pass "
            "precision=auto, bf16 or float32."
        )
    if recipe.hardware.precision != "auto":
        return recipe
    return recipe.replace(precision="bf16" if native_dtype(device) == torch.bfloat16 else "float32")


def find_field(name: str) -> tuple[str, dataclasses.Field]:
    """Return the section and field of a name, `section.field`, or `field` where no other section has one of that name.

    Raises:
        ValueError: If there is none, or there are several.
    """
    found = [
        (section, field)
        for section, kind in SECTIONS.items()
        for field in dataclasses.fields(kind)
        if name in (field.name, f"{section}.{field.name}")
    ]
    if len(found) > 1:
        full = " or ".join(f"{section}.{field.name}" for section, field in found)
        raise ValueError(f"Got the recipe field {name!r}, which several sections have; write {full}.")
    if not found:
        known = [field.name for kind in SECTIONS.values() for field in dataclasses.fields(kind)]
        raise ValueError(f"Unknown recipe field {shown(name)}{nearest_name(name.rpartition('.')[2], known)}.")
    return found[0]
