"""`Recipe`: every choice that a training run depends on, its derived numbers, and overrides from the command line."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from depict_hf.configuration_depict import DECODER_TYPES, ENCODER_PRESETS

from .imagefolder import read_class_names

_CHOICES = {
    "decoder_type": DECODER_TYPES,
    "optimizer": ("adamw", "sgd"),
    "schedule": ("polynomial", "cosine"),
    "precision": ("float32", "bf16"),
}


@dataclass(frozen=True)
class Recipe:
    """Everything that one training run depends on, besides the data and the number of processes.

    Args:
        name: Of the recipe.
        backbone: Hub name or path of the encoder's weights: what `AutoBackbone` loads, or with `encoder`, what
            `depict_hf.conversion.read_weights` reads.
        encoder: Preset of `DepictConfig` for the native encoder; None for a backbone of transformers.
        drop_path_rate: Stochastic depth of the native encoder's last block.
        start_from: Hub name or folder of a trained model of the same architecture, whose weights, decoder included,
            training starts from; the backbone's and a new decoder if None.
        freeze_encoder: Whether the encoder stays as it is, in evaluation mode.
        frozen_encoder_blocks: Embeddings and this many first blocks of the encoder stay as they are.
        lora_rank: Of low-rank adapters in the linear layers of the encoder, which otherwise stays as it is; 0 for none.
        lora_alpha: The adapters' products are multiplied by this over their rank.
        cache_features: Whether a frozen encoder computes its outputs once, on whole images of `size` and on their
            mirror images; training squares are then cut from those outputs, without random scale and colours.
        decoder_type: One of `DepictConfig`'s.
        class_names: In the order of their ids; on the command line also a `.json` or `.txt` file of them.
        image_column: Of the dataset; found by its usual name if None.
        label_column: Of the dataset; found by its usual name if None.
        reduce_labels: Whether label 0 of the dataset is ignored and the others go down by one.
        train_split, validation_split, test_split: Names of the splits, or parts of them such as "train[:80%]".
        skip_unreadable: Whether images that cannot be decoded are left out instead of refused.
        streaming: Whether the training split is read on the way, in the order of its files and of a buffer.
        shuffle_buffer: In a stream, images among which the next one is chosen.
        num_train_images: In a stream, images of the training split; as the dataset says if None.
        image_mean, image_std: Of each channel, for values in 0 to 1.
        size: Pixels of the shorter side, in evaluation and, at ratio 1, in training.
        long_side_factor: In training, the longer side is at most this times `size` at ratio 1.
        scale_range: Bounds of the random ratio in training.
        crop_size: Side in pixels of training crops.
        window_size, window_stride: In evaluation during training, pixels; whole images if None.
        final_window_stride: Stride of the trained model; `window_stride` if None.
        photometric: Whether colours are distorted in training.
        epochs: Passes over the training split.
        batch_size: Images per optimiser step, over all processes.
        accumulation_steps: Forward passes per optimiser step in each process.
        optimizer: "adamw" or "sgd" (momentum 0.9, Nesterov).
        learning_rate: Of the decoder's matrices.
        encoder_rate_factor: The encoder's rate is this times `learning_rate`.
        encoder_layer_decay: The rate of each encoder block is this times that of the next one.
        scale_rate_factor: The same for class tokens, step sizes and the LayerNorm over classes, which together set
            the scale of the logits.
        class_weights: One for each class, by which its pixels count in the loss.
        class_balance: Instead of `class_weights`: pixels count by the frequency of their class in the training split
            to the power of minus this; 0 for alike.
        focal_gamma: Exponent of the focal loss; 0 for cross-entropy.
        dice_weight: Of a dice loss beside the cross-entropy; 0 for none.
        weight_decay: Of matrices; norms, biases, tokens and step sizes have none.
        schedule: "polynomial" (power 0.9) or "cosine", from the learning rate down to `final_learning_rate`.
        final_learning_rate: At the last step.
        warmup_steps: Optimiser steps of linear growth from zero before the schedule.
        max_grad_norm: Gradients are clipped to it; 0 for no clipping.
        average_decay: Of the exponential moving average of the weights, which is what is evaluated and becomes the
            trained model; 0 for no average.
        precision: "float32", or "bf16" for autocast of the forward pass; the loss is float32 in both.
        seed: Of initial weights, data order and augmentation.
        evaluate_every_epochs: Epochs between evaluations on the validation split.
        sample_pictures: Validation images that each evaluation writes pictures of, to `samples/`.
        save_every_steps: Optimiser steps between checkpoints; a checkpoint at each evaluation if None.
        final_size: `size` of the trained model's image processor; `size` if None.
        gradient_checkpointing: Whether activations are computed again in the backward pass instead of kept.
        compile: Whether the model is compiled by `torch.compile`.
        report_to: Trackers that `Trainer` knows, separated by commas, or "none".
        num_workers: Processes that read data, per training process; 0 reads in the training process.

    Raises:
        ValueError: If a value is out of its range, or `batch_size` cannot be divided as asked.
    """

    name: str
    backbone: str
    class_names: tuple[str, ...]
    size: int
    crop_size: int
    epochs: int
    batch_size: int
    learning_rate: float
    encoder: str | None = None
    drop_path_rate: float = 0.0
    decoder_type: str = "sa"
    start_from: str | None = None
    freeze_encoder: bool = True
    frozen_encoder_blocks: int = 0
    lora_rank: int = 0
    lora_alpha: float = 16.0
    cache_features: bool = False
    image_column: str | None = None
    label_column: str | None = None
    reduce_labels: bool = False
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"
    skip_unreadable: bool = False
    streaming: bool = False
    shuffle_buffer: int = 1000
    num_train_images: int | None = None
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    long_side_factor: float = 4.0
    scale_range: tuple[float, float] = (0.5, 2.0)
    window_size: int | None = None
    window_stride: int | None = None
    final_window_stride: int | None = None
    photometric: bool = True
    accumulation_steps: int = 1
    optimizer: str = "adamw"
    encoder_rate_factor: float = 1.0
    encoder_layer_decay: float = 1.0
    scale_rate_factor: float = 1.0
    class_weights: tuple[float, ...] | None = None
    class_balance: float = 0.0
    focal_gamma: float = 0.0
    dice_weight: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "polynomial"
    final_learning_rate: float = 1e-5
    warmup_steps: int = 0
    max_grad_norm: float = 0.0
    average_decay: float = 0.0
    precision: str = "float32"
    seed: int = 0
    evaluate_every_epochs: int = 1
    sample_pictures: int = 4
    save_every_steps: int | None = None
    final_size: int | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    report_to: str = "tensorboard"
    num_workers: int = 2

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"Got {name}={getattr(self, name)!r}, needed one of {', '.join(choices)}.")
        for name in ("size", "crop_size", "epochs", "batch_size", "accumulation_steps", "evaluate_every_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"Got {name}={getattr(self, name)}, needed at least 1.")
        if self.cache_features and not self.freeze_encoder:
            raise ValueError("Got cache_features=True with freeze_encoder=False; freeze the encoder or do not cache.")
        if self.lora_rank and self.freeze_encoder:
            raise ValueError(
                f"Got lora_rank={self.lora_rank} with freeze_encoder=True; pass freeze_encoder=false (and "
                "cache_features=false): everything of the encoder but its adapters is frozen then."
            )
        if self.streaming and (self.cache_features or self.class_balance):
            raise ValueError("Got streaming with cache_features or class_balance, which read all images at the start.")
        if self.shuffle_buffer < 1:
            raise ValueError(f"Got shuffle_buffer={self.shuffle_buffer}, needed at least 1 image.")
        if self.encoder not in (None, *ENCODER_PRESETS):
            raise ValueError(f"Got encoder={self.encoder!r}, needed none or one of {', '.join(ENCODER_PRESETS)}.")
        for name in (
            "frozen_encoder_blocks",
            "lora_rank",
            "class_balance",
            "focal_gamma",
            "dice_weight",
            "sample_pictures",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"Got {name}={getattr(self, name)}, needed at least 0.")
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"Got average_decay={self.average_decay}, needed 0 or more and less than 1.")
        if self.class_weights is not None and self.class_balance:
            raise ValueError("Got class_weights and class_balance; give one of them.")
        if self.class_weights is not None and len(self.class_weights) != len(self.class_names):
            raise ValueError(
                f"Got {len(self.class_weights)} class_weights for {len(self.class_names)} classes; give one for each."
            )
        if not self.class_names:
            raise ValueError("Got no class_names; give one for each class, in the order of the ids.")
        if not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(f"Got scale_range={self.scale_range}, needed two positive ratios, the smaller one first.")
        if not 0 <= self.final_learning_rate <= self.learning_rate:
            raise ValueError(
                f"Got final_learning_rate={self.final_learning_rate}, needed 0 to learning_rate={self.learning_rate}."
            )
        self.images_per_pass(num_processes=1)

    def images_per_pass(self, num_processes: int) -> int:
        """Images in one forward pass of each of `num_processes` processes.

        Raises:
            ValueError: If `batch_size` does not divide evenly.
        """
        passes = num_processes * self.accumulation_steps
        if self.batch_size % passes:
            raise ValueError(
                f"Got batch_size={self.batch_size} for {num_processes} processes with "
                f"accumulation_steps={self.accumulation_steps}, needed a multiple of {passes}; change one of them."
            )
        return self.batch_size // passes

    def steps_per_epoch(self, num_images: int) -> int:
        """Optimiser steps in a pass over `num_images`; a last incomplete batch is left out.

        Raises:
            ValueError: If there are fewer images than one batch.
        """
        if num_images < self.batch_size:
            raise ValueError(
                f"Got {num_images} training images, needed at least one batch of {self.batch_size}; lower batch_size."
            )
        return num_images // self.batch_size

    def override(self, assignments: Sequence[str]) -> "Recipe":
        """The recipe with fields replaced as `field=value` texts say; tuples are separated by commas, None is "none".

        Raises:
            ValueError: If a text is no assignment, or a field is unknown or its value of another type.
        """
        hints = typing.get_type_hints(Recipe)
        changes = {}
        for assignment in assignments:
            name, separator, text = assignment.partition("=")
            if not separator:
                raise ValueError(f"Got {assignment!r}, needed field=value.")
            if name not in hints or name == "name":
                raise ValueError(f"Unknown recipe field {name!r}{nearest_name(name, hints)}.")
            if name == "class_names" and Path(text).suffix in (".json", ".txt"):
                changes[name] = read_class_names(Path(text))
            else:
                changes[name] = _parse(name, text, hints[name])
        return dataclasses.replace(self, **changes)


def nearest_name(name: str, known: typing.Iterable[str]) -> str:
    """A hint for messages about an unknown name: the most similar one, and all there are."""
    known = [each for each in known if each != "name"]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"; did you mean {nearest!r}? Known are {', '.join(known)}"


def _parse(name: str, text: str, hint: typing.Any) -> object:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if types.NoneType in options and text.lower() == "none":
        return None
    kind = options[0]
    try:
        if typing.get_origin(kind) is tuple:
            items, parts = typing.get_args(kind), text.split(",")
            items = items[:1] * len(parts) if items[-1] is Ellipsis else items
            return tuple(item(part) for item, part in zip(items, parts, strict=True))
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        wanted = hint.__name__ if isinstance(hint, type) else hint
        raise ValueError(f"Got {name}={text}, needed a value of type {wanted}.") from None
