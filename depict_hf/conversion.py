"""Weights of others into ours: published checkpoints of DEPICT and Segmenter, encoders of timm and transformers."""

import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor

from .configuration_depict import DepictConfig
from .image_processing_depict import DepictImageProcessor
from .labels import class_names
from .modeling_depict import DepictForSemanticSegmentation
from .vit import ViTEmbeddings, resize_positions

# `STATS`, segm/data/utils.py in rstrudel/segmenter@20d1bfa.
NORMALIZATIONS = {
    "vit": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "deit": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
# Dimension of one head, fixed in the published code: model/decoder.py in QishuaiWen/DEPICT@6c66e2b ("sa" and "ca";
# "cbsa" has the same), segm/model/factory.py in rstrudel/segmenter@20d1bfa ("mask_transformer").
SUBSPACE_DIM = 100
MASK_TRANSFORMER_HEAD_DIM = 64

# Published name to ours, each row a full match; None drops the parameter (ImageNet classifiers, never used).
_PUBLISHED_NAMES = [
    (r"encoder\.(head|head_dist)\.(weight|bias)", None),
    (r"encoder\.(cls_token)", r"encoder.embeddings.\1"),
    (r"encoder\.dist_token", r"encoder.embeddings.distillation_token"),
    (r"encoder\.pos_embed", r"encoder.embeddings.position_embeddings"),
    (r"encoder\.patch_embed\.proj\.(\w+)", r"encoder.embeddings.projection.\1"),
    (r"encoder\.norm\.(\w+)", r"encoder.norm.\1"),
    (r"(encoder|decoder)\.blocks\.(\d+)\.attn\.qkv\.(\w+)", r"\1.layers.\2.attention.qkv.\3"),
    (r"(encoder|decoder)\.blocks\.(\d+)\.attn\.proj\.(\w+)", r"\1.layers.\2.attention.projection.\3"),
    (r"(encoder|decoder)\.blocks\.(\d+)\.(norm[12]|mlp\.fc[12])\.(\w+)", r"\1.layers.\2.\3.\4"),
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
# transformers' ViT and DeiT, as modules name them and as older checkpoints on disk do; q, k and v are joined later.
_TRANSFORMERS_NAMES = [
    (r"(classifier|cls_classifier|distillation_classifier|pooler\.dense|decoder\.0)\.(weight|bias)", None),
    (r"embeddings\.mask_token", None),
    (r"embeddings\.(cls_token|distillation_token|position_embeddings)", r"embeddings.\1"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"embeddings.projection.\1"),
    (r"layers\.(\d+)\.attention\.([qkv])_proj\.(\w+)", r"layers.\1.attention.\2.\3"),
    (r"layers\.(\d+)\.attention\.o_proj\.(\w+)", r"layers.\1.attention.projection.\2"),
    (r"layers\.(\d+)\.mlp\.(fc[12])\.(\w+)", r"layers.\1.mlp.\2.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.(\w+)", r"layers.\1.attention.\2.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)", r"layers.\1.attention.projection.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(\w+)", r"layers.\1.mlp.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(\w+)", r"layers.\1.mlp.fc2.\2"),
    (r"(?:layers|encoder\.layer)\.(\d+)\.layernorm_before\.(\w+)", r"layers.\1.norm1.\2"),
    (r"(?:layers|encoder\.layer)\.(\d+)\.layernorm_after\.(\w+)", r"layers.\1.norm2.\2"),
    (r"layernorm\.(\w+)", r"norm.\1"),
]


def convert_checkpoint(
    checkpoint: str | Path, variant: str | Path | None = None
) -> tuple[DepictForSemanticSegmentation, DepictImageProcessor]:
    """Read a model that the authors of DEPICT or of Segmenter published.

    The decoder's kind, depth and widths, the number of classes and the encoder's shape come from the weights; the
    number of encoder heads, dropout, window size and stride, resize and normalisation from the variant file. Class
    names are those of the dataset that the variant names, where their count fits. Nothing in either file is executed.

    Args:
        checkpoint: Path of `checkpoint.pth`, or of the folder that holds it.
        variant: Path of `variant.yml`; by default the one beside the checkpoint.

    Returns:
        The model in evaluation mode, float32, and its image processor; both are ready for `save_pretrained`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file holds more than data, or a parameter is missing, left over or of another shape.

    Source:
        `load_model`, segm/model/factory.py in rstrudel/segmenter@20d1bfa; the same in QishuaiWen/DEPICT@6c66e2b.
    """
    checkpoint = Path(checkpoint)
    if checkpoint.is_dir():
        checkpoint = checkpoint / "checkpoint.pth"
    variant = checkpoint.with_name("variant.yml") if variant is None else Path(variant)
    for path in (checkpoint, variant):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; a published model is a checkpoint.pth with the variant.yml beside it."
            )
    state_dict = read_checkpoint(checkpoint)
    settings = read_variant(variant)
    config = _config_from(state_dict, settings)
    model = DepictForSemanticSegmentation(config)
    _load_exactly(model, rename_parameters(state_dict))
    return model.eval(), _image_processor_from(settings)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Published parameter names and tensors of a `checkpoint.pth`, read without executing anything in it.

    Raises:
        ValueError: If the file holds anything but tensors and plain values, or no "model".
    """
    content = _load_data(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        keys = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'{path} holds {keys}, needed a dict with the parameters under "model".')
    return dict(content["model"])


def _load_data(path: str | Path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no pickle of tensors and plain values, or holds code, which is never run: {error}"
        ) from error


class _VariantLoader(yaml.SafeLoader):
    """Safe YAML plus the one Python tag that published files contain, read as a plain tuple."""


_VariantLoader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node, deep=True))
)


def read_variant(path: str | Path) -> dict:
    """Settings of a `variant.yml`.

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
    """Published parameter names to ours; values pass through untouched, so gradients can be renamed too.

    The ImageNet classifiers (`encoder.head`, `encoder.head_dist`), which segmentation never uses, are dropped.

    Raises:
        ValueError: If a name is not one of the published models'.
    """
    return _rename(state_dict, _PUBLISHED_NAMES, "the published models of DEPICT and Segmenter")


def load_encoder(model: DepictForSemanticSegmentation, state_dict: Mapping[str, Tensor]) -> None:
    """Load pretrained weights of a plain vision transformer into `model.encoder`, in place.

    Position embeddings of another grid are resized bilinearly to the model's. `layer_norm_eps` is the model's own: for
    the outputs of the source, build the model with the source's (timm 1e-6, transformers' ViT 1e-12); the published
    code trains with 1e-5 from either.

    Args:
        model: With a native encoder of the same shape.
        state_dict: Of a timm VisionTransformer (AugReg, DeiT, distilled or not), or of transformers' ViT or DeiT with
            or without a head. Classifiers, pooler and mask token are dropped.

    Raises:
        ValueError: If a parameter is missing, left over or of another shape.
    """
    if any(name.endswith("patch_embeddings.projection.weight") for name in state_dict):
        stripped = {re.sub(r"^(vit|deit)\.", "", name): value for name, value in state_dict.items()}
        renamed = _join_qkv(_rename(stripped, _TRANSFORMERS_NAMES, "transformers' ViT and DeiT"))
    else:
        published = rename_parameters({f"encoder.{name}": value for name, value in state_dict.items()})
        renamed = {name.removeprefix("encoder."): value for name, value in published.items()}
    embeddings = model.encoder.embeddings
    name = "embeddings.position_embeddings"
    if name in renamed:
        renamed[name] = _fit_positions(renamed[name], embeddings)
    _load_exactly(model.encoder, renamed)


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """Parameters of a pretrained model, for `load_encoder`, read without executing anything.

    Args:
        source: A weights file (`.safetensors`, or a pickle of tensors), a folder with `model.safetensors`, or the name
            of a repository on the Hub that has one, such as "timm/vit_small_patch16_384.augreg_in21k_ft_in1k".

    Raises:
        OSError: If there is no such file or repository.
        ValueError: If a pickle holds more than tensors.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "model.safetensors"
    elif not path.is_file():
        path = Path(hf_hub_download(str(source), "model.safetensors"))
    if path.suffix == ".safetensors":
        return load_file(path)
    content = _load_data(path)
    return dict(content["model"]) if isinstance(content.get("model"), dict) else content


def _fit_positions(positions: Tensor, embeddings: ViTEmbeddings) -> Tensor:
    """Position embeddings of a square grid, resized to the grid of `embeddings`."""
    num_patches = positions.shape[1] - embeddings.num_prefix_tokens
    side = math.isqrt(num_patches)
    if side**2 != num_patches:
        raise ValueError(
            f"{positions.shape[1]} position embeddings less {embeddings.num_prefix_tokens} prefix tokens are no square "
            "grid; check `use_distillation_token`."
        )
    return resize_positions(positions, (side, side), embeddings.grid_size)


def _rename(state_dict: Mapping[str, Tensor], table: list[tuple[str, str | None]], source: str) -> dict[str, Tensor]:
    renamed, unknown = {}, []
    for name, value in state_dict.items():
        for pattern, replacement in table:
            match = re.fullmatch(pattern, name)
            if match:
                if replacement is not None:
                    renamed[match.expand(replacement)] = value
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"Parameters that {source} do not have: {', '.join(unknown[:10])}; nothing was converted.")
    return renamed


def _join_qkv(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    joined = dict(state_dict)
    for name in state_dict:
        match = re.fullmatch(r"(layers\.\d+\.attention)\.q\.(weight|bias)", name)
        if match:
            parts = [joined.pop(f"{match[1]}.{part}.{match[2]}") for part in "qkv"]
            joined[f"{match[1]}.qkv.{match[2]}"] = torch.cat(parts)
    return joined


def _load_exactly(module: torch.nn.Module, state_dict: dict[str, Tensor]) -> None:
    own = module.state_dict()
    problems = [f"missing {name}" for name in own.keys() - state_dict.keys()]
    problems += [f"left over {name}" for name in state_dict.keys() - own.keys()]
    problems += [
        f"{name} is {tuple(state_dict[name].shape)}, needed {tuple(own[name].shape)}"
        for name in own.keys() & state_dict.keys()
        if own[name].shape != state_dict[name].shape
    ]
    if problems:
        raise ValueError(f"The weights do not fit the model: {'; '.join(sorted(problems)[:10])}.")
    module.load_state_dict(state_dict)


def _config_from(state_dict: dict[str, Tensor], settings: dict) -> DepictConfig:
    """Configuration of a published model from its weights and its variant."""
    net = settings["net_kwargs"]
    inference = settings.get("inference_kwargs", {})
    dataset = settings.get("dataset_kwargs", {})
    try:
        projection = state_dict["encoder.patch_embed.proj.weight"]
        fields = {
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
            "window_size": inference.get("window_size", dataset.get("crop_size")),
            "window_stride": inference.get("window_stride"),
            **_decoder_fields(state_dict, net.get("decoder", {})),
        }
    except KeyError as error:
        raise ValueError(f"The checkpoint or its variant lacks {error}; needed the two files of one model.") from error
    return DepictConfig(**fields, **_label_fields(_count_classes(state_dict), dataset.get("dataset")))


def _decoder_fields(state_dict: dict[str, Tensor], decoder: dict) -> dict:
    """Kind, depth, heads and widths of the decoder; its kind is not recorded, but its parameter names tell."""
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
    """Layers under `prefix`, counted by their consecutive numbers."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match[1] for name in state_dict if (match := pattern.match(name))})


def _count_classes(state_dict: dict[str, Tensor]) -> int:
    return state_dict.get("decoder.head.bias", state_dict.get("decoder.mask_norm.bias")).shape[0]


def _label_fields(num_labels: int, dataset: str | None) -> dict:
    """Class names of the dataset that the variant names (or, if it names none, of that with as many classes)."""
    for name in ("ade20k", "cityscapes", "pascal_context"):
        names = class_names(name)
        if dataset in (None, name) and len(names) == num_labels:
            return {"id2label": dict(enumerate(names)), "label2id": {label: i for i, label in enumerate(names)}}
    return {"num_labels": num_labels}


def _image_processor_from(settings: dict) -> DepictImageProcessor:
    """Resize and normalisation of a published model."""
    dataset = settings.get("dataset_kwargs", {})
    normalization = dataset.get("normalization", settings["net_kwargs"].get("normalization"))
    size = settings.get("inference_kwargs", {}).get("im_size", dataset.get("image_size"))
    if normalization not in NORMALIZATIONS or not isinstance(size, int):
        raise ValueError(
            f"variant.yml has normalization={normalization!r} and im_size={size!r}, needed one of "
            f"{', '.join(NORMALIZATIONS)} and a number of pixels."
        )
    mean, std = NORMALIZATIONS[normalization]
    return DepictImageProcessor(size={"shortest_edge": size}, image_mean=list(mean), image_std=list(std))
