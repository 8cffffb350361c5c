"""Published checkpoints of DEPICT and Segmenter into ours, and the protocol that their figures were made with."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .configuration_depict import DepictConfig
from .encoder_weights import check_exactly, load_encoder, load_exactly, read_weights
from .image_processing_depict import DepictImageProcessor
from .labels import class_names as class_names_of
from .labels import read_class_names
from .modeling_depict import DepictForSemanticSegmentation
from .published_files import (
    MASK_TRANSFORMER_HEAD_DIM,
    SUBSPACE_DIM,
    config_fields,
    count_classes,
    doubts,
    not_read,
    read_checkpoint,
    read_variant,
    rename_parameters,
)
from .ranges import check_whole
from .weight_files import check_finite, file_checksum

__all__ = [
    "MASK_TRANSFORMER_HEAD_DIM",
    "NORMALIZATIONS",
    "PROTOCOLS",
    "PUBLISHED_OVERLAP",
    "PUBLISHED_SIZES",
    "SUBSPACE_DIM",
    "Conversion",
    "convert_checkpoint",
    "convert_with_report",
    "load_encoder",
    "published_normalization",
    "published_protocol",
    "read_checkpoint",
    "read_variant",
    "read_weights",
    "rename_parameters",
]

logger = logging.getLogger(__name__)

# How the published figures were made, by data set: pixels of the shorter side (`im_size`, segm/config.yml, which goes
# before the size that the model was trained at), and how many times that the longer side may have at most
# (`max_ratio`, segm/data/config/*.py; both in rstrudel/segmenter@20d1bfa). The windows follow from the crops of
# training, see `published_protocol`.
PUBLISHED_SIZES = {"ade20k": (512, 4), "pascal_context": (520, 8), "cityscapes": (1024, 2)}
# Pixels that neighbouring windows share: segm/eval/miou.py in rstrudel/segmenter@20d1bfa.
PUBLISHED_OVERLAP = 32
PROTOCOLS = ("published", "training")

# `STATS`, segm/data/utils.py in rstrudel/segmenter@20d1bfa.
NORMALIZATIONS = {
    "vit": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "deit": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class Conversion:
    """What `convert_with_report` made, and from what.

    Attributes:
        model: A model in evaluation mode, float32.
        image_processor: Carries, with the model's window, the protocol.
        report: Lines for people: decoder, classes and where their names are from, encoder, protocol and where it is
            from, parameters that were dropped.
        warning: Why the protocol is not that of published figures although it was asked for, and what
            `published_files.doubts` says of the variant; None where there is nothing.
        checkpoint: The file of weights.
    """

    model: DepictForSemanticSegmentation
    image_processor: DepictImageProcessor
    report: tuple[str, ...]
    warning: str | None = None
    checkpoint: Path | None = None

    def record(self) -> dict[str, Any]:
        """Return what the converted model's card says of its origin, ready for JSON.

        `name` is that of the folder the checkpoint lies in, as the authors name models; `checkpoint_sha256` the
        checksum of the file. Paths are left out.
        """
        assert self.checkpoint is not None
        return {
            "name": self.checkpoint.absolute().parent.name,
            "checkpoint": self.checkpoint.name,
            "checkpoint_sha256": file_checksum(self.checkpoint),
            "report": list(self.report),
            "warning": self.warning,
        }


def convert_checkpoint(
    checkpoint: str | Path,
    variant: str | Path | None = None,
    protocol: str = "published",
    im_size: int | None = None,
    class_names: Sequence[str] | str | Path | None = None,
) -> tuple[DepictForSemanticSegmentation, DepictImageProcessor]:
    """Read a model that the authors of DEPICT or of Segmenter published, or that their code trained.

    The decoder's kind, depth and widths, the number of classes and the encoder's shape come from the weights; the
    number of encoder heads, dropout, normalisation, data set and crop size from the variant file. Nothing in either
    file is executed.

    Args:
        checkpoint: Path of `checkpoint.pth`, or of the folder that holds it.
        variant: Path of `variant.yml`; by default the one beside the checkpoint.
        protocol: "published": as the published figures were made, see `published_protocol`; for a data set that is
            not in `PUBLISHED_SIZES`, the sizes are the variant's own, which is logged. "training": as validation
            during training was, by the variant's `inference_kwargs`, with means and deviations that are not rounded.
        im_size: Pixels of the shorter side, instead of the protocol's; the bound of the longer side moves along.
        class_names: One for each class, in the order of their ids, or the path of a file of them as
            `labels.read_class_names` reads; by default those of the data set that the variant names, where their count
            fits.

    Returns:
        The model in evaluation mode, float32, and its image processor; both are ready for `save_pretrained`, and carry
        the protocol: `segment` alone predicts by it.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file holds more than data, a parameter is missing, left over or of another shape, or an
            argument does not fit the model.

    Source:
        `load_model`, segm/model/factory.py, and `main`, segm/eval/miou.py in rstrudel/segmenter@20d1bfa.
    """
    conversion = convert_with_report(checkpoint, variant, protocol, im_size, class_names)
    if conversion.warning:
        logger.warning(conversion.warning)
    return conversion.model, conversion.image_processor


def convert_with_report(
    checkpoint: str | Path,
    variant: str | Path | None = None,
    protocol: str = "published",
    im_size: int | None = None,
    class_names: Sequence[str] | str | Path | None = None,
) -> Conversion:
    """Convert as `convert_checkpoint` does, and give an account of what was done.

    Raises:
        OSError, ValueError: As `convert_checkpoint`.
    """
    checkpoint = Path(checkpoint)
    if checkpoint.is_dir():
        checkpoint = checkpoint / "checkpoint.pth"
    variant = checkpoint.with_name("variant.yml") if variant is None else Path(variant)
    for path in (checkpoint, variant):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; a published model is a checkpoint.pth with the variant.yml beside it."
            )
    if protocol not in PROTOCOLS:
        raise ValueError(f"Got protocol={protocol!r}, needed one of {', '.join(PROTOCOLS)}.")
    if im_size is not None:
        if not isinstance(im_size, int) or im_size < 1:
            raise ValueError(f"Got im_size={im_size!r}, needed a positive number of pixels.")
        check_whole("im_size", im_size)
    state_dict = read_checkpoint(checkpoint)
    settings = read_variant(variant)
    fields = config_fields(state_dict, settings)
    num_labels = count_classes(state_dict)
    dataset = _dataset(settings, num_labels)
    labels, names_from = _label_fields(num_labels, dataset, class_names)
    reading, protocol_from, warning = _reading(settings, dataset, protocol, im_size)
    size = reading.pop("size")
    image_processor = _image_processor_from(settings, size, rounded=protocol == "published")
    config = DepictConfig(**fields, **reading, **labels)
    renamed = rename_parameters(state_dict)
    # Before memory is taken for sizes that only one of the weights may have.
    with torch.device("meta"):
        check_exactly(DepictForSemanticSegmentation(config), renamed)
    model = DepictForSemanticSegmentation(config)
    load_exactly(model, renamed)
    check_finite(model.state_dict().items(), str(checkpoint))

    dropped = sorted(name for name in state_dict if not rename_parameters({name: state_dict[name]}))
    report = (
        f"decoder {config.decoder_type}, {num_labels} classes, {model.num_parameters() / 1e6:.1f} million parameters, "
        f"window {config.window_size} / {config.window_stride}",
        f"class names: {names_from}",
        f"encoder: {settings['net_kwargs'].get('backbone', 'unnamed')}, {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}, patches of {config.patch_size} pixels, trained on {config.image_size}",
        f"protocol: {protocol}, from {protocol_from}: size {size}, window_size {config.window_size}, window_stride "
        f"{config.window_stride}",
        f"parameters dropped: {', '.join(dropped) or 'none'}",
        f"settings not read: {', '.join(not_read(settings)) or 'none'}",
    )
    warning = " ".join(([warning] if warning else []) + doubts(settings, num_labels)) or None
    return Conversion(model.eval(), image_processor, report, warning, checkpoint)


def published_protocol(dataset: str, crop_size: int, im_size: int | None = None) -> dict[str, Any]:
    """Say how the published figures of a data set were made, in the words of our configuration.

    Every recipe of a row of the paper and every converted model take it from here. In multi-scale evaluation both
    bounds of `size` are multiplied by the scale and cut off to whole pixels; windows stay as they are.

    Args:
        dataset: A key of `PUBLISHED_SIZES`.
        crop_size: Side in pixels of the squares that the model was trained on.
        im_size: Pixels of the shorter side, instead of the data set's.

    Returns:
        `size` of the image processor, `window_size` and `window_stride` of the model. Images with a side below the
        window are enlarged to it, after normalisation.

    Raises:
        ValueError: If the data set is not known, or squares of `crop_size` are too small to overlap as published.

    Source:
        `main`, segm/eval/miou.py, and `BaseMMSeg`, segm/data/base.py in rstrudel/segmenter@20d1bfa.
    """
    if dataset not in PUBLISHED_SIZES:
        raise ValueError(f"Got dataset={dataset!r}, needed one of {', '.join(PUBLISHED_SIZES)}.")
    shortest_edge, max_ratio = PUBLISHED_SIZES[dataset]
    shortest_edge = im_size or shortest_edge
    return {
        "size": {"shortest_edge": shortest_edge, "longest_edge": max_ratio * shortest_edge},
        **_published_windows(crop_size),
    }


def _published_windows(crop_size: int) -> dict[str, int]:
    if crop_size <= PUBLISHED_OVERLAP:
        raise ValueError(
            f"Got crop_size={crop_size}, but windows of the published protocol overlap by {PUBLISHED_OVERLAP} pixels "
            'and must be larger; convert with protocol="training".'
        )
    return {"window_size": crop_size, "window_stride": crop_size - PUBLISHED_OVERLAP}


def published_normalization(kind: str) -> tuple[list[float], list[float]]:
    """Return the means and deviations of each channel, for values in 0 to 1, as in the published evaluation.

    They are rounded to two decimals on the scale of 0 to 255 there, so that for "deit" 123.675 became 123.68.

    Args:
        kind: A key of `NORMALIZATIONS`.

    Source:
        `BaseMMSeg.__init__`, segm/data/base.py in rstrudel/segmenter@20d1bfa.
    """
    mean, std = ((np.round(255 * np.array(values), 2) / 255).tolist() for values in NORMALIZATIONS[kind])
    return mean, std


def _dataset(settings: dict, num_labels: int) -> str | None:
    """Name the data set that the variant names or, if it names none, the published one with as many classes."""
    named = settings.get("dataset_kwargs", {}).get("dataset")
    if named is not None:
        return str(named)
    return next((name for name in PUBLISHED_SIZES if len(class_names_of(name)) == num_labels), None)


def _label_fields(num_labels: int, dataset: str | None, names: Sequence[str] | str | Path | None) -> tuple[dict, str]:
    """Return the fields of the configuration on the classes, and where their names are from."""
    origin = "given"
    if isinstance(names, (str, Path)):
        names, origin = read_class_names(Path(names)), f"read from {names}"
    elif names is None and dataset in PUBLISHED_SIZES and len(class_names_of(dataset)) == num_labels:
        names, origin = class_names_of(dataset), f"those of {dataset}"
    if names is None:
        return {"num_labels": num_labels}, f"none known for {num_labels} classes of the data set {dataset}"
    if len(names) != num_labels or len(set(names)) != len(names):
        raise ValueError(
            f"Got {len(names)} class names, {len(set(names))} of them different, for a model of {num_labels} classes; "
            "give another one for each class, in the order of their ids."
        )
    return {"id2label": dict(enumerate(names)), "label2id": {label: i for i, label in enumerate(names)}}, origin


def _reading(
    settings: dict, dataset: str | None, protocol: str, im_size: int | None
) -> tuple[dict[str, Any], str, str | None]:
    """Return how the converted model reads photographs.

    Returns:
        `size`, `window_size` and `window_stride`, where they are from, and a warning where that is no published source.

    Raises:
        ValueError: If the variant lacks a number that is needed.
    """
    training = settings.get("dataset_kwargs", {})
    validation = settings.get("inference_kwargs", {})
    if protocol == "training":
        side = im_size or validation.get("im_size", training.get("image_size"))
        windows = {
            "window_size": validation.get("window_size", training.get("crop_size")),
            "window_stride": validation.get("window_stride"),
        }
        return {"size": _shortest(side), **windows}, "inference_kwargs of the variant", None
    # The published code trains on squares of the size that it builds the encoder for.
    crop_size = training.get("crop_size", np.min(settings["net_kwargs"].get("image_size", 0)).item())
    check_whole("crop_size of variant.yml", crop_size)
    if dataset in PUBLISHED_SIZES:
        return published_protocol(dataset, crop_size, im_size), f"the settings published for {dataset}", None
    side = im_size or training.get("image_size", validation.get("im_size"))
    warning = (
        f"The data set {dataset} is none of those that the published figures are for ({', '.join(PUBLISHED_SIZES)}): "
        "the shorter side is the variant's own image_size, and the longer side is not bounded."
    )
    return (
        {"size": _shortest(side), **_published_windows(crop_size)},
        "image_size and crop_size of the variant",
        warning,
    )


def _shortest(side: object) -> dict[str, int]:
    if not isinstance(side, int) or isinstance(side, bool):
        raise ValueError(f"variant.yml has image_size or im_size {side!r}, needed a number of pixels; give im_size.")
    check_whole("image_size or im_size of variant.yml", side)
    return {"shortest_edge": side}


def _image_processor_from(settings: dict, size: dict[str, int], rounded: bool) -> DepictImageProcessor:
    """Build the image processor of `size` with the variant's normalisation, rounded as published or not."""
    kind = settings.get("dataset_kwargs", {}).get("normalization", settings["net_kwargs"].get("normalization"))
    if not isinstance(kind, str) or kind not in NORMALIZATIONS:
        raise ValueError(f"variant.yml has normalization={kind!r}, needed one of {', '.join(NORMALIZATIONS)}.")
    mean, std = published_normalization(kind) if rounded else map(list, NORMALIZATIONS[kind])
    return DepictImageProcessor(size=size, image_mean=mean, image_std=std)
