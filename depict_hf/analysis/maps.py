"""Which tokens a token looks at: attention maps of single heads, and their roll-out over layers."""

import torch
from torch import Tensor

from ..modeling_depict import DepictForSemanticSegmentation
from .recording import Recording
from .steps import LAYERED_DECODERS, check_index, check_recording, require, step_at, steps

PARTS = ("decoder", "cross", "encoder")


@torch.no_grad()
def attention(
    model: DepictForSemanticSegmentation,
    recording: Recording,
    layer: int,
    rows: Tensor | None = None,
    part: str = "decoder",
) -> Tensor:
    """Compute the attention weights of one layer from its recorded input.

    Args:
        layer: Counted from 0.
        rows: Indices of the tokens that look, or None for all of them: patches, row-major, then class tokens; in
            "cross" class tokens; in "encoder" prefix tokens, then patches.
        part: "decoder" for its layers, "cross" for the cross-attention layers of "ca", "encoder" for an encoder layer
            that was recorded.

    Returns:
        `(batch, heads, rows, tokens)`, float64 (of the encoder: as recorded). A row sums to 1, except in "cbsa", where
        the map is A^T softmax(r r^T / sqrt(head_dim)) A: what representatives gather from the tokens, exchange, and
        give back.

    Raises:
        ValueError: If the decoder has no such layer, or the encoder's was not recorded.
    """
    _check_part(part)
    if part == "encoder":
        if layer not in recording.encoder_attentions:
            raise ValueError(
                f"The attention of encoder layer {layer} was not recorded; pass encoder_attentions=[{layer}] to "
                "`record` or `analyze`."
            )
        weights = recording.encoder_attentions[layer]
        return weights if rows is None else weights.index_select(2, rows.to(weights.device))
    return step_at(model, recording, layer, part == "cross").weights(rows)


def attention_map(
    model: DepictForSemanticSegmentation,
    recording: Recording,
    layer: int,
    patch: tuple[int, int] | None = None,
    label: int | None = None,
    part: str = "decoder",
) -> Tensor:
    """Show where one patch or one class token looks, head by head, as maps over the patches.

    Args:
        layer: Counted from 0.
        patch: (row, column) of the patch on the grid; or
        label: Class whose token looks. In "ca" class tokens look in the "cross" part.
        part: As in `attention`.

    Returns:
        `(batch, heads, grid_height, grid_width)`; what goes to other tokens than patches is left out, so that a map
        sums to less than 1 where there are any.

    Raises:
        ValueError: If not exactly one of patch and label is given, or it does not exist in that part; and as
            `attention` does.
    """
    _check_part(part)
    check_recording(model, recording)
    if (patch is None) == (label is None):
        raise ValueError(f"Got patch={patch} and label={label}; needed exactly one of them.")
    grid_height, grid_width = recording.grid_size
    num_prefix = 0
    if part == "encoder" and recording.encoder_attentions:
        num_prefix = next(iter(recording.encoder_attentions.values())).shape[-1] - recording.num_patches
    if patch is not None:
        if part == "cross":
            raise ValueError("Patches do not look at anything in the cross-attention layers; pass label.")
        check_index("row", patch[0], grid_height, "grid's height")
        check_index("column", patch[1], grid_width, "grid's width")
        row = num_prefix + patch[0] * grid_width + patch[1]
    else:
        assert label is not None  # exactly one of the two is given
        check_index("label", label, recording.num_labels, "model's list of classes")
        if part == "encoder" or (part == "decoder" and recording.decoder_type == "ca"):
            raise ValueError(
                f"A decoder of type {recording.decoder_type!r} has no class tokens in part {part!r}; pass patch"
                + (', or part="cross".' if recording.decoder_type == "ca" else ".")
            )
        row = label if part == "cross" else recording.num_patches + label
    weights = attention(model, recording, layer, torch.tensor([row]), part)[:, :, 0]
    return weights[..., num_prefix : num_prefix + recording.num_patches].unflatten(-1, recording.grid_size)


@torch.no_grad()
def rollout(model: DepictForSemanticSegmentation, recording: Recording) -> Tensor:
    """Follow attention through all decoder layers, by attention roll-out: an approximation.

    It takes every layer for (W + I) / 2, with W the mean of its heads' weights, rows scaled to sum 1, and multiplies
    the layers. That ignores what the values hold, the step sizes and their signs, and MLPs; `contributions` splits a
    score exactly.

    Returns:
        `(batch, tokens, tokens)`, float64, from the tokens that leave the last layer (rows, which sum to 1) to those
        that enter the first. For "ca" the rows are the class tokens, and the columns the patches, then the class
        tokens' own start: `(batch, num_labels, patches + num_labels)`.

    Raises:
        ValueError: If the decoder has no layers.

    Source:
        Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020.
    """
    require(recording.decoder_type, LAYERED_DECODERS, "attention")
    rolled: Tensor | None = None
    for step in steps(model, recording):
        weights = step.weights().mean(1)
        weights = weights / weights.sum(-1, keepdim=True)
        # (W + I) / 2 times what came before.
        rolled = _half_identity(weights) if rolled is None else 0.5 * (weights @ rolled + rolled)
    assert rolled is not None  # there is a layer
    if recording.decoder_type != "ca":
        return rolled
    num_labels, num_patches = recording.num_labels, recording.num_patches
    own = torch.eye(num_labels, dtype=rolled.dtype, device=rolled.device).expand(len(rolled), -1, -1)
    classes = torch.cat([rolled.new_zeros(len(rolled), num_labels, num_patches), own], dim=-1)
    for step in steps(model, recording, cross=True):
        classes = 0.5 * classes
        classes[..., :num_patches] += 0.5 * (step.weights().mean(1) @ rolled)
    return classes


def _half_identity(weights: Tensor) -> Tensor:
    halved = 0.5 * weights
    halved.diagonal(dim1=-2, dim2=-1).add_(0.5)
    return halved


def _check_part(part: str) -> None:
    if part not in PARTS:
        raise ValueError(f"Got part={part!r}, needed one of {', '.join(PARTS)}.")
