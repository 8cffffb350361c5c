"""Tasks of the benchmark run by every side in turns, with ratios to the first side, and as a table."""

import argparse
import platform
import statistics
from collections.abc import Iterator

import psutil
import torch

from ..evaluation import count_flops, interleaved_seconds, matrix_product, peak_extra_bytes
from .benchmark_tasks import (
    PUBLISHED_SCALES,
    PUBLISHED_WINDOW,
    Task,
    build_model,
    dtype_name,
    end_to_end,
    in_dtypes,
    other_models,
    random_photo,
    stages,
    training_step,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TASK_KINDS = ("photo", "multi-scale", "stages", "training", "others")


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
    flops = {
        name: (count_flops(side.run) or None) if side.count_flops else None
        for name, side in (measured.items() if task.count_flops else ())
    }
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
        count = flops.get(name)
        rate = None if count is None else count / medians[name]
        sides[name] = {
            "dtype": dtype_name(side.dtype),
            "median_seconds": medians[name],
            "seconds": seconds[name],
            "extra_bytes": extra_bytes[name],
            "flops": count,
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
    """Return the memory that is free for tensors now, in bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def tasks(args: argparse.Namespace) -> Iterator[Task]:
    """Yield what the command line asks for; models live only as long as their task."""
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
    """Write the lines of the table, one for each side."""
    lines: list[str] = []
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


def machine(device: torch.device) -> str:
    """Name the processor that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
