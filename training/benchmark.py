"""Compare the package with the published way of running the same weights, and with transformers' models, in one run.

    python -m training.benchmark [--output results.json]      the paper's small model, a few minutes on two cores
    python -m training.benchmark --grid                       every decoder, 512 to 2048 pixels, batch 1 to 8
    python -m training.benchmark --exponent                   cost of the decoders against the number of tokens
    python -m training.benchmark --recipes                    GPU hours of the recipes, estimated from their FLOPs

Sides of a comparison take turns; what is printed are medians. "memory" is the peak above the state before, "of peak"
the share of the rate that a large matrix product reaches in the same turns and the same dtype. Weights are random.
"""

import argparse
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch

from depict_hf.configuration_depict import DECODER_TYPES, ENCODER_PRESETS

from .evaluate import environment, write_json
from .evaluation import count_flops, interleaved_seconds, matrix_product, peak_extra_bytes
from .evidence import (
    EXPONENT_SIZES,
    PUBLISHED_SCALES,
    PUBLISHED_WINDOW,
    Task,
    build_model,
    cost_table,
    dtype_name,
    end_to_end,
    in_dtypes,
    measure_exponents,
    other_models,
    random_photo,
    render_exponents,
    stages,
    training_step,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WHAT = ("photo", "multi-scale", "stages", "training", "others")
GRID_SIZES, GRID_BATCHES = (512, 768, 1024, 1536, 2048), (1, 2, 4, 8)


def run_task(task: Task, repetitions: int, budget_seconds: float, device: torch.device) -> dict:
    """Measure every side of a task.

    Returns:
        A record ready for JSON. Per side: seconds of each round and their median, peak extra bytes, FLOPs, share of
        the measured matrix-product rate, and the ratios to the first side, `speed_up` (its seconds over this side's)
        and `memory_ratio` (this side's bytes over its). A side whose attention weights would not fit into memory is
        there with `left_out`.
    """
    left_out = task.left_out | {
        name: "attention weights do not fit into memory"
        for name, side in task.sides.items()
        if 3 * side.attention_bytes >= available_bytes(device)
    }
    measured = {name: side for name, side in task.sides.items() if name not in left_out}
    # The first of these passes also warms up, so that what is set up once is not taken for a side's memory.
    flops = {name: count_flops(side.run) for name, side in measured.items()} if task.count_flops else {}
    flops = {name: count or None if measured[name].count_flops else None for name, count in flops.items()}
    extra_bytes = {name: peak_extra_bytes(side.run, device) for name, side in measured.items()}
    products = {side.dtype: matrix_product(side.dtype, device) for side in measured.values()}
    functions = {name: side.run for name, side in measured.items()}
    functions |= {f"product {dtype}": product for dtype, (product, _) in products.items()}
    for product, _ in products.values():
        product()
    seconds = interleaved_seconds(functions, repetitions, budget_seconds, warm_up=False, device=device)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {dtype: product_flops / medians[f"product {dtype}"] for dtype, (_, product_flops) in products.items()}

    reference = next(iter(task.sides))
    sides = {}
    for name, side in measured.items():
        rate = flops[name] / medians[name] if flops.get(name) else None
        sides[name] = {
            "dtype": dtype_name(side.dtype),
            "median_seconds": medians[name],
            "seconds": seconds[name],
            "extra_bytes": extra_bytes[name],
            "flops": flops.get(name),
            "matrix_product_flops_per_second": rates[side.dtype],
            "share_of_matrix_product_rate": _ratio(rate, rates[side.dtype]),
            "speed_up": _ratio(medians.get(reference), medians[name]),
            "memory_ratio": _ratio(extra_bytes[name], extra_bytes.get(reference)),
        }
    sides |= {name: {"left_out": reason} for name, reason in left_out.items()}
    return {"what": task.what, "decoder": task.decoder, "size": list(task.size), "batch": task.batch, "sides": sides}


def _ratio(value: float | None, reference: float | None) -> float | None:
    return value / reference if value is not None and reference else None


def available_bytes(device: torch.device) -> int:
    """Memory that is free for tensors now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def tasks(args: argparse.Namespace) -> Iterator[Task]:
    """What the command line asks for; models live only as long as their task."""
    device = torch.device(args.device)
    dtypes = [DTYPES[name] for name in args.dtypes]
    for decoder_type in args.decoders:
        for size in args.sizes:
            photo = random_photo(size, round(size * 4 / 3))
            window = min(size, PUBLISHED_WINDOW)
            for batch in args.batches:
                if "photo" in args.what:
                    model = build_model(args.encoder, decoder_type, args.labels, device, window)
                    yield end_to_end(in_dtypes(model, dtypes), photo, batch)
                if "multi-scale" in args.what:
                    model = build_model(args.encoder, decoder_type, args.labels, device, window)
                    yield end_to_end(in_dtypes(model, dtypes[:1]), photo, batch, PUBLISHED_SCALES, flip=True)
                model = build_model(args.encoder, decoder_type, args.labels, device)
                if "stages" in args.what:
                    yield from stages(in_dtypes(model, dtypes), size, batch)
                if "training" in args.what:
                    yield training_step(model, size, 2 * batch)
    if "others" in args.what:
        for size in args.sizes:
            for batch in args.batches:
                yield other_models(build_model(args.encoder, args.decoders[0], args.labels, device), size, batch)


HEADER = (
    f"{'':<24}{'decoder':<17}{'size':>10}{'batch':>6}  {'side':<23}{'ms':>9}{'speed-up':>9}{'MiB':>8}{'memory':>7}"
    f"{'GFLOP':>8}{'of peak':>8}{'rounds':>7}"
)


def render(record: dict) -> str:
    """Lines of the table, one for each side."""
    lines = []
    for name, side in record["sides"].items():
        height, width = record["size"]
        first = f"{record['what']:<24}{record['decoder']:<17}{f'{height}x{width}':>10}{record['batch']:>6}"
        line = f"{first if not lines else '':<{len(first)}}  {name:<23}"
        if "left_out" in side:
            lines.append(f"{line}  left out: {side['left_out']}")
            continue
        line += f"{1000 * side['median_seconds']:>9.1f}{_number(side['speed_up'], 2):>9}"
        line += f"{_number(side['extra_bytes'], 1, 2**-20):>8}{_number(side['memory_ratio'], 2):>7}"
        line += f"{_number(side['flops'], 1, 1e-9):>8}{_number(side['share_of_matrix_product_rate'], 0, 100, '%'):>8}"
        lines.append(f"{line}{len(side['seconds']):>7}")
    return "\n".join(lines)


def _number(value: float | None, decimals: int, factor: float = 1.0, unit: str = "") -> str:
    return "-" if value is None else f"{value * factor:.{decimals}f}{unit}"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    sys.stdout.reconfigure(line_buffering=True)
    torch.manual_seed(0)
    device = torch.device(args.device)
    record = {"arguments": vars(args) | {"output": None}, "environment": environment() | {"machine": machine(device)}}
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
        write_json(record, args.output)
    return 0


def machine(device: torch.device) -> str:
    """The processor that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


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
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT), help="tasks to compare")
    parser.add_argument("--labels", type=int, default=150, help="number of classes")
    parser.add_argument("--repetitions", type=int, default=7, help="rounds at most")
    parser.add_argument("--seconds", type=float, default=25.0, help="no round of a task begins later, but one runs")
    parser.add_argument("--decoder-only", action="store_true", help="with --exponent: leave the whole model out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file for all measurements")
    args = parser.parse_args(argv)
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
