"""Compare the package with the published way of running the same weights, and with transformers' models, in one run.

    python -m training.benchmark [--output results.json]      the paper's small model, a few minutes on two cores
    python -m training.benchmark --grid                       every decoder, 512 to 2048 pixels, batch 1 to 8
    python -m training.benchmark --exponent                   cost of the decoders against the number of tokens
    python -m training.benchmark --recipes                    GPU hours of the recipes, estimated from their FLOPs

Sides of a comparison take turns; what is printed are medians. "memory" is the peak above the state before, "of peak"
the share of the rate that a large matrix product reaches in the same turns and the same dtype. Weights are random.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from depict_hf.configuration_depict import DECODER_TYPES, ENCODER_PRESETS
from depict_hf.writing import check_file

from .evaluation import environment, flush_every_line, write_json
from .evidence import EXPONENT_SIZES, cost_table, measure_exponents, render_exponents
from .evidence.benchmark import DTYPES, HEADER, TASK_KINDS, available_bytes, machine, render, run_task, tasks

# The names that this module had before its machinery moved into a room stay importable.
__all__ = ["DTYPES", "HEADER", "available_bytes", "machine", "main", "parse", "render", "run_task", "tasks"]

GRID_SIZES, GRID_BATCHES = (512, 768, 1024, 1536, 2048), (1, 2, 4, 8)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    flush_every_line()
    torch.manual_seed(0)
    device = torch.device(args.device)
    record: dict = {
        "arguments": {name: value for name, value in vars(args).items() if name != "overwrite"} | {"output": None},
        "environment": environment() | {"machine": machine(device)},
    }
    if args.recipes:
        print(cost_table())
        return 0
    print(f"{args.encoder}, {args.labels} classes, {record['environment']['machine']}, torch {torch.__version__}")
    if args.exponent:
        record["exponents"] = measure_exponents(
            args.encoder, args.labels, args.sizes, args.repetitions, args.seconds, device, args.decoder_only
        )
        print(render_exponents(record["exponents"]))
    else:
        print(HEADER)
        record["tasks"] = []
        for task in tasks(args):
            record["tasks"].append(run_task(task, args.repetitions, args.seconds, device))
            print(render(record["tasks"][-1]))
    if args.output is not None:
        try:
            write_json(record, args.output)
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--grid", action="store_true", help="every decoder, size and batch that is not given (hours)")
    modes.add_argument("--exponent", action="store_true", help="fit cost = c * tokens ** exponent for sa and cbsa")
    modes.add_argument("--recipes", action="store_true", help="print FLOPs and estimated GPU hours of all recipes")
    parser.add_argument("--encoder", choices=ENCODER_PRESETS, default="vit_small_patch16_384")
    parser.add_argument("--decoders", nargs="+", choices=DECODER_TYPES)
    parser.add_argument("--sizes", nargs="+", type=int, help="pixels of the shorter side, multiples of the patch")
    parser.add_argument("--batches", nargs="+", type=int, help="images at a time; training takes twice as many")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="of our side")
    parser.add_argument("--what", nargs="+", choices=TASK_KINDS, default=list(TASK_KINDS), help="tasks to compare")
    parser.add_argument("--labels", type=int, default=150, help="number of classes")
    parser.add_argument("--repetitions", type=int, default=7, help="rounds at most")
    parser.add_argument("--seconds", type=float, default=25.0, help="no round of a task begins later, but one runs")
    parser.add_argument("--decoder-only", action="store_true", help="with --exponent: leave the whole model out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file for all measurements")
    parser.add_argument("--overwrite", action="store_true", help="replace that file if it exists")
    args = parser.parse_args(argv)
    try:
        check_file(args.output, args.overwrite)
    except ValueError as error:
        parser.error(f"--output: {error}")
    if args.sizes is None:
        args.sizes = list(EXPONENT_SIZES if args.exponent else GRID_SIZES if args.grid else (512,))
    args.batches = args.batches or list(GRID_BATCHES if args.grid else (1,))
    args.decoders = args.decoders or list(DECODER_TYPES if args.grid else ("sa",))
    patch_size = ENCODER_PRESETS[args.encoder][0]
    for name in ("sizes", "batches", "labels", "repetitions"):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name}: got {values}, needed at least 1")
    if any(size % patch_size or size < 64 for size in args.sizes):
        parser.error(f"--sizes: got {args.sizes}, needed multiples of the patch ({patch_size} pixels) from 64 on")
    return args


if __name__ == "__main__":
    sys.exit(main())
