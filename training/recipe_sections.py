"""The fields of a recipe, in sections: what each means, its default and its range."""

from dataclasses import dataclass

from depict_hf.configuration_depict import DECODER_TYPES, ENCODER_PRESETS
from depict_hf.ranges import MOST_LAYERS, MOST_SIZE

from .settings import Section, setting


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
    degradation: float = setting(
        "Probability with which a training square is blurred, noisy, grey, tinted or compressed, too.",
        0.0,
        least=0,
        most=1,
    )
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
