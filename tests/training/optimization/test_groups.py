"""Layer-wise rates and frozen blocks, for the native encoder and for a backbone."""

import pytest
import transformers
from conftest import tiny_model

from depict_hf import DepictConfig, DepictForSemanticSegmentation
from training.optimization.groups import count_encoder_blocks, encoder_block, freeze_encoder_blocks, parameter_groups
from training.recipes import camvid_dinov2_small


def backbone_model():
    backbone = transformers.Dinov2Config(
        image_size=28, patch_size=14, hidden_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    return DepictForSemanticSegmentation(DepictConfig(backbone_config=backbone, num_labels=3))


NATIVE = ("encoder.embeddings.projection.weight", "encoder.layers.{}.mlp.fc1.weight", "encoder.norm.weight")
BACKBONE = (
    "encoder.backbone.embeddings.position_embeddings",
    "encoder.backbone.encoder.layer.{}.mlp.fc1.weight",
    "encoder.backbone.layernorm.weight",
)


@pytest.mark.parametrize(("make", "names"), [(lambda: tiny_model("sa"), NATIVE), (backbone_model, BACKBONE)])
def test_rates_fall_from_block_to_block(make, names):
    model = make()
    num_blocks = count_encoder_blocks(model)
    recipe = camvid_dinov2_small("sa").replace(learning_rate=0.1, encoder_rate_factor=0.5, encoder_layer_decay=0.2)
    rates = {id(p): group["lr"] for group in parameter_groups(model, recipe) for p in group["params"]}
    parameters = dict(model.named_parameters())
    embedding, block, norm = names
    for index in range(num_blocks):
        expected = 0.05 * 0.2 ** (num_blocks - 1 - index)
        assert rates[id(parameters[block.format(index)])] == pytest.approx(expected), index
    assert rates[id(parameters[embedding])] == pytest.approx(0.05 * 0.2**num_blocks)
    assert rates[id(parameters[norm])] == pytest.approx(0.05)
    assert rates[id(model.decoder.norm.weight)] == pytest.approx(0.1)


@pytest.mark.parametrize("num_frozen", [0, 1, 2])
def test_first_blocks_are_frozen_with_the_embeddings(num_frozen):
    model = backbone_model()
    freeze_encoder_blocks(model, num_frozen)
    for name, parameter in model.named_parameters():
        frozen = num_frozen > 0 and name.startswith("encoder.") and encoder_block(name, 3) < num_frozen
        assert parameter.requires_grad != frozen, name
    parameters = dict(model.named_parameters())
    assert parameters[BACKBONE[0]].requires_grad == (num_frozen == 0)
    assert parameters[BACKBONE[1].format(1)].requires_grad == (num_frozen < 2)
    assert parameters[BACKBONE[2]].requires_grad


def test_more_blocks_than_there_are_cannot_be_frozen():
    with pytest.raises(ValueError, match="frozen_encoder_blocks=4, needed at most 3"):
        freeze_encoder_blocks(backbone_model(), 4)
