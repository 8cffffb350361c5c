"""Contributions add up, each term is what the formula says, and the lens ends at the model's logits."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from depict_hf.analysis import Term, contributions, lens, read_out, record, source_contributions

LAYERED = ["sa", "ca", "cbsa", "mask_transformer"]


def scrambled_model(decoder_type, **overrides):
    """Every bias and LayerNorm away from the 0 and 1 that it starts from, so that forgetting one shows."""
    model = tiny_model(decoder_type, **overrides)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def cosines(model, pixel_values):
    """The model's own cosines: what its last LayerNorm, over the classes, is given."""
    seen = []
    handle = model.decoder.mask_norm.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        model(pixel_values)
    handle.remove()
    return seen[0].double()


@pytest.mark.parametrize("side", ["patches", "classes"])
@pytest.mark.parametrize("decoder_type", LAYERED)
def test_terms_add_up_to_the_models_cosine(decoder_type, side, pixel_values):
    model = scrambled_model(decoder_type)
    found = contributions(model, record(model, pixel_values), side=side)
    expected = cosines(model, pixel_values)
    assert found.quantity == "cosine" and found.values.shape == (2, len(found.terms), 24, 5)
    torch.testing.assert_close(found.values.sum(1), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.totals, expected, atol=1e-5, rtol=0)
    assert len(set(found.terms)) == len(found.terms)


def test_terms_add_up_on_a_backbone(pixel_values):
    from transformers import Dinov2Config

    backbone = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=32)
    model = scrambled_model("mask_transformer", backbone_config=backbone, decoder_hidden_size=12)
    found = contributions(model, record(model, pixel_values))
    torch.testing.assert_close(found.values.sum(1), cosines(model, pixel_values), atol=1e-5, rtol=0)


def test_terms_in_half_precision_add_up_to_its_rounding(pixel_values):
    model = scrambled_model("sa").bfloat16()
    found = contributions(model, record(model, pixel_values))
    assert (found.values.sum(1) - found.totals).abs().max() < 0.02


def test_logit_of_the_linear_decoder(pixel_values):
    model = scrambled_model("linear")
    recording = record(model, pixel_values)
    found = contributions(model, recording, labels=[4, 1])
    assert found.quantity == "logit" and found.terms == (Term("encoder"), Term("bias"))
    logits = recording.logits.flatten(2).transpose(1, 2)[..., [4, 1]].double()
    torch.testing.assert_close(found.values.sum(1), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.values[0, 1, 3], model.decoder.classifier.bias[[4, 1]].double())


def by_hand(update, final, other, norm, projection=None):
    """A summand's cosine with sigma and lengths held: the LayerNorm applied to `final` and its linear part to `update`.

    Args: `update` and `final` `(hidden,)`, `other` `(hidden,)` the vector of the other side.
    """
    sigma = (final.var(unbiased=False) + norm.eps).sqrt()
    linear = (update - update.mean()) / sigma * norm.weight
    whole = (final - final.mean()) / sigma * norm.weight + norm.bias
    if projection is not None:
        linear, whole = linear @ projection, whole @ projection
    return linear @ other / other.norm() / whole.norm()


def value(found, kind, layer=None, head=None):
    return found.values[:, found.terms.index(Term(kind, layer, head))]


@pytest.mark.parametrize("decoder_type", ["sa", "ca"])
def test_a_head_of_subspace_attention(decoder_type, pixel_values):
    model = scrambled_model(decoder_type).double()
    recording = record(model, pixel_values)
    layer, x = model.decoder.layers[1], recording.decoder_tokens[1][0]
    with torch.no_grad():
        p = layer.projection[16:]
        w = layer.norm(x) @ p.T
        update = layer.step_size * torch.softmax(w @ w.T / 4, -1) @ w @ p
        classes = read_out(model, recording)[1][0]
        expected = by_hand(update[7], recording.patch_tokens[-1][0, 7], classes[3], model.decoder.norm)
    found = contributions(model, recording)
    torch.testing.assert_close(value(found, "head", 1, 1)[0, 7, 3], expected)
    # The same term when only one pair is asked for.
    found = contributions(model, recording, patches=[7], labels=[3])
    assert found.values.shape == (2, len(found.terms), 1, 1)
    torch.testing.assert_close(value(found, "head", 1, 1)[0, 0, 0], expected)


def test_a_head_of_the_class_side(pixel_values):
    sa, ca = (scrambled_model(decoder_type).double() for decoder_type in ("sa", "ca"))
    with torch.no_grad():
        recording = record(sa, pixel_values)
        layer = sa.decoder.layers[0]
        w = layer.norm(recording.decoder_tokens[0][1]) @ layer.projection[:16].T
        update = layer.step_size * torch.softmax(w @ w.T / 4, -1) @ w @ layer.projection[:16]
        patches = read_out(sa, recording)[0][1]
        expected = by_hand(update[24 + 2], recording.class_tokens[-1][1, 2], patches[5], sa.decoder.norm)
        found = contributions(sa, recording, side="classes")
        torch.testing.assert_close(value(found, "head", 0, 0)[1, 5, 2], expected)

        recording = record(ca, pixel_values)
        layer, queries = ca.decoder.cross_layers[1], recording.cross_tokens[1][1]
        p = layer.projection[8:]
        w = layer.norm(ca.decoder.norm(recording.decoder_tokens[-1][1])) @ p.T
        update = layer.step_size * torch.softmax(queries @ p.T @ w.T / 8**0.5, -1) @ w @ p
        patches = read_out(ca, recording)[0][1]
        expected = by_hand(update[2], recording.cross_tokens[-1][1, 2], patches[5], ca.decoder.class_norm)
        found = contributions(ca, recording, side="classes", labels=[2])
        torch.testing.assert_close(value(found, "head", 1, 1)[1, 5, 0], expected)


def test_a_head_and_the_bias_of_cbsa(pixel_values):
    model = scrambled_model("cbsa").double()
    recording = record(model, pixel_values)
    layer, x = model.decoder.layers[0], recording.decoder_tokens[0][0]
    with torch.no_grad():
        w = (layer.norm(x) @ layer.projection.weight.T)[:, 16:]
        r = F.adaptive_avg_pool2d(w[:24].T.reshape(-1, 4, 6), (10, 10)).flatten(1).T
        a = torch.softmax(r @ w.T / 4, -1)
        r = r + layer.representative_step_size[1] * (a @ w)
        update = layer.step_size[1] * a.T @ torch.softmax(r @ r.T / 4, -1) @ r @ layer.output.weight[:, 16:].T
        classes = read_out(model, recording)[1][0]
        final = recording.patch_tokens[-1][0, 7]
        found = contributions(model, recording)
        for term, tokens in (("head", update[7]), ("output_bias", layer.output.bias)):
            expected = by_hand(tokens, final, classes[3], model.decoder.norm)
            torch.testing.assert_close(value(found, term, 0, 1 if term == "head" else None)[0, 7, 3], expected)


def test_terms_of_the_mask_transformer(pixel_values):
    model = scrambled_model("mask_transformer", decoder_hidden_size=12, decoder_intermediate_size=20).double()
    recording = record(model, pixel_values)
    decoder, x = model.decoder, recording.decoder_tokens[1][0]
    layer = decoder.layers[1]
    with torch.no_grad():
        q, k, v = layer.attention.qkv(layer.norm1(x)).chunk(3, dim=-1)
        heads = [
            torch.softmax(q[:, part] @ k[:, part].T / 6**0.5, -1)
            @ v[:, part]
            @ layer.attention.projection.weight[:, part].T
            for part in (slice(0, 6), slice(6, 12))
        ]
        attended = x + sum(heads) + layer.attention.projection.bias
        final, classes = recording.patch_tokens[-1][0, 7], read_out(model, recording)[1][0]
        found = contributions(model, recording)
        encoder = recording.encoder_output[0, 7] @ decoder.input_projection.weight.T
        for term, tokens in (
            (("encoder",), encoder),
            (("input_bias",), decoder.input_projection.bias),
            (("head", 1, 0), heads[0][7]),
            (("attention_bias", 1), layer.attention.projection.bias),
            (("mlp", 1), layer.mlp(layer.norm2(attended))[7]),
        ):
            expected = by_hand(tokens, final, classes[3], decoder.norm, decoder.patch_projection)
            torch.testing.assert_close(value(found, *term)[0, 7, 3], expected)


def test_by_layer_sums_heads_and_biases(pixel_values):
    model = scrambled_model("cbsa")
    found = contributions(model, record(model, pixel_values))
    terms, values = found.by_layer()
    assert terms == (Term("encoder"), Term("layer", 0), Term("layer", 1), Term("norm_bias"))
    torch.testing.assert_close(values.sum(1), found.values.sum(1))
    expected = value(found, "head", 1, 0) + value(found, "head", 1, 1) + value(found, "output_bias", 1)
    torch.testing.assert_close(values[:, 2], expected)
    assert [str(term) for term in terms] == ["encoder", "layer 0", "layer 1", "norm_bias"]
    assert [str(term) for term in found.terms[1:4]] == ["layer 0, head 0", "layer 0, head 1", "layer 0, output_bias"]


@pytest.mark.parametrize("decoder_type", LAYERED)
def test_sources_add_up_to_the_heads(decoder_type, pixel_values):
    model = scrambled_model(decoder_type)
    recording = record(model, pixel_values)
    found = contributions(model, recording)
    sources = source_contributions(model, recording, layer=1, patch=9, label=2)
    assert sources.shape == (2, 2, 24 if decoder_type == "ca" else 29)
    for head in range(2):
        torch.testing.assert_close(sources[:, head].sum(-1), value(found, "head", 1, head)[:, 9, 2])


def test_a_source_is_its_weight_times_its_value(pixel_values):
    model = scrambled_model("sa").double()
    recording = record(model, pixel_values)
    layer, x = model.decoder.layers[1], recording.decoder_tokens[1][0]
    with torch.no_grad():
        w = layer.norm(x) @ layer.projection[:16].T
        weights = torch.softmax(w @ w.T / 4, -1)
        update = layer.step_size * weights[9, 4] * w[4] @ layer.projection[:16]
        classes = read_out(model, recording)[1][0]
        expected = by_hand(update, recording.patch_tokens[-1][0, 9], classes[2], model.decoder.norm)
    torch.testing.assert_close(source_contributions(model, recording, 1, 9, 2)[0, 0, 4], expected)


@pytest.mark.parametrize("decoder_type", LAYERED)
def test_the_lens_ends_at_the_logits(decoder_type, pixel_values):
    model = scrambled_model(decoder_type)
    recording = record(model, pixel_values)
    for final_classes in (False, True):
        stages = lens(model, recording, final_classes=final_classes)
        assert stages.shape == (2, 3, 5, 4, 6)
        assert torch.equal(stages[:, -1], recording.logits)
        assert not torch.equal(stages[:, 0], recording.logits)


@pytest.mark.parametrize("decoder_type", LAYERED)
def test_the_lens_reads_what_a_decoder_without_later_layers_returns(decoder_type, pixel_values):
    """Dropping the last layer gives the scores that the lens reads before it."""
    model = scrambled_model(decoder_type)
    stages = lens(model, record(model, pixel_values))
    model.decoder.layers = model.decoder.layers[:1]
    with torch.no_grad():
        torch.testing.assert_close(stages[:, 1], model(pixel_values).logits)


def test_the_lens_on_cross_attention_layers(pixel_values):
    model = scrambled_model("ca")
    recording = record(model, pixel_values)
    stages = lens(model, recording, cross=True)
    assert torch.equal(stages[:, -1], recording.logits)
    model.decoder.cross_layers = model.decoder.cross_layers[:1]
    with torch.no_grad():
        torch.testing.assert_close(stages[:, 1], model(pixel_values).logits)


def test_the_lens_with_final_class_tokens(pixel_values):
    model = scrambled_model("sa")
    recording = record(model, pixel_values)
    patches = model.decoder.norm(recording.patch_tokens[0])
    classes = model.decoder.norm(recording.class_tokens[-1])
    scores = F.cosine_similarity(patches[:, :, None], classes[:, None], dim=-1)
    expected = model.decoder.mask_norm(scores).transpose(1, 2).unflatten(2, (4, 6))
    torch.testing.assert_close(lens(model, recording, final_classes=True)[:, 0], expected.detach())


def test_wrong_arguments_are_named(pixel_values):
    linear, sa = tiny_model("linear"), tiny_model("sa")
    of_linear, of_sa = record(linear, pixel_values), record(sa, pixel_values)
    with pytest.raises(ValueError, match="type 'linear' has no class tokens"):
        contributions(linear, of_linear, side="classes")
    with pytest.raises(ValueError, match="type 'linear' has no layers"):
        lens(linear, of_linear)
    with pytest.raises(ValueError, match="type 'linear' has no layers"):
        source_contributions(linear, of_linear, 0, 0, 0)
    with pytest.raises(ValueError, match="type 'sa' has no cross-attention layers"):
        lens(sa, of_sa, cross=True)
    with pytest.raises(ValueError, match="Got patches=24, but the record has 24"):
        contributions(sa, of_sa, patches=[24])
    with pytest.raises(ValueError, match="Got labels=-1"):
        contributions(sa, of_sa, labels=[-1])
    with pytest.raises(ValueError, match="Got side='both'"):
        contributions(sa, of_sa, side="both")
    with pytest.raises(ValueError, match="make the record with the model"):
        contributions(linear, of_sa)
