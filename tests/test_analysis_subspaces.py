"""Geometry of subspaces against configurations whose angles, ranks and shares are known."""

import math

import pytest
import torch
from conftest import tiny_model

from depict_hf.analysis import (
    class_gram,
    class_subspaces,
    deviation_from_identity,
    effective_rank,
    energy_shares,
    head_gram,
    overlaps,
    principal_angles,
    principal_colors,
    principal_subspace,
    projections,
    read_out,
    record,
    step_sizes,
    subspace_statistics,
)

EYE = torch.eye(6, dtype=torch.float64)


def random_matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_head_gram_is_identity_and_zero_for_orthonormal_incoherent_heads():
    gram = head_gram(torch.stack([EYE[:2], EYE[2:4]]))
    assert gram.shape == (2, 2, 2, 2)
    torch.testing.assert_close(gram[0, 0], EYE[:2, :2])
    torch.testing.assert_close(gram[0, 1], torch.zeros(2, 2, dtype=torch.float64))
    heads = random_matrix(3, 2, 5)
    torch.testing.assert_close(head_gram(heads)[2, 0], heads[2] @ heads[0].T)


def test_deviation_from_identity():
    assert deviation_from_identity(EYE).item() == 0
    assert deviation_from_identity(3 * EYE).item() == pytest.approx(2)
    assert deviation_from_identity(3 * EYE, any_scale=True).item() == pytest.approx(0, abs=1e-7)
    # The least of |a G - I| over a, searched here.
    gram = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    least = min(torch.dist(a * gram, EYE[:3, :3]).item() / math.sqrt(3) for a in torch.linspace(0, 1, 10001).tolist())
    assert deviation_from_identity(gram, any_scale=True).item() == pytest.approx(least, abs=1e-6)


def test_effective_rank():
    assert effective_rank(7 * EYE[:4]).item() == pytest.approx(4)
    assert effective_rank(torch.ones(5, 3)).item() == pytest.approx(1)
    assert effective_rank(torch.zeros(5, 3)).item() == 0
    # Singular values 3 and 1: shares 3/4 and 1/4, not 9/10 and 1/10.
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))).item() == pytest.approx(expected)


def test_overlaps_of_known_planes():
    turned = torch.stack([EYE[0], math.cos(0.3) * EYE[1] + math.sin(0.3) * EYE[2]])
    stretched = random_matrix(2, 2, seed=3) @ EYE[4:6]
    found = overlaps(torch.stack([EYE[:2], turned, stretched]))
    expected = torch.tensor([[1, (1 + math.cos(0.3) ** 2) / 2, 0]], dtype=torch.float64)
    torch.testing.assert_close(found[:1], expected)
    torch.testing.assert_close(found, found.T)


def test_energy_shares_project_onto_the_row_space():
    """Neither the rows' lengths nor their angles matter, only what they span."""
    heads = torch.stack([5 * EYE[:2], torch.stack([EYE[2], EYE[2] + 0.1 * EYE[3]])])
    tokens = torch.stack([3 * EYE[0], EYE[0] + EYE[3], EYE[5], 0 * EYE[0]])
    expected = torch.tensor([[1, 0], [0.5, 0.5], [0, 0], [0, 0]], dtype=torch.float64)
    torch.testing.assert_close(energy_shares(tokens, heads), expected)
    torch.testing.assert_close(energy_shares(tokens[None], heads)[0], expected)


def test_principal_angles_of_known_planes():
    angles = (1e-9, 0.4, 1.5)
    turned = torch.stack([math.cos(a) * EYE[i] + math.sin(a) * EYE[3 + i] for i, a in enumerate(angles)])
    mixed = random_matrix(3, 3) @ turned
    torch.testing.assert_close(
        principal_angles(mixed, random_matrix(3, 3, seed=1) @ EYE[:3]),
        torch.tensor(angles, dtype=torch.float64),
        atol=1e-11,
        rtol=1e-9,
    )
    found = principal_angles(EYE[:1] + EYE[3:4], EYE[:3])
    torch.testing.assert_close(found, torch.tensor([math.pi / 4], dtype=torch.float64))
    torch.testing.assert_close(principal_angles(EYE[:3], EYE[:1] + EYE[3:4]), found)


def test_principal_subspace_holds_the_most_energy():
    tokens = random_matrix(50, 6) * torch.tensor([1, 9, 1, 5, 1, 1])
    basis = principal_subspace(tokens, 2)
    values = torch.linalg.eigvalsh(tokens.T @ tokens)
    assert (tokens @ basis.T).square().sum().item() == pytest.approx(values[-2:].sum().item())
    shifted = principal_subspace(tokens + 100 * EYE[0], 2, center=True)
    assert principal_angles(shifted, principal_subspace(tokens, 2, center=True)).max() < 1e-6
    with pytest.raises(ValueError, match=r"Got dim=7 for tokens of shape \(50, 6\)"):
        principal_subspace(tokens, 7)


def test_principal_colors_keep_their_signs():
    """The same colours after a rotation of the features, another order of the patches and a change of scale."""
    tokens = random_matrix(1, 30, 8).exp()
    colors = principal_colors(tokens, (5, 6))
    assert colors.shape == (1, 5, 6, 3) and colors.min() == 0 and colors.max() == 1
    turn = torch.linalg.qr(random_matrix(8, 8, seed=2))[0]
    torch.testing.assert_close(principal_colors(3 * tokens @ turn, (5, 6)), colors)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(principal_colors(tokens[:, order], (5, 6)).flatten(1, 2), colors.flatten(1, 2)[:, order])
    # The first component by itself: its longer tail is bright.
    scores = (tokens[0] - tokens[0].mean(0)) @ torch.linalg.eigh(torch.cov(tokens[0].T))[1][:, -1]
    scores = scores * scores.pow(3).sum().sign()
    assert torch.equal(scores.argsort()[5:25], colors[0, ..., 0].flatten().argsort()[5:25])


@pytest.mark.parametrize("decoder_type", ["sa", "ca", "cbsa"])
def test_statistics_of_a_models_heads(decoder_type):
    model = tiny_model(decoder_type)
    for cross in (False, True) if decoder_type == "ca" else (False,):
        for found, heads in zip(subspace_statistics(model, cross), projections(model, cross), strict=True):
            assert heads.shape == (2, 8 if cross else 16, 24)
            gram = heads[1] @ heads[1].T
            expected = (gram - torch.eye(len(gram))).norm() / math.sqrt(len(gram))
            torch.testing.assert_close(found.deviations[1], expected)
            eigenvalues = torch.linalg.eigvalsh(gram).flip(0)
            torch.testing.assert_close(found.singular_values[1].square(), eigenvalues)
            torch.testing.assert_close(found.overlaps, overlaps(heads))
            assert found.random.overlaps[0, 1].item() == pytest.approx(heads.shape[1] / 24, rel=0.1)


def test_random_statistics_are_those_of_an_untrained_decoder():
    """The published start is N(0, 1 / hidden): its heads lie within the spread of the draws, others do not."""
    model = tiny_model("sa", hidden_size=96, decoder_head_dim=40)
    [found, _] = subspace_statistics(model, draws=4)
    torch.testing.assert_close(found.random.deviations, found.deviations, rtol=0.1, atol=0)
    torch.testing.assert_close(found.random.effective_ranks, found.effective_ranks, rtol=0.02, atol=0)
    # E |P P^T - I|^2 / head_dim = (head_dim + 1) / hidden for such matrices.
    assert found.random.deviations.square().mean().item() == pytest.approx(41 / 96, rel=0.1)


def test_projections_are_the_rows_that_the_decoder_multiplies_with():
    sa, cbsa = tiny_model("sa"), tiny_model("cbsa")
    torch.testing.assert_close(projections(sa)[1][1], sa.decoder.layers[1].projection[16:].double())
    torch.testing.assert_close(projections(cbsa)[0][1], cbsa.decoder.layers[0].projection.weight[16:].double())


def test_step_sizes():
    sa, cbsa = tiny_model("sa"), tiny_model("cbsa")
    assert step_sizes(sa)[1].tolist() == [sa.decoder.layers[1].step_size.item()] * 2
    assert step_sizes(cbsa)[1].tolist() == cbsa.decoder.layers[1].step_size.flatten().tolist()


@pytest.mark.parametrize("decoder_type", ["sa", "ca", "cbsa", "mask_transformer"])
def test_class_gram_along_the_decoder(decoder_type, pixel_values):
    model = tiny_model(decoder_type)
    recording = record(model, pixel_values)
    grams = class_gram(model, recording)
    assert grams.shape == (2, 4, 5, 5)
    tokens = recording.class_tokens[1][1].double()
    cosine = torch.nn.functional.cosine_similarity(tokens[3], tokens[0], dim=0)
    torch.testing.assert_close(grams[1, 1, 3, 0], cosine)
    classes = read_out(model, recording)[1]
    torch.testing.assert_close(class_gram(model, recording, cosines=False)[:, -1], classes @ classes.transpose(1, 2))


def test_class_subspaces_of_a_decoder_that_finds_the_principal_subspace(pixel_values):
    """Class tokens put by hand into the principal subspace of the patch vectors, then out of it."""
    model = tiny_model("ca", decoder_cross_num_layers=1)
    with torch.no_grad():
        model.decoder.cross_layers[0].step_size.zero_()
        patches, _ = read_out(model, record(model, pixel_values[:1]))
        # LayerNorm takes the mean away: directions without one.
        centered = patches[0] - patches[0].mean(1, keepdim=True)
        directions = torch.linalg.svd(centered)[2]
        model.decoder.norm.bias.zero_()
        for part, inside in ((directions[:5], True), (directions[12:17], False)):
            model.decoder.class_tokens.copy_((torch.randn(5, 5) + 3 * torch.eye(5)).double() @ part)
            [found] = class_subspaces(model, record(model, pixel_values[:1]))
            assert found.chance == 5 / 24
            if inside:
                assert found.angles_radians.max() < 1e-3 and found.captured == pytest.approx(found.best, rel=1e-4)
            else:
                assert found.angles_radians.min() > 1.5 and found.captured < 0.5 * found.best


def test_black_boxes_have_no_subspaces(pixel_values):
    for decoder_type in ("mask_transformer", "linear"):
        model = tiny_model(decoder_type)
        for function in (projections, subspace_statistics):
            with pytest.raises(ValueError, match=rf"type '{decoder_type}' has no subspaces; they exist in 'sa', 'ca'"):
                function(model)
        with pytest.raises(ValueError, match=rf"type '{decoder_type}' has no step sizes"):
            step_sizes(model)
    recording = record(model, pixel_values)
    for function in (class_gram, class_subspaces):
        with pytest.raises(ValueError, match="type 'linear' has no class tokens"):
            function(model, recording)
    with pytest.raises(ValueError, match="type 'sa' has no cross-attention layers; they exist in 'ca'"):
        projections(tiny_model("sa"), cross=True)
    with pytest.raises(ValueError, match="draws=0"):
        subspace_statistics(tiny_model("sa"), draws=0)
