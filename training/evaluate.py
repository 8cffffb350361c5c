"""Evaluate a model on a split at full resolution: `python -m training.evaluate MODEL DATASET [--split test] ...`.

Under `accelerate launch` or, on CPUs too, `torchrun`, processes share the images; the figures are those of one process.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import PIL.Image
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from depict_hf.configuration_depict import IGNORE_LABEL
from depict_hf.labels import colors_for
from depict_hf.loading import BACKENDS, DTYPES, load_model

from .data import SegmentationDataset, load_dataset_splits, open_samples
from .evaluation import (
    CORRUPTIONS,
    EvaluateMeanIoU,
    Execution,
    Protocol,
    WorstImages,
    environment,
    evaluate,
    largest_difference,
    parse_corruptions,
    percent,
    render_table,
    under_corruption,
    write_json,
)

CROSS_CHECK_TOLERANCE = 1e-9


def main(argv: Sequence[str] | None = None) -> int:
    started_in = environment()
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("model", help="folder or Hub name of a model with its image processor")
    add_data_arguments(parser)
    parser.add_argument(
        "--corruption",
        nargs="+",
        default=[],
        metavar="NAME[:SEVERITY]",
        help=f"evaluate under these too: all, {', '.join(CORRUPTIONS)}; all severities, 1 to 5, where none is given",
    )
    parser.add_argument("--contact-sheet", type=Path, metavar="FILE", help="picture of the images of lowest mean IoU")
    parser.add_argument("--worst", type=int, default=8, metavar="N", help="images on the contact sheet (%(default)s)")
    parser.add_argument(
        "--metric",
        choices=("own", "evaluate"),
        default="own",
        help='"evaluate" also computes the real mean_iou of evaluate, which keeps every map, and compares',
    )
    parser.add_argument(
        "--metric-script", default="mean_iou", metavar="PATH", help="that metric's script, where no Hub"
    )
    arguments = parser.parse_args(argv)
    try:
        state = start_processes()
        record = run(arguments, state) | {"environment": started_in}
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if state.is_main_process:
        print(render_table(record))
        print(describe(record))
        if arguments.output:
            write_json(record, arguments.output)
    state.destroy_process_group()
    difference = record.get("cross_check", {}).get("largest_difference", 0.0)
    if difference > CROSS_CHECK_TOLERANCE:
        print(f"error: evaluate's mean_iou differs by {difference:.3g}; see cross_check in the record", file=sys.stderr)
        return 1
    return 0


def start_processes() -> PartialState:
    """This process among those launched together, on the CPU where nothing is faster or accelerate was told so."""
    return PartialState(cpu=not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"))


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that evaluates takes."""
    parser.add_argument("dataset", help="Hub name, or local folder (see training.data.load_dataset_splits)")
    parser.add_argument("--split", default="test")
    parser.add_argument("--max-images", type=int, metavar="N", help="only so many, evenly spaced over the split")
    parser.add_argument("--image-column")
    parser.add_argument("--label-column")
    parser.add_argument(
        "--reduce-labels",
        action=argparse.BooleanOptionalAction,
        help="ignore label 0 and shift the others down by one; as the image processor does, if neither is given",
    )
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="leave out images that cannot be decoded instead of refusing"
    )
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="sizes relative to the model's own")
    parser.add_argument("--flip", action="store_true", help="average with the mirror image")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and computation (%(default)s)")
    parser.add_argument(
        "--backend", choices=BACKENDS, default="pytorch", help="onnxruntime: the model is a folder of `depict export`"
    )
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="images at a time (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that decode (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for the record")


def settings(arguments: argparse.Namespace, state: PartialState) -> tuple[Protocol, Execution]:
    """Protocol and execution of the arguments that `add_data_arguments` added.

    Raises:
        ValueError: If a number is out of its range.
    """
    for name, least in (("batch_size", 1), ("workers", 0)):
        if getattr(arguments, name) < least:
            option = name.replace("_", "-")
            raise ValueError(f"Got --{option} {getattr(arguments, name)}, needed at least {least}.")
    protocol = Protocol(tuple(arguments.scales), arguments.flip, max_images=arguments.max_images)
    return protocol, Execution(arguments.batch_size, arguments.workers, state)


def load_samples(
    arguments: argparse.Namespace, class_names: Sequence[str], reduce_labels: bool, state: PartialState
) -> SegmentationDataset:
    """The split that the arguments of `add_data_arguments` name.

    Args:
        class_names: The model's, in the order of their ids.
        reduce_labels: Where the arguments leave it open.

    Raises:
        OSError: If there is no such dataset.
        ValueError: If there is no such split, its columns are neither given nor found, or images are at fault.
    """
    with state.main_process_first():
        splits = load_dataset_splits(arguments.dataset)
        # The other processes find what the main process found while it read all images.
        return open_samples(
            splits,
            arguments.split,
            class_names,
            arguments.image_column,
            arguments.label_column,
            reduce_labels if arguments.reduce_labels is None else arguments.reduce_labels,
            arguments.skip_unreadable,
            arguments.workers,
        )


def run(arguments: argparse.Namespace, state: PartialState) -> dict:
    """Evaluate as the command line says, and write contact sheets.

    Returns:
        The record of `evaluate` without corruption, and with `corruptions` where some were asked for, `cross_check`
        where the metric of `evaluate` was.

    Raises:
        OSError: If model, data or metric cannot be had.
        ValueError: If arguments do not fit each other or the data.
    """
    corruptions = parse_corruptions(arguments.corruption)
    protocol, execution = settings(arguments, state)
    sheet = check_sheet(arguments.contact_sheet)
    if arguments.metric == "evaluate" and state.num_processes > 1:
        raise ValueError("--metric evaluate keeps every label map in one process; run it without a launcher.")
    model, image_processor = load_model(arguments.model, state.device, arguments.dtype, arguments.backend)
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    samples = load_samples(arguments, names, bool(image_processor.do_reduce_labels), state)
    check = None
    if arguments.metric == "evaluate":
        check = EvaluateMeanIoU(samples.num_labels, IGNORE_LABEL, arguments.metric_script)

    clean, under = None, []
    for corruption in [None, *corruptions]:
        worst = WorstImages(arguments.worst)
        observers = [worst.add] if sheet else []
        if check and corruption is None:
            observers.append(lambda index, image, labels, prediction, confusion: check.add(prediction, labels))
        record = evaluate(
            model, image_processor, samples, replace(protocol, corruption=corruption), execution, observers
        )
        if corruption is None:
            clean = record
        else:
            under.append(under_corruption(record, corruption, clean))
        if sheet:
            suffix = "" if corruption is None else f"-{corruption.name}-{corruption.severity}"
            path = sheet.with_name(f"{sheet.stem}{suffix}{sheet.suffix}")
            save_sheet(worst, samples, model.config.id2label, state, path)
    clean |= {"model": arguments.model, "dataset": arguments.dataset, "split": arguments.split}
    clean["left_out"] = list(samples.left_out)
    if under:
        clean["corruptions"] = under
    if check:
        clean["cross_check"] = compare_metrics(clean, check.compute(), arguments.metric_script)
    return clean


def check_sheet(path: Path | None) -> Path | None:
    """Refuse a file that no picture can be written to, before the images are evaluated.

    Raises:
        ValueError: If its suffix is that of no picture.
    """
    if path is not None and path.suffix.lower() not in PIL.Image.registered_extensions():
        raise ValueError(f"Got --contact-sheet {path}, needed the name of a picture, such as worst.png.")
    return path


def save_sheet(
    worst: WorstImages, samples: SegmentationDataset, id2label: dict[int, str], state: PartialState, path: Path
) -> None:
    """Write the contact sheet of the worst images of all processes."""
    if state.num_processes > 1:
        everywhere = gather_object(worst.images)
        worst = WorstImages(worst.count)
        worst.merge(everywhere)
    if not state.is_main_process:
        return
    names = [id2label[index] for index in range(len(id2label))]
    if not worst.images:
        print(f"{path} is not written: no image has a labelled pixel.", file=sys.stderr)
        return
    titles = [f"{Path(samples.name(each.index)).name} ({each.index})" for each in worst.images]
    path.parent.mkdir(parents=True, exist_ok=True)
    worst.sheet(titles, colors_for(id2label), names).save(path)


def compare_metrics(record: dict, results: dict, source: str) -> dict:
    """Results of `evaluate`'s metric beside ours.

    Returns:
        `source`, `mean_iou`, `mean_accuracy` and `overall_accuracy` of that metric, and `largest_difference` over these
        and all classes.
    """
    ours = {name: record[name] for name in ("mean_iou", "mean_accuracy", "overall_accuracy")} | {
        f"per_category_{kind}": list(record[f"per_class_{kind}"].values()) for kind in ("iou", "accuracy")
    }
    return {
        "source": source,
        **{name: float(results[name]) for name in ("mean_iou", "mean_accuracy", "overall_accuracy")},
        "largest_difference": largest_difference(ours, results),
    }


def describe(record: dict) -> str:
    """The lines below the table: corruptions, the other metric, speed and memory."""
    lines = [
        f"{each['corruption']}:{each['severity']}  mean IoU {percent(each['mean_iou']).strip()}, "
        f"retained {percent(each['retention']).strip()} %"
        for each in record.get("corruptions", ())
    ]
    if "cross_check" in record:
        difference = record["cross_check"]["largest_difference"]
        lines.append(f"mean_iou of evaluate: largest difference {difference:.3g}")
    memory = ", ".join(
        f"{kind} {value / 2**20:.0f} MiB" for kind, value in record["peak_memory_bytes"].items() if value is not None
    )
    lines.append(
        f"{record['num_images']} images, {record['images_per_second']:.2f} a second, metric "
        f"{100 * record['metric_share']:.2f} % of the time, peak memory {memory}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
