"""Evaluate a model on a split at full resolution: `python -m training.evaluate MODEL DATASET [--split test] ...`."""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
import transformers
from tqdm import tqdm

from depict_hf import DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.inference import segment

from .augmentation import IGNORE_INDEX
from .data import SegmentationDataset, get_split, load_dataset_splits
from .metrics import MeanIoU

METRIC_DEFINITION = "pixels counted over the whole split; classes that occur nowhere are left out of the means"


def evaluate(
    model: DepictForSemanticSegmentation,
    image_processor: DepictImageProcessor,
    samples: SegmentationDataset,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> dict:
    """Segment every photograph at its own size and compare with its label map.

    Args:
        model: In evaluation mode, on any device.
        image_processor: Prepares the photographs.
        samples: Photographs and label maps at full resolution.
        scales, flip: As for `depict_hf.inference.segment`.

    Returns:
        A record ready for JSON: metric and its definition, per-class fractions by name (None where a class occurs
        nowhere), protocol, precision, image count, images per second, and `environment()`.

    Raises:
        ValueError: If the model and the data differ in their number of classes.
    """
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if samples.num_labels != len(names):
        raise ValueError(
            f"The model has {len(names)} classes and the data {samples.num_labels}, needed the same number."
        )
    metric = MeanIoU(len(names), ignore_index=IGNORE_INDEX)
    seconds = 0.0
    for index in tqdm(range(len(samples)), desc="Evaluation", disable=not sys.stderr.isatty()):
        sample = samples[index]
        start = time.perf_counter()
        predictions = segment(model, image_processor, [sample["image"].permute(1, 2, 0).numpy()], scales, flip)
        seconds += time.perf_counter() - start
        metric.add_batch(predictions=predictions, references=[sample["labels"]])
    results = metric.compute()
    return {
        "metric": "mean IoU",
        "metric_definition": METRIC_DEFINITION,
        **{name: results[name] for name in ("mean_iou", "mean_accuracy", "overall_accuracy")},
        "per_class_iou": _by_name(names, results["per_category_iou"]),
        "per_class_accuracy": _by_name(names, results["per_category_accuracy"]),
        "protocol": {
            "size": {key: value for key, value in dict(image_processor.size).items() if value is not None},
            "window_size": model.config.window_size,
            "window_stride": model.config.window_stride,
            "scales": list(scales),
            "flip": flip,
            "resolution": "each photograph's own",
        },
        "precision": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "num_images": len(samples),
        "images_per_second": len(samples) / seconds,
        "environment": environment(),
    }


def environment() -> dict[str, str | int | None]:
    """Versions, commit of the code (None outside a checkout; "+" marks uncommitted changes) and hardware."""
    return {
        "commit": git_commit(Path(__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_threads": torch.get_num_threads(),
    }


def git_commit(folder: Path) -> str | None:
    """Hash of the commit checked out around `folder`, with "+" where tracked files were changed; None without git."""
    try:
        outputs = [
            subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return outputs[0].strip() + ("+" if outputs[1].strip() else "")


def render_table(record: dict) -> str:
    """Per-class IoU and accuracy of a record of `evaluate`, in percent."""
    width = max(len(name) for name in [*record["per_class_iou"], "overall accuracy"])
    lines = [f"{'class':{width}}  {'IoU':>6}  {'acc.':>6}"]
    for name, iou in record["per_class_iou"].items():
        lines.append(f"{name:{width}}  {_percent(iou)}  {_percent(record['per_class_accuracy'][name])}")
    lines.append(f"{'mean':{width}}  {_percent(record['mean_iou'])}  {_percent(record['mean_accuracy'])}")
    lines.append(f"{'overall accuracy':{width}}  {'':6}  {_percent(record['overall_accuracy'])}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("model", help="folder or Hub name of a model with its image processor")
    parser.add_argument("dataset", help="Hub name, or local folder laid out like a Hub dataset")
    parser.add_argument("--split", default="test")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0])
    parser.add_argument("--flip", action="store_true", help="average with the mirror image")
    parser.add_argument("--image-column")
    parser.add_argument("--label-column")
    parser.add_argument("--reduce-labels", action="store_true", help="ignore label 0 and shift the others down by one")
    parser.add_argument("--output", type=Path, help="JSON file for the record")
    arguments = parser.parse_args(argv)
    try:
        model = DepictForSemanticSegmentation.from_pretrained(arguments.model, dtype=torch.float32).eval()
        image_processor = DepictImageProcessor.from_pretrained(arguments.model)
        samples = SegmentationDataset(
            get_split(load_dataset_splits(arguments.dataset), arguments.split),
            model.config.num_labels,
            arguments.image_column,
            arguments.label_column,
            arguments.reduce_labels,
        )
        if torch.cuda.is_available():
            model = model.cuda()
        record = evaluate(model, image_processor, samples, arguments.scales, arguments.flip)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    record |= {"model": arguments.model, "dataset": arguments.dataset, "split": arguments.split}
    print(render_table(record))
    if arguments.output:
        write_json(record, arguments.output)
    return 0


def write_json(record: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def _by_name(names: list[str], values) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in zip(names, values.tolist(), strict=True)}


def _percent(value: float | None) -> str:
    return f"{'-':>6}" if value is None else f"{100 * value:6.2f}"


if __name__ == "__main__":
    sys.exit(main())
