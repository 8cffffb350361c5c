"""`Recipe`: every choice that a training run depends on, in sections, its derived numbers, and overrides of fields."""

import dataclasses
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from depict_hf.configuration_depict import DECODER_TYPES, ENCODER_PRESETS, IGNORE_LABEL
from depict_hf.loading import native_dtype, training_device
from depict_hf.ranges import MOST_LAYERS, MOST_SIZE, shown

from .data import read_class_names
from .settings import Section, nearest_name, parse_value, setting, text_of


@dataclass(frozen=True, kw_only=True)
class DataSection(Section):
    """Which photographs and label maps, and how they become training squares."""

    class_names: tuple[str, ...] = setting(
        "Names of the classes in the order of their ids; on the command line also a .json or .txt file of them."
    )
    image_column: str | None = setting("Column of the photographs; found by its usual name if none.", None)
    label_column: str | None = setting("Column of the label maps; found by its usual name if none.", None)
    reduce_labels: bool = setting("Whether label 0 is ignored and the others go down by one.", False)
    train_split: str = setting('Name of a split, or part of one such as "train[:80%]".', "train")
    validation_split: str = setting("The split that models are chosen on.", "validation")
    test_split: str = setting("The split that the trained model is evaluated on.", "test")
    skip_unreadable: bool = setting("Whether images that cannot be decoded are left out instead of refused.", False)
    streaming: bool = setting(
        "Whether the training split is read on the way, in the order of its files and of a buffer.", False
    )
    shuffle_buffer: int = setting("In a stream, images among which the next one is chosen.", 1000, least=1)
    num_train_images: int | None = setting(
        "In a stream, images of the training split; as the data set says if none.", None, least=1
    )
    image_mean: tuple[float, float, float] = setting("Mean of each channel, for values in 0 to 1.", (0.5, 0.5, 0.5))
    image_std: tuple[float, float, float] = setting("Deviation of each channel, for values in 0 to 1.", (0.5, 0.5, 0.5))
    size: int = setting(
        "Pixels of the shorter side, in evaluation and, at ratio 1, in training.", least=1, most=MOST_SIZE
    )
    long_side_factor: float = setting(
        "In training, the longer side is at most this times `size` at ratio 1.", 4.0, least=1
    )
    scale_range: tuple[float, float] = setting("Bounds of the random ratio in training.", (0.5, 2.0))
    crop_size: int = setting("Side of training squares in pixels.", least=1, most=MOST_SIZE)
    photometric: bool = setting("Whether colours are distorted in training.", True)
    cache_features: bool = setting(
        "Whether a frozen encoder computes its outputs once, on whole images of `size` and on their mirror images; "
        "training squares are then cut from those outputs, without random scale and colours.",
        False,
    )


@dataclass(frozen=True, kw_only=True)
class ModelSection(Section):
    """Which encoder and decoder, what they start from, and which of their weights move."""

    backbone: str = setting(
        "Hub name or path of the encoder's weights: what `AutoBackbone` loads or, with `encoder`, what "
        "`depict_hf.conversion.read_weights` reads."
    )
    encoder: str | None = setting(
        "Preset of `DepictConfig` for the native encoder; none for a backbone of transformers.",
        None,
        choices=tuple(ENCODER_PRESETS),
    )
    drop_path_rate: float = setting("Stochastic depth of the native encoder's last block.", 0.0, least=0, below=1)
    decoder_type: str = setting("Kind of decoder, one of `DepictConfig`'s.", "sa", choices=DECODER_TYPES)
    start_from: str | None = setting(
        "Hub name or folder of a trained model of the same architecture, whose weights, decoder included, training "
        "starts from; the backbone's and a new decoder if none.",
        None,
    )
    freeze_encoder: bool = setting("Whether the encoder stays as it is, in evaluation mode.", True)
    frozen_encoder_blocks: int = setting(
        "Embeddings and this many first blocks of the encoder stay as they are.", 0, least=0, most=MOST_LAYERS
    )
    lora_rank: int = setting(
        "Rank of adapters in the linear layers of the encoder, which otherwise stays as it is; 0 for none.",
        0,
        least=0,
        most=MOST_SIZE,
    )
    lora_alpha: float = setting("The adapters' products are multiplied by this over their rank.", 16.0)


@dataclass(frozen=True, kw_only=True)
class OptimizationSection(Section):
    """How the weights move: length, batches, loss, rates, schedule, average."""

    epochs: int = setting("Passes over the training split.", least=1)
    batch_size: int = setting("Images of an optimiser step, over all processes.", least=1)
    accumulation_steps: int = setting("Forward passes of an optimiser step in each process.", 1, least=1)
    optimizer: str = setting('"adamw", or "sgd" with momentum 0.9 after Nesterov.', "adamw", choices=("adamw", "sgd"))
    learning_rate: float = setting("Rate of the decoder's matrices.", least=0)
    encoder_rate_factor: float = setting("The encoder's rate is this times `learning_rate`.", 1.0, least=0)
    encoder_layer_decay: float = setting(
        "The rate of each encoder block is this times that of the next one.", 1.0, least=0
    )
    scale_rate_factor: float = setting(
        "The rate of class tokens, step sizes and the LayerNorm over classes, which together set the scale of the "
        "logits, is this times `learning_rate`.",
        1.0,
        least=0,
    )
    class_weights: tuple[float, ...] | None = setting(
        "Weights, one for each class, by which its pixels count in the loss.", None
    )
    class_balance: float = setting(
        "Instead of `class_weights`: pixels count by the frequency of their class in the training split to the power "
        "of minus this; 0 for alike.",
        0.0,
        least=0,
    )
    focal_gamma: float = setting("Exponent of the focal loss; 0 for cross-entropy.", 0.0, least=0)
    dice_weight: float = setting("Weight of a dice loss beside the cross-entropy; 0 for none.", 0.0, least=0)
    weight_decay: float = setting("Decay of matrices; norms, biases, tokens and step sizes have none.", 0.0, least=0)
    schedule: str = setting(
        'How the rate falls to `final_learning_rate`: "polynomial" (power 0.9) or "cosine".',
        "polynomial",
        choices=("polynomial", "cosine"),
    )
    final_learning_rate: float = setting("Rate at the last step.", 1e-5, least=0)
    warmup_steps: int = setting("Optimiser steps of linear growth from zero before the schedule.", 0, least=0)
    max_grad_norm: float = setting("Gradients are clipped to it; 0 for no clipping.", 0.0, least=0)
    average_decay: float = setting(
        "Decay of the exponential moving average of the weights, which is what is evaluated and becomes the trained "
        "model; 0 for no average.",
        0.0,
        least=0,
        below=1,
    )
    seed: int = setting("Seed of initial weights, data order and augmentation.", 0, least=0)


@dataclass(frozen=True, kw_only=True)
class EvaluationSection(Section):
    """How the model is evaluated while it trains, and what is reported and drawn of it."""

    window_size: int | None = setting(
        "In evaluation, side of windows in pixels; whole images if none.", None, least=1, most=MOST_SIZE
    )
    window_stride: int | None = setting(
        "Pixels from window to window in evaluation during training; `window_size` if none.",
        None,
        least=1,
        most=MOST_SIZE,
    )
    final_window_stride: int | None = setting(
        "Stride of the trained model; `window_stride` if none.", None, least=1, most=MOST_SIZE
    )
    final_size: int | None = setting(
        "`size` of the trained model's image processor; that of training if none.", None, least=1, most=MOST_SIZE
    )
    final_long_side_factor: float | None = setting(
        "The trained model's image processor bounds the longer side at this times the shorter one's `size`; not if "
        "none.",
        None,
        least=1,
    )
    evaluate_every_epochs: int = setting("Epochs between evaluations on the validation split.", 1, least=1)
    keep_best: bool = setting(
        "Whether the trained model is that of the evaluation with the highest validation mIoU; else the last one.",
        False,
    )
    early_stopping: int = setting(
        "Evaluations in a row without a higher validation mIoU after which training ends; 0 for never.", 0, least=0
    )
    sample_pictures: int = setting(
        "Validation images that each evaluation writes pictures of, to `samples/`.", 4, least=0
    )
    report_to: str = setting('Trackers that `Trainer` knows, separated by commas, or "none".', "tensorboard")


@dataclass(frozen=True, kw_only=True)
class HardwareSection(Section):
    """How it is computed and kept, which (but for `precision` and `tf32`) does not change what is learnt."""

    precision: str = setting(
        '"float32"; "bf16" or "fp16" (on accelerators, gradients scaled) for autocast of the forward pass; or "auto", '
        "bf16 where the processor multiplies it natively, else float32. The loss is float32 in all.",
        "float32",
        choices=("float32", "bf16", "fp16", "auto"),
    )
    tf32: bool = setting(
        "Whether matrix products in float32 may be rounded to 10 bits of mantissa on GPUs that are faster so; how "
        "scores are enlarged and the loss are exact in any case.",
        False,
    )
    gradient_checkpointing: bool = setting(
        "Whether activations are computed again in the backward pass instead of kept.", False
    )
    compile: bool = setting("Whether the model is compiled by `torch.compile`.", False)
    num_workers: int = setting(
        "Processes that read data, for each training process; 0 reads in the training process.", 2, least=0, most=1024
    )
    save_every_steps: int | None = setting(
        "Optimiser steps between checkpoints; a checkpoint at each evaluation if none, and always with `keep_best`.",
        None,
        least=1,
    )
    push_to_hub: str | None = setting(
        "Hub repository that the trained model is uploaded to at the end, such as USER/NAME; nowhere if none.", None
    )


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
    evaluation: EvaluationSection = EvaluationSection()
    hardware: HardwareSection = HardwareSection()

    def __post_init__(self) -> None:
        data, model, optimization = self.data, self.model, self.optimization
        if not data.class_names:
            raise ValueError("Got no class_names; give one for each class, in the order of the ids.")
        if len(set(data.class_names)) != len(data.class_names) or not all(name.strip() for name in data.class_names):
            raise ValueError("Got class_names of which some are empty or the same; give each class a name of its own.")
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
            ValueError: If a text is no assignment, or a field is unknown or its value of another type.
        """
        changes: dict[str, Any] = {}
        for assignment in assignments:
            name, separator, text = assignment.partition("=")
            if not separator:
                raise ValueError(f"Got {assignment!r}, needed field=value.")
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
        raise ValueError(f"Unknown recipe field {name!r}{nearest_name(name.rpartition('.')[2], known)}.")
    return found[0]
