"""Each decoder against the paper's formulas, written out here one token matrix at a time."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, tiny_model

from depict_hf import DepictForSemanticSegmentation
from depict_hf.decoders import class_logits, pool_adaptively

GRID = (4, 6)


def layer_norm(x, norm):
    return (x - x.mean(-1, keepdim=True)) / (
        x.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt() * norm.weight + norm.bias


def subspace_step(layer, x, queries=None):
    """s P^T concat_h softmax((P_h q) (P_h LN(x))^T / sqrt(d)) P_h LN(x), head by head."""
    update = 0
    for projection in layer.projection.chunk(layer.num_heads):
        w = layer_norm(x, layer.norm) @ projection.T
        q = w if queries is None else queries @ projection.T
        update = update + torch.softmax(q @ w.T / projection.shape[0] ** 0.5, dim=-1) @ w @ projection
    return layer.step_size * update


def scores(patches, classes, mask_norm):
    patches = patches / patches.norm(dim=-1, keepdim=True)
    classes = classes / classes.norm(dim=-1, keepdim=True)
    return layer_norm(patches @ classes.T, mask_norm).T.reshape(-1, *GRID)


@pytest.fixture
def patches():
    return torch.randn(2, 24, 24, generator=torch.Generator().manual_seed(3))


def test_self_attention_decoder(patches):
    decoder = tiny_model("sa").decoder
    logits = decoder(patches, GRID)
    for image, expected in zip(patches, logits, strict=True):
        x = torch.cat([image, decoder.class_tokens[0]])
        for layer in decoder.layers:
            x = x + subspace_step(layer, x)
        x = layer_norm(x, decoder.norm)
        torch.testing.assert_close(scores(x[:24], x[24:], decoder.mask_norm), expected, atol=1e-5, rtol=1e-4)


def test_cross_attention_decoder(patches):
    decoder = tiny_model("ca").decoder
    logits = decoder(patches, GRID)
    for x, expected in zip(patches, logits, strict=True):
        for layer in decoder.layers:
            x = x + subspace_step(layer, x)
        x, queries = layer_norm(x, decoder.norm), decoder.class_tokens[0]
        for layer in decoder.cross_layers:
            queries = queries + subspace_step(layer, x, queries)
        queries = layer_norm(queries, decoder.class_norm)
        torch.testing.assert_close(scores(x, queries, decoder.mask_norm), expected, atol=1e-5, rtol=1e-4)


def test_contract_and_broadcast_decoder(patches):
    """The grid is smaller than the 10 x 10 representatives, each then the mean of the patches that it overlaps."""
    decoder = tiny_model("cbsa").decoder
    logits = decoder(patches, GRID)
    for image, expected in zip(patches, logits, strict=True):
        x = torch.cat([image, decoder.class_tokens[0]])
        for layer in decoder.layers:
            w = layer_norm(x, layer.norm) @ layer.projection.weight.T
            grid = w[:24].view(*GRID, -1)
            cells = [
                grid[i * 4 // 10 : -(-(i + 1) * 4 // 10), j * 6 // 10 : -(-(j + 1) * 6 // 10)].mean(dim=(0, 1))
                for i in range(10)
                for j in range(10)
            ]
            updates = []
            for head, (tokens, r) in enumerate(zip(w.chunk(2, -1), torch.stack(cells).chunk(2, -1), strict=True)):
                contraction = torch.softmax(r @ tokens.T / 16**0.5, dim=-1)
                r = r + layer.representative_step_size[head] * (contraction @ tokens)
                update = contraction.T @ torch.softmax(r @ r.T / 16**0.5, dim=-1) @ r
                updates.append(layer.step_size[head] * update)
            x = x + layer.output(torch.cat(updates, dim=-1))
        x = layer_norm(x, decoder.norm)
        torch.testing.assert_close(scores(x[:24], x[24:], decoder.mask_norm), expected, atol=1e-5, rtol=1e-4)


def test_mask_transformer_decoder(patches):
    decoder = tiny_model("mask_transformer", decoder_hidden_size=12, decoder_intermediate_size=20).decoder
    logits = decoder(patches, GRID)
    for image, expected in zip(patches, logits, strict=True):
        x = torch.cat([decoder.input_projection(image), decoder.class_tokens[0]])
        for layer in decoder.layers:
            q, k, v = layer.attention.qkv(layer_norm(x, layer.norm1)).chunk(3, dim=-1)
            heads = [
                torch.softmax(q[:, part] @ k[:, part].T / 6**0.5, dim=-1) @ v[:, part]
                for part in (slice(0, 6), slice(6, 12))
            ]
            x = x + layer.attention.projection(torch.cat(heads, dim=-1))
            hidden = layer.mlp.fc1(layer_norm(x, layer.norm2))
            x = x + layer.mlp.fc2(0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)))
        x = layer_norm(x, decoder.norm)
        patch_tokens, class_tokens = x[:24] @ decoder.patch_projection, x[24:] @ decoder.class_projection
        torch.testing.assert_close(
            scores(patch_tokens, class_tokens, decoder.mask_norm), expected, atol=1e-5, rtol=1e-4
        )


def test_linear_decoder(patches):
    decoder = tiny_model("linear").decoder
    expected = (patches @ decoder.classifier.weight.T + decoder.classifier.bias).transpose(1, 2).reshape(2, 5, *GRID)
    torch.testing.assert_close(decoder(patches, GRID), expected)


@pytest.mark.parametrize("grid", [(4, 6), (10, 10), (23, 57), (1, 11)])
def test_pooling_while_tracing_equals_the_kernel(grid, monkeypatch):
    """Bins that overlap, that hold one patch and that hold several."""
    features = torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(3))
    expected = pool_adaptively(features, (10, 9))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.delattr(F, "adaptive_avg_pool2d")
    torch.testing.assert_close(pool_adaptively(features, (10, 9)), expected)


def test_prefix_tokens_are_refused(decoder_type):
    decoder = tiny_model(decoder_type).decoder
    with pytest.raises(ValueError, match=r"Got 25 patch tokens for grid_size=\(4, 6\), which needs 24; drop CLS"):
        decoder(torch.randn(1, 25, 24), GRID)


def test_class_logits_depend_on_direction_only(patches):
    norm = torch.nn.LayerNorm(5)
    classes = torch.randn(2, 5, 24)
    torch.testing.assert_close(
        class_logits(patches * 7, classes * 3, norm, GRID), class_logits(patches, classes, norm, GRID)
    )


def test_initial_weights_follow_the_published_code():
    """P ~ N(0, 1) / sqrt(D), s ~ N(0, 1), class tokens ~ truncated N(0, 0.02)."""
    torch.manual_seed(0)
    decoder = DepictForSemanticSegmentation(
        tiny_config("ca", hidden_size=96, decoder_num_layers=200, num_labels=100)
    ).decoder
    projections = torch.cat([layer.projection.flatten() for layer in decoder.layers])
    assert projections.std().item() == pytest.approx(96**-0.5, rel=0.02)
    steps = torch.cat([layer.step_size for layer in decoder.layers])
    assert steps.std().item() == pytest.approx(1, rel=0.15)
    assert decoder.class_tokens.std().item() == pytest.approx(0.02, rel=0.05)


def test_mask_transformer_heads_must_divide_a_backbones_width():
    from transformers import Dinov2Config

    backbone = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=32)
    with pytest.raises(ValueError, match="width 24 is not divisible by decoder_num_heads=5"):
        tiny_model("mask_transformer", backbone_config=backbone, decoder_num_heads=5)
