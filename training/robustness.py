"""Compare models under corruptions: `python -m training.robustness MODEL [MODEL ...] DATASET [--split test] ...`.

Every model is evaluated on the clean split and on the same corrupted photographs, which are drawn by their index alone.
"""

import argparse
import sys
from collections.abc import Sequence

from .evaluation import (
    CORRUPTIONS,
    SEVERITIES,
    add_data_arguments,
    environment,
    parse_corruptions,
    start_processes,
    write_json,
)
from .evidence.robustness import NAME_LENGTH, compare_models, render_comparison, summarize

# The names that this module had before its machinery moved into a room stay importable.
__all__ = ["NAME_LENGTH", "compare_models", "main", "render_comparison", "summarize"]


def main(argv: Sequence[str] | None = None) -> int:
    started_in = environment()
    parser = argparse.ArgumentParser(prog="python -m training.robustness", description=__doc__)
    parser.add_argument("models", nargs="+", metavar="model", help="folders or Hub names, of the same classes")
    add_data_arguments(parser)
    parser.add_argument(
        "--corruptions",
        nargs="+",
        default=["all"],
        metavar="NAME[:SEVERITY]",
        help=f"some of all (the default), {', '.join(CORRUPTIONS)}",
    )
    parser.add_argument(
        "--severities",
        type=int,
        nargs="+",
        default=list(SEVERITIES),
        metavar="1-5",
        help="of corruptions that are given without one; the split is evaluated once for each",
    )
    arguments = parser.parse_args(argv)
    try:
        state = start_processes()
        corruptions = parse_corruptions(arguments.corruptions, arguments.severities)
        record = compare_models(arguments, corruptions, state) | {"environment": started_in}
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if state.is_main_process:
        print(render_comparison(record))
        if arguments.output:
            write_json(record, arguments.output)
    state.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
