"""The adapter with captum itself, and captum's attributions beside our contributions."""

import pytest
import torch
from conftest import tiny_model

from depict_hf.analysis import Term, contributions, forward_for_attribution, record, source_contributions
from depict_hf.inference import load_photo
from depict_hf.loading import load_model

attr = pytest.importorskip("captum.attr", reason='needs captum: pip install ".[attribution]"')


def test_scores_are_the_models_logits(decoder_type, pixel_values):
    model = tiny_model(decoder_type)
    with torch.no_grad():
        logits = model(pixel_values).logits
        assert torch.equal(forward_for_attribution(model, patch=(2, 5))(pixel_values), logits[:, :, 2, 5])
        assert torch.equal(forward_for_attribution(model)(pixel_values), logits.mean((2, 3)))
        area = torch.zeros(4, 6, dtype=torch.bool)
        area[1, 2] = area[3, 0] = True
        expected = (logits[:, :, 1, 2] + logits[:, :, 3, 0]) / 2
        torch.testing.assert_close(forward_for_attribution(model, area=area)(pixel_values), expected)


def test_inputs_larger_than_a_window_are_whole(pixel_values):
    model = tiny_model("sa")
    with torch.no_grad():
        expected = forward_for_attribution(model)(pixel_values)
        model.config.window_size = 32
        assert torch.equal(forward_for_attribution(model)(pixel_values), expected)


def test_integrated_gradients_add_up(decoder_type, pixel_values):
    """Completeness: they sum to the score minus that of the baseline."""
    forward = forward_for_attribution(tiny_model(decoder_type).double(), patch=(1, 4))
    pixel_values = pixel_values.double()
    # A near baseline, since the scores of random weights jump.
    baseline = 0.9 * pixel_values
    found = attr.IntegratedGradients(forward).attribute(
        pixel_values, baseline, target=3, n_steps=50, internal_batch_size=20
    )
    assert found.shape == pixel_values.shape
    with torch.no_grad():
        expected = forward(pixel_values)[:, 3] - forward(baseline)[:, 3]
    torch.testing.assert_close(found.sum((1, 2, 3)), expected, rtol=1e-3, atol=1e-3)


def test_occlusion_of_patches(decoder_type, pixel_values):
    """A patch's value is what the score loses when it is grey."""
    forward = forward_for_attribution(tiny_model(decoder_type), patch=(1, 4))
    found = attr.Occlusion(forward).attribute(pixel_values, (3, 8, 8), strides=(3, 8, 8), target=3)
    grey = pixel_values.clone()
    grey[:, :, 16:24, 40:48] = 0
    with torch.no_grad():
        expected = forward(pixel_values)[:, 3] - forward(grey)[:, 3]
    torch.testing.assert_close(found[:, 0, 20, 44], expected, atol=1e-5, rtol=1e-4)


def test_layer_methods(decoder_type, pixel_values):
    model = tiny_model(decoder_type)
    forward = forward_for_attribution(model, patch=(1, 4))
    layer = model.encoder.norm if decoder_type == "linear" else model.decoder.norm
    activation = attr.LayerActivation(forward, layer).attribute(pixel_values)
    with torch.no_grad():
        tokens = record(model, pixel_values, encoder_tokens=True)
    before = tokens.encoder_tokens[-1] if decoder_type == "linear" else tokens.decoder_tokens[-1]
    torch.testing.assert_close(activation, layer(before).detach())
    found = attr.LayerIntegratedGradients(forward, layer).attribute(pixel_values, target=3, n_steps=8)
    assert found.shape == activation.shape and found.isfinite().all()


def test_gradient_times_activation_is_the_contribution_where_the_score_is_linear(pixel_values):
    """Agreement: in the linear decoder, whose path from the encoder's output has nothing that could move."""
    model = tiny_model("linear")
    forward = forward_for_attribution(model, patch=(1, 4))
    found = attr.LayerGradientXActivation(forward, model.encoder.norm).attribute(pixel_values, target=3)
    ours = contributions(model, record(model, pixel_values), patches=[1 * 6 + 4], labels=[3])
    expected = ours.values[:, ours.terms.index(Term("encoder")), 0, 0]
    torch.testing.assert_close(found[:, 1 + 10].sum(-1).double(), expected, atol=1e-5, rtol=1e-5)
    assert found[:, 1 + 9].abs().max() == 0


def test_gradient_times_activation_misses_what_a_normalised_token_is_made_of(pixel_values):
    """Disagreement: a score that depends on a token's direction has no gradient along it, while our terms add up.

    Beta of the last LayerNorm is zero here; the LayerNorm's epsilon leaves a little.
    """
    model = tiny_model("sa")
    forward = forward_for_attribution(model, patch=(1, 4))
    method = attr.LayerGradientXActivation(forward, model.decoder.norm)
    found = method.attribute(pixel_values, target=3, attribute_to_layer_input=True)[:, 10]
    ours = contributions(model, record(model, pixel_values), patches=[10], labels=[3])
    assert found.sum(-1).abs().max() < 1e-3 * found.abs().sum(-1).max()
    assert ours.totals.abs().min() > 0.05
    torch.testing.assert_close(ours.values.sum(1), ours.totals, atol=1e-5, rtol=0)


def test_the_default_model_beside_captum():
    """On a building: both find that the patch itself counts most; on its surroundings they differ.

    Integrated gradients follow the encoder's output to a grey image's and let attention weights, class tokens and the
    other classes' scores move; contributions hold them.
    """
    model, image_processor = load_model("depict_hf/default_model")
    photo = load_photo("tests/data/street.jpg")
    pixel_values = image_processor(photo, size={"height": 196, "width": 280}, return_tensors="pt")["pixel_values"]
    recording = record(model, pixel_values)
    row, column = 3, 2
    patch = row * recording.grid_size[1] + column
    label = recording.logits[0, :, row, column].argmax().item()
    assert model.config.id2label[label] == "building"

    terms = contributions(model, recording, [patch], [label])
    ours = sum(source_contributions(model, recording, layer, patch, label).sum((0, 1)) for layer in range(3))
    ours = ours[: recording.num_patches]
    ours[patch] += terms.values[0, 0, 0, 0]

    forward = forward_for_attribution(model, patch=(row, column))
    method = attr.LayerIntegratedGradients(forward, model.encoder.backbone.layernorm)
    theirs = method.attribute(pixel_values, target=label, n_steps=4, internal_batch_size=4)
    theirs = theirs[0].sum(-1)[-recording.num_patches :].double()

    assert ours.argmax() == theirs.argmax() == patch
    correlation = torch.corrcoef(torch.stack([ours, theirs]))[0, 1].item()
    around = torch.arange(recording.num_patches) != patch
    without = torch.corrcoef(torch.stack([ours[around], theirs[around]]))[0, 1].item()
    assert correlation > 0.8
    assert without < 0.6


def test_wrong_arguments_are_named(pixel_values):
    model = tiny_model("sa")
    area = torch.ones(4, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="at most one of them"):
        forward_for_attribution(model, patch=(0, 0), area=area)
    for wrong in (area.float(), area[0], ~area):
        with pytest.raises(ValueError, match=r"needed booleans \(grid_height, grid_width\)"):
            forward_for_attribution(model, area=wrong)
    with pytest.raises(ValueError, match="Got row=4, but the grid's height has 4"):
        forward_for_attribution(model, patch=(4, 0))(pixel_values)
    with pytest.raises(ValueError, match=r"Got an area of shape \(6, 4\), but the grid is \(4, 6\)"):
        forward_for_attribution(model, area=area.T)(pixel_values)
