"""Files of the published code: names and shapes of parameters, and what a variant says of the model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import yaml
from torch import Tensor

from .encoder_weights import TIMM_NAMES, load_data, rename_by

# Dimension of one head, fixed in the published code: model/decoder.py in QishuaiWen/DEPICT@6c66e2b ("sa" and "ca";
# "cbsa" has the same), segm/model/factory.py in rstrudel/segmenter@20d1bfa ("mask_transformer").
SUBSPACE_DIM = 100
MASK_TRANSFORMER_HEAD_DIM = 64

# Published name to ours, each row a full match; None drops the parameter (ImageNet classifiers, never used).
_PUBLISHED_NAMES = [
    *[(rf"encoder\.{name}", None if ours is None else f"encoder.{ours}") for name, ours in TIMM_NAMES],
    (r"decoder\.blocks\.(\d+)\.attn\.qkv\.(\w+)", r"decoder.layers.\1.attention.qkv.\2"),
    (r"decoder\.blocks\.(\d+)\.attn\.proj\.(\w+)", r"decoder.layers.\1.attention.projection.\2"),
    (r"decoder\.blocks\.(\d+)\.(norm[12]|mlp\.fc[12])\.(\w+)", r"decoder.layers.\1.\2.\3"),
    (r"decoder\.cls_emb", r"decoder.class_tokens"),
    (r"decoder\.(?:net|snet)\.layers\.(\d+)\.norm\.(\w+)", r"decoder.layers.\1.norm.\2"),
    (r"decoder\.(?:net|snet)\.layers\.(\d+)\.fn\.proj", r"decoder.layers.\1.projection"),
    (r"decoder\.(?:net|snet)\.layers\.(\d+)\.fn\.step_size", r"decoder.layers.\1.step_size"),
    (r"decoder\.net\.layers\.(\d+)\.fn\.proj\.weight", r"decoder.layers.\1.projection.weight"),
    (r"decoder\.net\.layers\.(\d+)\.fn\.to_out\.(\w+)", r"decoder.layers.\1.output.\2"),
    (r"decoder\.net\.layers\.(\d+)\.fn\.step_x", r"decoder.layers.\1.step_size"),
    (r"decoder\.net\.layers\.(\d+)\.fn\.step_rep", r"decoder.layers.\1.representative_step_size"),
    (r"decoder\.cnet\.layers\.(\d+)\.norm\.(\w+)", r"decoder.cross_layers.\1.norm.\2"),
    (r"decoder\.cnet\.layers\.(\d+)\.fn\.proj", r"decoder.cross_layers.\1.projection"),
    (r"decoder\.cnet\.layers\.(\d+)\.fn\.step_size", r"decoder.cross_layers.\1.step_size"),
    (r"decoder\.(?:decoder_norm|snorm)\.(\w+)", r"decoder.norm.\1"),
    (r"decoder\.cnorm\.(\w+)", r"decoder.class_norm.\1"),
    (r"decoder\.mask_norm\.(\w+)", r"decoder.mask_norm.\1"),
    (r"decoder\.proj_dec\.(\w+)", r"decoder.input_projection.\1"),
    (r"decoder\.proj_patch", r"decoder.patch_projection"),
    (r"decoder\.proj_classes", r"decoder.class_projection"),
    (r"decoder\.head\.(\w+)", r"decoder.classifier.\1"),
]


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read published parameter names and tensors of a `checkpoint.pth`, without executing anything in it.

    Beside them, files of the published code hold the states of the optimiser, of the schedule and, where training was
    in mixed precision, of the loss scale; these are left out. The prefix `module.` that `DataParallel` and
    `DistributedDataParallel` give to every parameter is removed.

    Raises:
        ValueError: If the file holds anything but tensors and plain values, or no "model".
    """
    content = load_data(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        keys = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'{path} holds {keys}, needed a dict with the parameters under "model".')
    state_dict = dict(content["model"])
    if all(name.startswith("module.") for name in state_dict):
        state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}
    return state_dict


class _VariantLoader(yaml.SafeLoader):
    """Safe YAML plus the one Python tag that published files contain, read as a plain tuple."""


_VariantLoader.add_constructor(
    "tag:yaml.org,2002:python/tuple",
    lambda loader, node: tuple(loader.construct_sequence(cast(yaml.SequenceNode, node), deep=True)),
)


def read_variant(path: str | Path) -> dict:
    """Read the settings of a `variant.yml`.

    Raises:
        ValueError: If the file is no YAML of plain values and tuples.
    """
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_VariantLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML of plain values: {error}") from error
    if not isinstance(settings, dict) or "net_kwargs" not in settings:
        raise ValueError(f'{path} has no "net_kwargs"; needed the variant.yml that training wrote beside the model.')
    return settings


def rename_parameters(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give published parameters our names; values pass through untouched, so gradients can be renamed too.

    The ImageNet classifiers (`encoder.head`, `encoder.head_dist`), which segmentation never uses, are dropped.

    Raises:
        ValueError: If a name is not one of the published models'.
    """
    return rename_by(state_dict, _PUBLISHED_NAMES, "the published models of DEPICT and Segmenter")


def config_fields(state_dict: dict[str, Tensor], settings: dict) -> dict:
    """Return the fields of the configuration that weights and variant tell, but for labels and windows."""
    net = settings["net_kwargs"]
    try:
        projection = state_dict["encoder.patch_embed.proj.weight"]
        return {
            "patch_size": projection.shape[-1],
            "num_channels": projection.shape[1],
            "hidden_size": projection.shape[0],
            "num_hidden_layers": _count_layers(state_dict, "encoder.blocks"),
            "intermediate_size": state_dict["encoder.blocks.0.mlp.fc1.weight"].shape[0],
            "use_distillation_token": "encoder.dist_token" in state_dict,
            "image_size": net["image_size"],
            "num_attention_heads": net["n_heads"],
            "hidden_dropout_prob": net.get("dropout", 0.0),
            "attention_probs_dropout_prob": net.get("dropout", 0.0),
            "drop_path_rate": net.get("drop_path_rate", 0.0),
            **_decoder_fields(state_dict, net.get("decoder", {})),
        }
    except KeyError as error:
        raise ValueError(f"The checkpoint or its variant lacks {error}; needed the two files of one model.") from error


def _decoder_fields(state_dict: dict[str, Tensor], decoder: dict) -> dict:
    """Tell kind, depth, heads and widths of the decoder; its kind is not recorded, but its parameter names tell."""
    dropout = decoder.get("dropout", 0.0)
    if "decoder.head.weight" in state_dict:
        return {"decoder_type": "linear"}
    if "decoder.proj_dec.weight" in state_dict:
        width = state_dict["decoder.proj_dec.weight"].shape[0]
        return {
            "decoder_type": "mask_transformer",
            "decoder_num_layers": _count_layers(state_dict, "decoder.blocks"),
            "decoder_num_heads": width // MASK_TRANSFORMER_HEAD_DIM,
            "decoder_hidden_size": width,
            "decoder_intermediate_size": state_dict["decoder.blocks.0.mlp.fc1.weight"].shape[0],
            "decoder_dropout": dropout,
            "decoder_drop_path_rate": decoder.get("drop_path_rate", 0.0),
        }
    stack = "decoder.snet" if "decoder.snet.layers.0.fn.proj" in state_dict else "decoder.net"
    kind = "ca" if stack == "decoder.snet" else "sa"
    projection = f"{stack}.layers.0.fn.proj"
    if f"{projection}.weight" in state_dict:
        kind, projection = "cbsa", f"{projection}.weight"
    rows = state_dict[projection].shape[0]
    num_heads = decoder.get("n_heads") or rows // SUBSPACE_DIM
    fields = {
        "decoder_type": kind,
        "decoder_num_layers": _count_layers(state_dict, f"{stack}.layers"),
        "decoder_num_heads": num_heads,
        "decoder_head_dim": _head_dim(rows, num_heads),
        "decoder_dropout": dropout,
    }
    if kind != "ca":
        return fields
    return fields | {
        "decoder_cross_num_layers": _count_layers(state_dict, "decoder.cnet.layers"),
        "decoder_cross_head_dim": _head_dim(state_dict["decoder.cnet.layers.0.fn.proj"].shape[0], num_heads),
    }


def _head_dim(rows: int, num_heads: int) -> int:
    if rows % num_heads:
        raise ValueError(f"A projection of {rows} rows has no {num_heads} equal heads; check n_heads in variant.yml.")
    return rows // num_heads


def _count_layers(state_dict: dict[str, Tensor], prefix: str) -> int:
    """Count the layers under `prefix` by their consecutive numbers."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match[1] for name in state_dict if (match := pattern.match(name))})


def count_classes(state_dict: dict[str, Tensor]) -> int:
    """Return the number of classes of a published model, from its last layer."""
    names = ("decoder.head.bias", "decoder.mask_norm.bias")
    return next(state_dict[name] for name in names if name in state_dict).shape[0]
