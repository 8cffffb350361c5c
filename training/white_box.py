"""Test the claims of the white box: `python -m training.white_box MODEL [MODEL ...] DATASET --card DIR ...`.

For each claim of the paper's abstract and method section: what tests it, its value over a split with intervals, of
trained decoders and of untrained ones on the same encoder, and a verdict by a fixed rule: holds, holds in part, does
not hold. The card says how everything is defined.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from depict_hf.photo_files import shown_lines

from .evaluation import add_data_arguments, check_outputs, end_processes, environment, start_processes, write_json
from .evidence.perturbations import load_groups, parse_groups
from .evidence.white_box import measure_white_box
from .evidence.white_box_card import RECORD_NAME, render_card, write_card
from .robustness import shown, shown_command
from .stopping import run_stoppable


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Returns:
        0 if all went well, 1 if not, 130 or 143 if SIGINT or SIGTERM ended it.
    """
    started_in = environment()
    parser = argparse.ArgumentParser(
        prog="python -m training.white_box", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="model", help="folders or Hub names, of the same classes")
    add_data_arguments(parser)
    parser.add_argument(
        "--group",
        action="append",
        default=[],
        metavar="NAME=MODEL,MODEL,...",
        help="models of one kind and several training seeds; one of linear decoders serves as a comparison",
    )
    parser.add_argument("--card", type=Path, metavar="DIR", help="folder for record, card and figure")
    parser.add_argument("--about", metavar="TEXT", help="how the models were trained, for the card")
    parser.set_defaults(split="validation")
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_intermixed_args(given)
    command = partial(_run, arguments, given, started_in)
    return run_stoppable(command, parser.prog, "no record was written; start it again")


def _run(arguments: argparse.Namespace, given: list[str], started_in: dict[str, Any]) -> int:
    try:
        state = start_processes()
        card = arguments.card
        check_outputs(arguments, state, card / RECORD_NAME if card else None)
        groups = parse_groups(arguments.models, arguments.group)
        names = {model: shown(model) for group in groups for model in group.models}
        if len(set(names.values())) < len(names):
            raise ValueError("Got several models of one name; give them by relative paths.")
        loaded = load_groups(arguments, groups, state)
        measured = measure_white_box(arguments, {names[name]: each for name, each in loaded.items()}, state)
        record = {
            "dataset": shown(arguments.dataset),
            "split": arguments.split,
            **({"about": arguments.about} if arguments.about else {}),
            "command": shown_command("python -m training.white_box", given),
            "groups": {
                group.name: {
                    "decoder_type": loaded[group.models[0]].model.config.decoder_type,
                    "models": [names[model] for model in group.models],
                }
                for group in groups
            },
            **measured,
            "environment": started_in,
        }
        print(render_card(record))
        if arguments.output:
            write_json(record, arguments.output)
        if card:
            write_card(record, card)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {shown_lines(error)}", file=sys.stderr)
        return 1
    end_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main())
