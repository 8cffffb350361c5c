"""Gaussian noise on a decoder's attention matrices, on its class tokens, and on the features that it reads.

The encoder runs once per photograph; every noise level and draw then runs the decoder alone on the features kept.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from depict_hf import DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.configuration_depict import IGNORE_LABEL
from depict_hf.decoders import ContractBroadcastAttention, SubspaceAttention
from depict_hf.inference import MAX_BATCH_PIXELS, score_stream
from depict_hf.modeling_depict import DepictSemanticSegmenterOutput
from depict_hf.resampling import size_of
from depict_hf.vit import LayerRecord, ViTLayer
from depict_hf.windows import CoarseScores, label_map, merge_windows, pad_to_multiple

from ..data import SegmentationDataset
from ..evaluation import MeanIoU, scores

# What noise can be added to, and the scales it is measured on. Noise on features is relative only: models on one frozen
# encoder read the same features, so that an absolute scale would be the same curve over another axis.
TARGETS = {
    "attention-noise": ("absolute", "relative"),
    "class-token-noise": ("absolute", "relative"),
    "feature-noise": ("relative",),
}
SIGMAS = {"absolute": (0.001, 0.005, 0.01, 0.03, 0.05, 0.1), "relative": (0.1, 0.3, 0.5, 1.0, 2.0)}
# What counts as attention parameters. All else stays as it is: biases, step sizes, LayerNorms, MLPs, class tokens and
# the projections before and after the layers.
ATTENTION_MATRICES = {
    "sa": "P of every layer, one matrix that is query, key, value and output at once",
    "ca": "P of every layer and of every cross-attention layer, each query, key, value and output at once",
    "cbsa": "of every layer the projection, which is query, key and value at once, and the output matrix",
    "mask_transformer": "of every layer the query, key, value and output matrices, each with a norm of its own",
}


@dataclass(frozen=True, eq=False)
class EncodedBatch:
    """Windows of one photograph that share a forward pass, between encoder and decoder.

    Args:
        patches: `(windows, patches, hidden)`, as the encoder returned them.
        grid_size: `(grid_height, grid_width)`.
        size: (height, width) pixels of a window.
        padded_size: The same with the padding to whole patches.
    """

    patches: Tensor
    grid_size: tuple[int, int]
    size: tuple[int, int]
    padded_size: tuple[int, int]

    def decode(self, decoder: nn.Module, patches: Tensor | None = None) -> Tensor:
        """Return the logits that the whole model has for these windows; with other patch tokens, if they are given."""
        logits = decoder(self.patches if patches is None else patches, self.grid_size)
        if self.padded_size != self.size:
            logits = merge_windows([logits], [(0, 0)], self.size, self.padded_size)
        return logits


@dataclass(frozen=True, eq=False)
class EncodedPhoto:
    """What is needed to label a photograph by a decoder alone and to score it.

    Args:
        index: Index in the split.
        batches: All its windows.
        view: How windows become the photograph; its scores are of no account.
        labels: uint8 or int64, at the size that the view is brought to.
    """

    index: int
    batches: tuple[EncodedBatch, ...]
    view: CoarseScores
    labels: Tensor


class _Recorder:
    """A model, as `score_stream` needs it, that keeps what its encoder returns."""

    def __init__(self, model: DepictForSemanticSegmentation):
        self.model = model
        self.config, self.training, self.device, self.dtype = model.config, model.training, model.device, model.dtype
        self.batches: list[EncodedBatch] = []

    def __call__(self, pixel_values: Tensor, /) -> DepictSemanticSegmenterOutput:
        padded = pad_to_multiple(pixel_values.to(self.dtype), self.config.encoder_patch_size)
        patches, grid_size = self.model.encoder(padded, LayerRecord())
        batch = EncodedBatch(patches, tuple(grid_size), size_of(pixel_values), size_of(padded))
        self.batches.append(batch)
        return DepictSemanticSegmenterOutput(logits=batch.decode(self.model.decoder))


def encode_photos(
    model: DepictForSemanticSegmentation,
    image_processor: DepictImageProcessor,
    samples: SegmentationDataset,
    indices: Sequence[int],
    label_size: int | None = None,
    max_batch_pixels: int = MAX_BATCH_PIXELS,
) -> list[EncodedPhoto]:
    """Run the encoder on photographs of a split, at one scale, and keep its output in memory.

    Args:
        indices: Which photographs.
        label_size: Pixels of the shorter side at most at which labels are compared: larger label maps are reduced by
            taking nearest pixels, and logits are brought to the same size. None compares every pixel.

    Raises:
        ValueError: If `label_size` is not positive, an image cannot be read, or the model is in training mode.
    """
    if label_size is not None and label_size < 1:
        raise ValueError(f"Got a label size of {label_size} pixels, needed at least 1.")
    photos = []
    for index in indices:
        sample, recorder = samples[index], _Recorder(model)
        photo = sample["image"].permute(1, 2, 0).numpy()
        [[view]] = score_stream(recorder, image_processor, [photo], max_batch_pixels=max_batch_pixels)
        labels = sample["labels"].to(torch.uint8 if samples.num_labels <= IGNORE_LABEL else torch.long)
        labels = reduce_labels(labels, label_size)
        height, width = labels.shape
        view = CoarseScores(
            view.mosaic[:0],
            replace(view.vertical, target_length=height),
            replace(view.horizontal, target_length=width),
        )
        photos.append(EncodedPhoto(index, tuple(recorder.batches), view, labels.to(model.device)))
    return photos


def reduce_labels(labels: Tensor, label_size: int | None) -> Tensor:
    """Reduce a label map `(height, width)` to a shorter side of at most `label_size`, taking the pixels at centres."""
    shorter = min(labels.shape)
    if label_size is None or shorter <= label_size:
        return labels
    for axis, length in enumerate(labels.shape):
        count = max(1, round(length * label_size / shorter))
        labels = labels.index_select(axis, ((torch.arange(count) + 0.5) * length / count).long())
    return labels


def confusion(
    model: DepictForSemanticSegmentation, photo: EncodedPhoto, patches: Sequence[Tensor] | None = None
) -> Tensor:
    """Label a photograph by the decoder as it is now, and count as `MeanIoU.count` does.

    Args:
        patches: Other patch tokens than those kept, per batch.
    """
    given: Sequence[Tensor | None] = [None] * len(photo.batches) if patches is None else patches
    logits = torch.cat(
        [batch.decode(model.decoder, each) for batch, each in zip(photo.batches, given, strict=True)]
    ).float()
    prediction = label_map([photo.view.with_logits(list(logits))])
    return MeanIoU(model.config.num_labels, IGNORE_LABEL).count(prediction.to(photo.labels.dtype), photo.labels)


def attention_matrices(model: DepictForSemanticSegmentation) -> dict[str, Tensor]:
    """Return the matrices of `ATTENTION_MATRICES` by name, as views on the model's weights.

    Raises:
        ValueError: If the decoder has no attention.
    """
    kind = model.config.decoder_type
    if kind not in ATTENTION_MATRICES:
        raise ValueError(f"A decoder of type {kind!r} has no attention; it exists in {', '.join(ATTENTION_MATRICES)}.")
    found: dict[str, Tensor] = {}
    for part in ("layers", "cross_layers"):
        for index, layer in enumerate(getattr(model.decoder, part, ())):
            found |= {f"{part}.{index}.{name}": matrix.detach() for name, matrix in _matrices(layer).items()}
    return found


def _matrices(layer: nn.Module) -> dict[str, Tensor]:
    if isinstance(layer, SubspaceAttention):
        return {"projection": layer.projection}
    if isinstance(layer, ContractBroadcastAttention):
        return {"projection": layer.projection.weight, "output": layer.output.weight}
    assert isinstance(layer, ViTLayer)  # there are no others
    parts = zip(("query", "key", "value"), layer.attention.qkv.weight.chunk(3), strict=True)
    return {**dict(parts), "output": layer.attention.projection.weight}


def class_tokens(model: DepictForSemanticSegmentation) -> dict[str, Tensor]:
    """Return the class tokens, as learned, by name.

    Raises:
        ValueError: If the decoder has none.
    """
    tokens = getattr(model.decoder, "class_tokens", None)
    if tokens is None:
        raise ValueError(f"A decoder of type {model.config.decoder_type!r} has no class tokens.")
    return {"class_tokens": tokens.detach()}


def root_mean_square(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def standard_normal(name: str, draw: int, like: Tensor) -> Tensor:
    """Draw independent normal numbers of variance 1; they depend on name, number of the draw and shape alone."""
    state = np.random.SeedSequence([zlib.crc32(name.encode()), draw]).generate_state(1)
    generator = torch.Generator().manual_seed(int(state[0]))
    return torch.randn(like.shape, generator=generator).to(like)


@contextmanager
def added(tensors: Mapping[str, Tensor], noise: Mapping[str, Tensor]) -> Iterator[None]:
    """Add noise to weights, in place; on exit they have their old values bit for bit."""
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    try:
        for name, tensor in tensors.items():
            tensor.add_(noise[name])
        yield
    finally:
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])


@torch.no_grad()
def measure_noise(
    model: DepictForSemanticSegmentation,
    photos: Sequence[EncodedPhoto],
    target: str,
    sigmas: Mapping[str, Sequence[float]],
    draws: int,
) -> dict:
    """Score a model under noise of every level and draw. Draw k is the same noise at every level, and in every model.

    Args:
        photos: As `encode_photos` made them with this model, or another one of the same encoder.
        target: A key of `TARGETS`.
        sigmas: Standard deviations by scale: "absolute" as they are, "relative" times the root mean square of each
            matrix, of the class tokens, or of a photograph's features.
        draws: How many draws.

    Returns:
        `clean`, the mean IoU without noise, and `scores`: by scale one list per level, of the mean IoU of each draw;
        `removed`, of attention matrices, the mean IoU with all at zero; `root_mean_squares` by name, for features their
        mean over the photographs. For a decoder without the target
        only `left_out`, which says so.

    Raises:
        ValueError: If no pixel is labelled.
    """
    tensors: dict[str, Tensor] = {}
    if target != "feature-noise":
        try:
            tensors = attention_matrices(model) if target == "attention-noise" else class_tokens(model)
        except ValueError as error:
            return {"left_out": str(error)}
    levels = [(scale, sigma) for scale in TARGETS[target] for sigma in sigmas[scale]]
    size = model.config.num_labels + 1
    counts = torch.zeros(len(levels), draws, size, size, dtype=torch.long, device=model.device)
    clean = torch.stack([confusion(model, photo) for photo in photos]).sum(0)
    if not clean.any():
        raise ValueError(f"None of the {len(photos)} photographs has a labelled pixel; take more, or another split.")
    if target == "feature-noise":
        lengths = [root_mean_square(torch.cat([each.patches for each in photo.batches])) for photo in photos]
        for photo, length in zip(photos, lengths, strict=True):
            for draw in range(draws):
                noise = [
                    standard_normal(f"features {photo.index} {number}", draw, batch.patches)
                    for number, batch in enumerate(photo.batches)
                ]
                for level, (_, sigma) in enumerate(levels):
                    patches = [
                        batch.patches + sigma * length * each for batch, each in zip(photo.batches, noise, strict=True)
                    ]
                    counts[level, draw] += confusion(model, photo, patches)
        sizes = {"features": sum(lengths) / len(lengths)}
    else:
        sizes = {name: root_mean_square(tensor) for name, tensor in tensors.items()}
        for draw in range(draws):
            normal = {name: standard_normal(name, draw, tensor) for name, tensor in tensors.items()}
            for level, (scale, sigma) in enumerate(levels):
                noise_by_name = {
                    name: sigma * (sizes[name] if scale == "relative" else 1) * each for name, each in normal.items()
                }
                with added(tensors, noise_by_name):
                    for photo in photos:
                        counts[level, draw] += confusion(model, photo)
    results: dict[str, list[list[float]]] = {scale: [] for scale in TARGETS[target]}
    for (scale, _), each in zip(levels, counts, strict=True):
        results[scale].append([scores(count)["mean_iou"] for count in each])
    removed = {"removed": score_without(model, photos, tensors)} if target == "attention-noise" else {}
    return {"clean": scores(clean)["mean_iou"], "scores": results, **removed, "root_mean_squares": sizes}


@torch.no_grad()
def score_without(
    model: DepictForSemanticSegmentation, photos: Sequence[EncodedPhoto], tensors: Mapping[str, Tensor]
) -> float:
    """Return the mean IoU with weights at zero: what noise cannot take away, since it does not come from them."""
    with added(tensors, {name: -tensor for name, tensor in tensors.items()}):
        return scores(torch.stack([confusion(model, photo) for photo in photos]).sum(0))["mean_iou"]
