from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import DECODER_TYPES, ONE_LAYER, tiny_config, tiny_model
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForSemanticSegmentation,
    BeitConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    SwinConfig,
)
from transformers.modeling_outputs import SemanticSegmenterOutput

from depict_hf import DepictForSemanticSegmentation, windows
from depict_hf.modeling_depict import segmentation_loss
from training.evaluation.measurement import peak_extra_bytes

LABELS = torch.randint(0, 5, (2, 32, 48), generator=torch.Generator().manual_seed(2))


# In "cbsa" with random step sizes a change is broadcast to all patches; tests/test_decoders.py checks its layout.
@pytest.mark.parametrize("decoder_type", ["sa", "ca", "mask_transformer", "linear"])
def test_logits_lie_on_the_patch_grid(pixel_values, decoder_type):
    """Row-major: a change in the bottom right patch of the input changes that patch's logits more than most others."""
    model = tiny_model(decoder_type)
    logits = model(pixel_values).logits
    assert logits.shape == (2, 5, 4, 6)
    changed = pixel_values.clone()
    changed[..., 24:, 40:] += 3
    difference = (model(changed).logits - logits).abs().amax(dim=1).flatten(1)
    assert (difference[:, 23] > 1.5 * difference.median(dim=1).values).all()


def test_other_sizes_are_padded_upsampled_and_cropped(decoder_type):
    model = tiny_model(decoder_type)
    image = torch.randn(1, 3, 30, 41)
    padded = F.pad(image, (0, 7, 0, 2))
    expected = F.interpolate(model(padded).logits, (32, 48), mode="bilinear")[..., :30, :41]
    torch.testing.assert_close(model(image).logits, expected)


def test_images_of_a_batch_do_not_mix(pixel_values, decoder_type):
    model = tiny_model(decoder_type)
    together = model(pixel_values).logits
    torch.testing.assert_close(model(pixel_values[1:]).logits, together[1:], atol=1e-5, rtol=1e-4)


def test_loss_is_cross_entropy_at_the_labels_size(pixel_values):
    model = tiny_model()
    labels = LABELS.clone()
    labels[:, :5] = 255
    output = model(pixel_values, labels=labels)
    logits = F.interpolate(output.logits, (32, 48), mode="bilinear")
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, labels, ignore_index=255))


@pytest.mark.parametrize("band_elements", [2**19, 700])  # all rows at once, and a few
def test_loss_by_bands_is_exact(band_elements, monkeypatch):
    """Value and gradient in float64, against the full-size logits'; sizes that do not divide, a third ignored."""
    monkeypatch.setitem(windows.BAND_ELEMENTS, "cpu", band_elements)
    generator = torch.Generator().manual_seed(3)
    logits = 5 * torch.randn(2, 5, 4, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 6, (2, 35, 50), generator=generator)
    labels[labels == 5] = 255
    gradients = []
    for loss_of in (
        lambda scores: segmentation_loss(scores, labels, 255),
        lambda scores: F.cross_entropy(F.interpolate(scores, (35, 50), mode="bilinear"), labels, ignore_index=255),
    ):
        leaf = logits.clone().requires_grad_()
        loss = loss_of(leaf)
        (3 * loss).backward()
        gradients.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-12, rtol=1e-10)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_loss_by_bands_needs_little_memory():
    """Logits at full size and their gradient would be 300 MB; enlarged in width only, they are 10 MB each."""
    logits = torch.randn(1, 150, 16, 500, requires_grad=True)
    labels = torch.randint(0, 150, (1, 500, 500))
    segmentation_loss(logits, labels, 255).backward()
    assert peak_extra_bytes(lambda: segmentation_loss(logits, labels, 255).backward()) < 6e7


def test_a_batch_without_labelled_pixels_has_zero_loss_and_gradient(pixel_values):
    model = tiny_model()
    loss = model(pixel_values, labels=torch.full((2, 32, 48), 255)).loss
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize(("label", "ignore"), [(5, 255), (-1, 255), (255, -100)])
def test_labels_that_are_no_class_are_refused(pixel_values, label, ignore):
    labels = LABELS.clone()
    labels[0, 3, 4] = label
    model = tiny_model(semantic_loss_ignore_index=ignore)
    with pytest.raises(ValueError, match=rf"Got labels \[{label}\], needed ids from 0 to 4 or {ignore}"):
        model(pixel_values, labels=labels)


def test_labels_that_are_no_class_are_refused_in_compiled_models_too(pixel_values):
    """Without a graph break; the message cannot say which label it was."""
    model = torch.compile(tiny_model(), fullgraph=True, backend="aot_eager")
    labels = LABELS.clone()
    labels[0, :4] = 255
    torch.testing.assert_close(model(pixel_values, labels=labels).loss, tiny_model()(pixel_values, labels=labels).loss)
    labels[1, 2, 3] = 5
    with pytest.raises(RuntimeError, match="Got labels that are no class ids, needed ids from 0 to 4 or 255"):
        model(pixel_values, labels=labels)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("decoder_type", "windows"),
    [
        ("sa", {}),
        ("mask_transformer", {}),
        *((each, {"window_size": 32, "window_stride": 20}) for each in DECODER_TYPES),
    ],
)
def test_a_compiled_model_takes_any_size(decoder_type, windows):
    """Padding, merging and cropping as without compiling, without a graph break."""
    model = tiny_model(decoder_type, **ONE_LAYER, **windows)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=not windows)
    for size in ((30, 41), (37, 70)):
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(image).logits, model(image).logits, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


def test_the_loss_is_exact_under_reduced_precision_and_checkpointing():
    """Against float64: value and gradient, the second time too, where the forward pass runs once more."""
    generator = torch.Generator().manual_seed(4)
    logits = 5 * torch.randn(2, 5, 4, 6, generator=generator)
    labels = torch.randint(0, 5, (2, 35, 50), generator=generator)
    expected = logits.double().requires_grad_()
    segmentation_loss(expected, labels, 255).backward()
    torch.set_float32_matmul_precision("medium")
    try:
        for kept in (True, False):
            leaf = logits.clone().requires_grad_()
            arguments = (leaf, labels, 255)
            with torch.autocast("cpu", torch.bfloat16):
                loss = (
                    segmentation_loss(*arguments)
                    if kept
                    else checkpoint(segmentation_loss, *arguments, use_reentrant=False)
                )
            loss.backward(retain_graph=True)
            loss.backward()
            torch.testing.assert_close(leaf.grad.double(), 2 * expected.grad, atol=1e-8, rtol=1e-4)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("labels", [LABELS[:1], LABELS.float(), LABELS[:, None]])
def test_labels_of_another_form_are_refused(pixel_values, labels):
    with pytest.raises(ValueError, match=r"needed integers of shape \(2, height, width\)"):
        tiny_model()(pixel_values, labels=labels)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32)])
def test_pixel_values_of_another_form_are_refused(shape):
    with pytest.raises(ValueError, match=r"needed \(batch, 3, height, width\)"):
        tiny_model()(torch.zeros(shape))


def test_half_precision_loss_is_computed_in_float32():
    logits = torch.randn(1, 5, 4, 6, dtype=torch.bfloat16)
    assert segmentation_loss(logits, LABELS[:1], 255).dtype == torch.float32


class TestLayers:
    def test_hidden_states_and_attentions_are_told_apart(self, pixel_values):
        model = tiny_model("ca", num_hidden_layers=3)
        output = model(pixel_values, output_hidden_states=True, output_attentions=True)
        assert isinstance(output, SemanticSegmenterOutput)
        lengths = {name: len(output[name]) for name in output if name != "logits"}
        assert lengths == {
            "hidden_states": 4,
            "attentions": 3,
            "decoder_hidden_states": 3,
            "decoder_attentions": 2,
            "cross_hidden_states": 3,
            "cross_attentions": 2,
        }
        assert output.attentions[0].shape == (2, 3, 25, 25)
        assert output.decoder_attentions[0].shape == (2, 2, 24, 24)
        assert output.cross_attentions[0].shape == (2, 2, 5, 24)
        for weights in (*output.attentions, *output.decoder_attentions, *output.cross_attentions):
            torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))

    def test_asking_changes_no_logits(self, pixel_values, decoder_type):
        model = tiny_model(decoder_type)
        asked = model(pixel_values, output_attentions=True, output_hidden_states=True).logits
        torch.testing.assert_close(model(pixel_values).logits, asked, atol=1e-5, rtol=1e-4)

    def test_decoder_states_join_encoder_and_logits(self, pixel_values):
        """The decoder's first state is the encoder's normalised patches; its last leads to the logits."""
        model = tiny_model("sa")
        output = model(pixel_values, output_hidden_states=True)
        patches = model.encoder.norm(output.hidden_states[-1])[:, 1:]
        torch.testing.assert_close(output.decoder_hidden_states[0][:, :24], patches)
        assert output.decoder_attentions is None
        tokens = F.normalize(model.decoder.norm(output.decoder_hidden_states[-1]), dim=-1)
        similarities = tokens[:, :24] @ tokens[:, 24:].transpose(1, 2)
        expected = model.decoder.mask_norm(similarities).transpose(1, 2).view(2, 5, 4, 6)
        torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-4)

    def test_tuples_hold_the_same_values(self, pixel_values):
        model = tiny_model("ca")
        arguments = {"labels": LABELS, "output_hidden_states": True, "output_attentions": True}
        expected = model(pixel_values, **arguments).to_tuple()
        output = model(pixel_values, **arguments, return_dict=False)
        assert len(output) == 8
        torch.testing.assert_close(output, expected)


class TestWindows:
    def window_model(self, **overrides):
        return tiny_model("ca", **({"window_size": 32, "window_stride": 20} | overrides))

    def test_windows_are_averaged_at_the_inputs_size(self):
        """Against a loop that runs each window alone; 45 x 71 needs 2 x 3 windows for each of three images."""
        model = self.window_model()
        images = torch.randn(3, 3, 45, 71)
        total, count = torch.zeros(3, 5, 45, 71), torch.zeros(45, 71)
        for top in (0, 13):
            for left in (0, 20, 39):
                area = (..., slice(top, top + 32), slice(left, left + 32))
                total[area] += F.interpolate(model(images[area]).logits, (32, 32), mode="bilinear")
                count[area[1:]] += 1
        torch.testing.assert_close(model(images).logits, total / count, atol=1e-5, rtol=1e-4)

    def test_an_input_of_one_window_stays_on_the_patch_grid(self):
        assert self.window_model()(torch.randn(1, 3, 32, 32)).logits.shape == (1, 5, 4, 4)

    def test_a_side_shorter_than_the_window_is_enlarged(self):
        model = self.window_model()
        image = torch.randn(1, 3, 24, 50)
        enlarged = F.interpolate(image, (32, 66), mode="bilinear")
        expected = F.interpolate(model(enlarged).logits, (24, 50), mode="bilinear")
        torch.testing.assert_close(model(image).logits, expected)

    def test_the_stride_defaults_to_the_window(self):
        image = torch.randn(1, 3, 32, 64)
        expected = self.window_model(window_stride=32)(image).logits
        torch.testing.assert_close(self.window_model(window_stride=None)(image).logits, expected)

    def test_training_and_a_cleared_window_size_use_the_whole_image(self):
        model, image = self.window_model(), torch.randn(1, 3, 32, 64)
        assert model.train()(image).logits.shape == (1, 5, 4, 8)
        model.eval().config.window_size = None
        assert model(image).logits.shape == (1, 5, 4, 8)

    def test_layers_of_windows_are_refused(self):
        with pytest.raises(ValueError, match="window_size = None"):
            self.window_model()(torch.randn(1, 3, 32, 64), output_attentions=True)

    def test_loss_of_windows(self):
        model, labels = self.window_model(), LABELS[:1, :, :40]
        output = model(torch.randn(1, 3, 32, 40), labels=labels)
        torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))


BACKBONES = {
    "dinov2": Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32),
    "dinov2_with_registers": Dinov2WithRegistersConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32, num_register_tokens=3
    ),
    "dinov3": DINOv3ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        patch_size=8,
        image_size=32,
        num_register_tokens=4,
    ),
    "beit": BeitConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        patch_size=8,
        image_size=32,
        use_relative_position_bias=True,
        reshape_hidden_states=True,
    ),
}


class TestBackbones:
    @pytest.mark.parametrize("name", BACKBONES)
    def test_the_decoder_reads_the_last_feature_map_row_by_row(self, name):
        torch.manual_seed(0)
        model = DepictForSemanticSegmentation(tiny_config("linear", backbone_config=BACKBONES[name])).eval()
        image = torch.randn(1, 3, 32, 40)
        feature_map = model.encoder.backbone(image).feature_maps[-1]
        expected = torch.einsum("bdhw,cd->bchw", feature_map, model.decoder.classifier.weight)
        torch.testing.assert_close(model(image).logits, expected, atol=1e-5, rtol=1e-4)

    def test_attentions_are_there_and_the_implementation_is_restored(self):
        model = DepictForSemanticSegmentation(tiny_config(backbone_config=BACKBONES["dinov2"])).eval()
        before = model.encoder.backbone.config._attn_implementation
        output = model(torch.randn(1, 3, 32, 40), output_attentions=True, output_hidden_states=True)
        assert before == "sdpa" == model.encoder.backbone.config._attn_implementation
        assert [weights.shape for weights in output.attentions] == [(1, 2, 21, 21)] * 2
        assert len(output.hidden_states) == 3

    def test_a_pyramid_is_refused(self):
        config = tiny_config(backbone_config=SwinConfig(image_size=32, patch_size=4, embed_dim=12, depths=[1, 1]))
        model = DepictForSemanticSegmentation(config)
        with pytest.raises(
            ValueError, match=r"'swin' returned a feature map of shape .* DEPICT needs a plain patch grid"
        ):
            model(torch.randn(1, 3, 32, 32))

    def test_save_and_load(self, tmp_path):
        model = DepictForSemanticSegmentation(tiny_config(backbone_config=BACKBONES["dinov2"])).eval()
        image = torch.randn(1, 3, 32, 40)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
        assert torch.equal(loaded(image).logits, model(image).logits)


def test_save_and_load_keep_every_value(tmp_path, pixel_values, decoder_type):
    """Fails if a bare parameter (tokens, projections, step sizes) is re-initialised on loading."""
    model = tiny_model(decoder_type, use_distillation_token=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)


def test_half_precision_stays_close(pixel_values, decoder_type):
    model = tiny_model(decoder_type)
    expected = model(pixel_values).logits
    logits = model.to(torch.bfloat16)(pixel_values).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().mean() < 0.1 * expected.std()
