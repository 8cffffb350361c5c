"""Measure what a model costs and reaches when run in different ways: `python -m training.tradeoff DATASET DIR ...`.

Sizes, window strides, precisions and scales of every --model, and exports of it by --onnx, each evaluated on the same
images of a split, one at a time. DIR gets the record, a table and a picture; points that the record has are not
measured again, so that the same command goes on where it was interrupted, and another one adds to it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from depict_hf.loading import load_model
from depict_hf.photo_files import shown_lines

from .evaluation import class_names, load_samples
from .evidence.tradeoff import Point, measure_points, new_record, points_of, write_tradeoff
from .stopping import command_line, run_stoppable


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Returns:
        0 if all went well, 1 if not, 130 or 143 if SIGINT or SIGTERM ended it.
    """
    parser = argparse.ArgumentParser(
        prog="python -m training.tradeoff", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="Hub name, or local folder (see training.data.load_dataset_splits)")
    parser.add_argument("output", type=Path, metavar="DIR", help="folder for record, table and picture")
    parser.add_argument(
        "--model", action="append", default=[], help="folder, Hub name or 'default'; several may be given (default)"
    )
    parser.add_argument("--onnx", action="append", default=[], metavar="FOLDER", help="made by `depict export`")
    parser.add_argument("--split", default="validation", help="(%(default)s)")
    parser.add_argument("--max-images", type=int, metavar="N", help="only so many, evenly spaced over the split")
    parser.add_argument("--about", metavar="TEXT", help="what the models are, for the table")
    for option in ("image_column", "label_column", "reduce_labels"):
        parser.set_defaults(**{option: None})
    parser.set_defaults(skip_unreadable=False, workers=0)
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given)
    return run_stoppable(lambda: _run(arguments), parser.prog, f"go on with: {command_line(parser.prog, given)}")


def _run(arguments: argparse.Namespace) -> int:
    try:
        points = planned_points(arguments.model or ["default"], arguments.onnx)
        model, image_processor = load_model(points[0].model, backend=points[0].backend)
        reduced = bool(image_processor.do_reduce_labels)
        samples = load_samples(arguments, class_names(model.config), reduced, PartialState(cpu=True))
        dataset = Path(arguments.dataset).name
        arguments.output.mkdir(parents=True, exist_ok=True)
        record = new_record(dataset, arguments.split, arguments.max_images, arguments.output)
        if arguments.about:
            record["about"] = arguments.about
        write_tradeoff(
            measure_points(points, samples, arguments.max_images, record, arguments.output), arguments.output
        )
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {shown_lines(error)}", file=sys.stderr)
        return 1
    return 0


def planned_points(models: Sequence[str], exports: Sequence[str]) -> list[Point]:
    """Return the ways to run models, as `points_of`, and exports as their files say.

    Raises:
        OSError, ValueError: If a model cannot be loaded, or takes no size of the shorter side.
    """
    points = []
    for name in models:
        model, image_processor = load_model(name)
        size = dict(image_processor.size).get("shortest_edge")
        if size is None:
            raise ValueError(f"{name} resizes to {dict(image_processor.size)}, needed shortest_edge, to choose others.")
        config = model.config
        points += points_of(name, size, config.window_size, config.window_stride, config.encoder_patch_size)
    return [*points, *(Point(name, backend="onnxruntime", dtype="auto") for name in exports)]


if __name__ == "__main__":
    sys.exit(main())
