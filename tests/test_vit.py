"""The native encoder against timm's implementation, and its own rules."""

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import enable_checkpointing, tiny_config, tiny_model

from depict_hf import vit
from depict_hf.conversion import load_encoder
from depict_hf.vit import LayerRecord, attend_by_heads, drop_path_rates, resize_positions


def test_equals_timm_on_a_grid_of_another_shape():
    """Fails on a wrong token order, LayerNorm epsilon, GELU, head split, or transposed position grid."""
    torch.manual_seed(0)
    reference = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2, num_classes=3
    ).eval()
    torch.nn.init.normal_(reference.pos_embed)
    model = tiny_model(layer_norm_eps=1e-6)
    load_encoder(model, reference.state_dict())

    pixel_values = torch.randn(2, 3, 16, 48)
    patches, grid_size = model.encoder(pixel_values, LayerRecord())
    grid = reference.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    grid = F.interpolate(grid, (2, 6), mode="bilinear").flatten(2).transpose(1, 2)
    tokens = reference.patch_embed.proj(pixel_values).flatten(2).transpose(1, 2) + grid
    tokens = torch.cat([(reference.cls_token + reference.pos_embed[:, :1]).expand(2, -1, -1), tokens], dim=1)
    expected = reference.norm(reference.blocks(tokens))[:, 1:]

    assert grid_size == (2, 6)
    torch.testing.assert_close(patches, expected, atol=2e-6, rtol=1e-5)


def test_prefix_positions_stay_and_the_grid_is_resized():
    positions = torch.cat([torch.full((1, 2, 1), 9.0), torch.arange(6.0).view(1, 6, 1)], dim=1)
    resized = resize_positions(positions, (2, 3), (4, 3))
    assert resized[0, :2, 0].tolist() == [9, 9]
    # Rows at -0.25, 0.25, 0.75 and 1.25 of the two old rows, clamped at the border.
    assert resized[0, 2:, 0].view(4, 3)[:, 0].tolist() == [0, 0.75, 2.25, 3]


def test_drop_path_grows_linearly():
    assert drop_path_rates(0.1, 3) == pytest.approx([0, 0.05, 0.1])
    model = tiny_model(drop_path_rate=0.4)
    assert [layer.drop_path.p for layer in model.encoder.layers] == pytest.approx([0, 0.4])


def test_drop_path_is_per_image_and_only_in_training():
    model = tiny_model(drop_path_rate=0.9, num_hidden_layers=2)
    layer, tokens = model.encoder.layers[1], torch.randn(64, 5, 24)
    assert not torch.equal(layer(tokens)[0][0], tokens[0])
    layer.train()
    torch.manual_seed(0)
    unchanged = (layer(tokens)[0] == tokens).flatten(1).all(dim=1).sum().item()
    # Both branches dropped with probability 0.81: 52 of 64 images are expected, none if depth were not per image.
    assert 40 < unchanged < 64


@pytest.mark.parametrize(
    "implementation",
    ["sdpa", "eager", pytest.param("flex_attention", marks=pytest.mark.slow)],  # flex compiles its kernels first
)
@torch.no_grad()  # flex has no backward pass on the CPU
def test_attention_implementations_agree(implementation, pixel_values):
    model = tiny_model("ca")
    expected = model(pixel_values).logits
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_heads_together", [1, 2, 100])
def test_attention_written_out(num_heads_together, monkeypatch):
    monkeypatch.setattr(vit, "WEIGHTS_TOGETHER", num_heads_together * 5 * 7)
    query, key, value = (torch.randn(2, 3, length, 8, dtype=torch.float64) for length in (5, 7, 7))
    expected = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    torch.testing.assert_close(attend_by_heads(query, key, value), expected)


@pytest.mark.parametrize(
    ("dtype", "mode", "written_out"),
    [
        (torch.bfloat16, torch.inference_mode, True),
        (torch.float32, torch.inference_mode, False),
        (torch.bfloat16, torch.enable_grad, False),  # would keep the weights of all layers
    ],
)
def test_attention_is_written_out_where_that_is_faster(dtype, mode, written_out, pixel_values, monkeypatch):
    calls = []
    monkeypatch.setattr(vit, "attend_by_heads", lambda *tensors: calls.append(tensors) or attend_by_heads(*tensors))
    with mode():
        tiny_model("linear").to(dtype)(pixel_values.to(dtype))
    assert len(calls) == (2 if written_out else 0)


def test_gradient_checkpointing_gives_the_same_gradients(pixel_values, decoder_type):
    labels = torch.randint(0, 5, (2, 32, 48), generator=torch.Generator().manual_seed(2))
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(decoder_type).train()
        if checkpointing:
            enable_checkpointing(model)
            assert model.encoder.layers[0].gradient_checkpointing
        model(pixel_values, labels=labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_an_image_size_of_two_sides():
    model = tiny_model(image_size=[16, 48])
    assert model.encoder.embeddings.position_embeddings.shape[1] == 1 + 2 * 6
    assert tiny_config(image_size=[16, 48]).grid_size == (2, 6)
