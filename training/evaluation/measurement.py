"""Seconds, peak memory, FLOPs and the machine's own matrix-product rate."""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}


def interleaved_seconds(
    functions: Mapping[str, Callable[[], object]],
    repetitions: int,
    budget_seconds: float = math.inf,
    warm_up: bool = True,
    device: torch.device | str = "cpu",
) -> dict[str, list[float]]:
    """Time functions in turns, so that whatever else the machine does falls on all of them alike.

    Args:
        functions: Functions by name; each is called once per round.
        repetitions: Rounds that count.
        budget_seconds: No round begins after so many seconds, but one always counts.
        warm_up: Whether a round that does not count comes first.
        device: Whose work each call waits for.

    Returns:
        Seconds of every call, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    for round_index in range(-int(warm_up), repetitions):
        if round_index > 0 and time.perf_counter() - start > budget_seconds:
            break
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            wait_for(device)
            if round_index >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def wait_for(device: torch.device | str) -> None:
    """Return once the device has done all work given to it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_extra_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int | None:
    """Return the highest memory use during a call, above the use before it.

    On CUDA it is what tensors occupy. On the CPU it is the resident memory of the process as the kernel keeps it,
    after free memory was handed back; None where there is no Linux kernel to ask.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        wait_for(device)
        return torch.cuda.max_memory_allocated(device) - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    release_free_memory()
    reset.write_text("5")  # the highest resident memory so far becomes the present one
    before = _status_bytes("VmRSS")
    function()
    return max(0, _status_bytes("VmHWM") - before)


def peak_resident_bytes() -> int | None:
    """Return the highest resident memory of this process so far; None where there is no Linux kernel to ask."""
    return _status_bytes("VmHWM") if Path("/proc/self/status").exists() else None


def release_free_memory() -> None:
    """Hand memory that the C library keeps for later back to the kernel, where it is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; this kernel does not account for memory.")


def count_flops(function: Callable[[], object]) -> int:
    """Count the operations of a call's matrix products, convolutions and attention; a product and a sum are two.

    Pointwise work, normalisation, softmax and interpolation are not counted. PyTorch's own counter leaves the CPU's
    fused attention out; here it counts like the others: two products forward, five backward.
    """
    aten = torch.ops.aten
    fused = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        function()
    return counter.get_total_flops()


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *args, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *args, **kwargs
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def matrix_product(dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Callable[[], Tensor], int]:
    """Return a product of two large square matrices, to be timed, and its FLOPs; its result has their shape."""
    size = MATRIX_SIZE[torch.device(device).type]
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    return lambda: left @ right, 2 * size**3


def log_slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Fit the exponent p of `cost = c * size ** p` by least squares over the logarithms.

    Raises:
        ValueError: If there are fewer than two different sizes.
    """
    if len(set(sizes)) < 2:
        raise ValueError(f"Got sizes {list(sizes)}, needed at least two different ones to fit an exponent.")
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(cost) for cost in costs]).slope
