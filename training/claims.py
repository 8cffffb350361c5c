"""Test the paper's claims by a plan written before: `python -m training.claims PLAN OUTPUT NAME=DATASET ...`.

Every run of the plan that OUTPUT lacks is made, and evaluated under noise; the same command goes on where it was
interrupted, and several processes may share the work by `--decoders`. Then costs are measured, and claims.json,
README.md and claims.png are written, as far as the plan is done. --explore looks for reasons, outside of the plan.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from depict_hf.photo_files import shown_lines

from .evaluation import flush_every_line, write_json, write_whole
from .evidence.claims import (
    Plan,
    build_claims,
    build_exploration,
    draw_claims,
    explore,
    load_noise,
    measure_plan_costs,
    read_plan,
    render_claims,
    render_exploration,
    run_grid,
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, metavar="PLAN", help="Markdown file, such as model_cards/claims/PLAN.md")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder for tokens, runs, models and the report")
    parser.add_argument("datasets", nargs="*", metavar="NAME=DATASET", help="where a data set of the plan lies")
    parser.add_argument("--backbone", help="folder of the encoder, instead of the plan's name of it")
    parser.add_argument("--decoders", nargs="+", metavar="TYPE", help="only these, and no report; default: all")
    parser.add_argument(
        "--explore",
        nargs="+",
        metavar="TYPE",
        help="instead of the plan's runs: measure its models of these decoders with depict_hf.analysis, train "
        "them from changed starts, and write exploration.json and EXPLORATION.md",
    )
    parser.add_argument("--threads", type=int, default=1, help="of this process (%(default)s)")
    arguments = parser.parse_intermixed_args(argv)
    flush_every_line()
    torch.set_num_threads(arguments.threads)
    try:
        for each in arguments.datasets:
            if "=" not in each:
                raise ValueError(f"Got {each}, needed NAME=DATASET, such as camvid=FOLDER.")
        plan = read_plan(arguments.plan)
        datasets = dict(each.split("=", 1) for each in arguments.datasets)
        if arguments.explore is not None:
            explore(plan, arguments.output, datasets, arguments.backbone, arguments.explore)
            write_exploration(plan, arguments.output)
            return 0
        run_grid(plan, arguments.output, datasets, arguments.backbone, arguments.decoders)
        if arguments.decoders is None:
            write_claims(plan, arguments.output)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {shown_lines(error)}", file=sys.stderr)
        return 1
    return 0


def write_claims(plan: Plan, output: Path) -> None:
    """Measure costs where all runs are finished, and write what came out."""
    finished = not any(load_noise(plan, output / name)[1] for name in plan.datasets)
    if finished and not (output / "costs.json").is_file():
        write_json(measure_plan_costs(plan, output), output / "costs.json", indent=1)
    claims = build_claims(plan, output)
    write_json(claims, output / "claims.json", indent=1)
    write_whole(render_claims(claims), output / "README.md")
    if claims["costs"] is not None:
        draw_claims(claims, output / "claims.png")
    print("\n".join(["Missing: " + ", ".join(claims["pending"])] if claims["pending"] else ["The plan is done."]))


def write_exploration(plan: Plan, output: Path) -> None:
    """Write what looking for reasons has found so far."""
    found = build_exploration(plan, output)
    write_json(found, output / "exploration.json", indent=1)
    write_whole(render_exploration(found), output / "EXPLORATION.md")


if __name__ == "__main__":
    sys.exit(main())
