"""A decoder layer's update taken apart: attention weights, what each head adds, and the rest.

Each class takes one kind of layer and its recorded input, computes in float64, and offers

    weights(rows)    attention weights, `(batch, heads, rows, tokens)`
    transport(rows)  what mixes the values, of the same shape; the weights, except in "cbsa"
    context(head, rows)  `(batch, rows, head_dim)`: the head's mixed values
    values, output   `(batch, heads, tokens, head_dim)` and `(heads, head_dim, width)`: head h adds
                     transport_h values_h output_h to the tokens, the step size included
    rest(rows)       by name what the layer adds beside its heads

Rows are indices of the tokens that are updated, or None for all.
"""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..decoders import (
    ContractBroadcastAttention,
    CrossAttentionDecoder,
    LayeredDecoder,
    MaskTransformerDecoder,
    SubspaceAttention,
    pool_adaptively,
)
from ..modeling_depict import DepictForSemanticSegmentation
from ..vit import ViTLayer
from .recording import Recording

SubspaceLayer = SubspaceAttention | ContractBroadcastAttention
DecoderLayer = SubspaceLayer | ViTLayer

SUBSPACE_DECODERS = ("sa", "ca", "cbsa")
LAYERED_DECODERS = (*SUBSPACE_DECODERS, "mask_transformer")


def exact(tensor: Tensor) -> Tensor:
    """Return the tensor in float64; on the CPU where its device (Apple's) does not know that."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device).double()


def require(decoder_type: str, having: tuple[str, ...], notion: str) -> None:
    """Raise ValueError unless the decoder is one of those that have the notion."""
    if decoder_type not in having:
        names = ", ".join(repr(name) for name in having)
        raise ValueError(f"A decoder of type {decoder_type!r} has no {notion}; they exist in {names}.")


def check_index(name: str, index: int, count: int, of: str) -> None:
    """Raise ValueError unless 0 <= index < count."""
    if not 0 <= index < count:
        raise ValueError(f"Got {name}={index}, but the {of} has {count}; choose 0 to {count - 1}.")


def layered_decoder(model: DepictForSemanticSegmentation) -> LayeredDecoder:
    """Return the decoder, which has layers.

    Raises:
        ValueError: If it has none.
    """
    require(model.config.decoder_type, LAYERED_DECODERS, "layers")
    return cast(LayeredDecoder, model.decoder)


def decoder_layers(model: DepictForSemanticSegmentation, cross: bool = False) -> list[DecoderLayer]:
    """Return the decoder's layers, or its cross-attention layers.

    Raises:
        ValueError: If it has none.
    """
    if cross:
        require(model.config.decoder_type, ("ca",), "cross-attention layers")
        layers = cast(CrossAttentionDecoder, model.decoder).cross_layers
    else:
        layers = layered_decoder(model).layers
    return list(cast(Iterable[DecoderLayer], layers))


def subspace_layers(model: DepictForSemanticSegmentation, notion: str, cross: bool = False) -> list[SubspaceLayer]:
    """Return the layers of a white-box decoder, or its cross-attention layers.

    Raises:
        ValueError: If the decoder is a black box, which has no `notion`, or has no such layers.
    """
    require(model.config.decoder_type, SUBSPACE_DECODERS, notion)
    return cast(list[SubspaceLayer], decoder_layers(model, cross))


def projections(model: DepictForSemanticSegmentation, cross: bool = False) -> list[Tensor]:
    """Return P of every layer, `(heads, head_dim, hidden)` each, float64.

    Args:
        cross: Whether the cross-attention layers of "ca" are meant instead.

    Raises:
        ValueError: If the decoder is a black box, whose heads have no single projection.
    """
    # Copies: in float64 they would else change with the weights.
    return [head_projections(layer).clone() for layer in subspace_layers(model, "subspaces", cross)]


@torch.no_grad()
def head_projections(layer: SubspaceLayer) -> Tensor:
    """Return P of one layer, `(heads, head_dim, hidden)`, float64."""
    projection = layer.projection
    matrix = projection.weight if isinstance(projection, nn.Linear) else projection
    return exact(matrix.detach()).unflatten(0, (layer.num_heads, -1))


def step_sizes(model: DepictForSemanticSegmentation, cross: bool = False) -> Tensor:
    """Return s of every layer, `(layers, heads)`, float64; equal over the heads of "sa" and "ca", which share one.

    Raises:
        ValueError: If the decoder is a black box.
    """
    layers = subspace_layers(model, "step sizes", cross)
    return torch.stack([exact(layer.step_size.detach()).flatten().expand(layer.num_heads) for layer in layers])


def layer_norm(tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Apply the LayerNorm in float64."""
    return F.layer_norm(exact(tokens), norm.normalized_shape, exact(norm.weight), exact(norm.bias), norm.eps)


def _rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """Cut the tokens' axis, the last but one, down to rows."""
    return tensor if rows is None else tensor.index_select(-2, rows.to(tensor.device))


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    return (queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5).softmax(dim=-1)


class SubspaceStep:
    """A layer of `SubspaceAttention`, self or cross."""

    def __init__(self, layer: SubspaceAttention, tokens: Tensor, queries: Tensor | None = None):
        projection = head_projections(layer)
        self.values = layer_norm(tokens, layer.norm)[:, None] @ projection.transpose(-1, -2)
        self.queries = self.values if queries is None else exact(queries)[:, None] @ projection.transpose(-1, -2)
        self.output = exact(layer.step_size) * projection

    def weights(self, rows: Tensor | None = None) -> Tensor:
        return _scores(_rows(self.queries, rows), self.values)

    transport = weights

    def context(self, head: int, rows: Tensor | None = None) -> Tensor:
        return _scores(_rows(self.queries[:, head], rows), self.values[:, head]) @ self.values[:, head]

    def rest(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        return {}


class BroadcastStep:
    """A layer of `ContractBroadcastAttention`.

    With w the projected tokens, r0 the averages that representatives start from (r0 = M w), r = r0 + s_r A w, and
    S = softmax(r r^T / sqrt(head_dim)), head h adds s_x A^T S r = s_x A^T S (M + s_r A) w.
    """

    def __init__(self, layer: ContractBroadcastAttention, tokens: Tensor, grid_size: tuple[int, int]):
        self.grid_size, self.size = grid_size, layer.REPRESENTATIVES
        self.values = layer_norm(tokens, layer.norm)[:, None] @ head_projections(layer).transpose(-1, -2)
        patches = self.values[..., : grid_size[0] * grid_size[1], :]
        averages = pool_adaptively(patches.transpose(-1, -2).flatten(0, 1).unflatten(-1, grid_size), self.size)
        averages = averages.flatten(-2).transpose(-1, -2).unflatten(0, patches.shape[:2])
        self.contraction = _scores(averages, self.values)
        self.representative_step_size = exact(layer.representative_step_size)
        self.representatives = averages + self.representative_step_size * (self.contraction @ self.values)
        self.similarities = _scores(self.representatives, self.representatives)
        output = exact(layer.output.weight).unflatten(1, (layer.num_heads, -1)).permute(1, 2, 0)
        self.output = exact(layer.step_size) * output
        self.bias = exact(layer.output.bias)

    def weights(self, rows: Tensor | None = None) -> Tensor:
        """Return the effective map A^T S A; its rows do not sum to 1 but to their tokens' columns of A."""
        return self._broadcast(rows) @ self.contraction

    def transport(self, rows: Tensor | None = None) -> Tensor:
        """Return A^T S (M + s_r A), the map that the layer applies to the projected tokens."""
        num_tokens, num_patches = self.values.shape[2], self.grid_size[0] * self.grid_size[1]
        identity = torch.eye(num_patches, dtype=torch.float64, device=self.values.device)
        averaging = pool_adaptively(identity.unflatten(1, self.grid_size)[None], self.size)[0].flatten(1).T
        averaging = F.pad(averaging, (0, num_tokens - num_patches))
        return self._broadcast(rows) @ (averaging + self.representative_step_size * self.contraction)

    def context(self, head: int, rows: Tensor | None = None) -> Tensor:
        return self._broadcast(rows)[:, head] @ self.representatives[:, head]

    def rest(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        return {"output_bias": self.bias}

    def _broadcast(self, rows: Tensor | None) -> Tensor:
        return _rows(self.contraction.transpose(-1, -2), rows) @ self.similarities


class OrdinaryStep:
    """A layer of `ViTLayer`: attention, then an MLP that is not split further."""

    def __init__(self, layer: ViTLayer, tokens: Tensor):
        attention = layer.attention
        self.layer, self.tokens = layer, exact(tokens)
        bias = None if attention.qkv.bias is None else exact(attention.qkv.bias)
        qkv = F.linear(layer_norm(tokens, layer.norm1), exact(attention.qkv.weight), bias)
        qkv = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        self.queries, self.keys, self.values = qkv.unbind(0)
        self.output = exact(attention.projection.weight).unflatten(1, (attention.num_heads, -1)).permute(1, 2, 0)
        self.bias = exact(attention.projection.bias)

    def weights(self, rows: Tensor | None = None) -> Tensor:
        return _scores(_rows(self.queries, rows), self.keys)

    transport = weights

    def context(self, head: int, rows: Tensor | None = None) -> Tensor:
        return _scores(_rows(self.queries[:, head], rows), self.keys[:, head]) @ self.values[:, head]

    def rest(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        attended = _rows(self.tokens, rows) + self.bias
        for head, output in enumerate(self.output):
            attended = attended + self.context(head, rows) @ output
        mlp = self.layer.mlp
        hidden = F.linear(layer_norm(attended, self.layer.norm2), exact(mlp.fc1.weight), exact(mlp.fc1.bias))
        hidden = F.linear(mlp.activation(hidden), exact(mlp.fc2.weight), exact(mlp.fc2.bias))
        return {"attention_bias": self.bias, "mlp": hidden}


def step_at(
    model: DepictForSemanticSegmentation, recording: Recording, layer: int, cross: bool = False
) -> SubspaceStep | BroadcastStep | OrdinaryStep:
    """Take one decoder layer apart, with its recorded input.

    Raises:
        ValueError: If the decoder has no such layer, or is not of the record's type.
    """
    check_recording(model, recording)
    layers = decoder_layers(model, cross)
    check_index("layer", layer, len(layers), f"{recording.decoder_type!r} decoder's list of layers")
    module = layers[layer]
    if isinstance(module, ViTLayer):
        return OrdinaryStep(module, recording.decoder_tokens[layer])
    if isinstance(module, ContractBroadcastAttention):
        return BroadcastStep(module, recording.decoder_tokens[layer], recording.grid_size)
    if cross:
        patches = layer_norm(recording.decoder_tokens[-1], layered_decoder(model).norm)
        return SubspaceStep(module, patches, recording.cross_tokens[layer])
    return SubspaceStep(module, recording.decoder_tokens[layer])


def steps(
    model: DepictForSemanticSegmentation, recording: Recording, cross: bool = False
) -> Iterator[SubspaceStep | BroadcastStep | OrdinaryStep]:
    """Take every decoder layer apart, one at a time, with its recorded input."""
    for layer in range(len(decoder_layers(model, cross))):
        yield step_at(model, recording, layer, cross)


@torch.no_grad()
def read_out(model: DepictForSemanticSegmentation, recording: Recording) -> tuple[Tensor, Tensor]:
    """Return the vectors whose cosines score patches against classes: tokens after the last LayerNorm and projection.

    Returns:
        Patch vectors `(batch, patches, width)` and class vectors `(batch, num_labels, width)`, float64.

    Raises:
        ValueError: If the decoder compares no vectors.
    """
    check_recording(model, recording)
    require(recording.decoder_type, LAYERED_DECODERS, "class tokens")
    decoder = layered_decoder(model)
    patches = layer_norm(recording.patch_tokens[-1], decoder.norm)
    classes = layer_norm(recording.class_tokens[-1], class_norm(model))
    if isinstance(decoder, MaskTransformerDecoder):
        patches, classes = patches @ exact(decoder.patch_projection), classes @ exact(decoder.class_projection)
    return patches, classes


def class_norm(model: DepictForSemanticSegmentation) -> nn.LayerNorm:
    """Return the last LayerNorm of the class tokens."""
    decoder = layered_decoder(model)
    return decoder.class_norm if isinstance(decoder, CrossAttentionDecoder) else decoder.norm


def check_recording(model: DepictForSemanticSegmentation, recording: Recording) -> None:
    """Raise ValueError if the record is of another kind of model."""
    found = (recording.decoder_type, recording.num_labels, recording.encoder_output.shape[-1])
    needed = (model.config.decoder_type, model.config.num_labels, model.encoder.hidden_size)
    if found != needed:
        raise ValueError(
            f"Got a record of decoder type, labels and width {found}, but the model has {needed}; make the record with "
            "the model that is passed beside it."
        )
