"""The native encoder: the plain pre-norm vision transformer of the published code."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_depict import DepictConfig

# Attention weights that `attend_by_heads` forms at a time.
WEIGHTS_TOGETHER = 2**22


@dataclass
class LayerRecord:
    """What a stack of layers leaves behind for a caller who asked for it.

    Attributes:
        keep_hidden_states: Whether to keep tokens before the first and after every layer.
        keep_attentions: Whether to keep attention weights; the layers then run eagerly, since the fused kernels do
            not compute them.
        hidden_states: `(batch, tokens, hidden)` each.
        attentions: `(batch, heads, queries, keys)` each.
        cross: A record of its own for a decoder's cross-attention layers, if the caller wants one.
    """

    keep_hidden_states: bool = False
    keep_attentions: bool = False
    hidden_states: list[Tensor] = field(default_factory=list)
    attentions: list[Tensor] = field(default_factory=list)
    cross: "LayerRecord | None" = None

    def add(self, hidden_states: Tensor, attentions: Tensor | None = None) -> None:
        if self.keep_hidden_states:
            self.hidden_states.append(hidden_states)
        if self.keep_attentions and attentions is not None:
            self.attentions.append(attentions)


class AttentionModule(Protocol):
    """A module whose heads `attend` computes.

    Attributes:
        config: Names the implementation of attention.
        training: Whether dropout applies.
        is_causal: False, which implementations of transformers look at.
    """

    config: DepictConfig
    training: bool
    is_causal: bool


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Compute attention written out, for callers who need the weights; signature of `ALL_ATTENTION_FUNCTIONS`.

    Returns:
        Context `(batch, queries, heads, head_dim)` and weights `(batch, heads, queries, keys)`.
    """
    weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def attend(
    module: AttentionModule, query: Tensor, key: Tensor, value: Tensor, dropout: float, output_attentions: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute multi-head attention by the implementation that the module's configuration names.

    Args:
        module: The layer that the heads belong to.
        query: `(batch, heads, queries, head_dim)`.
        key: `(batch, heads, keys, head_dim)`.
        value: `(batch, heads, keys, head_dim)`.
        dropout: Probability, applied in training only.
        output_attentions: Whether the weights are needed, which only eager attention computes.

    Returns:
        Context `(batch, queries, heads * head_dim)`, and weights `(batch, heads, queries, keys)` or None.
    """
    implementation = "eager" if output_attentions else module.config._attn_implementation
    if implementation == "sdpa" and _is_slow_in_sdpa(query, dropout if module.training else 0.0):
        return attend_by_heads(query, key, value).flatten(2), None
    function: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    context, weights = function(
        module, query, key, value, None, dropout=dropout if module.training else 0.0, scaling=query.shape[-1] ** -0.5
    )
    return context.flatten(2), weights if output_attentions else None


def attend_by_heads(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention for a few heads at a time, so that their weights are still in the cache when they are used.

    Args:
        query: `(batch, heads, queries, head_dim)`.
        key: `(batch, heads, keys, head_dim)`.
        value: `(batch, heads, keys, head_dim)`.

    Returns:
        Context `(batch, queries, heads, head_dim)`.
    """
    batch_size, num_heads = query.shape[:2]
    num_together = max(1, WEIGHTS_TOGETHER // (query.shape[2] * key.shape[2]))
    query, key, value = (tokens.flatten(0, 1) for tokens in (query * query.shape[-1] ** -0.5, key, value))
    # Mixed precision would compute the softmax in float32, in memory of its own.
    with torch.autocast(query.device.type, enabled=False):
        context = [
            torch.bmm(torch.bmm(some, keys.transpose(1, 2)).softmax(dim=-1), values)
            for some, keys, values in zip(*(tokens.split(num_together) for tokens in (query, key, value)), strict=True)
        ]
    return torch.cat(context).unflatten(0, (batch_size, num_heads)).transpose(1, 2)


def _is_slow_in_sdpa(query: Tensor, dropout: float) -> bool:
    """Whether matrix products are faster than PyTorch's fused kernel: in bfloat16 on CPUs, where no gradient is asked.

    There the fused kernel is about as slow as in float32, while matrix products gain.
    """
    return (
        query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and dropout == 0
        and not (torch.is_grad_enabled() and query.requires_grad)
        and not torch.compiler.is_compiling()
    )


class ViTAttention(nn.Module):
    """Ordinary multi-head self-attention, `(batch, tokens, hidden)` to the same."""

    is_causal = False

    def __init__(
        self,
        config: DepictConfig,
        hidden_size: int,
        num_heads: int,
        qkv_bias: bool,
        dropout: float,
        attention_dropout: float,
    ):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.projection = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        context, weights = attend(self, query, key, value, self.attention_dropout, output_attentions)
        return self.dropout(self.projection(context)), weights


class ViTMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation = ACT2FN[hidden_act]
        self.fc2 = nn.Linear(intermediate_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.dropout(self.activation(self.fc1(hidden_states)))
        return self.dropout(self.fc2(hidden_states))


class ViTLayer(GradientCheckpointingLayer):
    """One pre-norm transformer block: attention, then MLP, each with a residual connection and stochastic depth."""

    def __init__(
        self,
        config: DepictConfig,
        *,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        hidden_act: str = "gelu",
        qkv_bias: bool = True,
        layer_norm_eps: float = 1e-5,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.attention = ViTAttention(config, hidden_size, num_heads, qkv_bias, dropout, attention_dropout)
        self.norm2 = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.mlp = ViTMLP(hidden_size, intermediate_size, hidden_act, dropout)
        self.drop_path = StochasticDepth(drop_path_rate, mode="row")

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        attention_output, weights = self.attention(self.norm1(hidden_states), output_attentions)
        hidden_states = hidden_states + self.drop_path(attention_output)
        return hidden_states + self.drop_path(self.mlp(self.norm2(hidden_states))), weights


def drop_path_rates(last: float, num_layers: int) -> list[float]:
    """Return the stochastic depth per layer, growing linearly from 0 to `last`."""
    return [last * index / max(num_layers - 1, 1) for index in range(num_layers)]


def resize_positions(positions: Tensor, grid_size: tuple[int, int], new_grid_size: tuple[int, int]) -> Tensor:
    """Resize the grid in position embeddings bilinearly; the prefix tokens' embeddings stay as they are.

    Args:
        positions: `(1, prefix + grid_height * grid_width, hidden)`, row-major.
        grid_size: `(grid_height, grid_width)` of `positions`.
        new_grid_size: The one wanted.

    Source:
        `resize_pos_embed`, segm/model/utils.py in rstrudel/segmenter@20d1bfa. There a grid of another shape but the
        same number of patches is not resized; here it is.
    """
    # Grids that `torch.export` leaves free are not compared: the program would refuse the one that is equal.
    free = any(isinstance(side, torch.SymInt) for side in new_grid_size)
    if not free and tuple(grid_size) == tuple(new_grid_size):
        return positions
    num_patches = grid_size[0] * grid_size[1]
    prefix, grid = positions.split([positions.shape[1] - num_patches, num_patches], dim=1)
    grid = grid.transpose(1, 2).unflatten(2, grid_size)
    grid = F.interpolate(grid, size=new_grid_size, mode="bilinear", align_corners=False)
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2)], dim=1)


class ViTEmbeddings(nn.Module):
    """Image to tokens: patches by convolution, prefix tokens in front, learned position embeddings added."""

    def __init__(self, config: DepictConfig):
        super().__init__()
        grid_height, grid_width = config.grid_size
        self.grid_size = config.grid_size
        self.num_prefix_tokens = 2 if config.use_distillation_token else 1
        num_positions = self.num_prefix_tokens + grid_height * grid_width
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.distillation_token = (
            nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.use_distillation_token else None
        )
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        patches = self.projection(pixel_values)
        grid_size = (patches.shape[-2], patches.shape[-1])
        prefix = [self.cls_token] if self.distillation_token is None else [self.cls_token, self.distillation_token]
        tokens = [token.expand(patches.shape[0], -1, -1) for token in prefix]
        hidden_states = torch.cat([*tokens, patches.flatten(2).transpose(1, 2)], dim=1)
        positions = resize_positions(self.position_embeddings, self.grid_size, grid_size)
        return self.dropout(hidden_states + positions), grid_size


class ViTEncoder(nn.Module):
    """Image to patch tokens.

    Source:
        segm/model/vit.py and segm/model/blocks.py in rstrudel/segmenter@20d1bfa, which DEPICT's code runs on.
    """

    def __init__(self, config: DepictConfig):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.embeddings = ViTEmbeddings(config)
        self.layers = nn.ModuleList(
            ViTLayer(
                config,
                hidden_size=config.hidden_size,
                num_heads=config.num_attention_heads,
                intermediate_size=config.intermediate_size,
                hidden_act=config.hidden_act,
                qkv_bias=config.qkv_bias,
                layer_norm_eps=config.layer_norm_eps,
                dropout=config.hidden_dropout_prob,
                attention_dropout=config.attention_probs_dropout_prob,
                drop_path_rate=rate,
            )
            for rate in drop_path_rates(config.drop_path_rate, config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.projection

    def forward(self, pixel_values: Tensor, record: LayerRecord) -> tuple[Tensor, tuple[int, int]]:
        """Encode images whose sides are multiples of the patch.

        Args:
            pixel_values: `(batch, channels, height, width)`, normalised.
            record: Receives embeddings and every layer's tokens, prefix tokens included, before the last LayerNorm.

        Returns:
            Patch tokens `(batch, grid_height * grid_width, hidden)`, row-major, prefix tokens removed, and
            `(grid_height, grid_width)`.
        """
        hidden_states, grid_size = self.embeddings(pixel_values)
        record.add(hidden_states)
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, record.keep_attentions)
            record.add(hidden_states, weights)
        return self.norm(hidden_states)[:, self.embeddings.num_prefix_tokens :], grid_size
