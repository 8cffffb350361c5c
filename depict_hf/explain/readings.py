"""What the instruments read for every patch of every window, as arrays."""

from dataclasses import dataclass

import numpy as np
import torch

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
        label_probabilities: Of the class that is read in the end, at every stage, `(patches, layers + 1)`.
        final: Of all classes in the end, `(patches, num_labels)`.
        terms: What the scores of the last best and second class split into.
        contributions: `(patches, terms, 2)`.
        scores: Their sums, `(patches, 2)`: cosines, for "linear" logits.
    """

    classes: np.ndarray
    probabilities: np.ndarray
    label_probabilities: np.ndarray
    final: np.ndarray
    terms: tuple[Term, ...]
    contributions: np.ndarray
    scores: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        return self.classes[:, -1, 0]


def read_patches(model: DepictForSemanticSegmentation, recordings: list[Recording]) -> Patches:
    fields, terms = [], ()
    for recording in recordings:
        linear = recording.decoder_type == "linear"
        stages = recording.logits[:, None] if linear else lens(model, recording)
        # (patches, stages, labels)
        probabilities = (stages[0].double() / model.config.temperature).softmax(1).flatten(2).permute(2, 0, 1)
        best, classes = probabilities.topk(2, dim=-1)
        rows = torch.arange(len(classes), device=classes.device)
        own = probabilities[rows, :, classes[:, -1, 0]]
        parts, scores = [], []
        for some in rows.split(PATCHES_AT_ONCE):
            split = contributions(model, recording, some)
            terms = split.terms
            pair = classes[some, -1].to(split.totals.device)
            parts.append(split.values[0].permute(1, 0, 2).take_along_dim(pair[:, None], dim=2))
            scores.append(split.totals[0].take_along_dim(pair, dim=1))
        final = probabilities[:, -1]
        fields.append((classes, best, own, final, torch.cat(parts), torch.cat(scores)))
    classes, best, own, final, parts, scores = (
        torch.cat([each.cpu() for each in column]).numpy() for column in zip(*fields, strict=True)
    )
    return Patches(classes, best, own, final, terms, parts, scores)


def head_maps(
    model: DepictForSemanticSegmentation, recording: Recording, patch: tuple[int, int] | None, label: int | None
) -> np.ndarray:
    """`attention_map` of a patch or class token for all layers, `(layers, heads, grid_height, grid_width)`."""
    part = "cross" if label is not None and recording.decoder_type == "ca" else "decoder"
    layers = model.decoder.cross_layers if part == "cross" else model.decoder.layers
    maps = [attention_map(model, recording, layer, patch, label, part)[0] for layer in range(len(layers))]
    return torch.stack(maps).cpu().numpy()
