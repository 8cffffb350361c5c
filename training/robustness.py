"""Compare models under perturbations: `python -m training.robustness MODEL [MODEL ...] DATASET [--split test] ...`.

Alone, every model is evaluated on the clean split and on the same corrupted photographs, which are drawn by their
index. With --perturb, --group or --card, several kinds of perturbation are measured for groups of models:

    attention-noise    Gaussian noise on the decoder's attention matrices, absolute and relative to their norms
    class-token-noise  the same on the class tokens
    feature-noise      the same on the features that the decoder reads, relative
    corruptions        the corruptions above
    views              other scales, crops and brightness
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from depict_hf.photo_files import shown_lines

from .evaluation import (
    CORRUPTIONS,
    SEVERITIES,
    Corruption,
    add_data_arguments,
    check_outputs,
    end_processes,
    environment,
    parse_corruptions,
    start_processes,
    write_json,
)
from .evidence.noise import SIGMAS
from .evidence.perturbations import SECTIONS, load_groups, measure_section, parse_groups
from .evidence.robustness import NAME_LENGTH, compare_models, render_comparison, summarize
from .evidence.robustness_card import RECORD_NAME, render_card, write_card
from .evidence.robustness_summary import verdict
from .stopping import run_stoppable

# The names that this module had before its machinery moved into a room stay importable.
__all__ = ["NAME_LENGTH", "compare_models", "main", "render_comparison", "summarize"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Returns:
        0 if all went well, 1 if not, 130 or 143 if SIGINT or SIGTERM ended it.
    """
    started_in = environment()
    parser = argparse.ArgumentParser(
        prog="python -m training.robustness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="model", help="folders or Hub names, of the same classes")
    add_data_arguments(parser)
    parser.add_argument(
        "--group",
        action="append",
        default=[],
        metavar="NAME=MODEL,MODEL,...",
        help="models of one kind and several training seeds, in the same order of seeds in every group",
    )
    parser.add_argument(
        "--perturb",
        action="extend",
        nargs="+",
        choices=SECTIONS,
        metavar="KIND",
        help=f"some of {', '.join(SECTIONS)} (corruptions)",
    )
    parser.add_argument(
        "--card", type=Path, metavar="DIR", help="folder for record, card and figure; keeps kinds measured before"
    )
    parser.add_argument("--about", metavar="TEXT", help="how the models were trained, for the card")
    parser.add_argument("--draws", type=int, default=10, metavar="N", help="of the noise at every level (%(default)s)")
    for option, scale in (("--sigmas", "absolute"), ("--relative-sigmas", "relative")):
        levels = " ".join(f"{sigma:g}" for sigma in SIGMAS[scale])
        parser.add_argument(option, type=float, nargs="+", help=f"levels of {scale} noise ({levels})")
    parser.add_argument(
        "--label-size",
        type=int,
        metavar="N",
        help="pixels of the shorter side at which noise is scored; less is faster; default: every pixel",
    )
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
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_intermixed_args(given)
    alone = not (arguments.perturb or arguments.group or arguments.card)
    if alone and not arguments.models:
        parser.error("the following arguments are required: model, dataset")
    command = partial(_run, arguments, alone, given, started_in)
    return run_stoppable(command, parser.prog, "no record was written; start it again")


def _run(arguments: argparse.Namespace, alone: bool, given: list[str], started_in: dict[str, Any]) -> int:
    try:
        state = start_processes()
        corruptions = parse_corruptions(arguments.corruptions, arguments.severities)
        check_outputs(arguments, state)
        if alone:
            record = compare_models(arguments, corruptions, state) | {"environment": started_in}
            text = render_comparison(record)
        else:
            record = measure_groups(arguments, corruptions, state, given)
            text = f"{render_card(record)}\n{verdict(record)}"
        if state.is_main_process:
            print(text)
            if arguments.output:
                write_json(record, arguments.output)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {shown_lines(error)}", file=sys.stderr)
        return 1
    end_processes()
    return 0


def measure_groups(
    arguments: argparse.Namespace, corruptions: Sequence[Corruption], state: PartialState, given: Sequence[str]
) -> dict:
    """Measure the kinds of perturbation asked for, one after the other; each finished one is written to the card.

    Args:
        given: The command line, for the card.

    Returns:
        `dataset`, `split`, `groups` with `decoder_type` and `models`, and `sections` as of `measure_section`.

    Raises:
        ImportError: If scipy, or for the card matplotlib, is missing.
        OSError: If a model or the data cannot be had.
        ValueError: If arguments do not fit each other, or the card is of other models or data.
    """
    groups = parse_groups(arguments.models, arguments.group)
    names = [shown(model) for group in groups for model in group.models]
    if len(set(names)) < len(names):
        raise ValueError(f"Got several models named {max(names, key=names.count)}; give them by relative paths.")
    loaded = load_groups(arguments, groups, state)
    record = {
        "dataset": shown(arguments.dataset),
        "split": arguments.split,
        "groups": {
            group.name: {
                "decoder_type": loaded[group.models[0]].model.config.decoder_type,
                "models": [shown(model) for model in group.models],
            }
            for group in groups
        },
        "sections": {},
    } | ({"about": arguments.about} if arguments.about else {})
    record = with_sections(record, arguments.card)  # refuses another card before anything is measured
    command = shown_command("python -m training.robustness", given)
    for name in arguments.perturb or ["corruptions"]:
        section = measure_section(name, loaded, arguments, corruptions, state) | {"command": command}
        section["models"] = {shown(model): each for model, each in section["models"].items()}
        record = with_sections(record, arguments.card)
        found = record["sections"] | {name: section}
        record["sections"] = {each: found[each] for each in SECTIONS if each in found}
        if arguments.card and state.is_main_process:
            write_card(record, arguments.card)
    return record


def with_sections(record: dict, folder: Path | None) -> dict:
    """Add the sections that an earlier command, or another one at the same time, has written to a card.

    Raises:
        ValueError: If the card is of other models or data.
    """
    if folder is None or not (folder / RECORD_NAME).is_file():
        return record
    found = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    for key in ("dataset", "split", "groups"):
        if found[key] != record[key]:
            raise ValueError(
                f"{folder} holds a card of {key} {found[key]}, but the command has {record[key]}; take another folder, "
                "or delete it."
            )
    about = {name: found[name] for name in ("about",) if name in found}
    return about | record | {"sections": found["sections"] | record["sections"]}


def shown_command(program: str, given: Sequence[str]) -> str:
    """Return a command line for a card, without `--about`, whose text stands there already."""
    kept = list(given)
    if "--about" in kept:
        place = kept.index("--about")
        del kept[place : place + 2]
    return f"{program} {shlex.join(map(shown, kept))}"


def shown(argument: str) -> str:
    """Shorten absolute paths in an argument to their last part, as they mean nothing on other machines."""
    name, equals, value = argument.rpartition("=")
    parts = [
        Path(each).name if Path(each).is_absolute() or each.startswith("..") else each for each in value.split(",")
    ]
    return name + equals + ",".join(parts)


if __name__ == "__main__":
    sys.exit(main())
