"""One function per run. `python -m training.train RECIPE DATASET OUTPUT field=value ...` finds them by name.

`python -m training.recipes` lists them; with a name, and fields to override, it prints every field and its meaning.

The rows of the paper exist once per decoder: `ade20k_vit_small_sa`, `ade20k_vit_small_ca`,
`ade20k_vit_small_mask_transformer` (Segmenter), and so on.

Their GPU hours are estimates for one A100 SXM: the FLOPs of all training steps, counted as the code runs them, over
70 % of its 19.5 TFLOP/s in float32, or 40 % of its 312 TFLOP/s in bfloat16 (`precision=bf16`); evaluation is not
included. `python -m training.benchmark --recipes` computes them.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from depict_hf.conversion import PUBLISHED_SIZES, published_protocol
from depict_hf.labels import class_names
from depict_hf.photo_files import shown_lines

from .recipe import DataSection, EvaluationSection, HardwareSection, ModelSection, OptimizationSection, Recipe
from .settings import nearest_name

PAPER_DECODERS = ("sa", "ca", "mask_transformer")
CAMVID_DECODERS = (*PAPER_DECODERS, "linear")


def camvid_dinov2_small(decoder_type: str) -> Recipe:
    """A decoder on a frozen DINOv2 ViT-S/14, trained on the 367 road scenes of CamVid.

    Command:

        python -m training.train camvid_dinov2_small_sa DATASET OUTPUT --backbone facebook/dinov2-small

    Measured for "sa": 45.3 mIoU on the test split (59.7 on validation), in 49 minutes on two CPU cores with bfloat16
    instructions, 17 of them for the features.
    """
    return Recipe(
        name=f"camvid_dinov2_small_{decoder_type}",
        data=DataSection(
            class_names=tuple(class_names("camvid")),
            image_mean=(0.485, 0.456, 0.406),
            image_std=(0.229, 0.224, 0.225),
            size=560,
            crop_size=280,
            cache_features=True,
        ),
        model=ModelSection(backbone="facebook/dinov2-small", decoder_type=decoder_type),
        optimization=OptimizationSection(
            epochs=120,
            batch_size=8,
            learning_rate=1e-3,
            scale_rate_factor=10.0,
            weight_decay=0.01,
            schedule="cosine",
            final_learning_rate=0.0,
            warmup_steps=50,
            max_grad_norm=1.0,
        ),
        evaluation=EvaluationSection(evaluate_every_epochs=15),
        hardware=HardwareSection(precision="bf16", num_workers=1),
    )


def camvid_dinov2_small_finetuned(decoder_type: str) -> Recipe:
    """The model of `camvid_dinov2_small`, trained further with the last eight blocks of its encoder.

    Command, where START is the output of `camvid_dinov2_small_sa`:

        python -m training.train camvid_dinov2_small_finetuned_sa DATASET OUTPUT start_from=START

    Measured for "sa": 66.0 mIoU on the test split (73.2 on validation, at 588 pixels), in 102 minutes on two CPU cores
    with bfloat16 instructions, shared with other work, after those of START.
    """
    return camvid_dinov2_small(decoder_type).replace(
        name=f"camvid_dinov2_small_finetuned_{decoder_type}",
        cache_features=False,
        freeze_encoder=False,
        frozen_encoder_blocks=4,
        encoder_rate_factor=0.25,
        encoder_layer_decay=0.8,
        size=588,
        final_size=728,
        crop_size=392,
        window_size=392,
        window_stride=392,
        scale_range=(0.6, 1.6),
        epochs=15,
        learning_rate=3e-4,
        scale_rate_factor=3.0,
        class_balance=0.5,
        evaluate_every_epochs=5,
    )


def camvid_dinov2_small_refined(decoder_type: str) -> Recipe:
    """The model of `camvid_dinov2_small_finetuned`, trained further with its whole encoder at the size of evaluation.

    Commands, where START is the output of `camvid_dinov2_small_finetuned_sa`; the last one made the default model:

        python -m training.train camvid_dinov2_small_refined_sa DATASET OUTPUT start_from=START seed=2
        python -m training.train camvid_dinov2_small_refined_sa DATASET OTHER start_from=START seed=3 degradation=0.5
        python -m training.average MEAN OUTPUT OTHER

    Measured for "sa" with windows at stride 203: 74.4 mIoU on the test split of the mean (81.1 on validation); 720 of
    the 945 steps of the first took 49 minutes on two CPU cores with bfloat16 instructions.
    """
    return camvid_dinov2_small_finetuned(decoder_type).replace(
        name=f"camvid_dinov2_small_refined_{decoder_type}",
        frozen_encoder_blocks=0,
        size=868,
        final_size=868,
        scale_range=(0.5, 1.6),
        drop_path_rate=0.1,
        dice_weight=0.3,
        average_decay=0.995,
        epochs=21,
        evaluate_every_epochs=21,
    )


def _paper(
    name: str,
    decoder_type: str,
    encoder: str,
    dataset: str,
    data: DataSection,
    optimization: OptimizationSection,
    **evaluation: Any,
) -> Recipe:
    """Return what all rows of the paper share; the trained model is evaluated as the published figures were made.

    Source:
        segm/config.yml, segm/train.py and segm/eval/miou.py in rstrudel/segmenter@20d1bfa, which DEPICT trains with.
    """
    protocol = published_protocol(dataset, data.crop_size)
    return Recipe(
        name=f"{name}_{decoder_type}",
        data=data,
        model=ModelSection(
            encoder=encoder,
            backbone=f"timm/{encoder}.augreg_in21k_ft_in1k",
            freeze_encoder=False,
            drop_path_rate=0.1,
            decoder_type=decoder_type,
        ),
        optimization=optimization,
        evaluation=EvaluationSection(
            window_size=protocol["window_size"],
            final_window_stride=protocol["window_stride"],
            final_size=protocol["size"]["shortest_edge"],
            final_long_side_factor=protocol["size"]["longest_edge"] / protocol["size"]["shortest_edge"],
            **evaluation,
        ),
        hardware=HardwareSection(num_workers=10),
    )


def _paper_data(dataset: str, crop_size: int, **fields: Any) -> DataSection:
    size, long_side_factor = PUBLISHED_SIZES[dataset]
    return DataSection(
        class_names=tuple(class_names(dataset)),
        test_split="validation",  # the test labels of all three data sets are withheld
        crop_size=crop_size,
        **{"size": size, "long_side_factor": float(long_side_factor), **fields},
    )


def _paper_optimization(**fields: Any) -> OptimizationSection:
    return OptimizationSection(optimizer="sgd", schedule="polynomial", final_learning_rate=1e-5, **fields)


def _ade20k(size: str, decoder_type: str, image_size: int = 512) -> Recipe:
    suffix = "" if image_size == 512 else f"_{image_size}"
    return _paper(
        f"ade20k_vit_{size}{suffix}",
        decoder_type,
        f"vit_{size}_patch16_384",
        "ade20k",
        _paper_data("ade20k", image_size, size=image_size, reduce_labels=True),
        _paper_optimization(epochs=64, batch_size=8, learning_rate=0.001),
        window_stride=image_size,
        evaluate_every_epochs=2,
    )


def ade20k_vit_tiny(decoder_type: str) -> Recipe:
    """ADE20K, ViT-Ti/16: `python -m training.train ade20k_vit_tiny_sa DATASET OUTPUT`.

    Estimated GPU hours in float32 (bfloat16) on one A100: sa 2.1 (0.2), ca 2.0 (0.2), mask_transformer 2.0 (0.2).
    """
    return _ade20k("tiny", decoder_type)


def ade20k_vit_small(decoder_type: str) -> Recipe:
    """ADE20K, ViT-S/16: `python -m training.train ade20k_vit_small_sa DATASET OUTPUT`.

    Estimated GPU hours in float32 (bfloat16) on one A100: sa 5.5 (0.6), ca 5.5 (0.6), mask_transformer 6.1 (0.7).
    """
    return _ade20k("small", decoder_type)


def ade20k_vit_base(decoder_type: str) -> Recipe:
    """ADE20K, ViT-B/16: `python -m training.train ade20k_vit_base_sa DATASET OUTPUT`.

    Estimated GPU hours in float32 (bfloat16) on one A100: sa 17.5 (1.9), ca 17.5 (1.9), mask_transformer 20.4 (2.2).
    """
    return _ade20k("base", decoder_type)


def ade20k_vit_large_640(decoder_type: str) -> Recipe:
    """ADE20K, ViT-L/16 at 640: `python -m training.train ade20k_vit_large_640_sa DATASET OUTPUT`.

    The paper's mIoU for DEPICT: 52.9 single-scale, 54.3 multi-scale.

    Estimated GPU hours in float32 (bfloat16) on one A100: sa 98 (10.7), ca 98 (10.7), mask_transformer 106 (11.6).
    """
    return _ade20k("large", decoder_type, image_size=640)


def pascal_context_vit_large(decoder_type: str) -> Recipe:
    """Pascal Context, ViT-L/16: `python -m training.train pascal_context_vit_large_sa DATASET OUTPUT`.

    The paper's mIoU for DEPICT: 57.9 single-scale, 58.6 multi-scale.

    Estimated GPU hours in float32 (bfloat16) on one A100: sa 49 (5.4), ca 49 (5.4), mask_transformer 53 (5.8).
    """
    return _paper(
        "pascal_context_vit_large",
        decoder_type,
        "vit_large_patch16_384",
        "pascal_context",
        _paper_data("pascal_context", crop_size=480),
        _paper_optimization(epochs=256, batch_size=16, learning_rate=0.001),
        window_stride=320,
        evaluate_every_epochs=8,
    )


def cityscapes_vit_large(decoder_type: str) -> Recipe:
    """Cityscapes, ViT-L/16, labels as trainIds: `python -m training.train cityscapes_vit_large_sa DATASET OUTPUT`.

    The paper's mIoU for DEPICT: 78.8 single-scale, 81.0 multi-scale.

    Estimated GPU hours in float32 (bfloat16) on one A100: sa 76 (8.3), ca 76 (8.3), mask_transformer 82 (8.9).
    """
    return _paper(
        "cityscapes_vit_large",
        decoder_type,
        "vit_large_patch16_384",
        "cityscapes",
        _paper_data("cityscapes", crop_size=768),
        _paper_optimization(epochs=216, batch_size=8, learning_rate=0.01),
        window_stride=512,
        evaluate_every_epochs=4,
    )


_PAPER_ROWS = (
    ade20k_vit_tiny,
    ade20k_vit_small,
    ade20k_vit_base,
    ade20k_vit_large_640,
    pascal_context_vit_large,
    cityscapes_vit_large,
)
RECIPES: dict[str, Callable[[], Recipe]] = {
    **{
        f"{row.__name__}_{kind}": partial(row, kind)
        for row in (camvid_dinov2_small, camvid_dinov2_small_finetuned, camvid_dinov2_small_refined)
        for kind in CAMVID_DECODERS
    },
    **{f"{row.__name__}_{kind}": partial(row, kind) for row in _PAPER_ROWS for kind in PAPER_DECODERS},
}


def get_recipe(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in RECIPES:
        raise ValueError(f"Unknown recipe {name!r}{nearest_name(name, RECIPES)}.")
    return RECIPES[name]()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.recipes", description="List recipes, or explain one.")
    parser.add_argument("recipe", nargs="?", help="whose fields are printed; all names if omitted")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="replace fields of the recipe")
    arguments = parser.parse_args(argv)
    if arguments.recipe is None:
        print("\n".join(RECIPES))
        return 0
    try:
        print(get_recipe(arguments.recipe).override(arguments.overrides))
    except ValueError as error:
        print(f"error: {shown_lines(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
