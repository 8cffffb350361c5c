"""Published checkpoints: tests/data/published holds small random models made with the published code.

Made with DEPICT at QishuaiWen/DEPICT@6c66e2b, Segmenter at rstrudel/segmenter@20d1bfa and CBSA at
QishuaiWen/CBSA@042c7f9, float32 on a CPU. The ImageNet classifier rows are cut to two; gradients are every n-th value,
logits of "cbsa" every tenth class. Tolerances leave room for another order of float32 sums. In "cbsa", whose 150 random
classes are nearly alike, LayerNorm over the classes magnifies it: in float64 the same weights differ from these float32
references by 2e-4.
"""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers import DeiTConfig, DeiTModel, ViTConfig, ViTForImageClassification

from depict_hf import DepictForSemanticSegmentation
from depict_hf.conversion import (
    convert_checkpoint,
    load_encoder,
    read_checkpoint,
    read_weights,
    rename_parameters,
)
from depict_hf.inference import segment
from depict_hf.vit import LayerRecord
from depict_hf.windows import resize_bilinear

PUBLISHED = Path(__file__).parent / "data" / "published"
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
CASES = ("sa_deit_distilled", "ca_vit", "cbsa", "segmenter_linear")


def sides(image_processor) -> dict[str, int]:
    return {name: side for name, side in dict(image_processor.size).items() if side is not None}


@pytest.fixture(params=CASES)
def published(request):
    folder = PUBLISHED / request.param
    return folder, load_file(folder / "expected.safetensors")


def test_logits(published):
    folder, expected = published
    model, _ = convert_checkpoint(folder / "checkpoint.pth")
    model.config.window_size = None
    pixel_values = expected["forward.pixel_values"]
    logits = resize_bilinear(model(pixel_values).logits, pixel_values.shape[-2:])
    stride = model.config.num_labels // expected["forward.logits"].shape[1]
    tolerance = 3e-4 if folder.name == "cbsa" else 1e-4
    torch.testing.assert_close(logits[:, ::stride], expected["forward.logits"], atol=tolerance, rtol=0)


def test_loss_and_gradients(published):
    folder, expected = published
    model, _ = convert_checkpoint(folder)
    model.train()
    loss = model(expected["train.pixel_values"], labels=expected["train.labels"].long()).loss
    loss.backward()
    torch.testing.assert_close(loss[None], expected["train.loss"], atol=1e-4, rtol=0)
    slices = {k.removeprefix("train.grad."): v for k, v in expected.items() if k.startswith("train.grad.")}
    gradients = {name: parameter.grad.flatten() for name, parameter in model.named_parameters()}
    renamed = rename_parameters(slices)
    assert renamed.keys() == gradients.keys()
    for name, values in renamed.items():
        own = gradients[name][:: max(1, len(gradients[name]) // 24)][:24]
        assert (own - values).norm() <= 2e-3 * values.norm() + 1e-7, name


@pytest.mark.parametrize(
    ("protocol", "scales", "flip", "agreement"),
    [("single", (1.0,), False, 0.9995), ("multi", SCALES, True, 0.98)],
)
def test_protocol(published, protocol, scales, flip, agreement):
    """These random models decide many pixels by a hair, where one grey level of rounding moves a label."""
    folder, expected = published
    if protocol == "multi" and folder.name == "cbsa":
        scales = (0.5, 1.0, 1.5)  # the scales that this reference was made with
    model, image_processor = convert_checkpoint(folder, protocol="training")
    [segmentation] = segment(model, image_processor, [expected["protocol.image"].numpy()], scales, flip)
    assert (segmentation == expected[f"protocol.{protocol}.segmentation"]).float().mean().item() >= agreement


def test_settings_of_the_variant_are_kept():
    model, image_processor = convert_checkpoint(PUBLISHED / "ca_vit", protocol="training")
    config = model.config
    assert (config.window_size, config.window_stride, config.image_size) == (64, 48, (64, 64))
    assert (config.decoder_head_dim, config.decoder_cross_head_dim, config.decoder_num_heads) == (100, 50, 3)
    assert sides(image_processor) == {"shortest_edge": 80}
    assert tuple(image_processor.image_mean) == (0.5, 0.5, 0.5)
    _, image_processor = convert_checkpoint(PUBLISHED / "sa_deit_distilled", protocol="training")
    assert tuple(image_processor.image_std) == (0.229, 0.224, 0.225)
    assert not model.training


def test_a_converted_model_survives_a_save(tmp_path):
    model, image_processor = convert_checkpoint(PUBLISHED / "ca_vit")
    model.save_pretrained(tmp_path)
    image_processor.save_pretrained(tmp_path)
    loaded = DepictForSemanticSegmentation.from_pretrained(tmp_path)
    image = torch.randn(1, 3, 80, 110)
    assert torch.equal(loaded(image).logits, model(image).logits)


class TestBadFiles:
    def copy(self, tmp_path, change=None, variant=None) -> Path:
        shutil.copytree(PUBLISHED / "segmenter_linear", tmp_path, dirs_exist_ok=True)
        if change is not None:
            content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
            change(content)
            torch.save(content, tmp_path / "checkpoint.pth")
        if variant is not None:
            text = (tmp_path / "variant.yml").read_text()
            (tmp_path / "variant.yml").write_text(variant(text))
        return tmp_path

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c["model"].pop("encoder.norm.bias"), "missing encoder.norm.bias"),
            (lambda c: c["model"].update({"encoder.extra": torch.zeros(1)}), "do not have: encoder.extra"),
            (lambda c: c["model"].update({"encoder.norm.bias": torch.zeros(3)}), r"encoder.norm.bias is \(3,\)"),
            (lambda c: c["model"].pop("encoder.patch_embed.proj.weight"), "lacks 'encoder.patch_embed.proj.weight'"),
            (lambda c: c.pop("model"), 'needed a dict with the parameters under "model"'),
        ],
    )
    def test_parameters_that_do_not_fit_are_refused(self, tmp_path, change, message):
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(self.copy(tmp_path, change))

    def test_code_in_the_checkpoint_is_not_run(self, tmp_path):
        folder, witness = self.copy(tmp_path / "model"), tmp_path / "witness"

        class Attack:
            def __reduce__(self):
                return (Path.touch, (witness,))

        torch.save({"model": Attack()}, folder / "checkpoint.pth")
        with pytest.raises(ValueError, match="holds code, which is never run"):
            convert_checkpoint(folder)
        assert not witness.exists()

    def test_code_in_the_variant_is_not_run(self, tmp_path):
        witness = tmp_path / "witness"
        attack = f"log_dir: !!python/object/apply:os.mkdir [{witness}]"
        folder = self.copy(tmp_path / "model", variant=lambda text: text.replace("log_dir: log", attack))
        assert attack in (folder / "variant.yml").read_text()
        with pytest.raises(ValueError, match="is not YAML of plain values"):
            convert_checkpoint(folder)
        assert not witness.exists()

    def test_missing_files_are_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"checkpoint\.pth does not exist"):
            convert_checkpoint(tmp_path)
        shutil.copy(PUBLISHED / "ca_vit" / "checkpoint.pth", tmp_path)
        with pytest.raises(FileNotFoundError, match=r"variant\.yml does not exist"):
            convert_checkpoint(tmp_path / "checkpoint.pth")

    def test_a_garbage_file_is_refused(self, tmp_path):
        folder = self.copy(tmp_path)
        torch.save(io.BytesIO(b"x").getvalue(), folder / "checkpoint.pth")
        with pytest.raises(ValueError, match="needed a dict"):
            convert_checkpoint(folder)

    def test_unknown_normalisation_is_refused(self, tmp_path):
        folder = self.copy(tmp_path, variant=lambda text: text.replace("normalization: deit", "normalization: clip"))
        with pytest.raises(ValueError, match="normalization='clip'"):
            convert_checkpoint(folder)


def test_class_names_follow_dataset_and_count(tmp_path):
    """ADE20K's 150 names where the head has 150 classes; none where the count differs (the stored models)."""
    shutil.copytree(PUBLISHED / "segmenter_linear", tmp_path, dirs_exist_ok=True)
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    content["model"]["decoder.head.weight"] = torch.zeros(150, 48)
    content["model"]["decoder.head.bias"] = torch.zeros(150)
    torch.save(content, tmp_path / "checkpoint.pth")
    model, _ = convert_checkpoint(tmp_path)
    assert (model.config.id2label[0], model.config.id2label[149], model.config.label2id["wall"]) == ("wall", "flag", 0)
    model, _ = convert_checkpoint(PUBLISHED / "segmenter_linear")
    assert model.config.id2label[5] == "LABEL_5"


class TestOwnTraining:
    """Files that others wrote with the published code: any number of classes, any epoch, any way to train."""

    def snapshot(self, folder: Path, model, **extra) -> Path:
        """As segm/train.py writes: beside the parameters the states of optimiser, schedule and, if any, loss scale."""
        shutil.copy(PUBLISHED / "segmenter_linear" / "variant.yml", folder)
        content = {"model": model, "n_cls": 6, "epoch": 63, **extra}
        torch.save(content, folder / "checkpoint.pth")
        return folder

    def parameters(self) -> dict[str, torch.Tensor]:
        return read_checkpoint(PUBLISHED / "segmenter_linear" / "checkpoint.pth")

    def test_a_later_epoch(self, tmp_path):
        """SGD with momentum, a polynomial schedule that counted with numpy, and the scale of mixed precision."""
        parameters = self.parameters()
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, nesterov=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 9)
        for _ in range(3):
            weight.sum().backward()
            optimizer.step()
            schedule.step()
        numbers = {"rate": np.float64(0.01), "mean": np.float32(2.5), "steps": np.int64(7), "best": np.bool_(True)}
        extra = {
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": schedule.state_dict() | numbers,
            "loss_scaler": torch.amp.GradScaler("cpu").state_dict(),
        }
        model, _ = convert_checkpoint(self.snapshot(tmp_path, parameters, **extra))
        expected, _ = convert_checkpoint(PUBLISHED / "segmenter_linear")
        for name, value in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name

    @pytest.mark.parametrize("old_format", [False, True])
    def test_prefixes_of_parallel_training(self, tmp_path, old_format):
        wrapped = {f"module.{name}": value for name, value in self.parameters().items()}
        folder = self.snapshot(tmp_path, wrapped)
        if old_format:
            content = torch.load(folder / "checkpoint.pth", weights_only=True)
            torch.save(content, folder / "checkpoint.pth", _use_new_zipfile_serialization=False)
        assert read_checkpoint(folder / "checkpoint.pth").keys() == self.parameters().keys()
        model, _ = convert_checkpoint(folder)
        assert torch.equal(model.decoder.classifier.bias, self.parameters()["decoder.head.bias"])

    @pytest.mark.parametrize("num_labels", [1, 2, 19, 300])
    def test_any_number_of_classes(self, tmp_path, num_labels):
        parameters = self.parameters()
        parameters["decoder.head.weight"] = torch.randn(num_labels, 48, generator=torch.Generator().manual_seed(0))
        parameters["decoder.head.bias"] = torch.zeros(num_labels)
        names = [f"kind {index}" for index in range(num_labels)]
        model, image_processor = convert_checkpoint(self.snapshot(tmp_path, parameters), im_size=64, class_names=names)
        model.save_pretrained(tmp_path / "saved")
        loaded = DepictForSemanticSegmentation.from_pretrained(tmp_path / "saved").eval()
        assert loaded.config.id2label == dict(enumerate(names)) and loaded.config.num_labels == num_labels
        [labels] = segment(loaded, image_processor, [np.random.default_rng(0).integers(0, 255, (64, 80, 3), np.uint8)])
        assert labels.max() < num_labels and (num_labels == 1 or len(labels.unique()) > 1)

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["a", "b"], "Got 2 class names, 2 of them different, for a model of 6 classes"),
            (["a", "b", "c", "d", "e", "a"], "Got 6 class names, 5 of them different, for a model of 6 classes"),
        ],
    )
    def test_names_that_do_not_fit(self, names, message):
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(PUBLISHED / "segmenter_linear", class_names=names)


class TestEncoders:
    @pytest.mark.parametrize("distilled", [False, True])
    def test_timm(self, distilled):
        torch.manual_seed(0)
        kind = timm.models.deit.VisionTransformerDistilled if distilled else timm.models.VisionTransformer
        source = kind(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2, num_classes=7).eval()
        model = tiny_model(layer_norm_eps=1e-6, use_distillation_token=distilled)
        load_encoder(model, source.state_dict())
        image = torch.randn(1, 3, 32, 32)
        expected = source.forward_features(image)[:, 1 + distilled :]
        torch.testing.assert_close(model.encoder(image, LayerRecord())[0], expected, atol=2e-6, rtol=1e-5)

    def vit(self, **overrides):
        torch.manual_seed(0)
        fields = {
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 48,
        }
        return ViTForImageClassification(ViTConfig(**(fields | overrides))).eval()

    def test_transformers_vit_with_a_head(self, tmp_path):
        source = self.vit()
        model = tiny_model(layer_norm_eps=1e-12)
        image = torch.randn(1, 3, 32, 32)
        expected = source.vit(image).last_hidden_state[:, 1:]
        load_encoder(model, source.state_dict())
        torch.testing.assert_close(model.encoder(image, LayerRecord())[0], expected, atol=2e-6, rtol=1e-5)

        # Files on the Hub carry the names of older releases.
        source.save_pretrained(tmp_path)
        stored = load_file(tmp_path / "model.safetensors")
        assert "vit.encoder.layer.0.attention.attention.query.weight" in stored
        from_file = tiny_model(layer_norm_eps=1e-12)
        load_encoder(from_file, stored)
        assert torch.equal(from_file.encoder(image, LayerRecord())[0], model.encoder(image, LayerRecord())[0])

    def test_transformers_deit(self):
        torch.manual_seed(0)
        source = DeiTModel(
            DeiTConfig(
                image_size=32,
                patch_size=8,
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=3,
                intermediate_size=48,
            )
        ).eval()
        model = tiny_model(layer_norm_eps=1e-12, use_distillation_token=True)
        load_encoder(model, source.state_dict())
        image = torch.randn(1, 3, 32, 32)
        expected = source(image).last_hidden_state[:, 2:]
        torch.testing.assert_close(model.encoder(image, LayerRecord())[0], expected, atol=2e-6, rtol=1e-5)

    def test_weights_are_read_from_files_and_folders(self, tmp_path):
        weights = {"norm.weight": torch.arange(3.0)}
        save_file(weights, tmp_path / "model.safetensors")
        torch.save({"model": weights}, tmp_path / "deit.pth")
        for source in (tmp_path, tmp_path / "model.safetensors", tmp_path / "deit.pth"):
            assert torch.equal(read_weights(source)["norm.weight"], weights["norm.weight"])
        torch.save({"model": Path}, tmp_path / "code.pth")
        with pytest.raises(ValueError, match="holds code, which is never run"):
            read_weights(tmp_path / "code.pth")

    def test_positions_are_resized_to_the_models_grid(self):
        source = self.vit(image_size=16).state_dict()
        model = tiny_model()
        load_encoder(model, source)
        grid = source["vit.embeddings.position_embeddings"][:, 1:].transpose(1, 2).unflatten(2, (2, 2))
        expected = resize_bilinear(grid, (4, 4)).flatten(2).transpose(1, 2)
        torch.testing.assert_close(model.encoder.embeddings.position_embeddings[:, 1:], expected)

    def test_another_architecture_is_refused(self):
        with pytest.raises(ValueError, match=r"vision transformers do not have: layer1\.weight"):
            load_encoder(tiny_model(), {"layer1.weight": torch.zeros(1)})
        with pytest.raises(ValueError, match="The weights do not fit the model: missing embeddings"):
            load_encoder(tiny_model(), {"norm.weight": torch.zeros(24)})

    def test_a_distilled_source_for_a_plain_model_is_refused(self):
        with pytest.raises(ValueError, match="check `use_distillation_token`"):
            load_encoder(DepictForSemanticSegmentation(tiny_config()), {"pos_embed": torch.zeros(1, 18, 24)})


def test_read_checkpoint_returns_published_names():
    assert "decoder.snet.layers.0.fn.step_size" in read_checkpoint(PUBLISHED / "ca_vit" / "checkpoint.pth")
