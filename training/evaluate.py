"""Evaluate a model on a split at full resolution: `python -m training.evaluate MODEL DATASET [--split test] ...`.

Under `accelerate launch` or, on CPUs too, `torchrun`, processes share the images; the figures are those of one process.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

from depict_hf.configuration_depict import IGNORE_LABEL
from depict_hf.photo_files import shown_lines

from .evaluation import (
    CORRUPTIONS,
    Calibration,
    CalibrationObserver,
    Corruption,
    EvaluateMeanIoU,
    Execution,
    Observer,
    Protocol,
    WorstImages,
    add_data_arguments,
    check_diagram,
    check_outputs,
    check_sheet,
    class_names,
    compare_metrics,
    describe,
    draw_reliability,
    end_processes,
    environment,
    evaluate,
    evaluate_under,
    load_samples,
    load_with_overrides,
    open_shared_samples,
    parse_corruptions,
    read_shared_classes,
    render_table,
    save_sheet,
    settings,
    start_processes,
    write_json,
)
from .stopping import run_stoppable

# Names that this module had before what they stand for moved into a room stay importable from here.
__all__ = [
    "Execution",
    "Protocol",
    "add_data_arguments",
    "check_sheet",
    "compare_metrics",
    "describe",
    "environment",
    "evaluate",
    "load_samples",
    "main",
    "render_table",
    "run",
    "save_sheet",
    "settings",
    "start_processes",
    "write_json",
]

CROSS_CHECK_TOLERANCE = 1e-9


def main(argv: Sequence[str] | None = None, prog: str = "python -m training.evaluate") -> int:
    """Evaluate, print and write the record.

    Returns:
        0 if all went well, 1 if not, 130 or 143 if SIGINT or SIGTERM ended it.
    """
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("model", help="folder or Hub name of a model with its image processor")
    add_data_arguments(parser)
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="for data with other classes: JSON from classes of the model to lists of those of the data that mean the "
        "same; these alone are scored",
    )
    parser.add_argument(
        "--corruption",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME[:SEVERITY]",
        help=f"evaluate under these too: all, {', '.join(CORRUPTIONS)}; all severities, 1 to 5, where none is given",
    )
    parser.add_argument("--contact-sheet", type=Path, metavar="FILE", help="picture of the images of lowest mean IoU")
    parser.add_argument("--worst", type=int, default=8, metavar="N", help="images on the contact sheet (%(default)s)")
    parser.add_argument(
        "--calibration",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="FILE",
        help="also measure how far probabilities can be believed; a name that ends in .png, .svg or .pdf, after the "
        "dataset's, for the diagram",
    )
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
    return run_stoppable(lambda: _run(arguments), prog, "no record was written; start it again")


def _run(arguments: argparse.Namespace) -> int:
    started_in = environment()
    try:
        state = start_processes()
        record = run(arguments, state) | {"environment": started_in}
        if state.is_main_process:
            print(render_table(record))
            print(describe(record))
            if arguments.output:
                write_json(record, arguments.output)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {shown_lines(error)}", file=sys.stderr)
        return 1
    end_processes()
    difference = record.get("cross_check", {}).get("largest_difference", 0.0)
    if difference > CROSS_CHECK_TOLERANCE:
        print(f"error: evaluate's mean_iou differs by {difference:.3g}; see cross_check in the record", file=sys.stderr)
        return 1
    return 0


def run(arguments: argparse.Namespace, state: PartialState) -> dict:
    """Evaluate as the command line says, and write contact sheets and the reliability diagram.

    Returns:
        The record of `evaluate_under`, with `cross_check` where the metric of `evaluate` was asked for, and with
        `calibration` where that was: what `Calibration.figures` says with the model's own temperature and, if that is
        not 1, as `uncalibrated` what it says with 1.

    Raises:
        OSError: If model, data or metric cannot be had.
        ValueError: If arguments do not fit each other or the data.
    """
    if arguments.metric == "evaluate" and arguments.classes:
        raise ValueError("Got --metric evaluate with --classes; that metric scores all classes, leave one of them out.")
    corruptions = parse_corruptions(arguments.corruption)
    protocol, execution = settings(arguments, state)
    sheet = check_sheet(arguments.contact_sheet)
    diagram = arguments.calibration if arguments.calibration != Path() else None
    check_diagram(diagram)
    sheets = {each: _sheet_path(sheet, each) for each in (None, *corruptions)} if sheet else {}
    if arguments.metric == "evaluate" and state.num_processes > 1:
        raise ValueError("--metric evaluate keeps every label map in one process; run it without a launcher.")
    check_outputs(arguments, state, diagram, *sheets.values())
    model, image_processor = load_with_overrides(arguments, arguments.model, state)
    names = class_names(model.config)
    if arguments.classes is None:
        samples = load_samples(arguments, names, bool(image_processor.do_reduce_labels), state)
    else:
        samples, scored = open_shared_samples(arguments, names, state)
        protocol = replace(protocol, classes=scored)
    metric = None
    if arguments.metric == "evaluate":
        metric = EvaluateMeanIoU(samples.num_labels, IGNORE_LABEL, arguments.metric_script)
    worst = {each: WorstImages(arguments.worst) for each in sheets}

    def observers(corruption: Corruption | None) -> list[Observer]:
        observed: list[Observer] = [worst[corruption].add] if worst else []
        if metric and corruption is None:
            observed.append(lambda index, image, labels, prediction, confusion: metric.add(prediction, labels))
        return observed

    calibrations: dict[str, Calibration] = {}
    if arguments.calibration is not None:
        calibrations["calibration"] = Calibration(model.config.temperature)
        if model.config.temperature != 1:
            calibrations["uncalibrated"] = Calibration()
    score_observers = [CalibrationObserver(list(calibrations.values()))] if calibrations else []
    passes = (protocol, execution, observers, score_observers)
    record = evaluate_under(corruptions, model, image_processor, samples, *passes)
    if arguments.classes:
        record["protocol"]["classes"] = read_shared_classes(arguments.classes)
    record |= {"model": arguments.model, "dataset": arguments.dataset, "split": arguments.split}
    for name, calibration in calibrations.items():
        calibration.reduce(state)
        record[name] = calibration.figures()
    if diagram and state.is_main_process:
        titles = {f"temperature {record[name]['temperature']:g}": record[name] for name in reversed(calibrations)}
        draw_reliability(titles, diagram)
    for corruption, images in worst.items():
        save_sheet(images, samples, model.config.id2label, state, sheets[corruption])
    if metric:
        record["cross_check"] = compare_metrics(record, metric.compute(), arguments.metric_script)
    return record


def _sheet_path(sheet: Path, corruption: Corruption | None) -> Path:
    suffix = "" if corruption is None else f"-{corruption.name}-{corruption.severity}"
    return sheet.with_stem(sheet.stem + suffix)


if __name__ == "__main__":
    sys.exit(main())
