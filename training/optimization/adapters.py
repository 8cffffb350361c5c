"""Low-rank adapters (Hu et al., ICLR 2022) of `peft` in an encoder that otherwise stays as it is."""

from torch import nn

from depict_hf import DepictForSemanticSegmentation

from .groups import count_encoder_blocks, encoder_block


def add_adapters(model: DepictForSemanticSegmentation, rank: int, alpha: float, num_frozen: int = 0) -> None:
    """Freeze the encoder and add a trainable low-rank product to every linear layer of its blocks, in place.

    The products are zero at first, so that the model's outputs do not change.

    Args:
        model: Its decoder is not touched.
        rank: Rank of the products.
        alpha: They are multiplied by `alpha / rank`.
        num_frozen: First blocks that get none.

    Raises:
        ImportError: If `peft` is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(f"lora_rank={rank} needs peft: pip install '.[lora]' ({error})") from error
    num_blocks = count_encoder_blocks(model)
    prefix = "encoder."
    targets = [
        name
        for name, module in model.encoder.named_modules()
        if isinstance(module, nn.Linear) and encoder_block(f"{prefix}{name}.", num_blocks) >= num_frozen
    ]
    model.encoder.requires_grad_(False)
    decoder = {name: each.requires_grad for name, each in model.decoder.named_parameters()}
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), model.encoder)
    for name, parameter in model.decoder.named_parameters():
        parameter.requires_grad_(decoder[name])


def has_adapters(model: nn.Module) -> bool:
    """Whether `add_adapters` has been called with the model, and `merge_adapters` not yet."""
    return hasattr(getattr(model, "encoder", None), "peft_config")


def merge_adapters(model: DepictForSemanticSegmentation) -> None:
    """Add the products to the weights that they belong to, and put the plain layers back, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge(safe_merge=True)
                setattr(parent, name, child.get_base_layer())
    del model.encoder.peft_config
