"""A patch's score for a class, split exactly into what encoder, layers and heads add; and the score after each layer.

A patch vector is y = W (C x / sigma * gamma + beta), where x is the patch token after the last layer, C takes the mean
over its entries away, sigma, gamma and beta belong to the last LayerNorm, and W is the projection that only
"mask_transformer" has. x is a sum: the encoder's output and what every layer and head added. With sigma, the lengths
|y| and |c|, and the class vector c held at their values, the cosine y c / (|y| |c|) is therefore linear in those
summands, and splits without a remainder. Held fixed means: a term is not what the score would lose without the part
(see `head_removed` for that), since then later layers, sigma and |y| would change too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decoders import CrossAttentionDecoder, LinearDecoder, MaskTransformerDecoder, class_logits
from ..modeling_depict import DepictForSemanticSegmentation
from .recording import Recording
from .steps import (
    LAYERED_DECODERS,
    check_index,
    check_recording,
    class_norm,
    exact,
    layered_decoder,
    read_out,
    require,
    step_at,
    steps,
)

SIDES = ("patches", "classes")


@dataclass(frozen=True)
class Term:
    """One summand.

    Attributes:
        kind: "encoder" (its output, in "mask_transformer" after the input projection), "input_bias" of that
            projection, "class_tokens" (as learned, before any layer), "head", "attention_bias", "mlp", "output_bias"
            (of a "cbsa" layer), "norm_bias" (beta of the last LayerNorm), "bias" (of "linear"); where terms are summed
            by layer, "layer".
        layer: Decoder layer, counted from 0, for what belongs to one.
        head: Number of the head, for "head"; counted from 0.
    """

    kind: str
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        """Name the term for people, counted from 0 too: "layer 2, head 1", "layer 2, mlp", "encoder"."""
        if self.layer is None:
            return self.kind
        part = f"head {self.head}" if self.kind == "head" else self.kind
        return f"layer {self.layer}" if self.kind == "layer" else f"layer {self.layer}, {part}"


@dataclass(frozen=True, eq=False)
class Contributions:
    """A split of scores, float64.

    Attributes:
        terms: What the summands are.
        values: `(batch, terms, patches, labels)`.
        totals: `(batch, patches, labels)`: the scores computed from the last tokens, which the values sum to; in
            float32 to about 1e-6, in half precision to the rounding of the recorded tokens.
        quantity: "cosine", or for "linear" "logit".
    """

    terms: tuple[Term, ...]
    values: Tensor
    totals: Tensor
    quantity: str

    def by_layer(self) -> tuple[tuple[Term, ...], Tensor]:
        """Sum all that belongs to one layer to a term of kind "layer".

        Returns:
            The fewer terms, and their values `(batch, terms, patches, labels)`.
        """
        groups: dict[Term, list[int]] = {}
        for index, term in enumerate(self.terms):
            whole = term if term.layer is None else Term("layer", term.layer)
            groups.setdefault(whole, []).append(index)
        values = torch.stack([self.values[:, indices].sum(1) for indices in groups.values()], dim=1)
        return tuple(groups), values


@torch.no_grad()
def contributions(
    model: DepictForSemanticSegmentation,
    recording: Recording,
    patches: Sequence[int] | Tensor | None = None,
    labels: Sequence[int] | Tensor | None = None,
    side: str = "patches",
) -> Contributions:
    """Split the cosine of patches with class tokens into terms that add up to it.

    Class tokens move through the layers too (in "sa", "cbsa" and "mask_transformer" beside the patches, in "ca" in the
    cross-attention layers). A cosine is linear in one side at a time, so one side is split, while the other one's last
    vectors are held.

    Args:
        patches: Row-major indices of the patches; all by default.
        labels: Classes; all by default.
        side: "patches": how the patch token came to be what it is; or "classes": how the class token did.

    Returns:
        The terms, values of shape `(batch, terms, patches, labels)`, which add up to the cosine; for "linear" those of
        the logit, the encoder's output and the bias.

    Raises:
        ValueError: If an index is out of range, or "linear" is asked for its class side, which does not exist.
    """
    check_recording(model, recording)
    if side not in SIDES:
        raise ValueError(f"Got side={side!r}, needed one of {', '.join(SIDES)}.")
    patch_rows = _indices("patches", patches, recording.num_patches)
    label_rows = _indices("labels", labels, recording.num_labels)
    if recording.decoder_type == "linear":
        if side == "classes":
            require("linear", LAYERED_DECODERS, "class tokens")
        return _linear(model, recording, patch_rows, label_rows)
    of_patches = side == "patches"
    # Split side first, held side second.
    rows, held_rows = (patch_rows, label_rows) if of_patches else (label_rows, patch_rows)
    split, held = read_out(model, recording) if of_patches else read_out(model, recording)[::-1]
    split, held = split[:, rows], F.normalize(held[:, held_rows], dim=-1)
    totals = F.normalize(split, dim=-1) @ held.transpose(1, 2)

    direction, scale, norm_bias = _linear_form(model, recording, of_patches, rows, split, held)
    terms, summands = [], []
    for term, value in _summands(model, recording, of_patches, rows, direction):
        terms.append(term)
        summands.append(value * scale)
    terms.append(Term("norm_bias"))
    summands.append(norm_bias)
    values = torch.stack(summands, dim=1)
    if not of_patches:
        values, totals = values.transpose(-1, -2), totals.transpose(-1, -2)
    return Contributions(tuple(terms), values, totals, "cosine")


@torch.no_grad()
def source_contributions(
    model: DepictForSemanticSegmentation, recording: Recording, layer: int, patch: int, label: int
) -> Tensor:
    """Split the heads' terms of one layer further, into the tokens that the patch looked at.

    The attention weights are held too: a source counts by its weight times its value, not by what it does to weights.

    Args:
        layer: Decoder layer, counted from 0.
        patch: Row-major index of the patch whose cosine is split.
        label: Class.

    Returns:
        `(batch, heads, tokens)`, float64; the sum over the tokens is the value of `Term("head", layer, head)`. Tokens
        are the patches, row-major, and except in "ca" the class tokens behind them.

    Raises:
        ValueError: If an index is out of range, or the decoder has no layers.
    """
    step = step_at(model, recording, layer)
    row, held_row = _indices("patch", [patch], recording.num_patches), _indices("label", [label], recording.num_labels)
    split, held = read_out(model, recording)
    split, held = split[:, row], F.normalize(held[:, held_row], dim=-1)
    direction, scale, _ = _linear_form(model, recording, True, row, split, held)
    # (batch, heads, tokens): what each token's value adds along the direction.
    along = (step.values @ (step.output @ direction[:, None].transpose(-1, -2))).squeeze(-1)
    return step.transport(row).squeeze(2) * along * scale


@torch.no_grad()
def lens(
    model: DepictForSemanticSegmentation, recording: Recording, cross: bool = False, final_classes: bool = False
) -> Tensor:
    """Read class scores after each layer: apply the decoder's end to that layer's tokens.

    The end is the last LayerNorm, cosine and normalisation over the classes, in "mask_transformer" with its
    projections, and in "ca" with all cross-attention layers. Tokens of early layers were never trained to be read.

    Args:
        cross: In "ca" the scores after each cross-attention layer instead, with the final patch tokens.
        final_classes: Whether patch tokens of every layer are compared with the class tokens of the last one, which
            shows the patches' side alone, as `contributions` does.

    Returns:
        `(batch, layers + 1, num_labels, grid_height, grid_width)`, before the first and after every layer, in the
        model's dtype; the last one is the model's logits.

    Raises:
        ValueError: If the decoder has no layers.
    """
    check_recording(model, recording)
    decoder = layered_decoder(model)
    if cross:
        require(recording.decoder_type, ("ca",), "cross-attention layers")

    def read(patches: Tensor, classes: Tensor) -> Tensor:
        if isinstance(decoder, MaskTransformerDecoder):
            patches, classes = patches @ decoder.patch_projection, classes @ decoder.class_projection
        return class_logits(patches, classes, decoder.mask_norm, recording.grid_size)

    stages = []
    if isinstance(decoder, CrossAttentionDecoder):
        last = decoder.norm(recording.decoder_tokens[-1])
        if cross:
            for tokens in recording.cross_tokens:
                stages.append(read(last, decoder.class_norm(tokens)))
            return torch.stack(stages, dim=1)
        for tokens in recording.decoder_tokens:
            patches, classes = decoder.norm(tokens), recording.cross_tokens[0]
            for layer in decoder.cross_layers:
                classes = recording.cross_tokens[-1] if final_classes else layer(patches, classes)[0]
            stages.append(read(patches, decoder.class_norm(classes)))
        return torch.stack(stages, dim=1)
    sizes = [recording.num_patches, recording.num_labels]
    final = decoder.norm(recording.decoder_tokens[-1]).split(sizes, dim=1)[1]
    for tokens in recording.decoder_tokens:
        patches, classes = decoder.norm(tokens).split(sizes, dim=1)
        stages.append(read(patches, final if final_classes else classes))
    return torch.stack(stages, dim=1)


def _linear_form(
    model: DepictForSemanticSegmentation,
    recording: Recording,
    of_patches: bool,
    rows: Tensor,
    split: Tensor,
    held: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the cosine as a linear form of the split side's last tokens x: x direction^T * scale + norm_bias.

    Args:
        of_patches: Whether the split side is that of the patches.
        rows: Indices on the split side.
        split: Its vectors, `(batch, rows, width)`.
        held: The other side's vectors, of length 1, `(batch, held, width)`.

    Returns:
        direction `(batch, held, width)`, scale `(batch, rows, 1)`, norm_bias `(batch, rows, held)`.
    """
    decoder = layered_decoder(model)
    norm = decoder.norm if of_patches else class_norm(model)
    tokens = exact((recording.patch_tokens if of_patches else recording.class_tokens)[-1][:, rows])
    if isinstance(decoder, MaskTransformerDecoder):
        held = held @ exact(decoder.patch_projection if of_patches else decoder.class_projection).T
    direction = held * exact(norm.weight)
    direction = direction - direction.mean(-1, keepdim=True)
    deviation = (tokens.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    length = split.norm(dim=-1, keepdim=True)
    norm_bias = (held @ exact(norm.bias))[:, None] / length
    return direction, 1 / (deviation * length), norm_bias


def _summands(
    model: DepictForSemanticSegmentation, recording: Recording, of_patches: bool, rows: Tensor, direction: Tensor
) -> Iterator[tuple[Term, Tensor]]:
    """Yield each summand of the last tokens along the directions, `(batch, rows, held)`."""
    decoder = layered_decoder(model)

    def along(tokens: Tensor) -> Tensor:
        return exact(tokens) @ direction.transpose(1, 2)

    if not of_patches:
        yield Term("class_tokens"), along(recording.class_tokens[0][:, rows])
    elif isinstance(decoder, MaskTransformerDecoder):
        projection = decoder.input_projection
        yield Term("encoder"), along(exact(recording.encoder_output[:, rows]) @ exact(projection.weight).T)
        yield Term("input_bias"), along(exact(projection.bias).expand(len(direction), len(rows), -1))
    else:
        yield Term("encoder"), along(recording.encoder_output[:, rows])
    cross = not of_patches and recording.decoder_type == "ca"
    # Class tokens stand behind the patches, except in layers of their own.
    token_rows = rows if of_patches or cross else rows + recording.num_patches
    for index, step in enumerate(steps(model, recording, cross)):
        for head, output in enumerate(step.output):
            yield Term("head", index, head), along(step.context(head, token_rows) @ output)
        for kind, tokens in step.rest(token_rows).items():
            yield Term(kind, index), along(tokens.expand(len(direction), len(rows), -1))


def _linear(model: DepictForSemanticSegmentation, recording: Recording, rows: Tensor, labels: Tensor) -> Contributions:
    classifier = cast(LinearDecoder, model.decoder).classifier
    products = exact(recording.encoder_output[:, rows]) @ exact(classifier.weight)[labels].T
    bias = exact(classifier.bias)[labels].expand_as(products)
    return Contributions(
        (Term("encoder"), Term("bias")), torch.stack([products, bias], dim=1), products + bias, "logit"
    )


def _indices(name: str, indices: Sequence[int] | Tensor | None, count: int) -> Tensor:
    if indices is None:
        return torch.arange(count)
    indices = torch.as_tensor(indices).cpu()
    for index in indices.flatten().tolist():
        check_index(name, index, count, "record")
    return indices.flatten().long()
