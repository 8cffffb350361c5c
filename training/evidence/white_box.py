"""What the claims of the white box are tested by, measured image by image, of trained and of untrained decoders."""

import argparse
import copy
import sys
import time
from collections.abc import Mapping
from statistics import fmean

import torch
from accelerate import PartialState
from scipy import ndimage
from torch import Tensor

from depict_hf import DepictForSemanticSegmentation
from depict_hf.analysis import (
    Recording,
    class_gram,
    class_subspaces,
    coding_rate,
    compression,
    deviation_from_identity,
    lens,
    record,
    step_sizes,
    subspace_statistics,
)
from depict_hf.analysis.steps import (
    LAYERED_DECODERS,
    SUBSPACE_DECODERS,
    decoder_layers,
    head_projections,
    layer_norm,
    subspace_layers,
)
from depict_hf.configuration_depict import IGNORE_LABEL
from depict_hf.vit import ViTLayer

from ..evaluation import environment, settings, spread
from .perturbations import Loaded, encoding_once

NORMALIZATIONS = {
    "raw": "tokens as they stand between the layers",
    "unit": "every token scaled to length 1",
    "seen": "tokens after the LayerNorm of the layer whose step it is, as its heads see them",
}
EPSILON = 0.5
DIGITS = 6


def untrained(model: DepictForSemanticSegmentation, seed: int) -> DepictForSemanticSegmentation:
    """Return a model of the same configuration and encoder, whose decoder has the weights that training starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = DepictForSemanticSegmentation(copy.deepcopy(model.config))
    fresh.encoder = model.encoder
    return fresh.to(model.device, model.dtype).eval()


def measure_white_box(arguments: argparse.Namespace, loaded: Mapping[str, Loaded], state: PartialState) -> dict:
    """Measure all models, and beside each an untrained one of the same configuration and encoder.

    Photographs are taken whole, at the image processor's size, also of models that segment by windows.

    Returns:
        A record ready for JSON: `num_images`, `left_out`, indices of images without any label at a patch's centre,
        `size`, `epsilon`, `environment`, `seconds`, and by model `models` and `untrained`: `weights` of
        `weight_figures` and `images`, one `image_figures` per image, in the same order.

    Raises:
        ValueError: If the command runs in several processes, a number is out of range, or no image has labels.
    """
    started_in, start = environment(), time.perf_counter()
    if state.num_processes > 1:
        raise ValueError(f"Got {state.num_processes} processes; this is measured by one, start several commands.")
    protocol, _ = settings(arguments, state)
    first = next(iter(loaded.values()))
    results: dict[str, dict[str, dict]] = {"models": {}, "untrained": {}}
    indices, left_out = spread(len(first.samples), protocol.max_images), set()
    with encoding_once([each.model for each in loaded.values()]):
        for number, (name, each) in enumerate(loaded.items()):
            begin = time.perf_counter()
            pair = {"models": each.model, "untrained": untrained(each.model, number)}
            images: dict[str, list[dict]] = {kind: [] for kind in pair}
            for index in indices:
                sample = each.samples[index]
                pixel_values = each.image_processor(sample["image"], return_tensors="pt")["pixel_values"]
                for kind, model in pair.items():
                    recording = record(model, pixel_values)
                    truth = labels_on_grid(sample["labels"], recording, model.config.encoder_patch_size)
                    if (truth == IGNORE_LABEL).all():
                        left_out.add(index)
                        break
                    images[kind].append(image_figures(model, recording, truth))
            for kind, model in pair.items():
                results[kind][name] = {"weights": weight_figures(model), "images": images[kind]}
            print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    if len(left_out) == len(indices):
        raise ValueError(f"None of the {len(indices)} images has a label; take more, or another split.")
    return {
        "num_images": len(indices) - len(left_out),
        "left_out": sorted(left_out),
        "size": {name: side for name, side in dict(first.image_processor.size).items() if side is not None},
        "epsilon": EPSILON,
        "environment": started_in,
        "seconds": time.perf_counter() - start,
        **results,
    }


def weight_figures(model: DepictForSemanticSegmentation) -> dict[str, float | None]:
    """Return what is a matter of the weights alone; empty for a black box.

    Returns:
        Means over all layers (cross-attention layers of "ca" too) and heads: `deviation` of P_h P_h^T from the
        identity, `deviation_any_scale`, and over all pairs of different heads `overlap`, with `chance`, the overlap of
        random subspaces, head_dim / hidden (both None where layers have one head); see `depict_hf.analysis`.
        `negative_steps`: share of negative step sizes among all of the self-attention layers.
    """
    kind = model.config.decoder_type
    if kind not in SUBSPACE_DECODERS:
        return {}
    deviations, any_scale, shared, chances = [], [], [], []
    for cross in (False, True) if kind == "ca" else (False,):
        layers = subspace_layers(model, "subspaces", cross)
        for layer, statistics in zip(layers, subspace_statistics(model, cross, draws=1), strict=True):
            deviations += statistics.deviations.tolist()
            any_scale += statistics.deviations_any_scale.tolist()
            heads = len(statistics.overlaps)
            pairs = statistics.overlaps[~torch.eye(heads, dtype=torch.bool)].tolist()
            shared += pairs
            chances += [head_projections(layer).shape[1] / head_projections(layer).shape[2]] * len(pairs)
    return {
        "deviation": fmean(deviations),
        "deviation_any_scale": fmean(any_scale),
        "overlap": fmean(shared) if shared else None,
        "chance": fmean(chances) if chances else None,
        "negative_steps": (step_sizes(model) < 0).double().mean().item(),
    }


@torch.no_grad()
def image_figures(model: DepictForSemanticSegmentation, recording: Recording, truth: Tensor) -> dict:
    """Return what one image says of the claims.

    Args:
        recording: Of that image alone.
        truth: Its labels on the patch grid, `(grid_height, grid_width)`, `IGNORE_LABEL` where there is none.

    Returns:
        By name, numbers where they are defined: rates of `rate_figures`, of the class vectors `class_figures`, and of
        the label map on the patch grid, where labels are known, `components` per class (`components_per_class`) and
        `variation` (`outline_share`), both with `_truth` of the label map, and `variation_lens` of the labels read
        before the decoder's first layer. With them, as lists, `curves`.
    """
    figures: dict = {}
    if recording.decoder_type in LAYERED_DECODERS:
        figures |= rate_figures(model, recording) | class_figures(model, recording)
        before = lens(model, recording)[0, 0].argmax(0)
        figures["variation_lens"] = outline_share(before, truth)
    found = recording.logits[0].argmax(0)
    figures |= {
        "components": components_per_class(found, truth),
        "components_truth": components_per_class(truth, truth),
        "variation": outline_share(found, truth),
        "variation_truth": outline_share(truth, truth),
    }
    return {name: value if isinstance(value, dict) else round(value, DIGITS) for name, value in figures.items()}


def rate_figures(model: DepictForSemanticSegmentation, recording: Recording) -> dict:
    """Return how much the decoder's layers change the rates of the patch tokens, in nats, by normalisation.

    Returns:
        `rate_raw` and so on: the sum over the layers of R after minus R before its step, and for white boxes
        `compression_raw` and so on, the same of R^c by the layer's own heads. `curves`: by the same names the pairs
        [before, after] of every layer.
    """
    tokens = recording.patch_tokens
    layers = decoder_layers(model)
    white = recording.decoder_type in SUBSPACE_DECODERS
    curves: dict[str, list[list[float]]] = {}
    for name in NORMALIZATIONS:
        pairs = []
        for layer, before, after in zip(layers, tokens[:-1], tokens[1:], strict=True):
            pair = torch.stack([before[0], after[0]]).double()
            norm = layer.norm1 if isinstance(layer, ViTLayer) else layer.norm
            pairs.append(layer_norm(pair, norm) if name == "seen" else pair)
        unit = name == "unit"
        curves[f"rate_{name}"] = [coding_rate(pair, EPSILON, unit).tolist() for pair in pairs]
        if white:
            curves[f"compression_{name}"] = [
                compression(pair, head_projections(layer), EPSILON, unit).tolist()
                for layer, pair in zip(layers, pairs, strict=True)
            ]
    changes = {name: sum(after - before for before, after in pairs) for name, pairs in curves.items()}
    rounded = {name: [[round(value, DIGITS) for value in pair] for pair in pairs] for name, pairs in curves.items()}
    return {**changes, "curves": rounded}


def class_figures(model: DepictForSemanticSegmentation, recording: Recording) -> dict[str, float]:
    """Return how the class vectors that patches are compared with lie to each other and to the patch vectors.

    Returns:
        `class_deviation` of their Gram matrix of cosines from the identity; `captured`, the share of the patch
        vectors' energy in their span, `best`, in the principal subspace of the same dimension, and `span_chance`, in a
        random one; `angle`, the mean principal angle between both in degrees; and `captured_centered` and
        `best_centered`, where the mean of the patch vectors is taken away first.
    """
    [plain] = class_subspaces(model, recording)
    [centered] = class_subspaces(model, recording, center=True)
    return {
        "class_deviation": deviation_from_identity(class_gram(model, recording)[0, -1]).item(),
        "captured": plain.captured,
        "best": plain.best,
        "span_chance": plain.chance,
        "angle": plain.angles_radians.mean().rad2deg().item(),
        "captured_centered": centered.captured,
        "best_centered": centered.best,
    }


def labels_on_grid(labels: Tensor, recording: Recording, patch_size: int) -> Tensor:
    """Return the label at the centre of every patch, `(grid_height, grid_width)`; `IGNORE_LABEL` in the padding."""
    for axis, (count, length) in enumerate(zip(recording.grid_size, recording.area[2:], strict=True)):
        centers = (torch.arange(count) + 0.5) * patch_size
        places = (centers * labels.shape[axis] / length).long().clamp(max=labels.shape[axis] - 1)
        labels = labels.index_select(axis, places)
        if (centers >= length).any():
            labels = labels.clone()
            labels.narrow(axis, int((centers < length).sum()), int((centers >= length).sum())).fill_(IGNORE_LABEL)
    return labels


def components_per_class(labels: Tensor, truth: Tensor) -> float:
    """Count the connected components (of patches that share a side) of every class, and average over the classes.

    Args:
        labels: `(grid_height, grid_width)`.
        truth: Of the same shape; patches without a label there belong to no component.
    """
    labels = torch.where(truth == IGNORE_LABEL, IGNORE_LABEL, labels.to(truth))
    classes = [label for label in labels.unique().tolist() if label != IGNORE_LABEL]
    return fmean(ndimage.label((labels == label).cpu().numpy())[1] for label in classes)


def outline_share(labels: Tensor, truth: Tensor) -> float:
    """Return the total variation of a label map: the share of pairs of neighbouring patches with different labels.

    Arguments are those of `components_per_class`; pairs count where both patches have a label in `truth`. 0 without
    any pair.
    """
    labels, known = labels.to(truth), truth != IGNORE_LABEL
    different = pairs = 0
    for axis in (0, 1):
        count = labels.shape[axis] - 1
        both = known.narrow(axis, 0, count) & known.narrow(axis, 1, count)
        unequal = labels.narrow(axis, 0, count) != labels.narrow(axis, 1, count)
        different += int((unequal & both).sum())
        pairs += int(both.sum())
    return different / pairs if pairs else 0.0
