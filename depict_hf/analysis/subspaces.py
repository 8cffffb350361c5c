"""Geometry of the heads' subspaces and of the class tokens: orthonormality, overlap, ranks, angles, shares."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling_depict import DepictForSemanticSegmentation
from .recording import Recording
from .steps import exact, projections, read_out


def head_gram(projections: Tensor) -> Tensor:
    """Return P_h P_g^T of all pairs of heads.

    Args:
        projections: P, `(heads, head_dim, hidden)`.

    Returns:
        `(heads, heads, head_dim, head_dim)`, float64. Orthonormal rows give the identity where h = g, incoherent heads
        give zero elsewhere.
    """
    projections = exact(projections)
    return torch.einsum("hid,gjd->hgij", projections, projections)


def deviation_from_identity(gram: Tensor, any_scale: bool = False) -> Tensor:
    """Measure how far a Gram matrix is from that of orthonormal vectors: |G - I| / |I| in the Frobenius norm.

    Args:
        gram: G, `(..., n, n)`, symmetric.
        any_scale: Whether vectors that are orthogonal and of equal length count as orthonormal. The deviation is then
            the least over all multiples of G, in [0, 1].

    Returns:
        `(...)`, float64: 0 for orthonormal vectors.
    """
    gram = exact(gram)
    size = gram.shape[-1]
    if any_scale:
        trace, square = gram.diagonal(dim1=-2, dim2=-1).sum(-1), gram.square().sum((-2, -1))
        cosine = trace.square() / (size * torch.where(square > 0, square, 1))
        return (1 - cosine).clamp(min=0).sqrt()
    identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
    return (gram - identity).square().sum((-2, -1)).sqrt() / math.sqrt(size)


def effective_rank(matrix: Tensor) -> Tensor:
    """Return the exponential of the entropy of the singular values (not their squares), normalised to sum 1.

    Args:
        matrix: `(..., rows, columns)`.

    Returns:
        `(...)`, float64, between 1 and min(rows, columns); 0 for a zero matrix.

    Source:
        Roy and Vetterli, "The effective rank: a measure of effective dimensionality", 2007.
    """
    return _effective_rank(torch.linalg.svdvals(exact(matrix)))


def row_basis(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis `(rank, dim)` of the span of the rows of `(count, dim)`, float64.

    Directions with less than a millionth of the largest singular value count as rounding: weights and tokens come in
    float32 or less.
    """
    _, values, basis = torch.linalg.svd(exact(matrix), full_matrices=False)
    return basis[values > 1e-6 * values[:1]]


def overlaps(projections: Tensor) -> Tensor:
    """Return the overlap of the heads' subspaces, the mean squared cosine of the angles between their row spaces.

    Args:
        projections: P, `(heads, head_dim, hidden)`.

    Returns:
        `(heads, heads)`, float64: 1 on the diagonal, 0 for orthogonal subspaces; random subspaces have head_dim /
        hidden on average.
    """
    bases = [row_basis(projection) for projection in projections]
    return torch.stack(
        [torch.stack([(a @ b.T).square().sum() / max(1, min(len(a), len(b))) for b in bases]) for a in bases]
    )


def energy_shares(tokens: Tensor, projections: Tensor) -> Tensor:
    """Return the share of each token's squared length that lies in each head's subspace, projected onto it.

    Args:
        tokens: `(..., count, hidden)`.
        projections: P, `(heads, head_dim, hidden)`.

    Returns:
        `(..., count, heads)` in [0, 1], float64; 0 for zero tokens. The shares of several heads sum to 1 only where
        their subspaces are orthogonal and fill the space.
    """
    tokens = exact(tokens)
    energy = tokens.square().sum(-1, keepdim=True)
    inside = [(tokens @ row_basis(projection).T).square().sum(-1) for projection in projections]
    return torch.stack(inside, dim=-1) / torch.where(energy > 0, energy, 1)


@dataclass(frozen=True, eq=False)
class SubspaceStatistics:
    """Geometry of one layer's heads, float64.

    Attributes:
        singular_values: Singular values of each P_h, `(heads, head_dim)`, descending.
        effective_ranks: Effective ranks of each P_h, `(heads,)`; see `effective_rank`.
        deviations: |P_h P_h^T - I| / |I|, `(heads,)`: 0 for orthonormal rows.
        deviations_any_scale: The same where only directions count, `(heads,)`.
        overlaps: Overlaps of the heads' row spaces, `(heads, heads)`; see `overlaps`.
        random: The same figures of random matrices of this shape, averaged over draws: independent normal entries of
            variance 1 / hidden, which decoders start from. None in the random statistics themselves.
    """

    singular_values: Tensor
    effective_ranks: Tensor
    deviations: Tensor
    deviations_any_scale: Tensor
    overlaps: Tensor
    random: "SubspaceStatistics | None" = None


@torch.no_grad()
def subspace_statistics(
    model: DepictForSemanticSegmentation, cross: bool = False, draws: int = 8, seed: int = 0
) -> list[SubspaceStatistics]:
    """Say how orthonormal and incoherent the heads of every layer are, beside random matrices of that shape.

    Args:
        cross: Whether to look at the cross-attention layers of "ca" instead.
        draws: Random matrices per layer.
        seed: Seed of those matrices.

    Raises:
        ValueError: If the decoder is a black box, which has no subspaces.
    """
    if draws < 1:
        raise ValueError(f"Got draws={draws}, needed at least 1.")
    generator = torch.Generator().manual_seed(seed)
    statistics = []
    for projection in projections(model, cross):
        drawn = []
        for _ in range(draws):
            matrix = torch.randn(projection.shape, generator=generator, dtype=torch.float64)
            drawn.append(_statistics((matrix * projection.shape[-1] ** -0.5).to(projection.device)))
        values, ranks, angles, angles_any_scale, shared = (
            torch.stack(each).mean(0) for each in zip(*drawn, strict=True)
        )
        random = SubspaceStatistics(values, ranks, angles, angles_any_scale, shared)
        statistics.append(SubspaceStatistics(*_statistics(projection), random))
    return statistics


@torch.no_grad()
def class_gram(model: DepictForSemanticSegmentation, recording: Recording, cosines: bool = True) -> Tensor:
    """Return the Gram matrices of the class tokens along the decoder.

    Args:
        cosines: Whether of the tokens scaled to length 1, so that `deviation_from_identity` measures angles only.

    Returns:
        `(batch, layers + 2, num_labels, num_labels)`, float64: before the first layer, after every layer that moves
        class tokens ("ca": cross-attention layers), and last of the vectors that patches are compared with.

    Raises:
        ValueError: If the decoder has no class tokens.
    """
    stages = [*recording.class_tokens, read_out(model, recording)[1]]
    grams = []
    for tokens in stages:
        tokens = F.normalize(exact(tokens), dim=-1) if cosines else exact(tokens)
        grams.append(tokens @ tokens.transpose(-1, -2))
    return torch.stack(grams, dim=1)


def principal_subspace(tokens: Tensor, dim: int, center: bool = False) -> Tensor:
    """Return an orthonormal basis of the subspace of `dim` dimensions that holds most of the tokens' energy.

    Args:
        tokens: `(count, hidden)`.
        dim: Number of dimensions, at most min(count, hidden).
        center: Whether the tokens' mean is taken away first, as principal component analysis does.

    Returns:
        `(dim, hidden)`, float64, by decreasing energy.

    Raises:
        ValueError: If `dim` is out of range.
    """
    if not 1 <= dim <= min(tokens.shape):
        raise ValueError(f"Got dim={dim} for tokens of shape {tuple(tokens.shape)}; needed 1 to {min(tokens.shape)}.")
    tokens = exact(tokens)
    if center:
        tokens = tokens - tokens.mean(0)
    return torch.linalg.svd(tokens, full_matrices=False)[2][:dim]


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Return the principal angles between the spans of the rows of two matrices.

    Args:
        first: `(m, dim)`.
        second: `(n, dim)`.

    Returns:
        `(min(rank of first, rank of second),)`, radians, ascending, float64; exact for small angles too.
    """
    large, small = sorted((row_basis(first), row_basis(second)), key=len, reverse=True)
    cosines = torch.linalg.svdvals(large @ small.T).clamp(max=1)
    sines = torch.linalg.svdvals(small - (small @ large.T) @ large).flip(0)[: len(small)].clamp(max=1)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


@dataclass(frozen=True, eq=False)
class ClassSubspace:
    """The class vectors of one image against the principal subspace of its patch vectors, float64.

    Attributes:
        angles_radians: Principal angles between the span of the class vectors and the principal subspace, ascending.
        captured: Share of the patch vectors' energy inside the span of the class vectors.
        best: Share inside the principal subspace: the most that any subspace of its dimension holds.
        chance: What a random subspace of the class vectors' dimension holds on average.
    """

    angles_radians: Tensor
    captured: float
    best: float
    chance: float


@torch.no_grad()
def class_subspaces(
    model: DepictForSemanticSegmentation, recording: Recording, dim: int | None = None, center: bool = False
) -> list[ClassSubspace]:
    """Whether class vectors span the principal subspace of the patch vectors, per image of the record.

    Both are taken as they are compared, see `read_out`.

    Args:
        dim: Dimension of the principal subspace; by default that of the span of the class vectors, as far as there
            are patches.
        center: Whether the mean of the patch vectors is taken away first.

    Raises:
        ValueError: If the decoder has no class tokens, or `dim` is out of range.
    """
    results = []
    for patches, classes in zip(*read_out(model, recording), strict=True):
        if center:
            patches = patches - patches.mean(0)
        basis = row_basis(classes)
        principal = principal_subspace(patches, min(len(basis), *patches.shape) if dim is None else dim)
        energy = patches.square().sum()
        captured, best = ((patches @ each.T).square().sum() / energy for each in (basis, principal))
        results.append(
            ClassSubspace(
                principal_angles(classes, principal), captured.item(), best.item(), len(basis) / classes.shape[1]
            )
        )
    return results


@torch.no_grad()
def principal_colors(tokens: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Show the first three principal components of patch tokens as red, green and blue.

    Each component has the sign that makes its distribution's longer tail positive (positive sum of cubes), which
    neither the order of the tokens nor a rotation of the feature space changes; each is stretched so that its 1 % and
    99 % quantiles become 0 and 1.

    Args:
        tokens: `(batch, patches, hidden)`, row-major, with at least 3 patches and 3 dimensions.
        grid_size: `(grid_height, grid_width)`.

    Returns:
        `(batch, grid_height, grid_width, 3)` in [0, 1], float64; 0 where a component has no variance.
    """
    images = []
    for each in exact(tokens):
        centered = each - each.mean(0)
        scores = centered @ principal_subspace(each, 3, center=True).T
        scores = scores * torch.where(scores.pow(3).sum(0) < 0, -1.0, 1.0)
        low, high = torch.quantile(scores, torch.tensor([0.01, 0.99]).to(scores), dim=0)
        images.append(((scores - low) / torch.where(high > low, high - low, torch.inf)).clamp(0, 1))
    return torch.stack(images).unflatten(1, tuple(grid_size))


def _statistics(projection: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    values = torch.linalg.svdvals(projection)
    gram = projection @ projection.transpose(-1, -2)
    return (
        values,
        _effective_rank(values),
        deviation_from_identity(gram),
        deviation_from_identity(gram, any_scale=True),
        overlaps(projection),
    )


def _effective_rank(values: Tensor) -> Tensor:
    total = values.sum(-1, keepdim=True)
    shares = values / torch.where(total > 0, total, 1)
    return torch.special.entr(shares).sum(-1).exp() * (total.squeeze(-1) > 0)
