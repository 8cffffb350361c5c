"""Photographs of a split segmented at full resolution and compared with their label maps, by one or many processes."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from depict_hf import DepictImageProcessor
from depict_hf.configuration_depict import IGNORE_LABEL
from depict_hf.inference import MAX_BATCH_PIXELS, score_stream
from depict_hf.modeling_depict import SegmentationModel
from depict_hf.photo_files import shown_lines
from depict_hf.windows import CoarseScores, label_map

from ..data import SegmentationDataset, UnreadableImageError
from .corruptions import Corruption
from .measurement import peak_resident_bytes, wait_for
from .metrics import MeanIoU, scores
from .records import class_names, environment

METRIC_DEFINITION = "pixels counted over the whole split; classes that occur nowhere are left out of the means"
Observer = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
ScoreObserver = Callable[[int, Sequence[CoarseScores], Tensor], None]
# A photograph, uint8 `(3, height, width)`, and its index in the split to another one of the same form.
PhotoChange = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Protocol:
    """What decides the figures, beside model and data.

    Args:
        scales, flip: As for `depict_hf.inference.segment`.
        corruption: Applied to the photographs: a `Corruption`, or another change of them that `str` names.
        max_images: Evaluate at most so many, evenly spaced over the split.
        classes: Ids of the classes that are scored, None for all; what is labelled otherwise is ignored, and what is
            taken for another class is wrong.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    corruption: Corruption | PhotoChange | None = None
    max_images: int | None = None
    classes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Execution:
    """How the figures are computed, which does not change them.

    Args:
        batch_size_images: Photographs that are segmented together.
        num_workers: Processes that read and decode; with 0, the evaluating process does.
        state: Of the processes that share the images; None evaluates all of them in this one.
        max_batch_pixels: As for `depict_hf.inference.segment`.
    """

    batch_size_images: int = 4
    num_workers: int = 0
    state: PartialState | None = None
    max_batch_pixels: int = MAX_BATCH_PIXELS


def evaluate(
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    samples: SegmentationDataset,
    protocol: Protocol = Protocol(),
    execution: Execution = Execution(),
    observers: Sequence[Observer] = (),
    score_observers: Sequence[ScoreObserver] = (),
) -> dict:
    """Segment every photograph at its own size and compare with its label map.

    Args:
        model: In evaluation mode, on any device; the metric is counted there too.
        image_processor: Prepares the photographs.
        samples: Photographs and label maps at full resolution.
        observers: Called with every image of this process: index in the split, image uint8 `(3, height, width)`, label
            map and prediction `(height, width)`, and its confusion matrix as of `MeanIoU.count`.
        score_observers: Called before them: index in the split, the image's views as of `inference.score_stream`, and
            its label map.

    Returns:
        A record ready for JSON, the same in all processes: metric and its definition, per-class fractions by name (None
        where a class occurs nowhere), protocol, precision, image count and names of images left out, speed and memory
        of `_costs`, and `environment()` as it was at the start.

    Raises:
        ValueError: If the model and the data differ in their number of classes, or an image cannot be read.
    """
    started_in = environment()
    names = class_names(model.config)
    if samples.num_labels != len(names):
        raise ValueError(
            f"The model has {len(names)} classes and the data {samples.num_labels}, needed the same number."
        )
    indices = spread(len(samples), protocol.max_images)
    watchers = (observers, score_observers)
    confusion, measured = _count(model, image_processor, samples, indices, protocol, execution, *watchers)
    left_out = sorted(index for each in measured for index in each["left_out"])
    scored = range(len(names)) if protocol.classes is None else protocol.classes
    results = scores(_among(confusion, scored))
    return {
        "metric": "mean IoU",
        "metric_definition": METRIC_DEFINITION,
        **{name: _number(results[name]) for name in ("mean_iou", "mean_accuracy", "overall_accuracy")},
        "per_class_iou": {names[each]: _number(results["per_category_iou"][each]) for each in scored},
        "per_class_accuracy": {names[each]: _number(results["per_category_accuracy"][each]) for each in scored},
        "protocol": {
            "size": {key: value for key, value in dict(image_processor.size).items() if value is not None},
            "window_size": model.config.window_size,
            "window_stride": model.config.window_stride,
            "scales": list(protocol.scales),
            "flip": protocol.flip,
            "corruption": str(protocol.corruption) if protocol.corruption else None,
            "resolution": "each photograph's own",
        },
        "precision": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "num_images": len(indices) - len(left_out),
        "left_out": [*samples.left_out, *(samples.name(index) for index in left_out)],
        **_costs(measured),
        "environment": started_in,
    }


def evaluate_under(
    corruptions: Sequence[Corruption],
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    samples: SegmentationDataset,
    protocol: Protocol = Protocol(),
    execution: Execution = Execution(),
    observers: Callable[[Corruption | None], Sequence[Observer]] = lambda corruption: (),
    score_observers: Sequence[ScoreObserver] = (),
) -> dict:
    """Evaluate the photographs as they are, and then under every corruption.

    Args:
        corruptions: One pass over the split each.
        observers: Called before each pass, with its corruption or None; returns the observers of that pass.
        score_observers: Of the photographs as they are. The other arguments are those of `evaluate`.

    Returns:
        The record of `evaluate` for the photographs as they are, with `corruptions`, in their order, where there are
        any: what `under_corruption` makes of each pass.

    Raises:
        ValueError: As `evaluate` does.
    """
    clean = evaluate(model, image_processor, samples, protocol, execution, observers(None), score_observers)
    under = []
    for corruption in corruptions:
        corrupted = replace(protocol, corruption=corruption)
        record = evaluate(model, image_processor, samples, corrupted, execution, observers(corruption))
        under.append(under_corruption(record, corruption, clean))
    return clean | ({"corruptions": under} if under else {})


def under_corruption(record: dict, corruption: Corruption, clean: dict) -> dict:
    """What a record says of a corruption, beside the `clean` one of the same model and protocol.

    Returns:
        Name and severity, `mean_iou`, `mean_accuracy`, `overall_accuracy`, `per_class_iou`, and `retention`: mean IoU
        as a fraction of the clean one (None where that is 0 or nothing is labelled).
    """
    figures = {name: record[name] for name in ("mean_iou", "mean_accuracy", "overall_accuracy", "per_class_iou")}
    retention = record["mean_iou"] / clean["mean_iou"] if clean["mean_iou"] else None
    return {"corruption": corruption.name, "severity": corruption.severity, **figures, "retention": retention}


def _count(
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    samples: SegmentationDataset,
    indices: Sequence[int],
    protocol: Protocol,
    execution: Execution,
    observers: Sequence[Observer],
    score_observers: Sequence[ScoreObserver],
) -> tuple[Tensor, list[dict]]:
    """Confusion matrix over the images of all processes, and what each of them measured."""
    state, device = execution.state, model.device
    rank, num_processes = (0, 1) if state is None else (state.process_index, state.num_processes)
    loader = DataLoader(
        _Photographs(samples, protocol.corruption),
        execution.batch_size_images,
        sampler=indices[rank::num_processes],
        num_workers=execution.num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # so that evaluating does not move the global one
    )
    metric = MeanIoU(samples.num_labels, IGNORE_LABEL)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model_seconds = metric_seconds = 0.0
    left_out: list[int] = []
    start = time.perf_counter()
    for items in tqdm(loader, desc="Evaluation", disable=rank > 0 or not sys.stderr.isatty()):
        batch = [item for item in items if not isinstance(item, _Failure)]
        left_out += [item.leave_out(samples) for item in items if isinstance(item, _Failure)]
        begin = time.perf_counter()
        photos = [image.permute(1, 2, 0).numpy() for _, image, _ in batch]
        predictions = []
        observing = 0.0
        stream = score_stream(
            model, image_processor, photos, protocol.scales, protocol.flip, execution.max_batch_pixels
        )
        for views, (index, _, labels) in zip(stream, batch, strict=True):
            predictions.append(label_map(views))
            if score_observers:
                wait_for(device)
                observed_from = time.perf_counter()
                for watch in score_observers:
                    watch(index, views, labels)
                observing += time.perf_counter() - observed_from
        wait_for(device)
        segmented = time.perf_counter()
        pairs = [
            (prediction.to(labels.dtype).to(device), labels.to(device))
            for prediction, (_, _, labels) in zip(predictions, batch, strict=True)
        ]
        counts = [metric.count(*pair) for pair in pairs]
        for each in counts:
            metric.add(each)
        wait_for(device)
        counted = time.perf_counter()
        model_seconds += segmented - begin - observing
        metric_seconds += counted - segmented
        for (index, image, _), (prediction, labels), each in zip(batch, pairs, counts, strict=True):
            for observe in observers:
                observe(index, image, labels, prediction, each)
    measured = {
        "images": len(indices[rank::num_processes]) - len(left_out),
        "left_out": left_out,
        "seconds": time.perf_counter() - start,
        "model_seconds": model_seconds,
        "metric_seconds": metric_seconds,
        "resident": peak_resident_bytes(),
        "cuda": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
    confusion = metric.confusion.to(device)
    if num_processes == 1:
        return confusion, [measured]
    return reduce(confusion, "sum"), gather_object([measured])


@dataclass(frozen=True)
class _Failure:
    """An image that cannot be read: raised in a worker, the error would arrive with the worker's stack."""

    index: int
    error: ValueError

    def leave_out(self, samples: SegmentationDataset) -> int:
        """Name it on stderr and return its index; raise the error if such images are not to be left out."""
        if not (samples.skip_unreadable and isinstance(self.error, UnreadableImageError)):
            raise self.error
        print(f"left out: {shown_lines(self.error)}", file=sys.stderr, flush=True)
        return self.index


class _Photographs(Dataset):
    """Index, photograph `(3, height, width)` uint8 and label map, small enough to be handed over by a worker."""

    def __init__(self, samples: SegmentationDataset, corruption: PhotoChange | None):
        self.samples = samples
        self.corruption = corruption
        self.label_dtype = torch.uint8 if samples.num_labels <= IGNORE_LABEL else torch.long

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor] | _Failure:
        try:
            sample = self.samples[index]
        except ValueError as error:
            return _Failure(index, error)
        image = sample["image"] if self.corruption is None else self.corruption(sample["image"], index)
        return index, image, sample["labels"].to(self.label_dtype)


def _costs(measured: Sequence[dict]) -> dict:
    """Speed and memory of the processes together.

    Returns:
        `num_processes`; `images_per_second` of the whole loop, reading included, and `images_per_second_model_alone`,
        from photograph to label map; `metric_share`, the metric's own share of the time, a fraction;
        `peak_memory_bytes`, of the process with most: `resident` since it began (without its workers), `cuda` what
        tensors occupied during the run. What cannot be had, or is not defined for lack of images, is None.
    """
    images = sum(each["images"] for each in measured)
    model_rates = [each["images"] / each["model_seconds"] for each in measured if each["images"]]
    seconds = [each["seconds"] for each in measured]
    return {
        "num_processes": len(measured),
        "images_per_second": images / max(seconds),
        "images_per_second_model_alone": sum(model_rates) if model_rates else None,
        "metric_share": sum(each["metric_seconds"] for each in measured) / sum(seconds),
        "peak_memory_bytes": {
            kind: max((each[kind] for each in measured if each[kind] is not None), default=None)
            for kind in ("resident", "cuda")
        },
    }


def spread(count: int, at_most: int | None) -> list[int]:
    """Indices from 0 to `count - 1`: all, or so many at even distances from the first on.

    Raises:
        ValueError: If `at_most` is not positive.
    """
    if at_most is not None and at_most < 1:
        raise ValueError(f"Got at most {at_most} images, needed at least 1.")
    kept = count if at_most is None else min(count, at_most)
    return [position * count // kept for position in range(kept)]


def _among(confusion: Tensor, classes: Sequence[int]) -> Tensor:
    """Return a confusion matrix as of `MeanIoU` in which other classes are neither labelled nor told from none."""
    others = [each for each in range(len(confusion) - 1) if each not in classes]
    confusion = confusion.clone()
    confusion[others] = 0
    confusion[:, -1] += confusion[:, others].sum(dim=1)
    confusion[:, others] = 0
    return confusion


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else float(value)
