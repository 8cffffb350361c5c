"""Train a model for the classes of one's own label maps: `depict train DATA OUT`.

Settings follow from the data, the machine and the time there is; `report.md` in OUT says what was chosen and why.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from depict_hf.photo_files import shown_lines

from .stopping import command_line, run_stoppable

DEFAULT_MINUTES = 60.0


def build_parser(prog: str = "python -m training.own_classes") -> argparse.ArgumentParser:
    """Declare the options of the command; nothing heavy is imported for them."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes to a parser."""
    parser.add_argument("data", metavar="DATA", help="folder, or Hub name, of photographs and their label maps")
    parser.add_argument("output", metavar="OUT", type=Path, help="folder for the model and its report; new or empty")
    parser.add_argument(
        "--from",
        dest="source",
        default="default",
        metavar="MODEL",
        help="start from 'default', the model shipped, a folder or Hub name of another one, or a backbone such as "
        "facebook/dinov2-small (%(default)s)",
    )
    parser.add_argument("--classes", metavar="A,B,...", help="names of the classes in the order of their ids")
    parser.add_argument("--decoder", metavar="TYPE", help="kind of decoder; default: that of MODEL, sa for a backbone")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help=f"everything included, from start to report ({DEFAULT_MINUTES:g} where no length is given)",
    )
    length.add_argument("--epochs", type=int, metavar="N", help="passes over the training images instead")
    length.add_argument("--max-steps", type=int, metavar="N", help="optimiser steps instead")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in OUT, in the minutes that it has left"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="fields of a recipe to be set by hand"
    )


def main(argv: Sequence[str] | None = None, prog: str = "python -m training.own_classes") -> int:
    """Parse and train.

    Returns:
        0 if all went well, 1 if the run could not start or go on, 130 or 143 if SIGINT or SIGTERM ended it.
    """
    started = time.monotonic()
    arguments = build_parser(prog).parse_intermixed_args(argv)
    go_on = f"go on with: {command_line(prog, argv, '--resume')}"
    return run_stoppable(lambda: run(arguments, started), prog, go_on)


def run(arguments: argparse.Namespace, started: float | None = None) -> int:
    """Train as the arguments of `add_arguments` say.

    Args:
        started: When the command began, by `time.monotonic`; the minutes count from then. Now if None.

    Returns:
        The exit code of `main`, but for signals, which the caller hears of.
    """
    from safetensors import SafetensorError

    started = time.monotonic() if started is None else started
    try:
        for name in ("minutes", "epochs", "max_steps"):
            value = getattr(arguments, name)
            if value is not None and not value > 0:
                raise ValueError(f"Got --{name.replace('_', '-')} {value}, needed more than 0.")
        from .evaluation import flush_every_line
        from .session import train_own_classes

        flush_every_line()
        train_own_classes(arguments, started)
    except (FloatingPointError, ImportError, OSError, SafetensorError, ValueError) as error:
        print(f"depict: {shown_lines(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
