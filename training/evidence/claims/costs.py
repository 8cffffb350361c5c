"""What the decoders of a plan cost: parameters, arithmetic, and time alone and with the encoder."""

import statistics
from functools import partial
from pathlib import Path

import torch

from depict_hf import DepictConfig, DepictForSemanticSegmentation

from ...evaluation import count_flops, environment, interleaved_seconds
from .plan import Plan

ASPECT = 4 / 3


def measure_plan_costs(plan: Plan, output: Path, repetitions: int = 7) -> dict:
    """Measure models as those of the first seed, on one image of the plan's size at 4 : 3, float32.

    Args:
        output: Folder of `run_grid`.
        repetitions: Rounds of the timing; each runs every decoder once, alone and behind the encoder.

    Returns:
        `image_size`, `threads`, and by data set and decoder in `datasets`: `parameters`; `flops`, two per multiply-add
        of matrix products; `decoder_milliseconds` and `milliseconds` of the whole, medians.

    Raises:
        ValueError, OSError: If a configuration is missing.
    """
    measured: dict[str, dict] = {}
    for dataset in plan.datasets:
        costs: dict[str, dict[str, float]] = {}
        functions = {}
        for decoder in plan.learning_rates:
            folder = output / dataset / "models" / f"{decoder}_seed{plan.seeds[0]}"
            # Costs do not depend on weights; the counter follows tensors that require a gradient.
            model = DepictForSemanticSegmentation(DepictConfig.from_pretrained(folder)).eval().requires_grad_(False)
            patch = model.config.encoder_patch_size
            grid_size = (plan.size // patch, int(plan.size * ASPECT) // patch)
            model.config.window_size = None
            patches = torch.randn(1, grid_size[0] * grid_size[1], model.encoder.hidden_size)
            pixel_values = torch.randn(1, 3, grid_size[0] * patch, grid_size[1] * patch)
            functions[f"{decoder} alone"] = partial(model.decoder, patches, grid_size)
            functions[f"{decoder} whole"] = partial(model.__call__, pixel_values)
            costs[decoder] = {
                "parameters": sum(each.numel() for each in model.decoder.parameters()),
                "flops": count_flops(functions[f"{decoder} alone"]),
            }
        with torch.inference_mode():
            seconds = interleaved_seconds(functions, repetitions)
        for decoder, cost in costs.items():
            cost["decoder_milliseconds"] = 1000 * statistics.median(seconds[f"{decoder} alone"])
            cost["milliseconds"] = 1000 * statistics.median(seconds[f"{decoder} whole"])
        measured[dataset] = costs
    size = [plan.size, int(plan.size * ASPECT)]
    return {"image_size": size, "threads": torch.get_num_threads(), "datasets": measured, "environment": environment()}
