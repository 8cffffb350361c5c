"""What noise on the attention parameters leaves of the mIoU of the models that a plan compares."""

import json
from pathlib import Path

import torch

from depict_hf.loading import load_model

from ...data import SegmentationDataset
from ...evaluation import spread, write_json
from ..noise import ATTENTION_MATRICES, encode_photos, measure_noise
from .plan import Plan


def measure_run_noise(plan: Plan, folder: Path, run: str, samples: SegmentationDataset) -> None:
    """Evaluate one trained model under the plan's noise, unless that was done before.

    The record has `images`, the indices of the test images, `clean`, the mIoU without noise on them, and by scale and
    level the mIoU of every draw.

    Args:
        folder: Of one data set's runs; gets `noise/RUN.json`, and has the model in `models/RUN` until then.
        run: Name of the run.
        samples: The test split.

    Raises:
        OSError, ValueError: If the model is missing or the data cannot be read.
    """
    path = noise_path(folder, run)
    if path.is_file():
        return
    model, image_processor = load_model(folder / "models" / run)
    images = list(spread(len(samples), plan.noise.images))
    sigmas = {"relative": plan.noise.relative, "absolute": plan.noise.absolute}
    # As the runs are trained and evaluated, but without a cache of rounded weights, which would have no noise.
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        photos = encode_photos(model, image_processor, samples, images, plan.size)
        found = measure_noise(model, photos, "attention-noise", sigmas, plan.noise.draws)
    by_level = {
        scale: {f"{level:g}": draws for level, draws in zip(levels, found["scores"][scale], strict=True)}
        for scale, levels in sigmas.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json({"images": images, "clean": found["clean"], **by_level}, path, indent=1)
    print(f"{folder.name} {run}: noise on {len(images)} test images")


def noise_path(folder: Path, run: str) -> Path:
    """Return where the record of a run's noise is."""
    return folder / "noise" / f"{run}.json"


def load_noise(plan: Plan, folder: Path) -> tuple[dict[str, dict[str, dict]], list[str]]:
    """Return the records of `measure_run_noise` by decoder and seed, and the names of runs that have none yet.

    Decoders without attention parameters are left out.
    """
    records: dict[str, dict[str, dict]] = {}
    missing = []
    for decoder in filter(ATTENTION_MATRICES.__contains__, plan.learning_rates):
        records[decoder] = {}
        for seed in plan.seeds:
            path = noise_path(folder, f"{decoder}_seed{seed}")
            if path.is_file():
                records[decoder][str(seed)] = json.loads(path.read_text(encoding="utf-8"))
            else:
                missing.append(f"{decoder}_seed{seed}")
    return records, missing
