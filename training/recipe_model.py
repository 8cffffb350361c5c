"""The model that a recipe trains: its encoder's weights, its decoder, and which of its weights move."""

from typing import Any, cast

import torch
from transformers import AutoConfig, PreTrainedModel

from depict_hf import DepictConfig, DepictForSemanticSegmentation
from depict_hf.configuration_depict import published_decoder_fields
from depict_hf.conversion import load_encoder, read_weights
from depict_hf.weight_files import check_finite, one_line

from .optimization import add_adapters, freeze_encoder_blocks
from .recipe import Recipe


def build_model(recipe: Recipe) -> DepictForSemanticSegmentation:
    """Build the recipe's model, float32: the pretrained encoder, frozen if so asked, and a new decoder.

    Raises:
        ImportError: If adapters are asked for and `peft` is not installed.
        OSError: If weights cannot be loaded.
        ValueError: If weights are missing, or the model to start from has another decoder.
    """
    if recipe.model.start_from is not None:
        check_start(recipe)
    fields: dict[str, Any] = {
        "decoder_type": recipe.model.decoder_type,
        "id2label": dict(enumerate(recipe.data.class_names)),
        "label2id": {name: index for index, name in enumerate(recipe.data.class_names)},
        "window_size": recipe.evaluation.window_size,
        "window_stride": recipe.evaluation.window_stride,
    }
    if recipe.model.start_from is not None:
        model, loading = DepictForSemanticSegmentation.from_pretrained(
            recipe.model.start_from, dtype=torch.float32, output_loading_info=True, **fields
        )
        if loading["missing_keys"] or loading["unexpected_keys"]:
            missing, unexpected = (sorted(loading[kind])[:5] for kind in ("missing_keys", "unexpected_keys"))
            raise ValueError(
                f"{recipe.model.start_from} is no whole model: weights {missing} are missing, {unexpected} unexpected; "
                "start from a folder that training or `depict convert` wrote."
            )
    elif recipe.model.encoder is None:
        model = _around_backbone(recipe.model.backbone, fields)
    else:
        fields |= {"image_size": recipe.data.crop_size, "drop_path_rate": recipe.model.drop_path_rate}
        model = DepictForSemanticSegmentation(DepictConfig.from_preset(recipe.model.encoder, **fields))
        load_encoder(model, read_weights(recipe.model.backbone))
    freeze_for(model, recipe)
    return model


def _around_backbone(name_or_path: str, fields: dict[str, Any]) -> DepictForSemanticSegmentation:
    """Build a model with these fields around a pretrained backbone.

    Raises:
        OSError: If there is no such backbone.
        ValueError: If its settings or weights are damaged, or it cannot be an encoder.
    """
    try:
        backbone_config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        fields = fields | published_decoder_fields(fields["decoder_type"], backbone_config.hidden_size)
        model = DepictForSemanticSegmentation(DepictConfig(backbone_config=backbone_config, **fields))
        load_backbone(model, name_or_path)
    except (ImportError, OSError, ValueError):
        raise
    # Of damaged settings and weights, every architecture raises errors of its own.
    except Exception as error:
        raise ValueError(
            f"Got backbone={name_or_path}, which cannot be loaded as an encoder ({type(error).__name__}): "
            f"{one_line(error)}; copy or download it again, or choose another."
        ) from error
    return model


def freeze_for(model: DepictForSemanticSegmentation, recipe: Recipe) -> None:
    """Freeze what the recipe does not train and add its adapters, in place.

    Raises:
        ImportError: If adapters are asked for and `peft` is not installed.
        ValueError: If the encoder has fewer blocks than are to be frozen.
    """
    model.encoder.requires_grad_(not recipe.model.freeze_encoder)
    freeze_encoder_blocks(model, recipe.model.frozen_encoder_blocks)
    # Used in pretraining only; FSDP does not resume where a trainable weight never had a gradient.
    for name, parameter in model.encoder.named_parameters():
        if name.endswith("mask_token"):
            parameter.requires_grad_(False)
    if recipe.model.lora_rank:
        add_adapters(model, recipe.model.lora_rank, recipe.model.lora_alpha, recipe.model.frozen_encoder_blocks)


def check_start(recipe: Recipe) -> None:
    """Refuse to start from a model whose decoder is not the recipe's.

    Raises:
        OSError: If there is no such model.
        ValueError: If decoder type or number of classes differ.
    """
    config = DepictConfig.from_pretrained(recipe.model.start_from)
    found, needed = (config.decoder_type, config.num_labels), (recipe.model.decoder_type, len(recipe.data.class_names))
    if found != needed:
        raise ValueError(
            f"Got start_from={recipe.model.start_from} with decoder {found[0]!r} and {found[1]} classes, needed "
            f"{needed[0]!r} and {needed[1]} classes, as the recipe has; choose another recipe or class_names, or "
            "start from a backbone."
        )


def load_backbone(model: DepictForSemanticSegmentation, name_or_path: str) -> None:
    """Load pretrained weights, float32, into the model's backbone, in place.

    Raises:
        OSError: If they cannot be loaded.
        ValueError: If some are missing.
    """
    # `AutoBackbone.from_pretrained` takes a local folder for the name of a timm model; the class itself does not.
    backbone = cast(PreTrainedModel, model.encoder.backbone)
    backbone_class = type(backbone)
    model.encoder.backbone, loading = backbone_class.from_pretrained(
        name_or_path, config=backbone.config, dtype=torch.float32, output_loading_info=True
    )
    check_finite(model.encoder.backbone.state_dict().items(), name_or_path)
    if loading["missing_keys"]:
        raise ValueError(
            f"{name_or_path} lacks weights of {backbone_class.__name__}, among them "
            f"{sorted(loading['missing_keys'])[:5]}; choose a checkpoint of that architecture."
        )
