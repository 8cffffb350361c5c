"""Coding rates against closed forms and against determinants written out here."""

import math

import pytest
import torch
from conftest import tiny_model

from depict_hf.analysis import coding_rate, compression, projections, rate_curves, record


def rate(tokens, epsilon):
    """The definition, with the determinant of the dim x dim matrix."""
    tokens = tokens.double()
    count, dim = tokens.shape
    return 0.5 * torch.logdet(torch.eye(dim, dtype=torch.float64) + dim / (count * epsilon**2) * tokens.T @ tokens)


def orthonormal_rows(count, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, count, generator=generator, dtype=torch.float64))[0].T


def random_tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("count", "dim", "epsilon"), [(3, 8, 0.5), (8, 8, 0.1), (5, 6, 2.0)])
def test_orthonormal_tokens(count, dim, epsilon):
    """Each of the count directions costs 1/2 log(1 + dim / (count epsilon^2))."""
    expected = count / 2 * math.log(1 + dim / (count * epsilon**2))
    assert coding_rate(orthonormal_rows(count, dim), epsilon).item() == pytest.approx(expected, rel=1e-12)


def test_zero_tokens_cost_nothing():
    assert coding_rate(torch.zeros(7, 4)).item() == 0
    assert coding_rate(torch.zeros(7, 4), normalize=True).item() == 0


def test_one_token():
    token = torch.tensor([[3.0, 4.0]])
    assert coding_rate(token, 0.5).item() == pytest.approx(0.5 * math.log(1 + 2 * 25 / 0.25), rel=1e-12)
    assert coding_rate(token, 0.5, normalize=True).item() == pytest.approx(0.5 * math.log(1 + 2 / 0.25), rel=1e-12)


@pytest.mark.parametrize(("count", "dim"), [(5, 12), (12, 5), (6, 6)])
def test_either_gram_matrix_gives_the_definition(count, dim):
    tokens = random_tokens(count, dim)
    assert coding_rate(tokens, 0.7).item() == pytest.approx(rate(tokens, 0.7).item(), rel=1e-12)


def test_scaling_tokens_is_scaling_epsilon():
    tokens = random_tokens(9, 5)
    torch.testing.assert_close(coding_rate(tokens.double() * 3, 0.6), coding_rate(tokens, 0.2))


@pytest.mark.parametrize("scale", [1e-200, 1e-6, 1.0, 1e9, 1e200])
@pytest.mark.parametrize(("count", "dim"), [(60, 40), (40, 60)])
def test_low_rank_is_stable_at_any_size(count, dim, scale):
    """Rank 3 costs three directions; rounding along the others must not add to it, nor squares overflow."""
    values = torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64)
    tokens = orthonormal_rows(3, count, 1).T @ (values[:, None] * orthonormal_rows(3, dim, 2))
    ratio = math.log(dim / count / 0.25) + 2 * math.log(scale)
    expected = sum(
        0.5 * (exponent + math.log1p(math.exp(-exponent)) if exponent > 0 else math.log1p(math.exp(exponent)))
        for exponent in (ratio + 2 * math.log(value) for value in values)
    )
    assert coding_rate(tokens * scale).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_batches_are_independent_and_half_precision_counts_in_double():
    tokens = random_tokens(2, 3, 7, 5).half()
    rates = coding_rate(tokens)
    assert rates.shape == (2, 3) and rates.dtype == torch.float64
    assert rates[1, 2].item() == pytest.approx(rate(tokens[1, 2], 0.5).item(), rel=1e-12)


def test_rotations_do_not_change_the_rate():
    tokens = random_tokens(9, 6).double()
    turn = orthonormal_rows(6, 6, 4)
    torch.testing.assert_close(coding_rate(tokens @ turn), coding_rate(tokens))


def test_groups_weigh_their_rates_by_size():
    tokens, groups = random_tokens(10, 4), torch.tensor([0, 0, 255, 0, 7, 255, 0, 0, 7, 0])
    expected = sum((groups == g).sum().item() / 10 * rate(tokens[groups == g], 0.5) for g in (0, 7, 255))
    assert coding_rate(tokens, groups=groups).item() == pytest.approx(expected.item(), rel=1e-12)
    one = torch.zeros(10, dtype=torch.long)
    torch.testing.assert_close(coding_rate(tokens, groups=one), coding_rate(tokens))
    batch = torch.stack([tokens, tokens])
    together = coding_rate(batch, groups=torch.stack([groups, one]))
    torch.testing.assert_close(together, torch.stack([coding_rate(tokens, groups=g) for g in (groups, one)]))


def test_gradient_of_the_rate():
    """1/2 log det(I + a Z^T Z) has gradient a Z (I + a Z^T Z)^-1; also for tokens of low rank it is finite."""
    tokens = random_tokens(9, 4).double().requires_grad_()
    coding_rate(tokens, 0.5).backward()
    a = 4 / (9 * 0.25)
    expected = a * tokens @ torch.linalg.inv(torch.eye(4, dtype=torch.float64) + a * tokens.T @ tokens)
    torch.testing.assert_close(tokens.grad, expected)
    zeros = torch.zeros(3, 4, requires_grad=True)
    coding_rate(zeros).backward()
    assert zeros.grad.isfinite().all()


def test_compression_counts_each_head_in_its_own_dimension():
    tokens, heads = random_tokens(20, 8), random_tokens(3, 2, 8, seed=1)
    expected = sum(rate(tokens.double() @ head.double().T, 0.3) for head in heads)
    assert compression(tokens, heads, 0.3).item() == pytest.approx(expected.item(), rel=1e-12)


def test_orthogonal_heads_of_tokens_in_their_subspaces():
    """Tokens in the subspaces of heads that fill the space: log det splits into blocks, with head_dim for dim."""
    frame = torch.eye(6, dtype=torch.float64).view(2, 3, 6)
    tokens = torch.block_diag(random_tokens(4, 3), random_tokens(5, 3, seed=1)).double()
    whole = coding_rate(tokens, 0.5 * math.sqrt(6 / 3))
    torch.testing.assert_close(compression(tokens, frame, 0.5), whole)


def test_curves_of_every_decoder(decoder_type, pixel_values):
    model = tiny_model(decoder_type)
    recording = record(model, pixel_values)
    curves = rate_curves(model, recording, epsilon=0.4)
    torch.testing.assert_close(curves.patch_rates_nats[1, -1], rate(recording.patch_tokens[-1][1], 0.4))
    if decoder_type == "linear":
        assert curves.class_rates_nats is None and curves.patch_compression_nats is None
        return
    torch.testing.assert_close(curves.class_rates_nats[1, 1], rate(recording.class_tokens[1][1], 0.4))
    if decoder_type == "mask_transformer":
        assert curves.patch_compression_nats is None and curves.class_compression_nats is None
        return
    heads = projections(model)[1]
    for when, tokens in enumerate(recording.patch_tokens[1:3]):
        expected = sum(rate(tokens[1].double() @ head.T, 0.4) for head in heads)
        torch.testing.assert_close(curves.patch_compression_nats[1, 1, when], expected)
    heads = projections(model, cross=decoder_type == "ca")[0]
    expected = sum(rate(recording.class_tokens[1][0].double() @ head.T, 0.4) for head in heads)
    torch.testing.assert_close(curves.class_compression_nats[0, 0, 1], expected)


def test_curves_as_the_layer_sees_its_tokens(pixel_values):
    model = tiny_model("sa")
    recording = record(model, pixel_values)
    layer = model.decoder.layers[1]
    torch.nn.init.normal_(layer.norm.weight)
    seen = torch.nn.functional.layer_norm(
        recording.patch_tokens[2][0].double(), (24,), layer.norm.weight.double(), layer.norm.bias.double()
    )
    curves = rate_curves(model, recording, normalize=True, as_seen=True)
    seen = seen / seen.norm(dim=-1, keepdim=True)
    expected = sum(rate(seen @ head.T, 0.5) for head in projections(model)[1]).detach()
    torch.testing.assert_close(curves.patch_compression_nats[0, 1, 1], expected)


def test_wrong_arguments_are_named():
    tokens = random_tokens(4, 3)
    with pytest.raises(ValueError, match=r"Got tokens of shape \(4,\)"):
        coding_rate(tokens[:, 0])
    with pytest.raises(ValueError, match="at least one token"):
        coding_rate(tokens[:0])
    with pytest.raises(ValueError, match="not finite"):
        coding_rate(tokens.log())
    with pytest.raises(ValueError, match="epsilon=0"):
        coding_rate(tokens, epsilon=0)
    with pytest.raises(ValueError, match=r"Got groups of shape \(3,\)"):
        coding_rate(tokens, groups=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"needed \(heads, head_dim, 3\)"):
        compression(tokens, torch.ones(2, 2, 4))
