import pytest
from transformers import AutoConfig, Dinov2Config

from depict_hf import DepictConfig
from depict_hf.configuration_depict import ENCODER_PRESETS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 3}, "hidden_size=100 is not divisible by num_attention_heads=3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ({"hidden_size": -384}, "hidden_size=-384 must be at least 1"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0 must be at least 0 and below 1"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps=0.0 must be positive"),
        ({"hidden_act": "gelo"}, "Unknown hidden_act='gelo'"),
        ({"image_size": 8}, "does not hold one patch"),
        ({"image_size": [64, 64, 3]}, "must be one number of pixels or"),
        ({"decoder_type": "upernet"}, "Unknown decoder_type='upernet'; choose one of sa, ca"),
        ({"num_labels": 1}, "num_labels=1, but decoder_type='sa' normalises over the classes"),
        ({"decoder_head_dim": 0}, "decoder_head_dim=0 must be at least 1"),
        ({"decoder_dropout": -0.1}, "decoder_dropout=-0.1"),
        ({"decoder_type": "mask_transformer", "decoder_num_heads": 5}, "width 384 is not divisible"),
        ({"window_size": 64, "window_stride": 65}, "larger than window_size=64"),
        ({"window_size": 0}, "window_size=0 must be at least 1"),
        ({"window_stride": 32}, "needs a window_size"),
        ({"backbone_config": {"hidden_size": 8}}, "without `model_type`"),
    ],
)
def test_wrong_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DepictConfig(**fields)


def test_wrong_types_are_refused():
    with pytest.raises(Exception, match="hidden_size"):
        DepictConfig(hidden_size="384")


def test_presets_hold_the_published_widths():
    """Heads of 64 everywhere, a distillation token in DeiT only; `vit_base_patch8_384` cuts patches of 8."""
    for name in ENCODER_PRESETS:
        config = DepictConfig.from_preset(name)
        assert config.hidden_size == 64 * config.num_attention_heads, name
        assert config.intermediate_size == 4 * config.hidden_size, name
        assert config.use_distillation_token == name.startswith("deit"), name
    large = DepictConfig.from_preset("vit_large_patch16_384", num_labels=150, image_size=640)
    assert (large.num_hidden_layers, large.num_labels, large.grid_size) == (24, 150, (40, 40))
    assert DepictConfig.from_preset("vit_base_patch8_384").patch_size == 8
    segmenter = DepictConfig.from_preset("vit_base_patch16_384", decoder_type="mask_transformer", decoder_dropout=0.0)
    assert (segmenter.decoder_num_heads, segmenter.decoder_num_layers, segmenter.decoder_dropout) == (12, 2, 0.0)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="Unknown encoder preset 'vit_huge'"):
        DepictConfig.from_preset("vit_huge")


def test_save_and_load_keep_every_field(tmp_path):
    config = DepictConfig(
        image_size=[64, 96],
        decoder_type="ca",
        decoder_cross_head_dim=7,
        window_size=64,
        window_stride=48,
        id2label={0: "sky", 1: "road", 2: "car"},
        label2id={"sky": 0, "road": 1, "car": 2},
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, DepictConfig)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert loaded.grid_size == (4, 6)
    assert loaded.num_labels == 3


def test_a_backbone_configuration_survives_a_save(tmp_path):
    backbone = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, patch_size=7, image_size=28)
    DepictConfig(backbone_config=backbone, hidden_size=-1).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.backbone_config.hidden_size == 24
    assert loaded.encoder_patch_size == 7


def test_a_backbone_without_square_patches_is_refused():
    from transformers import ResNetConfig

    with pytest.raises(ValueError, match="patch_size=None; DEPICT needs one feature map of square patches"):
        _ = DepictConfig(backbone_config=ResNetConfig()).encoder_patch_size


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_that_cannot_divide_is_refused(temperature):
    with pytest.raises(ValueError, match="must be positive and finite"):
        DepictConfig(temperature=temperature)


def test_a_temperature_is_saved(tmp_path):
    assert DepictConfig().temperature == 1
    DepictConfig(temperature=1.7).save_pretrained(tmp_path)
    assert DepictConfig.from_pretrained(tmp_path).temperature == 1.7
