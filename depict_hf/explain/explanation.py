"""The numbers of a photograph's explanation, as JSON takes them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..analysis import (
    Recording,
    attention_map,
    class_gram,
    deviation_from_identity,
    rate_curves,
    step_sizes,
    subspace_statistics,
)
from ..image_processing_depict import DepictImageProcessor
from ..inference import load_photo, rgb_photo, segment
from ..modeling_depict import DepictForSemanticSegmentation
from .layout import Layout, record_windows
from .readings import Patches, head_maps, read_patches

UNSURE_MARGIN = 0.2  # Below this distance of the first two probabilities, a pixel or patch counts as unsure.
EPSILON = 0.5  # Distortion that coding rates allow, for tokens of length 1.
MOST_CLASSES = 24  # Shown in the Gram matrix and as class tokens: those with the largest shares.
MOST_PAIRS = 8  # Of confused classes.

_BLACK_BOX = (
    "This model's decoder ({}) is a black box: its heads have separate matrices for queries, keys and values, so there "
    "are no subspaces whose rate a layer could lower, and no step sizes."
)
_NO_LAYERS = (
    "This model's decoder (linear) has no layers: it multiplies each patch's features by one matrix. There are no "
    "attention heads, no class tokens and no layers between which something could change."
)


@dataclass(frozen=True, eq=False)
class Explanation:
    """What `explain` found.

    Attributes:
        numbers: For JSON; see `explain`.
        photo: Upright, RGB.
        labels: Class ids of all pixels of the photograph, as of `segment`.
        confidence: The probabilities of these, as of `segment`.
        layout: Where windows and patches lie.
        patches: What was read for them.
        recordings: Records of the windows.
        shown_classes: Ids of the classes whose tokens are shown.
        model: The model that made the records.
    """

    numbers: dict
    photo: PIL.Image.Image
    labels: Tensor
    confidence: Tensor
    layout: Layout
    patches: Patches
    recordings: list[Recording]
    shown_classes: list[int]
    model: DepictForSemanticSegmentation

    def page(self) -> str:
        """Write one self-contained HTML file of less than 3 MB."""
        from .page import page

        return page(self)


@torch.no_grad()
def explain(
    model: DepictForSemanticSegmentation,
    image_processor: DepictImageProcessor,
    photo: PIL.Image.Image | str | Path,
    at: tuple[int, int] | None = None,
    class_name: str | None = None,
    name: str | None = None,
) -> Explanation:
    """Segment a photograph and say how every patch came to its class.

    Args:
        model: A model in evaluation mode, with two classes or more.
        photo: PIL image, or path of an image file; turned upright by its EXIF orientation.
        at: (x, y), the pixel of the upright photograph whose patch is told in full; by default the one in the middle.
        class_name: Class whose token is told in full.
        name: Name of the photograph, for people; by default its file's.

    Returns:
        `numbers` has the keys below. Layers, heads, windows, rows and columns are counted from 0, classes are ids,
        shares and probabilities lie in [0, 1], boxes are [left, top, right, bottom] in pixels of the photograph.

            photo         name, width, height
            model         decoder_type, class_names, temperature (divides logits before probabilities), layers, heads
            layout        resized, window, starts, grid, patch: see `Layout`; windows: their number
            classes       of every class in the label map: id, share, confidence (mean), by decreasing share
            unsure        margin (below which a pixel is unsure), share of unsure pixels, confidence (mean),
                          pairs: classes that unsure patches waver between, their share of the photograph, mean margin,
                          and `patch`, the index of the least sure one
            patch         of the patch at `at`: index, window, row, column, box; class, confidence, runner_up,
                          runner_up_probability, margin; readings (by stage: class, probability, runner_up,
                          runner_up_probability, label_probability, which is that of the class read in the end);
                          quantity (cosine or logit), score, runner_up_score, contributions (kind, layer, head, value
                          for the class, runner_up_value); attention `[layer][head][row][column]` over its window
            class         where `class_name` is given: id, share, confidence, and attention of its token,
                          `[window][layer][head][row][column]`
            rates         mean over windows, tokens scaled to length 1: epsilon, patch_nats and class_nats by stage,
                          patch_compression_nats and class_compression_nats by layer, before and after its step; and a
                          sentence
            class_tokens  classes (ids), stages, gram `[stage][class][class]` of cosines, mean over windows, deviation
                          from orthonormality by stage (all classes), and a sentence
            subspaces     by layer: part (decoder or cross), layer, step_sizes, and of the heads deviation, overlap and
                          effective_rank (means), and the same of random matrices as random_...
            missing       why a part above is null, by its name

    Raises:
        ValueError: If there is no such pixel or class, the model has one class only or is in training mode.
        OSError: If the file cannot be read.
    """
    if model.config.num_labels < 2:
        raise ValueError("The model has one class, which it gives to every pixel: there is nothing to explain.")
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    chosen = None if class_name is None else _class_id(class_name, names)
    if isinstance(photo, PIL.Image.Image):
        name = name or "photograph"
        photo = rgb_photo(photo)
    else:
        name = name or Path(photo).name
        photo = load_photo(photo)
    layout, recordings = record_windows(model, image_processor, photo)
    at = at or (photo.width // 2, photo.height // 2)
    place = layout.locate(*at)
    labels, confidence, margin = segment(model, image_processor, [photo], return_confidence=True)[0]
    assert confidence is not None and margin is not None
    patches = read_patches(model, recordings)
    classes = _classes(labels, confidence, len(names))
    shown = [each["id"] for each in classes[:MOST_CLASSES]]
    if chosen is not None and chosen not in shown:
        shown.append(chosen)

    decoder_type = model.config.decoder_type
    missing = {}
    if decoder_type == "linear":
        missing = dict.fromkeys(("attention", "class_tokens", "rates", "subspaces"), _NO_LAYERS)
    elif decoder_type == "mask_transformer":
        missing = {"subspaces": _BLACK_BOX.format(decoder_type)}
    numbers = {
        "photo": {"name": name, "width": photo.width, "height": photo.height},
        "model": {
            "decoder_type": decoder_type,
            "class_names": names,
            "temperature": model.config.temperature,
            "layers": 0 if decoder_type == "linear" else len(recordings[0].decoder_tokens) - 1,
            "heads": 0 if decoder_type == "linear" else attention_map(model, recordings[0], 0, (0, 0)).shape[1],
        },
        "layout": {
            "resized": list(layout.resized),
            "window": list(layout.window),
            "starts": [list(each) for each in layout.starts],
            "grid": list(layout.grid),
            "patch": layout.patch,
            "windows": len(recordings),
        },
        "classes": classes,
        "unsure": _unsure(confidence, margin, patches, layout),
        "patch": _patch(model, recordings, patches, layout, place),
        "class": None if chosen is None else _class(model, recordings, classes, chosen),
        "rates": None if "rates" in missing else _rates(model, recordings),
        "class_tokens": None if "class_tokens" in missing else _class_tokens(model, recordings, shown, names),
        "subspaces": None if "subspaces" in missing else _subspaces(model),
        "missing": missing,
    }
    return Explanation(numbers, photo, labels, confidence, layout, patches, recordings, shown, model)


def _class_id(class_name: str, names: list[str]) -> int:
    exact = [index for index, name in enumerate(names) if name == class_name]
    found = exact or [index for index, name in enumerate(names) if name.casefold() == class_name.casefold()]
    if not found:
        raise ValueError(f"The model has no class {class_name!r}; choose one of: {', '.join(names)}.")
    return found[0]


def _classes(labels: Tensor, confidence: Tensor, num_labels: int) -> list[dict]:
    labels, confidence = labels.flatten(), confidence.flatten().double()
    counts = torch.bincount(labels, minlength=num_labels)
    sums = torch.bincount(labels, confidence, minlength=num_labels)
    return [
        {"id": index, "share": counts[index].item() / len(labels), "confidence": (sums[index] / counts[index]).item()}
        for index in counts.argsort(descending=True, stable=True).tolist()
        if counts[index]
    ]


def _unsure(confidence: Tensor, margin: Tensor, patches: Patches, layout: Layout) -> dict:
    margins = patches.probabilities[:, -1, 0] - patches.probabilities[:, -1, 1]
    areas = layout.areas(layout.photo)
    pairs: dict[tuple[int, int], list[int]] = {}
    for index in np.flatnonzero((margins < UNSURE_MARGIN) & (areas > 0)).tolist():
        first, second = sorted(patches.classes[index, -1].tolist())
        pairs.setdefault((first, second), []).append(index)
    found: list[dict] = [
        {
            "classes": list(pair),
            "share": float(areas[members].sum()),
            "margin": float(np.average(margins[members], weights=areas[members])),
            "patch": members[int(margins[members].argmin())],
        }
        for pair, members in pairs.items()
    ]
    return {
        "margin": UNSURE_MARGIN,
        "share": (margin < UNSURE_MARGIN).double().mean().item(),
        "confidence": confidence.double().mean().item(),
        "pairs": sorted(found, key=lambda each: -each["share"])[:MOST_PAIRS],
    }


def _patch(
    model: DepictForSemanticSegmentation,
    recordings: list[Recording],
    patches: Patches,
    layout: Layout,
    place: tuple[int, int, int],
) -> dict:
    window, row, column = place
    index = layout.index(*place)
    readings = [
        {
            "class": int(classes[0]),
            "probability": float(probabilities[0]),
            "runner_up": int(classes[1]),
            "runner_up_probability": float(probabilities[1]),
            "label_probability": float(own),
        }
        for classes, probabilities, own in zip(
            patches.classes[index], patches.probabilities[index], patches.label_probabilities[index], strict=True
        )
    ]
    last = readings[-1]
    linear = model.config.decoder_type == "linear"
    return {
        "index": index,
        "window": window,
        "row": row,
        "column": column,
        "box": layout.box(*place),
        "class": last["class"],
        "confidence": last["probability"],
        "runner_up": last["runner_up"],
        "runner_up_probability": last["runner_up_probability"],
        "margin": last["probability"] - last["runner_up_probability"],
        "readings": readings,
        "quantity": "logit" if linear else "cosine",
        "score": float(patches.scores[index, 0]),
        "runner_up_score": float(patches.scores[index, 1]),
        "contributions": [
            {
                "kind": term.kind,
                "layer": term.layer,
                "head": term.head,
                "value": float(values[0]),
                "runner_up_value": float(values[1]),
            }
            for term, values in zip(patches.terms, patches.contributions[index], strict=True)
        ],
        "attention": None if linear else _rounded(head_maps(model, recordings[window], (row, column), None)),
    }


def _class(model: DepictForSemanticSegmentation, recordings: list[Recording], classes: list[dict], chosen: int) -> dict:
    found = next((each for each in classes if each["id"] == chosen), {"id": chosen, "share": 0.0, "confidence": None})
    if model.config.decoder_type == "linear":
        return {**found, "attention": None}
    return {**found, "attention": [_rounded(head_maps(model, each, None, chosen)) for each in recordings]}


def _rounded(maps: np.ndarray) -> list:
    return np.round(maps, 7).tolist()


def _rates(model: DepictForSemanticSegmentation, recordings: list[Recording]) -> dict:
    curves = [rate_curves(model, recording, EPSILON, normalize=True) for recording in recordings]

    def mean(name: str) -> list | None:
        if getattr(curves[0], name) is None:
            return None
        return torch.cat([getattr(each, name) for each in curves]).mean(0).tolist()

    rates, compressions = mean("patch_rates_nats"), mean("patch_compression_nats")
    assert rates is not None
    return {
        "epsilon": EPSILON,
        "patch_nats": rates,
        "class_nats": mean("class_rates_nats"),
        "patch_compression_nats": compressions,
        "class_compression_nats": mean("class_compression_nats"),
        "sentence": rate_sentence(rates, compressions),
    }


def rate_sentence(rates: list[float], compressions: list[list[float]] | None) -> str:
    """Say what the curve shows; changes of less than 1 % count as none.

    Args:
        rates: R before the first and after every layer, in nats.
        compressions: R^c before and after every layer's step, or None for a black box.
    """
    first, last = rates[0], rates[-1]
    change = (last - first) / first
    numbers = f"from {first:.1f} nats before the first layer to {last:.1f} after the last one ({100 * change:+.0f} %)"
    if abs(change) < 0.01:
        text = f"The coding rate hardly changes, {numbers}: the patches are as varied as before."
    elif change > 0:
        text = (
            f"The coding rate rises, {numbers}: over the decoder as a whole, the patches become more different from "
            "each other. They are not compressed."
        )
    else:
        text = (
            f"The coding rate falls, {numbers}: over the decoder as a whole, the patches become more alike and take "
            "fewer nats to describe."
        )
    if compressions is None:
        return text
    lower = [str(layer + 1) for layer, (before, after) in enumerate(compressions) if after < before]
    if not lower:
        return text + " Seen by its own heads, no layer lowers the rate."
    if len(lower) == len(compressions):
        return text + " Seen by its own heads, every layer lowers the rate."
    which = f"layer {lower[0]} does" if len(lower) == 1 else f"layers {', '.join(lower[:-1])} and {lower[-1]} do"
    return text + f" Seen by their own heads, {len(lower)} of {len(compressions)} layers lower the rate: {which}."


def _class_tokens(
    model: DepictForSemanticSegmentation, recordings: list[Recording], shown: list[int], names: list[str]
) -> dict:
    grams = torch.cat([class_gram(model, recording) for recording in recordings])
    deviations = deviation_from_identity(grams).mean(0).tolist()
    gram = grams.mean(0)[:, shown][:, :, shown].cpu()
    stages = ["as learned", *(f"after layer {layer}" for layer in range(1, len(gram) - 1)), "as compared with patches"]
    return {
        "classes": shown,
        "stages": stages,
        "gram": gram.tolist(),
        "deviation": deviations,
        "sentence": _gram_sentence(gram[-1], [names[index] for index in shown]),
    }


def _gram_sentence(gram: Tensor, names: list[str]) -> str:
    if len(names) < 2:
        return "The photograph shows one class, so that there are no two tokens to compare."
    above = gram.triu(1) + torch.full_like(gram, -2).tril()
    first, second = divmod(int(above.argmax()), len(names))
    others = gram[~torch.eye(len(names), dtype=torch.bool)]
    return (
        f"Of the classes shown, {names[first]} and {names[second]} have the most similar tokens in the end "
        f"(cosine {gram[first, second]:.2f}); on average two tokens have the cosine {others.mean():.2f}, and "
        f"{others.abs().mean():.2f} without its sign, where 0 would be fully separate."
    )


def _subspaces(model: DepictForSemanticSegmentation) -> list[dict]:
    found = []
    for part in ("decoder", "cross") if model.config.decoder_type == "ca" else ("decoder",):
        sizes = step_sizes(model, part == "cross").tolist()
        for layer, statistics in enumerate(subspace_statistics(model, part == "cross")):
            numbers = {"part": part, "layer": layer, "step_sizes": sizes[layer]}
            assert statistics.random is not None
            for prefix, each in (("", statistics), ("random_", statistics.random)):
                heads = len(each.overlaps)
                apart = ~torch.eye(heads, dtype=torch.bool, device=each.overlaps.device)
                numbers[f"{prefix}deviation"] = each.deviations.mean().item()
                numbers[f"{prefix}overlap"] = each.overlaps[apart].mean().item() if heads > 1 else None
                numbers[f"{prefix}effective_rank"] = each.effective_ranks.mean().item()
            found.append(numbers)
    return found
