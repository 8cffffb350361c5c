"""Reproduce a published figure: `python -m training.reproduce CHECKPOINT DATASET [--multi-scale]`.

The authors' file is converted, evaluated by the protocol of the published figures, and compared with its row. Exit
codes: 0 reproduced; 1 files or data are at fault; 2 the command line is; 3 not reproduced; 4 measured, but there is
nothing to compare with: no published figure is known, or other images were evaluated. Under `torchrun` or `accelerate
launch`, processes share the images.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from depict_hf.photo_files import shown_lines

from .evaluation import (
    Execution,
    check_outputs,
    describe,
    end_processes,
    environment,
    flush_every_line,
    render_table,
    start_processes,
    write_json,
)
from .evidence.paper import PAPER_ROWS, TOLERANCE_POINTS, describe_reproduction, reproduce

EXIT_CODES = {"reproduced": 0, "not reproduced": 3, "not comparable": 4, "no figure": 4}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint.pth of the authors, or the folder that holds it")
    parser.add_argument("dataset", help="Hub name, or local folder (see training.data.load_dataset_splits)")
    parser.add_argument("--variant", type=Path, metavar="FILE", help="variant.yml; default: beside the checkpoint")
    parser.add_argument("--multi-scale", action="store_true", help="six scales with mirror images, as published")
    parser.add_argument("--split", default="validation", help="%(default)s: of which figures are published")
    parser.add_argument(
        "--im-size", type=int, metavar="N", help="pixels of the shorter side; default: as the published code evaluates"
    )
    parser.add_argument("--expected", type=float, metavar="MIOU", help="published figure in percent, for other files")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE_POINTS,
        metavar="POINTS",
        help="difference in mIoU up to which it counts as reproduced (%(default)s: figures have one decimal)",
    )
    parser.add_argument("--max-images", type=int, metavar="N", help="only so many, for a trial; compared with nothing")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="images at a time (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that decode (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for the record")
    parser.add_argument("--overwrite", action="store_true", help="replace the record if it exists")
    arguments = parser.parse_args(argv)
    for name, least in (("batch_size", 1), ("workers", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(arguments, name)}, needed at least {least}")
    flush_every_line()
    started_in = environment()
    try:
        state = start_processes()
        check_outputs(arguments, state)
        record = reproduce(
            arguments.checkpoint,
            arguments.dataset,
            arguments.variant,
            arguments.multi_scale,
            arguments.split,
            Execution(arguments.batch_size, arguments.workers, state),
            arguments.max_images,
            arguments.expected,
            arguments.tolerance,
            arguments.im_size,
            PAPER_ROWS,
        )
        if state.is_main_process:
            print(render_table(record["evaluation"]))
            print(describe(record["evaluation"]))
            print(describe_reproduction(record))
            if arguments.output:
                write_json(record | {"environment": started_in}, arguments.output)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {shown_lines(error)}", file=sys.stderr)
        return 1
    end_processes()
    return EXIT_CODES[record["verdict"]]


if __name__ == "__main__":
    sys.exit(main())
