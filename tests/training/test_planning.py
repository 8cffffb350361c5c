"""Plans: what fits into the minutes, on fast and slow machines, with few and many images."""

import dataclasses
import math

import pytest

from training.planning import DataFacts, MachineFacts, base_recipe, make_plan, size_for

DATA = DataFacts(("road", "car", "sky"), train=80, validation=20, test=100, short_side=512)
MACHINE = MachineFacts(
    "cpu",
    patch_size=14,
    num_blocks=12,
    hidden_size=384,
    precision="bf16",
    encode_seconds=0.5,
    train_seconds=0.5,
    segment_seconds=0.5,
    processors=2,
    free_disk_bytes=1e12,
)


def plan(minutes=60.0, data=DATA, machine=MACHINE, steps=None, spent=30.0, **options):
    base = base_recipe(data, machine, (0.5,) * 3, (0.5,) * 3, "sa")
    return make_plan(data, machine, base, 60 * minutes, spent, steps, **options)


def test_an_hour_on_a_small_machine_has_both_stages_and_ends_before_test_and_margin():
    """80 * 2 + 20 photographs at half a second: 90 seconds. The test split takes 50, the margin 3 % of the hour."""
    decoder, finetuning = (found := plan()).stages
    assert (decoder.name, finetuning.name) == ("decoder", "fine-tuning")
    assert decoder.recipe.data.cache_features and decoder.recipe.model.freeze_encoder
    assert not finetuning.recipe.model.freeze_encoder and finetuning.recipe.model.frozen_encoder_blocks == 4
    end = 3600 * 0.97 - 50
    assert finetuning.ends_at == pytest.approx(end)
    assert decoder.ends_at == pytest.approx(30 + 90 + 0.12 * (end - 30))
    assert (found.test_images, found.test_seconds, found.validation_images) == (100, 50, 20)
    assert all(stage.steps is None for stage in found.stages)
    # 0.92 of what is left, at 4 seconds a step, and whatever evaluation takes is not counted twice.
    expected = 0.92 * (end - decoder.ends_at) / 4
    assert any(f"about {expected:.0f} steps of 8 squares of 392 pixels" in reason for reason in found.reasons)


def test_squares_get_smaller_and_then_the_encoder_stays_frozen_where_time_is_short():
    small = plan(minutes=5, data=dataclasses.replace(DATA, test=10)).stages[-1].recipe
    assert small.data.crop_size == 280 and not small.model.freeze_encoder
    frozen = plan(minutes=2)
    assert [stage.name for stage in frozen.stages] == ["decoder"]
    assert frozen.stages[0].ends_at == pytest.approx(0.97 * 120 - frozen.test_seconds)
    assert any("encoder stays frozen" in reason for reason in frozen.reasons)


def test_test_split_too_large_for_the_time_is_evaluated_in_part_and_said():
    found = plan(data=dataclasses.replace(DATA, test=10_000))
    left = 3600 * 0.97 - 30
    assert found.test_images == int(0.15 * left / 0.5)
    assert found.stages[-1].ends_at == pytest.approx(3600 * 0.97 - found.test_seconds)
    assert any(f"{found.test_images} of 10000 test images" in reason for reason in found.reasons)


def test_of_many_images_as_many_are_encoded_as_time_and_disk_allow():
    many = dataclasses.replace(DATA, train=100_000, validation=5000)
    found = plan(data=many)
    left = 3600 * 0.97 - 30 - 50
    assert found.stages[0].images == int(0.25 * left / 1.0)
    assert found.validation_images == int(0.08 * left / (10 * 0.5))
    assert found.stages[1].images is None
    # 42 x 56 patches of two times 384 numbers of two bytes, and 588 x 784 bytes of labels.
    one = 42 * 56 * 384 * 2 * 2 + 588 * 784
    full = plan(data=many, machine=dataclasses.replace(MACHINE, free_disk_bytes=2 * 50.5 * one))
    assert full.stages[0].images == 50


def test_steps_instead_of_minutes_are_divided_among_the_stages():
    found = plan(minutes=math.inf, steps=100)
    assert [stage.steps for stage in found.stages] == [40, 60]
    assert all(math.isinf(stage.ends_at) for stage in found.stages)
    assert (found.test_images, found.validation_images) == (100, 20)


def test_a_model_whose_decoder_is_kept_is_fine_tuned_at_once():
    assert [stage.name for stage in plan(decoder_is_new=False).stages] == ["fine-tuning"]


def test_too_few_minutes_are_refused_with_those_that_are_needed():
    with pytest.raises(ValueError, match=r"Got 0.8 minutes.*needed at least 0.27.*give more --minutes"):
        plan(minutes=0.8)


def test_fewer_images_than_a_batch_are_one_batch():
    recipe = plan(data=dataclasses.replace(DATA, train=5)).stages[-1].recipe
    assert recipe.optimization.batch_size == 4


@pytest.mark.parametrize(
    ("device", "patch", "short_side", "size"),
    [("cpu", 14, 3000, 588), ("cuda", 14, 3000, 784), ("cuda", 14, 360, 588), ("cpu", 16, 512, 672)],
)
def test_sizes_are_whole_patches(device, patch, short_side, size):
    assert size_for(device, patch, short_side) == size


def test_overrides_hold_in_both_stages_and_may_leave_one_out():
    both = plan(overrides=["optimization.learning_rate=0.5", "size=280"]).stages
    assert {(each.recipe.optimization.learning_rate, each.recipe.data.size) for each in both} == {(0.5, 280)}
    assert [each.name for each in plan(overrides=["model.freeze_encoder=true"]).stages] == ["decoder"]
    assert [each.name for each in plan(overrides=["cache_features=false"]).stages] == ["fine-tuning"]
    adapters = plan(overrides=["lora_rank=4"]).stages
    assert [each.recipe.model.lora_rank for each in adapters] == [0, 4]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs=3", "Got epochs as a field; use --minutes, --epochs or --max-steps"),
        ("model.start_from=x", "use --from"),
        ("data.class_names=a,b", "use --classes"),
        ("learning_rat=1", "did you mean 'learning_rate'"),
    ],
)
def test_overrides_that_are_options_of_the_command_or_unknown_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        plan(overrides=[override])
