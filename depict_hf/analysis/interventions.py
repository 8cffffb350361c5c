"""Changes to a decoder's weights that test what it relies on.

`rotate_heads` changes a model for good, and its logits not at all. All others are context managers: within them the
model computes with changed weights, and afterwards, also after an exception, it has its old weights bit for bit.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..decoders import ContractBroadcastAttention, SubspaceAttention
from ..modeling_depict import DepictForSemanticSegmentation
from ..vit import ViTLayer
from .steps import (
    DecoderLayer,
    SubspaceLayer,
    check_index,
    decoder_layers,
    exact,
    head_projections,
    subspace_layers,
)


@torch.no_grad()
def rotate_heads(model: DepictForSemanticSegmentation, generator: torch.Generator | None = None) -> None:
    """Multiply each head's projection by a random orthogonal matrix, P_h <- Q_h P_h, in place.

    Scores and values of a head depend on its subspace only, not on the basis in it, so that the logits do not move
    beyond rounding. In "cbsa" each head's part of the output matrix turns along. Weights in half precision are rounded
    again by this, which does move logits a little.

    Args:
        generator: A generator on the CPU.

    Raises:
        ValueError: If the decoder is a black box: its queries, keys and values have matrices of their own, and no such
            symmetry.
    """
    for layer in _subspace_layers(model, "symmetry under rotations of its heads"):
        _rotate(layer, layer.num_heads, generator)


@contextmanager
def rotated_across_heads(
    model: DepictForSemanticSegmentation, generator: torch.Generator | None = None
) -> Iterator[None]:
    """Multiply all heads' projections together by one random orthogonal matrix, P <- Q P: heads are mixed.

    The span of all heads stays, and in "cbsa" the output matrix turns along, but which head holds which subspace is
    lost: logits move.

    Raises:
        ValueError: If the decoder is a black box, or its layers have one head, so that there is nothing to mix.
    """
    layers = _subspace_layers(model, "subspaces")
    if layers[0].num_heads == 1:
        raise ValueError(
            "The decoder's layers have one head, so that nothing can be mixed; rotate_heads does the rest."
        )
    with _restored(_matrices(layers)):
        for layer in layers:
            _rotate(layer, 1, generator)
        yield


@contextmanager
def orthonormalized(model: DepictForSemanticSegmentation, keep_scale: bool = False) -> Iterator[None]:
    """Replace each P_h by the nearest matrix with orthonormal rows (its polar factor), as the theory wants it.

    Args:
        keep_scale: Whether rows may have a common length other than 1, the nearest one: the mean of the singular
            values. Tells a loss of angles from a loss of lengths.

    Raises:
        ValueError: If the decoder is a black box, or head_dim exceeds the tokens' width.
    """
    layers = _subspace_layers(model, "subspaces")
    for layer in layers:
        head_dim, hidden = head_projections(layer).shape[1:]
        if head_dim > hidden:
            raise ValueError(f"{head_dim} rows of width {hidden} cannot be orthonormal; lower the head's dimension.")

    def nearest(layer: SubspaceLayer) -> Tensor:
        left, values, right = torch.linalg.svd(head_projections(layer), full_matrices=False)
        scale = values.mean(-1)[:, None, None] if keep_scale else 1
        return scale * (left @ right)

    with _restored([_matrix(layer) for layer in layers]):
        for layer in layers:
            _set(_matrix(layer), nearest(layer).flatten(0, 1))
        yield


@contextmanager
def head_removed(model: DepictForSemanticSegmentation, layer: int, head: int, cross: bool = False) -> Iterator[None]:
    """Take away what one head adds; in "mask_transformer" too.

    Args:
        cross: Whether the layer is a cross-attention layer of "ca".

    Raises:
        ValueError: If there is no such layer or head.
    """
    module = _layer(model, layer, cross)
    num_heads = module.attention.num_heads if isinstance(module, ViTLayer) else module.num_heads
    check_index("head", head, num_heads, "layer's list of heads")
    parameter: Tensor
    if isinstance(module, SubspaceAttention):
        # One matrix is query, key, value and output.
        parameter, axis = module.projection, 0
    elif isinstance(module, ContractBroadcastAttention):
        parameter, axis = module.output.weight, 1
    else:
        parameter, axis = module.attention.projection.weight, 1
    with _restored([parameter]):
        width = parameter.shape[axis] // num_heads
        parameter.detach().narrow(axis, head * width, width).zero_()
        yield


@contextmanager
def layer_removed(model: DepictForSemanticSegmentation, layer: int, cross: bool = False) -> Iterator[None]:
    """Let the tokens pass one layer unchanged; in "mask_transformer" both its attention and its MLP.

    Args:
        cross: Whether the layer is a cross-attention layer of "ca".

    Raises:
        ValueError: If there is no such layer.
    """
    module = _layer(model, layer, cross)
    parameters: list[Tensor]
    if isinstance(module, SubspaceAttention):
        parameters = [module.step_size]
    elif isinstance(module, ContractBroadcastAttention):
        parameters = [module.step_size, module.output.bias]
    else:
        parameters = [*module.attention.projection.parameters(), *module.mlp.fc2.parameters()]
    with _restored(parameters):
        for parameter in parameters:
            parameter.detach().zero_()
        yield


@contextmanager
def step_size_scaled(
    model: DepictForSemanticSegmentation, factor: float, layer: int | None = None, cross: bool = False
) -> Iterator[None]:
    """Multiply learned step sizes by a factor; in "cbsa" those of tokens and of representatives.

    Args:
        layer: Number of the only layer meant; by default all, cross-attention layers included.
        cross: Whether that layer is a cross-attention layer of "ca".

    Raises:
        ValueError: If the decoder is a black box, there is no such layer, or the factor is not finite.
    """
    if not math.isfinite(factor):
        raise ValueError(f"Got factor={factor}, needed a finite number.")
    with _steps_changed(model, layer, cross, lambda step: step * factor):
        yield


@contextmanager
def step_size_removed(
    model: DepictForSemanticSegmentation, layer: int | None = None, cross: bool = False
) -> Iterator[None]:
    """Put 1 in the place of learned step sizes, as if the decoder had none: their signs are lost too.

    Arguments and errors are those of `step_size_scaled`.
    """
    with _steps_changed(model, layer, cross, torch.ones_like):
        yield


@contextmanager
def _steps_changed(
    model: DepictForSemanticSegmentation, layer: int | None, cross: bool, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    layers = _subspace_layers(model, "step sizes")
    if layer is not None:
        _layer(model, layer, cross)  # refuses what does not exist
        layers = [subspace_layers(model, "step sizes", cross)[layer]]
    parameters: list[Tensor] = [layer.step_size for layer in layers]
    parameters += [layer.representative_step_size for layer in layers if isinstance(layer, ContractBroadcastAttention)]
    with _restored(parameters):
        for parameter in parameters:
            parameter.detach().copy_(change(parameter.detach()))
        yield


@contextmanager
def _restored(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Give the parameters, on exit, the values that they had on entry, bit for bit."""
    saved = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        for parameter, values in zip(parameters, saved, strict=True):
            parameter.detach().copy_(values)


def _subspace_layers(model: DepictForSemanticSegmentation, notion: str) -> list[SubspaceLayer]:
    """Return all layers of a white-box decoder, cross-attention layers included."""
    layers = subspace_layers(model, notion)
    return layers + subspace_layers(model, notion, cross=True) if model.config.decoder_type == "ca" else layers


def _layer(model: DepictForSemanticSegmentation, layer: int, cross: bool) -> DecoderLayer:
    layers = decoder_layers(model, cross)
    check_index("layer", layer, len(layers), f"{model.config.decoder_type!r} decoder's list of layers")
    return layers[layer]


def _matrix(layer: SubspaceLayer) -> Tensor:
    """Return the parameter that holds P."""
    return layer.projection.weight if isinstance(layer, ContractBroadcastAttention) else layer.projection


def _matrices(layers: Sequence[SubspaceLayer]) -> list[Tensor]:
    outputs = [layer.output.weight for layer in layers if isinstance(layer, ContractBroadcastAttention)]
    return [_matrix(layer) for layer in layers] + outputs


def _rotate(layer: SubspaceLayer, blocks: int, generator: torch.Generator | None) -> None:
    """Turn each of `blocks` equal parts of the rows of P; where the output has a matrix of its own, turn it back."""
    projection = _matrix(layer)
    turns = _random_orthogonal(blocks, projection.shape[0] // blocks, generator)
    rows = exact(projection.detach()).unflatten(0, (blocks, -1))
    turns = turns.to(rows.device)
    _set(projection, (turns @ rows).flatten(0, 1))
    if isinstance(layer, ContractBroadcastAttention):
        columns = exact(layer.output.weight.detach()).unflatten(1, (blocks, -1)).transpose(0, 1)
        _set(layer.output.weight, (columns @ turns.transpose(1, 2)).transpose(0, 1).flatten(1))


def _random_orthogonal(count: int, size: int, generator: torch.Generator | None) -> Tensor:
    """Draw uniformly distributed orthogonal matrices, `(count, size, size)`, float64, on the CPU."""
    q, r = torch.linalg.qr(torch.randn(count, size, size, generator=generator, dtype=torch.float64))
    # Signs make the distribution uniform; Q of a QR decomposition alone is not.
    return q * r.diagonal(dim1=1, dim2=2).sign()[:, None]


def _set(parameter: Tensor, values: Tensor) -> None:
    parameter.detach().copy_(values)
