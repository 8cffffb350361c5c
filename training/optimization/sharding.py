"""What a model that several processes share among them (FSDP) cannot do."""

from ..recipe import Recipe


def check_sharding(recipe: Recipe, fsdp_version: int) -> None:
    """Refuse what does not work with a model that the processes share (FSDP).

    Raises:
        ValueError: If it is FSDP's first version, or the recipe asks for what needs the whole model in each process.
    """
    if fsdp_version < 2:
        raise ValueError(
            "Got FSDP of the first version, which `accelerate launch --use_fsdp` means by itself; needed is the "
            "second: launch with `accelerate launch --use_fsdp --fsdp_version 2 ...`."
        )
    optimization, model = recipe.optimization, recipe.model
    asked = {
        "average_decay": optimization.average_decay,
        "lora_rank": model.lora_rank,
        "cache_features": recipe.data.cache_features,
        "keep_best": recipe.evaluation.keep_best,
    }
    names = [name for name, value in asked.items() if value]
    if names:
        raise ValueError(
            f"Got {' and '.join(names)} for a model that the processes share (FSDP); leave it out, or launch without "
            "FSDP, so that every process holds the model."
        )
