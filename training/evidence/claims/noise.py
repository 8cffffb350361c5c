"""What noise on the attention parameters leaves of the mIoU, for all compared models of a plan."""

from pathlib import Path

from depict_hf.loading import load_model

from ...data import open_data
from ...evaluation import spread
from ..noise import ATTENTION_MATRICES, encode_photos, measure_noise
from .plan import Plan


def measure_plan_noise(plan: Plan, output: Path, name: str, where: str) -> dict:
    """Evaluate the models of one data set under the plan's noise.

    Args:
        output: Folder of `run_grid`.
        name: Name of the data set in the plan.
        where: Its folder or Hub name.

    Returns:
        `images`, the indices of the test images, and `decoders`: by decoder and seed `clean`, the mIoU without noise on
        them, and by scale and level the mIoU of every draw. Decoders without attention are left out.

    Raises:
        OSError, ValueError: If a model is missing or the data cannot be had.
    """
    samples = open_data(where, plan.datasets[name].known_names).samples["test"]
    images = list(spread(len(samples), plan.noise.images))
    sigmas = {"relative": plan.noise.relative, "absolute": plan.noise.absolute}
    decoders: dict[str, dict[str, dict]] = {}
    for decoder in plan.learning_rates:
        if decoder not in ATTENTION_MATRICES:
            continue
        decoders[decoder] = {}
        for seed in plan.seeds:
            model, image_processor = load_model(output / name / "models" / f"{decoder}_seed{seed}")
            photos = encode_photos(model, image_processor, samples, images, plan.size)
            found = measure_noise(model, photos, "attention-noise", sigmas, plan.noise.draws)
            decoders[decoder][str(seed)] = {
                "clean": found["clean"],
                **{
                    scale: {f"{level:g}": draws for level, draws in zip(levels, found["scores"][scale], strict=True)}
                    for scale, levels in sigmas.items()
                },
            }
            print(f"{name} {decoder}_seed{seed}: noise on {len(images)} test images")
    return {"images": images, "decoders": decoders}
