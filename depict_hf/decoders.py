"""The decoders: patch tokens to class scores on the patch grid.

`decoder(patches, (grid_height, grid_width)) -> logits`, with patches `(batch, grid_height * grid_width, hidden)`,
row-major, and logits `(batch, num_labels, grid_height, grid_width)`. "sa" and "ca" are DEPICT's white-box decoders (Wen
and Li, NeurIPS 2024) and "cbsa" their linear-time follow-up (Wen et al., NeurIPS 2025); "mask_transformer" and "linear"
are Segmenter's (Strudel et al., ICCV 2021), the black-box counterpart.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_depict import DepictConfig
from .vit import LayerRecord, ViTLayer, attend, drop_path_rates


class SubspaceAttention(GradientCheckpointingLayer):
    """One layer of multi-head subspace attention, self (MSSA) or cross (MSCA), with its LayerNorm and residual.

    One matrix P, `(heads * head_dim, hidden)`, serves as query, key, value and output; s is a learned scalar. With
    w = P LN(x) split into heads:

        self:   x <- x + s P^T softmax(w w^T / sqrt(head_dim)) w
        cross:  q <- q + s P^T softmax((P q) w^T / sqrt(head_dim)) w        (q is not normalised)

    Each head projects onto one low-dimensional subspace; a step moves the tokens along the gradient that lowers the
    coding rate of their projections.

    Source:
        Wen and Li 2024; `PreNorm` and `Attention`, model/dec_blocks.py in
        QishuaiWen/DEPICT@6c66e2b.
    """

    is_causal = False

    def __init__(self, config: DepictConfig, hidden_size: int, head_dim: int):
        super().__init__()
        self.config = config
        self.num_heads = config.decoder_num_heads
        self.norm = nn.LayerNorm(hidden_size)
        self.projection = nn.Parameter(torch.zeros(self.num_heads * head_dim, hidden_size))
        self.step_size = nn.Parameter(torch.zeros(1))

    def forward(
        self, hidden_states: Tensor, queries: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Take one step.

        Args:
            hidden_states: x, `(batch, tokens, hidden)`.
            queries: q, `(batch, queries, hidden)`, or None for self-attention.
            output_attentions: Whether to return the attention weights.

        Returns:
            The refined queries (the refined tokens, in self-attention), and weights `(batch, heads, queries, tokens)`
            or None.
        """
        keys = self._project(self.norm(hidden_states))
        refined = hidden_states if queries is None else queries
        projected = keys if queries is None else self._project(queries)
        context, weights = attend(self, projected, keys, keys, self.config.decoder_dropout, output_attentions)
        return refined + self.step_size * (context @ self.projection), weights

    def _project(self, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self.projection).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class SelfAttentionDecoder(nn.Module):
    """DEPICT-SA: class tokens join the patch tokens, and layers of MSSA refine both.

    Source:
        Wen and Li 2024; `MaskTransformer` with mode "sa", model/decoder.py in QishuaiWen/DEPICT@6c66e2b.
    """

    def __init__(self, config: DepictConfig, hidden_size: int):
        super().__init__()
        self.num_labels = config.num_labels
        self.class_tokens = nn.Parameter(torch.zeros(1, config.num_labels, hidden_size))
        self.layers = nn.ModuleList(
            SubspaceAttention(config, hidden_size, config.decoder_head_dim) for _ in range(config.decoder_num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.mask_norm = nn.LayerNorm(config.num_labels)

    def forward(self, patches: Tensor, grid_size: tuple[int, int], record: LayerRecord | None = None) -> Tensor:
        record = record or LayerRecord()
        hidden_states = torch.cat([patches, self.class_tokens.expand(patches.shape[0], -1, -1)], dim=1)
        record.add(hidden_states)
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, None, record.keep_attentions)
            record.add(hidden_states, weights)
        hidden_states = self.norm(hidden_states)
        num_patches = hidden_states.shape[1] - self.num_labels
        patches, classes = hidden_states.split([num_patches, self.num_labels], dim=1)
        return class_logits(patches, classes, self.mask_norm, grid_size)


class CrossAttentionDecoder(nn.Module):
    """DEPICT-CA: layers of MSSA refine the patch tokens; then class queries read them by cross-attention.

    Source:
        Wen and Li 2024; `MaskTransformer` with mode "ca", model/decoder.py in QishuaiWen/DEPICT@6c66e2b.
    """

    def __init__(self, config: DepictConfig, hidden_size: int):
        super().__init__()
        self.class_tokens = nn.Parameter(torch.zeros(1, config.num_labels, hidden_size))
        self.layers = nn.ModuleList(
            SubspaceAttention(config, hidden_size, config.decoder_head_dim) for _ in range(config.decoder_num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.cross_layers = nn.ModuleList(
            SubspaceAttention(config, hidden_size, config.decoder_cross_head_dim)
            for _ in range(config.decoder_cross_num_layers)
        )
        self.class_norm = nn.LayerNorm(hidden_size)
        self.mask_norm = nn.LayerNorm(config.num_labels)

    def forward(self, patches: Tensor, grid_size: tuple[int, int], record: LayerRecord | None = None) -> Tensor:
        record = record or LayerRecord()
        cross_record = record.cross or LayerRecord()
        record.add(patches)
        for layer in self.layers:
            patches, weights = layer(patches, None, record.keep_attentions)
            record.add(patches, weights)
        patches = self.norm(patches)

        classes = self.class_tokens.expand(patches.shape[0], -1, -1)
        cross_record.add(classes)
        for layer in self.cross_layers:
            classes, weights = layer(patches, classes, cross_record.keep_attentions)
            cross_record.add(classes, weights)
        return class_logits(patches, self.class_norm(classes), self.mask_norm, grid_size)


class ContractBroadcastAttention(GradientCheckpointingLayer):
    """One layer of contract-and-broadcast self-attention (CBSA), with its LayerNorm and residual.

    A few representatives r, averages of the projected patches over a coarse grid, are contracted in place of all
    tokens; the step is then broadcast back. With w = W LN(x) split into heads and A = softmax(r w^T / sqrt(head_dim)):

        r <- r + s_r A w
        x <- x + W_out (s_x A^T softmax(r r^T / sqrt(head_dim)) r)

    Its cost grows linearly with the number of tokens.

    Source:
        Wen et al. 2025; `Attention`, CBSA_semantic_segmentation/segm/model/dec_blocks.py in QishuaiWen/CBSA@042c7f9.
        There 150 classes and a square grid are built in; here both are free.
    """

    REPRESENTATIVES = (10, 10)

    def __init__(self, config: DepictConfig, hidden_size: int):
        super().__init__()
        self.num_heads = config.decoder_num_heads
        inner_size = self.num_heads * config.decoder_head_dim
        self.norm = nn.LayerNorm(hidden_size)
        self.projection = nn.Linear(hidden_size, inner_size, bias=False)
        self.output = nn.Linear(inner_size, hidden_size)
        self.step_size = nn.Parameter(torch.zeros(self.num_heads, 1, 1))
        self.representative_step_size = nn.Parameter(torch.zeros(self.num_heads, 1, 1))

    def forward(
        self, hidden_states: Tensor, grid_size: tuple[int, int], output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Take one step.

        Args:
            hidden_states: x, `(batch, patches + classes, hidden)`, the patches first, row-major.
            grid_size: `(grid_height, grid_width)` of the patches; the class tokens are not averaged.
            output_attentions: Whether to return A.

        Returns:
            The refined tokens, and A `(batch, heads, representatives, tokens)` or None.
        """
        projected = self.projection(self.norm(hidden_states))
        patches = projected[:, : grid_size[0] * grid_size[1]].transpose(1, 2).unflatten(2, grid_size)
        representatives = pool_adaptively(patches, self.REPRESENTATIVES).flatten(2).transpose(1, 2)
        tokens, representatives = self._split_heads(projected), self._split_heads(representatives)

        contraction = self._weights(representatives, tokens)
        representatives = representatives + self.representative_step_size * (contraction @ tokens)
        update = self._weights(representatives, representatives) @ representatives
        update = self.step_size * (contraction.transpose(-1, -2) @ update)
        refined = hidden_states + self.output(update.transpose(1, 2).flatten(2))
        return refined, contraction if output_attentions else None

    def _split_heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    @staticmethod
    def _weights(queries: Tensor, keys: Tensor) -> Tensor:
        return (queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5).softmax(dim=-1)


class ContractBroadcastDecoder(nn.Module):
    """The linear-time follow-up of DEPICT-SA: class tokens join the patch tokens in layers of CBSA.

    Source:
        Wen et al., NeurIPS 2025; `MaskTransformer`, CBSA_semantic_segmentation/segm/model/decoder.py in
        QishuaiWen/CBSA@042c7f9.
    """

    def __init__(self, config: DepictConfig, hidden_size: int):
        super().__init__()
        self.class_tokens = nn.Parameter(torch.zeros(1, config.num_labels, hidden_size))
        self.layers = nn.ModuleList(
            ContractBroadcastAttention(config, hidden_size) for _ in range(config.decoder_num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.mask_norm = nn.LayerNorm(config.num_labels)

    def forward(self, patches: Tensor, grid_size: tuple[int, int], record: LayerRecord | None = None) -> Tensor:
        record = record or LayerRecord()
        check_grid(patches, grid_size)
        hidden_states = torch.cat([patches, self.class_tokens.expand(patches.shape[0], -1, -1)], dim=1)
        record.add(hidden_states)
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, grid_size, record.keep_attentions)
            record.add(hidden_states, weights)
        patches, classes = self.norm(hidden_states).split([patches.shape[1], self.class_tokens.shape[1]], dim=1)
        return class_logits(patches, classes, self.mask_norm, grid_size)


class MaskTransformerDecoder(nn.Module):
    """Segmenter's mask transformer: class tokens join the patch tokens in ordinary transformer blocks.

    Source:
        `MaskTransformer`, segm/model/decoder.py in rstrudel/segmenter@20d1bfa.
    """

    def __init__(self, config: DepictConfig, hidden_size: int):
        super().__init__()
        width = config.decoder_hidden_size or hidden_size
        if width % config.decoder_num_heads:
            raise ValueError(
                f"The decoder's width {width} is not divisible by decoder_num_heads={config.decoder_num_heads}; change "
                "decoder_num_heads or decoder_hidden_size."
            )
        self.num_labels = config.num_labels
        self.input_projection = nn.Linear(hidden_size, width)
        self.class_tokens = nn.Parameter(torch.zeros(1, config.num_labels, width))
        self.layers = nn.ModuleList(
            ViTLayer(
                config,
                hidden_size=width,
                num_heads=config.decoder_num_heads,
                intermediate_size=config.decoder_intermediate_size or 4 * width,
                dropout=config.decoder_dropout,
                attention_dropout=config.decoder_dropout,
                drop_path_rate=rate,
            )
            for rate in drop_path_rates(config.decoder_drop_path_rate, config.decoder_num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.patch_projection = nn.Parameter(torch.zeros(width, width))
        self.class_projection = nn.Parameter(torch.zeros(width, width))
        self.mask_norm = nn.LayerNorm(config.num_labels)

    def forward(self, patches: Tensor, grid_size: tuple[int, int], record: LayerRecord | None = None) -> Tensor:
        record = record or LayerRecord()
        tokens = self.class_tokens.expand(patches.shape[0], -1, -1)
        hidden_states = torch.cat([self.input_projection(patches), tokens], dim=1)
        record.add(hidden_states)
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, record.keep_attentions)
            record.add(hidden_states, weights)
        hidden_states = self.norm(hidden_states)
        num_patches = hidden_states.shape[1] - self.num_labels
        patches, classes = hidden_states.split([num_patches, self.num_labels], dim=1)
        patches, classes = patches @ self.patch_projection, classes @ self.class_projection
        return class_logits(patches, classes, self.mask_norm, grid_size)


class LinearDecoder(nn.Module):
    """Segmenter's linear decoder: one linear layer on every patch.

    Source:
        `DecoderLinear`, segm/model/decoder.py in rstrudel/segmenter@20d1bfa.
    """

    def __init__(self, config: DepictConfig, hidden_size: int):
        super().__init__()
        self.classifier = nn.Linear(hidden_size, config.num_labels)

    def forward(self, patches: Tensor, grid_size: tuple[int, int], record: LayerRecord | None = None) -> Tensor:
        return to_grid(self.classifier(patches), grid_size)


LayeredDecoder = SelfAttentionDecoder | CrossAttentionDecoder | ContractBroadcastDecoder | MaskTransformerDecoder
Decoder = LayeredDecoder | LinearDecoder

DECODERS: dict[str, type[Decoder]] = {
    "sa": SelfAttentionDecoder,
    "ca": CrossAttentionDecoder,
    "cbsa": ContractBroadcastDecoder,
    "mask_transformer": MaskTransformerDecoder,
    "linear": LinearDecoder,
}


def class_logits(patches: Tensor, classes: Tensor, mask_norm: nn.LayerNorm, grid_size: tuple[int, int]) -> Tensor:
    """Score every patch against every class by cosine similarity, normalised over the classes.

    Args:
        patches: `(batch, grid_height * grid_width, hidden)`, row-major.
        classes: `(batch, num_labels, hidden)`, one token per label.
        mask_norm: LayerNorm over the class axis.
        grid_size: `(grid_height, grid_width)`, in patches, not pixels.

    Returns:
        `(batch, num_labels, grid_height, grid_width)`.

    Source:
        The end of `MaskTransformer.forward` in both published code bases.
    """
    similarities = F.normalize(patches, dim=-1) @ F.normalize(classes, dim=-1).transpose(1, 2)
    return to_grid(mask_norm(similarities), grid_size)


def pool_adaptively(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Average as `F.adaptive_avg_pool2d` does; while a graph is traced, by products with the matrices of its averages.

    The kernel's decomposition binds an ONNX graph to the traced grid, without an error.

    Args:
        features: `(batch, channels, grid_height, grid_width)`.
        size: Rows and columns of the averages.

    Returns:
        `(batch, channels, *size)`.
    """
    if not torch.compiler.is_compiling():
        return F.adaptive_avg_pool2d(features, size)
    weights = []
    for bins, length in zip(size, features.shape[-2:], strict=True):
        index = torch.arange(bins, device=features.device)
        position = torch.arange(length, device=features.device)
        first, end = index * length // bins, ((index + 1) * length + bins - 1) // bins
        inside = (position >= first[:, None]) & (position < end[:, None])
        weights.append(inside.to(features.dtype) / (end - first)[:, None])
    return weights[0] @ features @ weights[1].transpose(0, 1)


def to_grid(scores: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Lay `(batch, patches, num_labels)` out as `(batch, num_labels, grid_height, grid_width)`.

    Raises:
        ValueError: If the patches do not fill the grid.
    """
    check_grid(scores, grid_size)
    return scores.transpose(1, 2).unflatten(2, tuple(grid_size))


def check_grid(patches: Tensor, grid_size: tuple[int, int]) -> None:
    """Check that as many patches have arrived as the grid has places.

    Args:
        patches: `(batch, patches, ...)`.
        grid_size: (grid_height, grid_width), in patches.

    Raises:
        ValueError: If there are more or fewer.
    """
    needed = grid_size[0] * grid_size[1]
    if patches.shape[1] != needed:
        raise ValueError(
            f"Got {patches.shape[1]} patch tokens for grid_size={tuple(grid_size)}, which needs {needed}; drop CLS and "
            "register tokens before decoding."
        )
