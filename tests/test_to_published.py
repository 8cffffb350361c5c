"""Our models as files of the published code, and back: names, values and settings are those of the files in data/."""

from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_model

from depict_hf import DepictConfig, DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.conversion import convert_checkpoint, published_protocol, read_checkpoint, read_variant
from depict_hf.labels import class_names
from depict_hf.to_published import timm_state_dict, write_published

PUBLISHED = Path(__file__).parent / "data" / "published"
CASES = ("sa_deit_distilled", "ca_vit", "cbsa", "segmenter_linear")
HALVES = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("protocol", ["published", "training"])
def test_published_files_come_back(name, protocol, tmp_path):
    """Every parameter bit for bit under its own name; only the ImageNet classifiers, which we drop, are zeros."""
    model, image_processor = convert_checkpoint(PUBLISHED / name, protocol=protocol)
    original = read_checkpoint(PUBLISHED / name / "checkpoint.pth")
    settings = read_variant(PUBLISHED / name / "variant.yml")
    path = write_published(model, image_processor, tmp_path, settings["dataset_kwargs"]["dataset"])
    assert path == tmp_path / "checkpoint.pth"
    written = read_checkpoint(path)
    assert written.keys() == original.keys()
    for key, value in original.items():
        if key.startswith("encoder.head"):
            assert written[key].shape == (1000, *value.shape[1:]) and not written[key].any(), key
        else:
            assert written[key].dtype == value.dtype and torch.equal(written[key], value), key
    variant = read_variant(tmp_path / "variant.yml")
    ours, theirs = variant["net_kwargs"], settings["net_kwargs"]
    assert ours.keys() == theirs.keys() and ours["decoder"] == theirs["decoder"]
    assert {key: ours[key] for key in ours if key != "backbone"} == {
        key: theirs[key] for key in theirs if key != "backbone"
    }
    for key in ("dataset", "crop_size", "normalization"):
        assert variant["dataset_kwargs"][key] == settings["dataset_kwargs"][key]
    if protocol == "training":
        assert variant["inference_kwargs"] == settings["inference_kwargs"]
    again, processor_again = convert_checkpoint(tmp_path, protocol=protocol)
    assert again.config.to_dict() == model.config.to_dict()
    assert processor_again.to_dict() == image_processor.to_dict()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dataset", ["ade20k", "cityscapes", "pascal_context"])
def test_a_trained_row_comes_back_with_its_protocol(dataset, decoder_type, tmp_path):
    """By its class names the data set is found, and so are the published sizes, windows and names."""
    protocol = published_protocol(dataset, 64)
    config = DepictConfig.from_preset(
        "vit_tiny_patch16_384",
        num_hidden_layers=1,
        image_size=64,
        decoder_type=decoder_type,
        id2label=dict(enumerate(class_names(dataset))),
        drop_path_rate=0.1,
        window_size=protocol["window_size"],
        window_stride=protocol["window_stride"],
    )
    torch.manual_seed(0)
    model = DepictForSemanticSegmentation(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    write_published(model, DepictImageProcessor(size=protocol["size"], **HALVES), tmp_path / "new")
    again, image_processor = convert_checkpoint(tmp_path / "new")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert {key: value for key, value in dict(image_processor.size).items() if value is not None} == protocol["size"]
    assert (again.config.window_size, again.config.window_stride) == (64, 32)
    assert again.config.id2label == dict(enumerate(class_names(dataset)))
    assert (again.config.drop_path_rate, again.config.decoder_dropout) == (
        0.1,
        0.1 if decoder_type == "mask_transformer" else 0.0,
    )


def test_the_variant_names_the_published_encoder(tmp_path):
    """The published code loads pretrained weights of that name first: of another shape, it would stop there."""
    for encoder, layers, expected in (
        ("vit_tiny_patch16_384", 12, "vit_tiny_patch16_384"),
        ("vit_tiny_patch16_384", 2, "unnamed"),
        ("deit_tiny_distilled_patch16_224", 12, "deit_tiny_distilled_patch16_224"),
    ):
        config = DepictConfig.from_preset(encoder, num_hidden_layers=layers, image_size=32, num_labels=4)
        folder = tmp_path / f"{encoder}_{layers}"
        write_published(DepictForSemanticSegmentation(config), DepictImageProcessor(**HALVES), folder)
        settings = yaml.load((folder / "variant.yml").read_text(), Loader=yaml.FullLoader)  # as the published code does
        assert settings["net_kwargs"]["backbone"] == expected
        assert settings["net_kwargs"]["image_size"] == (32, 32)
        assert "dataset" not in settings["dataset_kwargs"]


def test_encoders_get_timms_names():
    timm = pytest.importorskip("timm", reason="timm says what its own names are")
    config = DepictConfig.from_preset("vit_tiny_patch16_384", num_hidden_layers=2, image_size=64)
    model = DepictForSemanticSegmentation(config)
    other = timm.create_model("vit_tiny_patch16_384", num_classes=0, depth=2, img_size=64)
    other.load_state_dict(timm_state_dict(model.encoder.state_dict()), strict=True)
    assert torch.equal(other.blocks[1].mlp.fc2.weight, model.encoder.layers[1].mlp.fc2.weight)


@pytest.mark.parametrize(
    ("decoder_type", "fields", "message"),
    [
        ("sa", {"decoder_head_dim": 16}, "decoder_head_dim=16, needed 100"),
        ("ca", {"decoder_head_dim": 100}, "decoder_cross_num_layers=2, needed 3; decoder_cross_head_dim=8, needed 50"),
        ("linear", {"layer_norm_eps": 1e-6}, r"layer_norm_eps=1e-06, needed 1e-05"),
        ("linear", {"image_size": (32, 48)}, r"image_size=\(32, 48\), needed a square"),
        ("mask_transformer", {"decoder_num_heads": 3}, "decoder_num_heads=3, needed 0"),
    ],
)
def test_what_the_published_code_cannot_build_is_refused(decoder_type, fields, message, tmp_path):
    model = tiny_model(decoder_type, **{"intermediate_size": 96, **fields})
    with pytest.raises(ValueError, match=message):
        write_published(model, DepictImageProcessor(**HALVES), tmp_path)
    assert not any(tmp_path.iterdir())


def test_other_normalisations_are_refused(tmp_path):
    image_processor = DepictImageProcessor(image_mean=(0.4, 0.4, 0.4), image_std=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match=r"image_mean=\[0.4, 0.4, 0.4\].*needed those of vit or deit"):
        write_published(tiny_model("linear", intermediate_size=96), image_processor, tmp_path)


@pytest.mark.parametrize("name", ["checkpoint.pth", "variant.yml"])
def test_nothing_is_overwritten(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name} is there already"):
        write_published(tiny_model("linear", intermediate_size=96), DepictImageProcessor(**HALVES), tmp_path)
    assert (tmp_path / name).read_text() == "mine"
