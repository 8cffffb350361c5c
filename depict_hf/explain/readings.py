"""What the instruments read for every patch of every window, as arrays."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..analysis import Recording, Term, attention_map, contributions, lens
from ..modeling_depict import DepictForSemanticSegmentation

PATCHES_AT_ONCE = 1024  # Whose contributions exist for all classes at a time.


@dataclass(frozen=True, eq=False)
class Patches:
    """What was read for the patches of all windows, window by window and row by row.

    Attributes:
        classes: Best and second class that would be read before the first and after every layer,
            `(patches, layers + 1, 2)`; for "linear" once.
        probabilities: Theirs, of the same shape.
        label_probabilities: Those of the class that is read in the end, at every stage, `(patches, layers + 1)`.
        final: Probabilities of all classes in the end, `(patches, num_labels)`.
        contributions: What the scores of the last best and second class split into, `(patches, terms, 2)`.
        scores: Their sums, `(patches, 2)`: cosines, for "linear" logits.
        terms: What the summands are.
    """

    classes: np.ndarray
    probabilities: np.ndarray
    label_probabilities: np.ndarray
    final: np.ndarray
    contributions: np.ndarray
    scores: np.ndarray
    terms: tuple[Term, ...]


def read_patches(model: DepictForSemanticSegmentation, recordings: list[Recording]) -> Patches:
    fields: list[tuple[Tensor, ...]] = []
    terms: tuple[Term, ...] = ()
    for recording in recordings:
        linear = recording.decoder_type == "linear"
        stages = recording.logits[:, None] if linear else lens(model, recording)
        # (patches, stages, labels); on the CPU, since some devices have no float64.
        shares = (stages[0].cpu().double() / model.config.temperature).softmax(1).flatten(2).permute(2, 0, 1)
        two, labels = shares.topk(2, dim=-1)
        rows = torch.arange(len(labels))
        parts, sums = [], []
        for some in rows.split(PATCHES_AT_ONCE):
            split = contributions(model, recording, some)
            terms = split.terms
            pair = labels[some, -1]
            parts.append(split.values[0].cpu().permute(1, 0, 2).take_along_dim(pair[:, None], dim=2))
            sums.append(split.totals[0].cpu().take_along_dim(pair, dim=1))
        fields.append(
            (labels, two, shares[rows, :, labels[:, -1, 0]], shares[:, -1], torch.cat(parts), torch.cat(sums))
        )
    classes, best, own, final, values, totals = (torch.cat(each).numpy() for each in zip(*fields, strict=True))
    return Patches(classes, best, own, final, values, totals, terms)


def head_maps(
    model: DepictForSemanticSegmentation, recording: Recording, patch: tuple[int, int] | None, label: int | None
) -> np.ndarray:
    """Return `attention_map` of a patch or class token for all layers, `(layers, heads, grid_height, grid_width)`."""
    part = "cross" if label is not None and recording.decoder_type == "ca" else "decoder"
    stages = recording.cross_tokens if part == "cross" else recording.decoder_tokens
    maps = [attention_map(model, recording, layer, patch, label, part)[0] for layer in range(len(stages) - 1)]
    return torch.stack(maps).cpu().numpy()
