"""Rehearse rows of the paper: `python -m training.train RECIPE --rehearse`, and all of them by this command.

    python -m training.rehearse RECORDS [RECIPE ...]

Each recipe that has no record in the folder RECORDS yet is rehearsed in a process of its own, so that the command goes
on where it was stopped; a table of all records is RECORDS/README.md. The exit code is 1 if a rehearsal failed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from depict_hf.writing import check_file

from .evaluation import flush_every_line, write_json, write_whole
from .evidence.rehearsal import Rehearsal, rehearse
from .evidence.rehearsal_setup import rows_of_the_paper
from .evidence.rehearsal_table import render_rehearsals
from .recipes import get_recipe


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.rehearse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path, help="folder of the records")
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="default: all rows of the paper, small ones first")
    arguments = parser.parse_args(argv)
    flush_every_line()
    names = arguments.recipes or rows_of_the_paper()
    for name in names:
        try:
            get_recipe(name)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    arguments.records.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        record = arguments.records / f"{name}.json"
        if record.is_file():
            print(f"{name}: {record} is there already")
            continue
        command = [sys.executable, "-m", f"{__package__}.train", name, "--rehearse", "--record", str(record)]
        if subprocess.run(command).returncode:
            failed.append(name)
        else:
            render(arguments.records)
    render(arguments.records)
    if failed:
        print(f"error: {len(failed)} rehearsals failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def render(records: Path) -> None:
    """Write the table of the records in a folder beside them; nothing where there are none."""
    paths = [records / f"{name}.json" for name in rows_of_the_paper()]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    if found:
        write_whole(render_rehearsals(found), records / "README.md")


def rehearse_one(argv: Sequence[str]) -> int:
    """Run `training.train RECIPE [DATASET [OUTPUT]] --rehearse`.

    Returns:
        0 if every step worked, 1 if one did not.
    """
    parser = argparse.ArgumentParser(
        prog="python -m training.train RECIPE --rehearse",
        description="Read, train ten steps, resume, evaluate, write a card, convert: in minutes, on a few images.",
    )
    parser.add_argument("--rehearse", action="store_true", required=True)
    parser.add_argument("recipe", help="a row of the paper")
    parser.add_argument("rest", nargs="*", metavar="[DATASET [OUTPUT]] field=value", help="made data if none")
    parser.add_argument("--backbone", help="path or Hub name of the encoder's weights; random ones if omitted")
    parser.add_argument("--record", type=Path, metavar="FILE", help="JSON file for the record")
    parser.add_argument("--overwrite", action="store_true", help="replace the record if it exists")
    arguments = parser.parse_intermixed_args(argv)
    flush_every_line()
    overrides = [each for each in arguments.rest if re.match(r"[\w.]+=", each)]
    places = [each for each in arguments.rest if each not in overrides]
    if len(places) > 2:
        parser.error(f"got {' '.join(places)}, needed at most a data set and a folder")
    dataset, output = [*places, None, None][:2]
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("Got several processes, needed one: rehearse without a launcher.")
        check_file(arguments.record, arguments.overwrite)
        if output is not None and Path(output).exists() and (not Path(output).is_dir() or any(Path(output).iterdir())):
            raise ValueError(f"{output} is not an empty folder; choose another one.")
        recipe = get_recipe(arguments.recipe).override(overrides)
        with tempfile.TemporaryDirectory(prefix="rehearsal-") as temporary:
            work = Path(temporary if output is None else output)
            work.mkdir(parents=True, exist_ok=True)
            record = rehearse(Rehearsal(recipe, work, dataset, arguments.backbone))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    minutes = record["seconds"] / 60
    print(f"{recipe.name}: everything works, in {minutes:.1f} minutes; {record['started_from']}")
    if arguments.record:
        write_json(record, arguments.record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
