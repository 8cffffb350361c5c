"""What training starts from: everything that does not depend on the classes is kept, to the bit."""

import pytest
import torch
from conftest import tiny_model
from transformers import (
    BeitConfig,
    Dinov2Backbone,
    Dinov2Config,
    DINOv3ViTBackbone,
    DINOv3ViTConfig,
    ResNetConfig,
    ViTConfig,
    ViTModel,
)

from depict_hf import DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.vit import LayerRecord
from training.starting import class_dependent, start_from

NEW = {
    "sa": {"decoder.class_tokens", "decoder.mask_norm.weight", "decoder.mask_norm.bias"},
    "ca": {"decoder.class_tokens", "decoder.mask_norm.weight", "decoder.mask_norm.bias"},
    "cbsa": {"decoder.class_tokens", "decoder.mask_norm.weight", "decoder.mask_norm.bias"},
    "mask_transformer": {"decoder.class_tokens", "decoder.mask_norm.weight", "decoder.mask_norm.bias"},
    "linear": {"decoder.classifier.weight", "decoder.classifier.bias"},
}
CLASSES = ("cat", "dog", "grass")


@pytest.fixture
def saved(tmp_path, decoder_type):
    model = tiny_model(decoder_type)
    model.save_pretrained(tmp_path)
    DepictImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    return model, tmp_path


def test_only_weights_that_depend_on_the_classes_are_new(saved, decoder_type):
    old, folder = saved
    start = start_from(str(folder), CLASSES)
    assert start.model.config.id2label == dict(enumerate(CLASSES)) and start.model.config.decoder_type == decoder_type
    assert set(start.new) == NEW[decoder_type] == class_dependent(old.config)
    assert set(start.kept) | set(start.new) == set(start.model.state_dict())
    weights = start.model.state_dict()
    assert all(torch.equal(weights[name], old.state_dict()[name]) for name in start.kept)
    assert (start.image_mean, start.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    text = "\n".join(start.describe())
    assert "kept: all" in text and all(name in text for name in NEW[decoder_type])


def test_as_many_other_classes_are_new_too_and_the_very_same_are_kept(tmp_path):
    """Weights of the same shape must not stay because they happen to fit."""
    old = tiny_model("sa")
    old.save_pretrained(tmp_path)
    DepictImageProcessor().save_pretrained(tmp_path)
    other = start_from(str(tmp_path), ("a", "b", "c", "d", "e"))
    assert set(other.new) == NEW["sa"]
    assert not torch.equal(other.model.decoder.class_tokens, old.decoder.class_tokens)
    same = start_from(str(tmp_path), tuple(old.config.id2label.values()))
    assert same.new == () and torch.equal(same.model.decoder.class_tokens, old.decoder.class_tokens)
    assert "new: nothing" in "\n".join(same.describe())


def test_another_decoder_is_new_as_a_whole(tmp_path):
    tiny_model("sa").save_pretrained(tmp_path)
    DepictImageProcessor().save_pretrained(tmp_path)
    start = start_from(str(tmp_path), CLASSES, "linear")
    assert set(start.new) == NEW["linear"] and start.model.config.decoder_type == "linear"


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
BACKBONES = {
    "dinov2": (Dinov2Backbone, Dinov2Config(**SMALL, patch_size=14, reshape_hidden_states=True)),
    "dinov3_vit": (DINOv3ViTBackbone, DINOv3ViTConfig(**SMALL, patch_size=14, intermediate_size=64)),
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_backbones_are_kept_and_get_a_new_decoder(tmp_path, kind):
    backbone_class, config = BACKBONES[kind]
    torch.manual_seed(0)
    backbone = backbone_class(config)
    backbone.save_pretrained(tmp_path)
    start = start_from(str(tmp_path), CLASSES)
    assert start.model.config.decoder_type == "sa" and start.image_mean == (0.485, 0.456, 0.406)
    assert {name.split(".")[0] for name in start.kept} == {"encoder"}
    assert {name.split(".")[0] for name in start.new} == {"decoder"}
    weights = start.model.encoder.backbone.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in backbone.state_dict().items())
    assert "colours are normalised as usual" in "\n".join(start.describe())
    output = start.model(torch.zeros(1, 3, 28, 42))
    assert isinstance(start.model, DepictForSemanticSegmentation) and output.logits.shape == (1, 3, 2, 3)


def test_a_vit_of_transformers_becomes_the_native_encoder(tmp_path):
    """Queries, keys and values are joined, every norm finds its place: the features are ViT's own."""
    torch.manual_seed(0)
    vit = ViTModel(
        ViTConfig(**SMALL, patch_size=14, intermediate_size=64, initializer_range=0.3), add_pooling_layer=False
    )
    vit.eval().save_pretrained(tmp_path)
    start = start_from(str(tmp_path), CLASSES)
    assert start.model.config.backbone_config is None and start.image_mean == (0.5, 0.5, 0.5)
    pixel_values = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = vit(pixel_values).last_hidden_state[:, 1:]
        patches, grid_size = start.model.eval().encoder(pixel_values, LayerRecord())
    assert grid_size == (2, 2)
    torch.testing.assert_close(patches, expected, rtol=1e-4, atol=1e-5)


def test_what_was_said_of_the_old_weights_is_not_said_of_the_new(tmp_path):
    tiny_model("sa", training_scenes="streets", temperature=2.0).save_pretrained(tmp_path)
    DepictImageProcessor().save_pretrained(tmp_path)
    config = start_from(str(tmp_path), CLASSES).model.config
    assert config.training_scenes is None and config.temperature == 1


@pytest.mark.parametrize("config", [ResNetConfig(), BeitConfig()])
def test_what_cannot_be_an_encoder_is_refused_by_name(tmp_path, config):
    config.save_pretrained(tmp_path)
    with pytest.raises((ValueError, OSError), match=r"resnet|beit|model\.safetensors"):
        start_from(str(tmp_path), CLASSES)


def test_code_of_a_hostile_hand_is_neither_run_nor_asked_about(tmp_path):
    """As `trust_remote_code=None` would do on a terminal."""
    (tmp_path / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}')
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'witness')!r}, 'w')")
    with pytest.raises(ValueError, match="contains custom code which must be executed") as caught:
        start_from(str(tmp_path), ("a", "b"))
    assert "\n" not in str(caught.value) and not (tmp_path / "witness").exists()
