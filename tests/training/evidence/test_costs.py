"""FLOPs of recipes in closed form, and hours as their quotient by the stated rates."""

import pytest

from training.evidence.costs import ASSUMED_RATES, ASSUMED_SCALING, TrainingCost, cost_table, step_bytes, training_cost
from training.recipes import RECIPES, get_recipe


def vit_products(tokens: int, width: int, layers: int) -> int:
    """FLOPs of the blocks of a plain ViT on one image, forward."""
    return layers * (2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width)


def test_a_step_in_closed_form():
    """Backward costs twice the forward pass, but once for patches: images need no gradient."""
    recipe = get_recipe("ade20k_vit_tiny_sa").replace(decoder_type="linear")
    patches = 32 * 32
    blocks, classifier = vit_products(patches + 1, 192, 12), 2 * patches * 192 * 150
    expected = 8 * (3 * (blocks + classifier) + 2 * 2 * patches * 768 * 192)
    cost = training_cost(recipe)
    assert cost.flops_per_step == expected
    assert cost.steps == 64 * (20210 // 8)
    assert cost.flops == expected * cost.steps


def test_frozen_and_cached_encoders_cost_less():
    """Of "linear" on cached features a step is one layer, without gradient for the features."""
    cost = training_cost(get_recipe("camvid_dinov2_small_linear"))
    assert cost.flops_per_step == 8 * 2 * (2 * 20 * 20 * 384 * 11)
    patches = 40 * 54  # 560 x 747 pixels, the width padded to 756
    patches_once = 2 * patches * 3 * 14**2 * 384
    assert cost.flops_before == 2 * 367 * (vit_products(patches + 1, 384, 12) + patches_once)
    finetuned = get_recipe("camvid_dinov2_small_finetuned_linear")
    whole = finetuned.replace(frozen_encoder_blocks=0)
    saved = training_cost(whole).flops_per_step - training_cost(finetuned).flops_per_step
    # The fifth block's first LayerNorm is trained, so that all of its products have both gradients.
    assert saved == 8 * (2 * vit_products(28 * 28 + 1, 384, 4) + 2 * 28 * 28 * 3 * 14**2 * 384)


def test_hours_are_flops_over_the_assumed_rate():
    cost = TrainingCost(flops_per_step=3 * 10**15, steps=4000, flops_before=10**15)
    peak, share = ASSUMED_RATES["TF32"]
    assert cost.gpu_hours("TF32") == pytest.approx((1 + 3 * 4000) * 1e15 / (peak * share * 3600))
    with pytest.raises(ValueError, match="Got precision='int8', needed one of float32, TF32, bf16"):
        cost.gpu_hours("int8")


def test_unknown_data_and_backbones_are_refused():
    recipe = get_recipe("ade20k_vit_tiny_sa")
    with pytest.raises(ValueError, match="Got recipe 'mine', needed one whose name begins with ade20k"):
        training_cost(recipe.replace(name="mine"))
    with pytest.raises(ValueError, match="Got backbone='mine', needed facebook/dinov2-small"):
        training_cost(recipe.replace(encoder=None, backbone="mine"))


@pytest.mark.slow
def test_every_recipe_has_its_line():
    lines = cost_table().splitlines()
    assert [line.split()[0] for line in lines[3:]] == list(RECIPES)


def test_cards_together_are_slower_than_their_number():
    cost = TrainingCost(flops_per_step=10**15, steps=4000)
    assert cost.gpu_hours("bf16", 8) == pytest.approx(cost.gpu_hours("bf16") / (8 * ASSUMED_SCALING[8]))
    with pytest.raises(ValueError, match="Got cards=3, needed one of 1, 8"):
        cost.gpu_hours("bf16", 3)


def test_bytes_of_a_step_in_closed_form():
    """Of "linear": twelve bytes a weight; of each block, what its products, norms, GELU and attention need again."""
    recipe = get_recipe("ade20k_vit_tiny_sa").replace(decoder_type="linear", crop_size=64)
    weights = sum(
        (
            (3 * 16**2 + 1) * 192 + (1 + 4 * 4 + 1) * 192,  # patches; position embeddings and class token
            12 * (12 * 192**2 + 13 * 192) + 2 * 192,  # blocks and last norm
            192 * 150 + 150,
        )
    )
    small, large = step_bytes(recipe, 1), step_bytes(recipe, 3)
    outputs = (large - small) / 2
    assert small - outputs == pytest.approx(12 * weights, rel=1e-3)
    # Norms in and out twice, q, k, v, attention's output, MLP in, twice wide before and after GELU.
    tokens = 17
    assert 12 * tokens * 192 * 4 * 14 < outputs < 12 * tokens * 192 * 4 * 22
    assert step_bytes(recipe.replace(optimizer="adamw"), 1) - small == pytest.approx(4 * weights, rel=1e-3)
