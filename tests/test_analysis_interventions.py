"""Interventions do what they say, and leave the weights as they were."""

import pytest
import torch
from conftest import tiny_model

from depict_hf.analysis import (
    contributions,
    deviation_from_identity,
    head_removed,
    layer_removed,
    orthonormalized,
    projections,
    record,
    rotate_heads,
    rotated_across_heads,
    step_size_removed,
    step_size_scaled,
    step_sizes,
)
from depict_hf.analysis.interventions import _random_orthogonal
from depict_hf.analysis.steps import step_at

WHITE_BOXES = ["sa", "ca", "cbsa"]
LAYERED = [*WHITE_BOXES, "mask_transformer"]


def seeded():
    return torch.Generator().manual_seed(0)


def logits_of(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values).logits


def interventions(decoder_type):
    """Every context manager that fits the decoder, by name."""
    found = {"head": lambda m: head_removed(m, 1, 0), "layer": lambda m: layer_removed(m, 1)}
    if decoder_type in WHITE_BOXES:
        found |= {
            "across": lambda m: rotated_across_heads(m, seeded()),
            "orthonormal": orthonormalized,
            "orthogonal": lambda m: orthonormalized(m, keep_scale=True),
            "scaled": lambda m: step_size_scaled(m, 1.5),
            "removed": step_size_removed,
        }
    return found


@pytest.mark.parametrize("decoder_type", WHITE_BOXES)
def test_rotating_each_head_moves_nothing(decoder_type, pixel_values):
    model = tiny_model(decoder_type).double()
    before, heads = logits_of(model, pixel_values), projections(model)
    rotate_heads(model, seeded())
    torch.testing.assert_close(logits_of(model, pixel_values), before, atol=1e-10, rtol=1e-10)
    turned = projections(model)
    assert (turned[0] - heads[0]).abs().max() > 0.1
    # Rows changed, the space they span did not.
    torch.testing.assert_close(turned[0].transpose(1, 2) @ turned[0], heads[0].transpose(1, 2) @ heads[0])
    rotate_heads(model, seeded())
    assert not torch.equal(projections(model)[0], turned[0])


@pytest.mark.parametrize("decoder_type", WHITE_BOXES)
def test_rotating_across_heads_moves_logits_but_not_their_common_span(decoder_type, pixel_values):
    model = tiny_model(decoder_type).double()
    before, heads = logits_of(model, pixel_values), projections(model)[0].flatten(0, 1)
    with rotated_across_heads(model, seeded()):
        mixed = projections(model)[0].flatten(0, 1)
        torch.testing.assert_close(mixed.T @ mixed, heads.T @ heads)
        assert (logits_of(model, pixel_values) - before).abs().max() > 1e-2
        if decoder_type == "cbsa":
            layer = model.decoder.layers[0]
            composed = layer.output.weight @ layer.projection.weight
    if decoder_type == "cbsa":
        torch.testing.assert_close(layer.output.weight @ layer.projection.weight, composed)


def test_rotations_are_uniform():
    """Without the sign correction the QR decomposition favours one sign of the diagonal."""
    turns = _random_orthogonal(4000, 3, seeded())
    torch.testing.assert_close(turns @ turns.transpose(1, 2), torch.eye(3).double().expand(4000, 3, 3))
    assert turns.mean(0).abs().max() < 0.05
    assert turns.square().mean(0).sub(1 / 3).abs().max() < 0.02


@pytest.mark.parametrize("keep_scale", [False, True])
def test_orthonormalized_is_the_nearest(keep_scale):
    """Nearer than any rotation of it, and with the least distance that the singular values allow."""
    model = tiny_model("ca")
    before = [*projections(model), *projections(model, cross=True)]
    with orthonormalized(model, keep_scale):
        after = [*projections(model), *projections(model, cross=True)]
    for old, new in zip(before, after, strict=True):
        deviations = deviation_from_identity(new @ new.transpose(1, 2), any_scale=keep_scale)
        assert deviations.max() < 1e-3 if keep_scale else deviations.max() < 1e-6
        values = torch.linalg.svdvals(old)
        target = values.mean(1, keepdim=True) if keep_scale else 1
        expected = (values - target).square().sum(1)
        torch.testing.assert_close((new - old).square().sum((1, 2)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decoder_type", LAYERED)
def test_removing_a_head_takes_its_contribution_away(decoder_type, pixel_values):
    """In the last layer, the tokens lose exactly what the head added."""
    model = tiny_model(decoder_type).double()
    recording = record(model, pixel_values)
    if decoder_type == "mask_transformer":
        # The MLP follows: look at what enters it.
        layer = model.decoder.layers[1]
        with torch.no_grad():
            layer.mlp.fc2.weight.zero_()
            layer.mlp.fc2.bias.zero_()
        recording = record(model, pixel_values)
    step = step_at(model, recording, 1)
    with head_removed(model, 1, 1):
        changed = record(model, pixel_values)
    lost = recording.decoder_tokens[-1] - changed.decoder_tokens[-1]
    torch.testing.assert_close(lost, step.context(1) @ step.output[1])
    assert lost.abs().max() > 1e-3


def test_removing_a_cross_head(pixel_values):
    model = tiny_model("ca").double()
    with head_removed(model, 0, 1, cross=True):
        found = contributions(model, record(model, pixel_values), side="classes")
    index = [(term.kind, term.layer, term.head) for term in found.terms].index(("head", 0, 1))
    assert found.values[:, index].abs().max() == 0
    assert found.values[:, index - 1].abs().max() > 0


@pytest.mark.parametrize("decoder_type", LAYERED)
def test_a_removed_layer_lets_tokens_pass(decoder_type, pixel_values):
    model = tiny_model(decoder_type)
    with torch.no_grad():
        for layer in model.decoder.layers:
            if decoder_type == "cbsa":
                layer.output.bias += 1
    with layer_removed(model, 0):
        recording = record(model, pixel_values)
    assert torch.equal(recording.decoder_tokens[1], recording.decoder_tokens[0])
    assert not torch.equal(recording.decoder_tokens[2], recording.decoder_tokens[1])


def test_a_removed_cross_layer(pixel_values):
    model = tiny_model("ca")
    with layer_removed(model, 1, cross=True):
        recording = record(model, pixel_values)
    assert torch.equal(recording.cross_tokens[2], recording.cross_tokens[1])
    assert not torch.equal(recording.cross_tokens[1], recording.cross_tokens[0])


def test_step_sizes_scaled_and_removed():
    for decoder_type in WHITE_BOXES:
        model = tiny_model(decoder_type)
        before = step_sizes(model)
        with step_size_scaled(model, -2.0):
            torch.testing.assert_close(step_sizes(model), -2 * before)
        with step_size_scaled(model, 0.5, layer=1):
            torch.testing.assert_close(step_sizes(model)[1], 0.5 * before[1])
            assert torch.equal(step_sizes(model)[0], before[0])
        with step_size_removed(model):
            assert (step_sizes(model) == 1).all()
            if decoder_type == "cbsa":
                assert (model.decoder.layers[0].representative_step_size == 1).all()
            if decoder_type == "ca":
                assert (step_sizes(model, cross=True) == 1).all()
    model = tiny_model("ca")
    before = step_sizes(model, cross=True)
    with step_size_scaled(model, 3, layer=0, cross=True):
        assert torch.equal(step_sizes(model, cross=True)[1], before[1])
        torch.testing.assert_close(step_sizes(model, cross=True)[0], 3 * before[0])


@pytest.mark.parametrize("decoder_type", LAYERED)
def test_weights_come_back_bit_for_bit_also_after_an_error(decoder_type, pixel_values):
    model = tiny_model(decoder_type)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = logits_of(model, pixel_values)
    for name, intervene in interventions(decoder_type).items():
        with intervene(model):
            assert not torch.equal(logits_of(model, pixel_values), before), name
        with pytest.raises(KeyError), intervene(model):
            raise KeyError
        # Within one another, they come back in turn.
        with intervene(model), head_removed(model, 0, 1), intervene(model):
            pass
        for key, value in model.state_dict().items():
            assert torch.equal(value, weights[key]), (name, key)
    assert torch.equal(logits_of(model, pixel_values), before)


def test_gradients_can_be_taken_within(pixel_values):
    model = tiny_model("sa")
    with head_removed(model, 0, 0):
        model(pixel_values).logits.square().sum().backward()
        assert model.decoder.class_tokens.grad.abs().sum() > 0


def test_what_cannot_be_is_named():
    black_box, linear, sa = tiny_model("mask_transformer"), tiny_model("linear"), tiny_model("sa")
    for model in (black_box, linear):
        name = model.config.decoder_type
        with pytest.raises(ValueError, match=f"type '{name}' has no symmetry under rotations of its heads"):
            rotate_heads(model)
        for manager in (rotated_across_heads, orthonormalized):
            with pytest.raises(ValueError, match=f"type '{name}' has no subspaces"), manager(model):
                pass
        with pytest.raises(ValueError, match=f"type '{name}' has no step sizes"), step_size_removed(model):
            pass
    with pytest.raises(ValueError, match="type 'linear' has no layers"), layer_removed(linear, 0):
        pass
    with (
        pytest.raises(ValueError, match="Got layer=2, but the 'sa' decoder's list of layers has 2"),
        layer_removed(sa, 2),
    ):
        pass
    with pytest.raises(ValueError, match="Got head=2, but the layer's list of heads has 2"), head_removed(sa, 0, 2):
        pass
    with pytest.raises(ValueError, match="type 'sa' has no cross-attention layers"), head_removed(sa, 0, 0, cross=True):
        pass
    with pytest.raises(ValueError, match="Got factor=nan"), step_size_scaled(sa, float("nan")):
        pass
    with pytest.raises(ValueError, match="have one head"), rotated_across_heads(tiny_model("sa", decoder_num_heads=1)):
        pass
    with pytest.raises(ValueError, match="30 rows of width 24"), orthonormalized(tiny_model("sa", decoder_head_dim=30)):
        pass
