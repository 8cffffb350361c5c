"""How the cost of decoders grows with the number of tokens: the exponent p of `cost = c * tokens ** p`."""

import statistics
from collections.abc import Callable, Sequence

import torch

from depict_hf import DepictConfig, DepictForSemanticSegmentation
from depict_hf.vit import LayerRecord

from ..evaluation import count_flops, interleaved_seconds, log_slope

EXPONENT_SIZES = (512, 768, 1024, 1536, 2048)
DECODERS = ("sa", "cbsa")


def measure_exponents(
    encoder: str,
    num_labels: int,
    sizes: Sequence[int],
    repetitions: int,
    budget_seconds: float,
    device: torch.device,
    decoder_only: bool = False,
) -> dict:
    """Time both decoders alone and, unless `decoder_only`, behind their encoder, on squares of `sizes` pixels.

    Returns:
        A record ready for JSON: `tokens` (patches) per size; per decoder and part the median `seconds` and the
        `flops` per size, and the exponents fitted to either, `time_exponent` and `flop_exponent`.

    Raises:
        ValueError: If there are fewer than two different sizes.
    """
    configs = {kind: DepictConfig.from_preset(encoder, decoder_type=kind, num_labels=num_labels) for kind in DECODERS}
    models = {kind: DepictForSemanticSegmentation(config).eval().to(device) for kind, config in configs.items()}
    grids = [(size // configs["sa"].patch_size,) * 2 for size in sizes]
    tokens = [height * width for height, width in grids]
    costs: dict[str, dict[str, dict]] = {kind: {} for kind in DECODERS}
    for part in ("decoder",) if decoder_only else ("decoder", "whole model"):
        seconds: dict[str, list[float]] = {kind: [] for kind in DECODERS}
        for grid_size in grids:
            functions = {kind: _call(models[kind], part, grid_size) for kind in DECODERS}
            for kind, values in interleaved_seconds(functions, repetitions, budget_seconds, device=device).items():
                seconds[kind].append(statistics.median(values))
        for kind in DECODERS:
            flops = part_flops(configs[kind], part, grids)
            costs[kind][part] = {
                "seconds": seconds[kind],
                "flops": flops,
                "time_exponent": log_slope(tokens, seconds[kind]),
                "flop_exponent": log_slope(tokens, flops),
            }
    return {"sizes": list(sizes), "tokens": tokens, "costs": costs}


def part_flops(config: DepictConfig, part: str, grids: Sequence[tuple[int, int]]) -> list[int]:
    """Return the FLOPs of the "decoder" or the "whole model" on one image of each grid, (height, width) in patches."""
    with torch.device("meta"):
        model = DepictForSemanticSegmentation(config).eval()
    return [count_flops(_call(model, part, grid_size)) for grid_size in grids]


def _call(model: DepictForSemanticSegmentation, part: str, grid_size: tuple[int, int]) -> Callable[[], None]:
    """Return a call of the model's part on random input that covers the grid."""
    config = model.config
    if part == "decoder":
        inputs = torch.randn(1, grid_size[0] * grid_size[1], config.hidden_size, device=model.device)
    else:
        inputs = torch.randn(1, 3, *(side * config.patch_size for side in grid_size), device=model.device)

    def run() -> None:
        with torch.inference_mode():
            patches = inputs if part == "decoder" else model.encoder(inputs, LayerRecord())[0]
            model.decoder(patches, grid_size)

    return run


def render_exponents(record: dict) -> str:
    """Write a table of milliseconds and GFLOP by size, with the fitted exponents."""
    columns = "".join(f"{size:>10}" for size in record["sizes"])
    lines = [
        f"{'square of pixels':<33}{columns}{'exponent':>10}",
        f"{'tokens':<33}{''.join(f'{count:>10}' for count in record['tokens'])}",
    ]
    for kind, parts in record["costs"].items():
        for part, cost in parts.items():
            milliseconds = "".join(f"{1000 * value:>10.1f}" for value in cost["seconds"])
            gflops = "".join(f"{value / 1e9:>10.1f}" for value in cost["flops"])
            lines.append(f"{f'{kind} {part}':<25}{'ms':<8}{milliseconds}{cost['time_exponent']:>10.2f}")
            lines.append(f"{'':<25}{'GFLOP':<8}{gflops}{cost['flop_exponent']:>10.2f}")
    return "\n".join(lines)
