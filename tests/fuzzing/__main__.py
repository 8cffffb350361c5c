"""Make damaged inputs by chance until one breaks the rule of this package, and keep that one."""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if nothing broke the rule, else 1."""
    from .makers import MAKERS
    from .workers import fuzz, run_alone

    parser = argparse.ArgumentParser(prog="python -m fuzzing", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="when to end (%(default)g)")
    parser.add_argument("--cases", type=int, metavar="N", help="of each kind, instead of minutes")
    parser.add_argument("--seed", type=int, help="of the cases; default: another one each time")
    parser.add_argument("--kinds", nargs="+", choices=MAKERS, default=list(MAKERS), help="default: all")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case (%(default)s)")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="for the case that breaks the rule; default: a new one"
    )
    parser.add_argument("--repeat", type=Path, metavar="FOLDER", help="run the one case in a folder again")
    arguments = parser.parse_args(argv)
    if arguments.repeat:
        with tempfile.TemporaryDirectory(prefix="fuzzing-") as folder:
            outcome = run_alone(arguments.repeat, Path(folder) / "work")
        print(f"{outcome.kind} {outcome.error}: {outcome.text}{outcome.facts or ''}")
        return 1 if outcome.kind == "escape" else 0
    seed = int.from_bytes(os.urandom(4), "big") if arguments.seed is None else arguments.seed
    place = arguments.output or Path(tempfile.mkdtemp(prefix="fuzzing-"))
    print(f"seed {seed}, in {place}", flush=True)
    length = {"minutes": arguments.minutes} if arguments.cases is None else {"cases": arguments.cases}
    report = fuzz(arguments.kinds, seed, place, **length, first=arguments.first)
    print("\n".join(report.lines()))
    if report.escape is None:
        return 0
    folder, outcome = report.escape
    print(f"\nThe rule is broken by {folder}\n{outcome.error}: {outcome.text}\n\nAgain: {repeating(folder)}")
    return 1


def repeating(folder: Path) -> str:
    """The command that runs a case again, from the repository's folder."""
    return f"PYTHONPATH=.:tests {sys.executable} -m fuzzing --repeat {folder}"


if __name__ == "__main__":
    # Before anything is imported that asks the Hub, or shows bars.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "critical"}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.exit(main())
