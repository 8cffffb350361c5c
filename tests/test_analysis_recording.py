"""Records and attention maps: nothing moves in the logits, and what is kept is what the model computed."""

import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import needs_fake_cuda, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode

from depict_hf.analysis import (
    analyze,
    attention,
    attention_map,
    class_gram,
    contributions,
    lens,
    orthonormalized,
    record,
    rollout,
    rotate_heads,
    rotated_across_heads,
    source_contributions,
    step_size_scaled,
)

LAYERED = ["sa", "ca", "cbsa", "mask_transformer"]


def dinov2_model(decoder_type="sa", **overrides):
    from transformers import Dinov2Config

    backbone = Dinov2Config(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        patch_size=8,
        image_size=32,
        reshape_hidden_states=True,
    )
    return tiny_model(decoder_type, backbone_config=backbone, **overrides)


def test_import_needs_nothing_heavy():
    code = "import sys, depict_hf.analysis; print(' '.join(sys.modules))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not {"captum", "matplotlib", "datasets", "training"} & loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_model, dinov2_model])
def test_logits_are_those_of_the_model_bit_for_bit(make, dtype, decoder_type, pixel_values):
    model = make(decoder_type).to(dtype)
    with torch.no_grad():
        expected = model(pixel_values).logits
    recording = record(model, pixel_values, encoder_tokens=True, encoder_attentions=[1])
    assert torch.equal(recording.logits, expected)
    with torch.no_grad():
        assert torch.equal(model(pixel_values).logits, expected)


def test_tokens_are_those_of_the_models_output(decoder_type, pixel_values):
    model = tiny_model(decoder_type)
    recording = record(model, pixel_values, encoder_tokens=True)
    with torch.no_grad():
        output = model(pixel_values, output_hidden_states=True)
    for found, expected in (
        (recording.encoder_tokens, output.hidden_states),
        (recording.decoder_tokens, output.decoder_hidden_states or ()),
        (recording.cross_tokens, output.cross_hidden_states or ()),
    ):
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected))
    assert recording.grid_size == (4, 6) and recording.area == (0, 0, 32, 48)
    assert recording.patch_tokens[-1].shape == (2, 24, 24)
    if decoder_type in ("sa", "ca", "cbsa"):
        assert torch.equal(recording.patch_tokens[0], recording.encoder_output)
    if decoder_type != "linear":
        assert torch.equal(recording.class_tokens[0][1], model.decoder.class_tokens[0])


def test_a_record_does_not_change_with_the_weights(decoder_type, pixel_values):
    model = tiny_model(decoder_type)
    recording = record(model, pixel_values)
    kept = [recording.logits, recording.encoder_output, *recording.decoder_tokens, *recording.cross_tokens]
    before = [tokens.clone() for tokens in kept]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(map(torch.equal, kept, before))


def test_only_what_is_asked_for_is_kept(pixel_values):
    recording = record(tiny_model("sa"), pixel_values, encoder_attentions=[1])
    assert recording.encoder_tokens == () and list(recording.encoder_attentions) == [1]


def test_a_side_that_is_no_multiple_of_the_patch(pixel_values):
    model = tiny_model("sa")
    recording = record(model, pixel_values[..., :29, :41])
    padded = F.pad(pixel_values[..., :29, :41], (0, 7, 0, 3))
    with torch.no_grad():
        assert torch.equal(recording.logits, model(padded).logits)
    assert recording.area == (0, 0, 29, 41)


def test_a_photograph_as_one_and_by_windows(image_processor, tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (32, 80, 3), np.uint8)
    PIL.Image.fromarray(photo).save(tmp_path / "photo.png")
    pixel_values = image_processor(photo, return_tensors="pt")["pixel_values"]
    model = tiny_model("sa")
    for given in (photo, PIL.Image.fromarray(photo), tmp_path / "photo.png"):
        with torch.no_grad():
            assert torch.equal(analyze(model, image_processor, given).logits, model(pixel_values).logits)
    model.config.window_size, model.config.window_stride = 32, 24
    assert analyze(model, image_processor, photo).grid_size == (4, 10)
    last = analyze(model, image_processor, photo, window=2)
    assert last.area == (0, 48, 32, 32) and last.grid_size == (4, 4)
    with torch.no_grad():
        assert torch.equal(last.logits, model(pixel_values[..., 48:]).logits)
    with pytest.raises(ValueError, match="Got window=3, but the photograph has windows 0 to 2"):
        analyze(model, image_processor, photo, window=3)


def test_a_rotated_photograph_is_turned_upright(image_processor):
    photo = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 80, 3), np.uint8))
    photo.getexif()[0x0112] = 6
    assert analyze(tiny_model("sa"), image_processor, photo).grid_size == (10, 4)


@needs_fake_cuda
@pytest.mark.parametrize("decoder_type", LAYERED)
def test_no_devices_mix(decoder_type):
    """On fake CUDA tensors, whose operations raise where devices mix or a value is read back."""
    model = tiny_model(decoder_type)
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(parameter.shape, device="cuda"))
        recording = record(model, torch.empty(2, 3, 32, 48), encoder_attentions=[0])
        assert recording.logits.device.type == "cuda"
        if decoder_type != "mask_transformer":
            rotate_heads(model)
            with orthonormalized(model), rotated_across_heads(model), step_size_scaled(model, 2):
                pass
        for result in (
            contributions(model, recording).values,
            contributions(model, recording, side="classes").values,
            source_contributions(model, recording, 0, 1, 2),
            lens(model, recording),
            rollout(model, recording),
            attention_map(model, recording, 0, patch=(1, 1)),
            attention_map(model, recording, 0, patch=(1, 1), part="encoder"),
            class_gram(model, recording),
        ):
            assert result.device.type == "cuda"


def test_wrong_arguments_are_named(pixel_values, image_processor):
    model = tiny_model("sa")
    with pytest.raises(ValueError, match="training mode"):
        record(tiny_model("sa").train(), pixel_values)
    with pytest.raises(ValueError, match=r"Got pixel_values of shape \(3, 32, 48\)"):
        record(model, pixel_values[0])
    with pytest.raises(ValueError, match=r"Got encoder_attentions=\[2\].*2 layers; choose among 0 to 1"):
        record(model, pixel_values, encoder_attentions=[2])
    with pytest.raises(ValueError, match=r"Got window=0, but model\.config\.window_size is None"):
        analyze(model, image_processor, PIL.Image.new("RGB", (40, 40)), window=0)
    with pytest.raises(ValueError, match="make the record with the model"):
        attention(tiny_model("ca"), record(model, pixel_values), 0)


@pytest.mark.parametrize("decoder_type", ["sa", "ca", "mask_transformer"])
def test_attention_is_that_of_the_model(decoder_type, pixel_values):
    model = tiny_model(decoder_type)
    recording = record(model, pixel_values)
    with torch.no_grad():
        output = model(pixel_values, output_attentions=True)
    for layer, expected in enumerate(output.decoder_attentions):
        torch.testing.assert_close(attention(model, recording, layer).float(), expected, atol=1e-6, rtol=1e-4)
    for layer, expected in enumerate(output.cross_attentions or ()):
        found = attention(model, recording, layer, part="cross")
        torch.testing.assert_close(found.float(), expected, atol=1e-6, rtol=1e-4)


def test_effective_map_of_cbsa(pixel_values):
    """A^T softmax(r r^T / sqrt(d)) A, with A as the model reports it and r written out."""
    model = tiny_model("cbsa")
    recording = record(model, pixel_values)
    with torch.no_grad():
        output = model(pixel_values, output_hidden_states=True, output_attentions=True)
        layer, contraction = model.decoder.layers[1], output.decoder_attentions[1][0]
        w = layer.norm(output.decoder_hidden_states[1][0]) @ layer.projection.weight.T
        averages = F.adaptive_avg_pool2d(w[:24].T.reshape(-1, 4, 6), (10, 10)).flatten(1).T
        found = attention(model, recording, 1, rows=torch.tensor([3, 25]))[0].float()
        for head in range(2):
            tokens, r, a = w[:, 16 * head :][:, :16], averages[:, 16 * head :][:, :16], contraction[head]
            r = r + layer.representative_step_size[head] * (a @ tokens)
            expected = a.T @ torch.softmax(r @ r.T / 4, dim=-1) @ a
            torch.testing.assert_close(found[head], expected[[3, 25]], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("make", [tiny_model, dinov2_model])
def test_attention_of_the_encoder(make, pixel_values):
    model = make("linear")
    recording = record(model, pixel_values, encoder_attentions=[1])
    with torch.no_grad():
        expected = model(pixel_values, output_attentions=True).attentions[1]
    assert torch.equal(attention(model, recording, 1, part="encoder"), expected)
    # One prefix token, then row-major patches.
    found = attention_map(model, recording, 1, patch=(2, 5), part="encoder")
    torch.testing.assert_close(found, expected[:, :, 1 + 2 * 6 + 5, 1:].unflatten(-1, (4, 6)))
    with pytest.raises(ValueError, match="encoder layer 0 was not recorded"):
        attention(model, recording, 0, part="encoder")


@pytest.mark.parametrize("decoder_type", LAYERED)
def test_maps_of_patches_and_classes(decoder_type, pixel_values):
    model = tiny_model(decoder_type)
    recording = record(model, pixel_values)
    whole = attention(model, recording, 1)
    found = attention_map(model, recording, 1, patch=(2, 5))
    torch.testing.assert_close(found, whole[:, :, 17, :24].unflatten(-1, (4, 6)))
    part = "cross" if decoder_type == "ca" else "decoder"
    found = attention_map(model, recording, 1, label=3, part=part)
    row = 3 if decoder_type == "ca" else 24 + 3
    torch.testing.assert_close(found, attention(model, recording, 1, part=part)[:, :, row, :24].unflatten(-1, (4, 6)))


def test_rollout_of_self_attention(pixel_values):
    model = tiny_model("sa")
    recording = record(model, pixel_values)
    first, second = (
        0.5 * (attention(model, recording, layer).mean(1) + torch.eye(29, dtype=torch.float64)) for layer in range(2)
    )
    torch.testing.assert_close(rollout(model, recording), second @ first)


def test_rollout_of_cross_attention(pixel_values):
    """As one stack over patches and classes, in which only the one kind moves at a time."""
    model = tiny_model("ca")
    recording = record(model, pixel_values)
    joint = torch.eye(29, dtype=torch.float64).expand(2, 29, 29)
    for part in ("decoder", "cross"):
        for layer in range(2):
            step = torch.eye(29, dtype=torch.float64).repeat(2, 1, 1)
            rows = slice(0, 24) if part == "decoder" else slice(24, 29)
            step[:, rows] *= 0.5
            step[:, rows, :24] += 0.5 * attention(model, recording, layer, part=part).mean(1)
            joint = step @ joint
    torch.testing.assert_close(rollout(model, recording), joint[:, 24:])


@pytest.mark.parametrize("decoder_type", LAYERED)
def test_rollout_rows_sum_to_one(decoder_type, pixel_values):
    model = tiny_model(decoder_type)
    sums = rollout(model, record(model, pixel_values)).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_maps_that_do_not_exist_are_named(pixel_values):
    sa, ca, linear = tiny_model("sa"), tiny_model("ca"), tiny_model("linear")
    of_sa, of_ca, of_linear = (record(model, pixel_values) for model in (sa, ca, linear))
    with pytest.raises(ValueError, match="type 'linear' has no layers"):
        attention(linear, of_linear, 0)
    with pytest.raises(ValueError, match="type 'linear' has no attention"):
        rollout(linear, of_linear)
    with pytest.raises(ValueError, match="type 'sa' has no cross-attention layers"):
        attention(sa, of_sa, 0, part="cross")
    with pytest.raises(ValueError, match="Got layer=2, but the 'sa' decoder's list of layers has 2; choose 0 to 1"):
        attention(sa, of_sa, 2)
    with pytest.raises(ValueError, match="Got layer=-1"):
        attention_map(sa, of_sa, -1, label=0)
    with pytest.raises(ValueError, match="Got column=6, but the grid's width has 6; choose 0 to 5"):
        attention_map(sa, of_sa, 0, patch=(0, 6))
    with pytest.raises(ValueError, match="Got label=5"):
        attention_map(sa, of_sa, 0, label=5)
    with pytest.raises(ValueError, match="needed exactly one"):
        attention_map(sa, of_sa, 0)
    with pytest.raises(ValueError, match="no class tokens in part 'decoder'; pass patch, or part=\"cross\""):
        attention_map(ca, of_ca, 0, label=0)
    with pytest.raises(ValueError, match="Patches do not look at anything"):
        attention_map(ca, of_ca, 0, patch=(0, 0), part="cross")
    with pytest.raises(ValueError, match="Got part='middle'"):
        attention(sa, of_sa, 0, part="middle")
