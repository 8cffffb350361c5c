"""Recipes are complete, derived numbers are exact, and the command line cannot set what does not exist."""

import dataclasses

import pytest

from training import recipes
from training.recipe import SECTIONS
from training.recipes import RECIPES, camvid_dinov2_small, get_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_bear_their_functions_name_and_cannot_be_changed(name):
    recipe = get_recipe(name)
    assert recipe.name == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.optimization.epochs = 1


def test_camvid_squares_are_whole_patches():
    """DINOv2 ViT-S/14: rows of the cached grid, and squares cut from it, fall on patch borders."""
    recipe = camvid_dinov2_small("sa")
    assert recipe.data.class_names[3] == "road" and len(recipe.data.class_names) == 11
    assert recipe.data.crop_size % 14 == recipe.data.size % 14 == 0


@pytest.mark.parametrize(
    ("row", "encoder", "size", "crop", "stride", "final_stride", "epochs", "batch", "rate", "long_side", "classes"),
    [
        ("ade20k_vit_tiny", "vit_tiny_patch16_384", 512, 512, 512, 480, 64, 8, 0.001, 4, 150),
        ("ade20k_vit_small", "vit_small_patch16_384", 512, 512, 512, 480, 64, 8, 0.001, 4, 150),
        ("ade20k_vit_base", "vit_base_patch16_384", 512, 512, 512, 480, 64, 8, 0.001, 4, 150),
        ("ade20k_vit_large_640", "vit_large_patch16_384", 640, 640, 640, 608, 64, 8, 0.001, 4, 150),
        ("pascal_context_vit_large", "vit_large_patch16_384", 520, 480, 320, 448, 256, 16, 0.001, 8, 60),
        ("cityscapes_vit_large", "vit_large_patch16_384", 1024, 768, 512, 736, 216, 8, 0.01, 2, 19),
    ],
)
@pytest.mark.parametrize("decoder_type", ["sa", "ca", "mask_transformer"])
def test_rows_of_the_paper(
    row, encoder, size, crop, stride, final_stride, epochs, batch, rate, long_side, classes, decoder_type
):
    """segm/config.yml, segm/train.py and segm/eval/miou.py in rstrudel/segmenter@20d1bfa."""
    recipe = get_recipe(f"{row}_{decoder_type}")
    assert (recipe.model.encoder, recipe.model.decoder_type, len(recipe.data.class_names)) == (
        encoder,
        decoder_type,
        classes,
    )
    assert (recipe.data.size, recipe.data.crop_size, recipe.data.long_side_factor) == (size, crop, long_side)
    assert (recipe.evaluation.window_size, recipe.evaluation.window_stride, recipe.evaluation.final_window_stride) == (
        crop,
        stride,
        final_stride,
    )
    assert (recipe.optimization.epochs, recipe.optimization.batch_size, recipe.optimization.learning_rate) == (
        epochs,
        batch,
        rate,
    )
    assert (recipe.optimization.optimizer, recipe.optimization.schedule, recipe.optimization.final_learning_rate) == (
        "sgd",
        "polynomial",
        1e-5,
    )
    assert (
        recipe.optimization.weight_decay,
        recipe.optimization.warmup_steps,
        recipe.optimization.max_grad_norm,
        recipe.model.drop_path_rate,
    ) == (0, 0, 0, 0.1)
    assert (
        recipe.optimization.scale_rate_factor,
        recipe.optimization.encoder_rate_factor,
        recipe.hardware.precision,
    ) == (1, 1, "float32")
    assert not recipe.model.freeze_encoder and recipe.data.photometric and recipe.data.scale_range == (0.5, 2.0)
    assert recipe.data.reduce_labels == row.startswith("ade20k")


def test_derived_numbers():
    recipe = camvid_dinov2_small("sa").replace(batch_size=24, accumulation_steps=2)
    assert recipe.images_per_pass(num_processes=3) == 4
    assert recipe.steps_per_epoch(367) == 15


@pytest.mark.parametrize("num_processes", [3, 16])
def test_uneven_division_is_refused(num_processes):
    recipe = camvid_dinov2_small("sa").replace(batch_size=8, accumulation_steps=1)
    with pytest.raises(ValueError, match=rf"batch_size=8 for {num_processes} processes.*multiple of {num_processes}"):
        recipe.images_per_pass(num_processes)


def test_fewer_images_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="7 training images, needed at least one batch of 8"):
        camvid_dinov2_small("sa").steps_per_epoch(7)


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("epochs=3", 3),
        ("learning_rate=2e-4", 2e-4),
        ("weight_decay=0", 0.0),
        ("photometric=false", False),
        ("photometric=True", True),
        ("scale_range=0.5,2", (0.5, 2.0)),
        ("class_names=road,not road", ("road", "not road")),
        ("window_stride=none", None),
        ("window_stride=140", 140),
        ("label_column=mask", "mask"),
        ("schedule=polynomial", "polynomial"),
        ("backbone=a=b", "a=b"),
    ],
)
def test_override_parses_by_the_fields_type(assignment, value):
    recipe = camvid_dinov2_small("sa")
    name = assignment.partition("=")[0]
    changed = recipe.override([assignment])
    assert changed.value(name) == value
    assert type(changed.value(name)) is type(value)
    assert changed.replace(**{name: recipe.value(name)}) == recipe


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epoch=3", "Unknown recipe field 'epoch'; did you mean 'epochs'"),
        ("lerning_rate=3", "did you mean 'learning_rate'"),
        ("name=mine", "Unknown recipe field 'name'"),
        ("epochs", "'epochs', needed field=value"),
        ("epochs=3.5", "epochs=3.5, needed a value of type int"),
        ("freeze_encoder=1", "freeze_encoder=1, needed a value of type bool"),
        ("scale_range=1", "scale_range=1, needed a value of type tuple"),
        ("window_size=big", "window_size=big, needed a value of type int"),
        ("epochs=none", "epochs=none, needed a value of type int"),
        ("epochs=0", "epochs=0, needed at least 1"),
        ("encoder=vit_giant", "encoder='vit_giant', needed one of vit_tiny_patch16_384"),
        ("decoder_type=mlp", "decoder_type='mlp', needed one of sa, ca"),
        ("scale_range=2,1", "two positive ratios"),
        ("final_learning_rate=1", "final_learning_rate=1.0, needed 0 to learning_rate"),
        ("accumulation_steps=3", "needed a multiple of 3"),
    ],
)
def test_override_refuses(assignment, message):
    with pytest.raises(ValueError, match=message):
        camvid_dinov2_small("sa").override([assignment])


def test_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="Unknown recipe 'camvid_dino'; did you mean 'camvid_dinov2_small_sa'"):
        get_recipe("camvid_dino")


def test_no_classes_are_refused():
    recipe = camvid_dinov2_small("sa")
    with pytest.raises(ValueError, match="no class_names"):
        recipe.replace(class_names=())


def test_sections_override_and_explain_themselves(capsys):
    recipe = camvid_dinov2_small("sa")
    by_section = recipe.override(["optimization.learning_rate=0.5", "data.size=700"])
    assert by_section == recipe.override(["learning_rate=0.5", "size=700"])
    assert (by_section.optimization.learning_rate, by_section.data.size) == (0.5, 700)
    with pytest.raises(ValueError, match=r"Unknown recipe field 'data\.learning_rate'"):
        recipe.override(["data.learning_rate=0.5"])

    assert recipes.main([recipe.name, "size=700"]) == 0
    printed = capsys.readouterr().out
    names = [field.name for kind in SECTIONS.values() for field in dataclasses.fields(kind)]
    assignments = [line.strip() for line in printed.splitlines() if line.strip().partition("=")[0] in names]
    assert len(assignments) == len(names)  # every field is there, once
    assert recipe.override(assignments) == recipe.replace(size=700)  # and as overrides take it
    for kind in SECTIONS.values():
        for field in dataclasses.fields(kind):
            assert " ".join(field.metadata["meaning"].split()) in " ".join(printed.split()), field.name
