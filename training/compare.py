"""Compare decoders on one frozen encoder, several seeds each: `python -m training.compare DATASET OUTPUT ...`.

Every decoder has the same optimiser steps, batches and crops, and its learning rate chosen on the validation split
from the same grid. Each finished run is a file in OUTPUT/runs; the same command continues where it was interrupted,
and several processes may share OUTPUT, each with its own `--decoders`. At the end of each, decoder costs are measured
and the report is written from all runs in OUTPUT: comparison.json, and .md and .png made from it.

Decoders are trained on the CPU: a run depends on its settings alone, and with as many threads repeats bit for bit.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from depict_hf.configuration_depict import DECODER_TYPES
from depict_hf.photo_files import shown_lines

from .evaluation import flush_every_line
from .evidence import load_runs
from .evidence.compare import (
    DATA_FIELDS,
    OVERRIDABLE,
    RUN_FIELDS,
    TRIAL_SEED,
    ComparisonData,
    EvaluationSplit,
    check_settings,
    compare_decoder,
    compare_decoders,
    comparison_recipe,
    evaluate_decoder,
    load_data,
    measure_costs,
    predict,
    run_once,
    settings_hash,
    train_decoder,
    training_batches,
    write_report,
)
from .recipes import CAMVID_DECODERS

# The names that this module had before its machinery moved into a room stay importable.
__all__ = [
    "DATA_FIELDS",
    "OVERRIDABLE",
    "RUN_FIELDS",
    "TRIAL_SEED",
    "ComparisonData",
    "EvaluationSplit",
    "check_settings",
    "compare_decoder",
    "compare_decoders",
    "comparison_recipe",
    "evaluate_decoder",
    "load_data",
    "main",
    "measure_costs",
    "predict",
    "run_once",
    "settings_hash",
    "train_decoder",
    "training_batches",
    "write_report",
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="Hub name, or local folder laid out like a Hub dataset")
    parser.add_argument("output", type=Path, help="folder for features, runs and the report")
    parser.add_argument("--backbone", help="path or Hub name of the encoder; the recipe's own if omitted")
    parser.add_argument("--decoders", nargs="+", choices=DECODER_TYPES, default=list(CAMVID_DECODERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2, 3e-2], help="learning rates to choose from"
    )
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps of every run")
    parser.add_argument("--threads", type=int, default=1, help="of this process")
    parser.add_argument("--report-only", action="store_true", help="write the report from what OUTPUT holds")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help=f"one of {', '.join(OVERRIDABLE)}")
    arguments = parser.parse_intermixed_args(argv)
    flush_every_line()
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.report_only:
            write_report(arguments.output, load_runs(arguments.output / "runs"))
        else:
            budget = (arguments.rates, arguments.seeds, arguments.steps)
            recipe = (arguments.backbone, arguments.overrides)
            compare_decoders(arguments.dataset, arguments.output, arguments.decoders, *budget, *recipe)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {shown_lines(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
