"""Coding rates: how many nats describe a set of tokens up to a distortion, whole or seen by the heads' subspaces."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling_depict import DepictForSemanticSegmentation
from .recording import Recording
from .steps import (
    SUBSPACE_DECODERS,
    check_recording,
    exact,
    head_projections,
    layer_norm,
    subspace_layers,
)


def coding_rate(tokens: Tensor, epsilon: float = 0.5, normalize: bool = False, groups: Tensor | None = None) -> Tensor:
    """Return the coding rate of tokens, R(Z) = 1/2 log det(I + dim / (count epsilon^2) Z^T Z), in nats.

    Eigenvalues of the smaller Gram matrix that its rounding in float64 cannot tell from zero count as zero, so that
    tokens of low rank have the rate of their rank, however long they are. Differentiable.

    Args:
        tokens: Z, `(..., count, dim)`; of any floating dtype.
        epsilon: Allowed distortion, in the tokens' unit.
        normalize: Whether to scale every token to length 1 first, as the rate reduction papers do.
        groups: Integers `(..., count)` or `(count,)`, one group per token. The result is then
            sum over g of count_g / count * R(Z_g), where R(Z_g) divides by count_g: the R_c of rate reduction, the
            rate of tokens whose groups are known.

    Returns:
        `(...)`, float64.

    Raises:
        ValueError: If tokens, epsilon or groups are not of that form.

    Source:
        Yu et al. 2020: coding rate, and average coding rate of a mixture with memberships 0 or 1.
    """
    if tokens.ndim < 2 or not tokens.is_floating_point() or not tokens.shape[-2] or not tokens.shape[-1]:
        raise ValueError(
            f"Got tokens of shape {tuple(tokens.shape)} and dtype {tokens.dtype}, needed floats (..., count, dim), "
            "at least one token."
        )
    if not tokens.isfinite().all():
        raise ValueError("Got tokens that are not finite; look at the layer that made them.")
    if not epsilon > 0:
        raise ValueError(f"Got epsilon={epsilon}, needed a positive number.")
    tokens = exact(tokens)
    if normalize:
        tokens = _unit(tokens)
    if groups is None:
        return _rate(tokens, epsilon)
    if tuple(groups.shape) not in (tuple(tokens.shape[:-1]), tuple(tokens.shape[-2:-1])) or groups.is_floating_point():
        raise ValueError(
            f"Got groups of shape {tuple(groups.shape)} and dtype {groups.dtype} for tokens of shape "
            f"{tuple(tokens.shape)}; needed one integer per token."
        )
    groups = groups.to(tokens.device).expand(tokens.shape[:-1]).reshape(-1, tokens.shape[-2])
    rates = []
    for each, member in zip(tokens.flatten(0, -3) if tokens.ndim > 2 else tokens[None], groups, strict=True):
        parts = [each[member == group] for group in member.unique()]
        weighted = (_rate(part, epsilon) * (len(part) / len(each)) for part in parts)
        rates.append(sum(weighted, start=tokens.new_zeros(())))
    return torch.stack(rates).reshape(tokens.shape[:-2])


def compression(tokens: Tensor, projections: Tensor, epsilon: float = 0.5, normalize: bool = False) -> Tensor:
    """Return R^c(Z) = sum over heads of R(Z P_h^T), with head_dim in place of dim, in nats.

    Args:
        tokens: Z, `(..., count, dim)`.
        projections: P, `(heads, head_dim, dim)`, as `projections(model)[layer]`.
        epsilon: Allowed distortion.
        normalize: Whether to scale every token to length 1 before it is projected.

    Returns:
        `(...)`, float64.

    Raises:
        ValueError: If shapes do not fit.

    Source:
        Yu et al. 2023: the rate of tokens under a mixture of subspaces, which their subspace self-attention and that
        of Wen and Li 2024 descend.
    """
    if projections.ndim != 3 or projections.shape[-1] != tokens.shape[-1]:
        raise ValueError(
            f"Got projections of shape {tuple(projections.shape)} for tokens of shape {tuple(tokens.shape)}; needed "
            f"(heads, head_dim, {tokens.shape[-1]})."
        )
    tokens, projections = exact(tokens), exact(projections)
    if normalize:
        tokens = _unit(tokens)
    zero = tokens.new_zeros(())
    return sum((coding_rate(tokens @ projection.T, epsilon) for projection in projections), start=zero)


@dataclass(frozen=True, eq=False)
class RateCurves:
    """Rates along the decoder, float64.

    Attributes:
        patch_rates_nats: R of the patch tokens before the first and after every layer, `(batch, layers + 1)`.
        class_rates_nats: R of the class tokens before the first and after every layer that moves them,
            `(batch, layers + 1)`; None for "linear".
        patch_compression_nats: `(batch, layers, 2)`: R^c of the patch tokens before and after each layer's step, by
            that layer's own P. None for black boxes.
        class_compression_nats: The same for the class tokens; in "ca" by the cross-attention layers.
    """

    patch_rates_nats: Tensor
    class_rates_nats: Tensor | None
    patch_compression_nats: Tensor | None
    class_compression_nats: Tensor | None


@torch.no_grad()
def rate_curves(
    model: DepictForSemanticSegmentation,
    recording: Recording,
    epsilon: float = 0.5,
    normalize: bool = False,
    as_seen: bool = False,
) -> RateCurves:
    """Compute R and R^c over the decoder's layers.

    Args:
        epsilon: Allowed distortion.
        normalize: Whether all tokens are scaled to length 1, without which the rates also measure lengths.
        as_seen: Whether R^c takes the tokens as the layer's heads see them, after the layer's own LayerNorm (the same
            one before and after the step), instead of as they stand between the layers. The class tokens of
            cross-attention layers pass no LayerNorm in either case.
    """
    check_recording(model, recording)

    def rates(stages: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([coding_rate(tokens, epsilon, normalize) for tokens in stages], dim=1)

    def compressions(stages: tuple[Tensor, ...], cross: bool) -> Tensor:
        pairs = []
        for layer, before, after in zip(
            subspace_layers(model, "subspaces", cross), stages[:-1], stages[1:], strict=True
        ):
            pair = torch.stack([before, after], dim=1)
            if as_seen and not cross:
                pair = layer_norm(pair, layer.norm)
            pairs.append(compression(pair, head_projections(layer), epsilon, normalize))
        return torch.stack(pairs, dim=1)

    patches, classes = recording.patch_tokens, recording.class_tokens
    white_box = recording.decoder_type in SUBSPACE_DECODERS
    return RateCurves(
        rates(patches),
        rates(classes) if classes else None,
        compressions(patches, False) if white_box else None,
        compressions(classes, recording.decoder_type == "ca") if white_box else None,
    )


def _unit(tokens: Tensor) -> Tensor:
    # Dividing by the largest entry first keeps the length of huge and tiny tokens finite; zero tokens stay zero.
    largest = tokens.abs().amax(dim=-1, keepdim=True)
    return F.normalize(tokens / torch.where(largest > 0, largest, 1), dim=-1, eps=0.5)


def _rate(tokens: Tensor, epsilon: float) -> Tensor:
    count, dim = tokens.shape[-2:]
    # Squares of the largest finite numbers are not finite: take the tokens' size out, and put its logarithm back.
    size = tokens.detach().abs().amax(dim=(-2, -1), keepdim=True)
    size = torch.where(size > 0, size, 1)
    tokens = tokens / size
    gram = tokens @ tokens.transpose(-1, -2) if count < dim else tokens.transpose(-1, -2) @ tokens
    eigenvalues = torch.linalg.eigvalsh(gram)
    rounding = max(count, dim) * torch.finfo(torch.float64).eps * eigenvalues[..., -1:].detach()
    kept = eigenvalues > rounding
    logarithms = torch.where(kept, eigenvalues, 1).log()
    # log(1 + x) of x = dim / (count epsilon^2) eigenvalue, from log(x).
    size_log = 2 * size.squeeze(-1).log() + torch.tensor(dim / count, dtype=torch.float64).log().to(size.device)
    size_log = size_log - 2 * torch.tensor(epsilon, dtype=torch.float64).log().to(size.device)
    return 0.5 * (torch.logaddexp(logarithms + size_log, torch.zeros_like(logarithms)) * kept).sum(dim=-1)
