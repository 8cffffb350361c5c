"""Files of the published code: names and shapes of parameters, and what a variant says of the model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import yaml
from torch import Tensor

from .configuration_depict import ENCODER_PRESETS
from .encoder_weights import TIMM_NAMES, check_tensors, load_data, rename_by
from .ranges import MOST_DEPTH, MOST_ENTRIES, check_nested, check_whole, shown
from .weight_files import one_line

# Dimension of one head, fixed in the published code: model/decoder.py in QishuaiWen/DEPICT@6c66e2b ("sa" and "ca";
# "cbsa" has the same), segm/model/factory.py in rstrudel/segmenter@20d1bfa ("mask_transformer").
SUBSPACE_DIM = 100
MASK_TRANSFORMER_HEAD_DIM = 64

# Bytes of a `variant.yml`, of which published ones have less than 2000.
LONGEST_VARIANT = 2**16

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
    `DistributedDataParallel` give to every parameter is removed. Shapes are those of the file.

    Raises:
        ValueError: If the file holds anything but tensors and plain values, or no "model".
    """
    content = load_data(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        keys = sorted(map(repr, content))[:10] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'{path} holds {keys}, needed a dict with the parameters under "model".')
    state_dict = check_tensors(content["model"], path)
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
        OSError: If the file cannot be read.
        ValueError: If the file is no YAML of plain values and tuples, is longer than `LONGEST_VARIANT`, deeper than
            `ranges.MOST_DEPTH`, repeats a key, or would grow beyond `ranges.MOST_ENTRIES` values where its aliases are
            written out; or if it has no "net_kwargs".
    """
    path = Path(path)
    if path.stat().st_size > LONGEST_VARIANT:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, needed a variant.yml of at most {LONGEST_VARIANT}.")
    try:
        loader = _VariantLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        _check_growth(node)
        settings = None if node is None else loader.construct_document(node)
    except OSError:
        raise
    # Beside its own errors, PyYAML raises those of the types that it makes.
    except Exception as error:
        raise ValueError(f"{path} is not YAML of plain values: {one_line(error)}") from error
    if not isinstance(settings, dict) or "net_kwargs" not in settings:
        raise ValueError(f'{path} has no "net_kwargs"; needed the variant.yml that training wrote beside the model.')
    check_nested(str(path), settings.get("net_kwargs"))
    for name in ("net_kwargs", "dataset_kwargs", "inference_kwargs"):
        if not isinstance(settings.get(name, {}), dict):
            raise ValueError(f"{path} has {name}={one_line(repr(settings[name]), 100)}, needed settings by name.")
    return settings


def _check_growth(node: yaml.Node | None) -> None:
    """Raise ValueError where a document is deep or, with its aliases written out, large, or repeats a key."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        if depth > MOST_DEPTH:
            raise ValueError(f"deeper than {MOST_DEPTH} levels")
        if id(node) not in sizes:
            parts: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
                repeated = sorted({key for key in keys if keys.count(key) > 1})
                if repeated:
                    raise ValueError(f"{repeated[0]!r} stands there more than once")
                parts = [each for pair in node.value for each in pair]
            elif isinstance(node, yaml.SequenceNode):
                parts = node.value
            sizes[id(node)] = 1 + sum(size(each, depth + 1) for each in parts)
        if sizes[id(node)] > MOST_ENTRIES:
            raise ValueError(f"more than {MOST_ENTRIES} values, aliases written out")
        return sizes[id(node)]

    if node is not None:
        size(node, 0)


def rename_parameters(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give published parameters our names; values pass through untouched, so gradients can be renamed too.

    The ImageNet classifiers (`encoder.head`, `encoder.head_dist`), which segmentation never uses, are dropped. All
    shapes are the same there and here.

    Raises:
        ValueError: If a name is not one of the published models'.
    """
    return rename_by(state_dict, _PUBLISHED_NAMES, "the published models of DEPICT and Segmenter")


def config_fields(state_dict: dict[str, Tensor], settings: dict) -> dict:
    """Return the fields of the configuration that weights and variant tell, but for labels and windows.

    Raises:
        ValueError: If one of them lacks what is needed, or the variant describes another model than the weights are.
    """
    net = settings["net_kwargs"]
    decoder = net.get("decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError(f"variant.yml has decoder={decoder!r}, needed settings by name.")
    image_size = net.get("image_size")
    sides = image_size if isinstance(image_size, (list, tuple)) else [image_size]
    if len(sides) not in (1, 2):
        raise ValueError(f"variant.yml has image_size={shown(image_size)}, needed one number of pixels or two.")
    for side in sides:
        check_whole("image_size of variant.yml", side)
    try:
        projection = state_dict["encoder.patch_embed.proj.weight"]
        if projection.ndim != 4:
            raise ValueError(f"encoder.patch_embed.proj.weight is {tuple(projection.shape)}, needed four dimensions.")
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
            **_decoder_fields(state_dict, decoder),
        }
    except KeyError as error:
        raise ValueError(f"The checkpoint or its variant lacks {error}; needed the two files of one model.") from error
    except IndexError as error:
        raise ValueError("The checkpoint has a scalar where a matrix is needed; download it again.") from error
    for name, field in _SAME.items():
        value, needed = net.get(name, fields[field]), fields[field]
        if value != needed or isinstance(value, bool) != isinstance(needed, bool):
            raise ValueError(
                f"variant.yml has {name}={shown(value)}, but the weights {needed}; needed the two files of one model."
            )
    return fields


# What the published code builds the encoder by, and the field that the weights give it.
_SAME = {"d_model": "hidden_size", "n_layers": "num_hidden_layers", "patch_size": "patch_size"}
_SAME |= {"distilled": "use_distillation_token"}
_KNOWN_NET = {*_SAME, "n_cls", "image_size", "n_heads", "dropout", "drop_path_rate", "decoder", "backbone"}
_KNOWN_NET |= {"normalization", "d_ff"}
_KNOWN_DECODER = {"name", "n_heads", "n_layers", "dropout", "drop_path_rate", "n_cls", "d_model", "d_encoder", "d_ff"}
_KNOWN = {"net_kwargs", "dataset_kwargs", "inference_kwargs", "algorithm_kwargs", "optimizer_kwargs", "log_dir", "amp"}
_KNOWN |= {"resume", "version", "world_batch_size"}


def doubts(settings: dict, num_labels: int) -> list[str]:
    """Say what in a variant may make the model compute otherwise than where it was trained, sentence by sentence.

    That are settings of the model (in `net_kwargs` and its `decoder`) that the published code does not have, another
    number of classes than the weights have, and another number of heads than the published code gives the backbone.
    """
    net = settings["net_kwargs"]
    unknown = [f"net_kwargs.{name}" for name in net if name not in _KNOWN_NET]
    unknown += [f"net_kwargs.decoder.{name}" for name in net.get("decoder") or {} if name not in _KNOWN_DECODER]
    found = []
    if unknown:
        found.append(f"variant.yml has {', '.join(unknown)}, which the published code does not; it is not followed.")
    if net.get("n_cls", num_labels) != num_labels:
        found.append(f"variant.yml has n_cls={shown(net['n_cls'])}, but the weights {num_labels} classes.")
    # "vit_small_patch16_384" and the like: the second word is the size, which tells the heads.
    heads_of = {name.split("_")[1]: preset[3] for name, preset in ENCODER_PRESETS.items()}
    words = str(net.get("backbone")).split("_")
    heads = heads_of.get(words[1]) if len(words) > 1 else None
    if heads is not None and net["n_heads"] != heads:
        found.append(
            f"variant.yml has n_heads={net['n_heads']}, but the published {one_line(net['backbone'])} {heads}."
        )
    return found


def not_read(settings: dict) -> list[str]:
    """List a variant's sections that the published code does not write, which say nothing of the model."""
    return [one_line(str(name), 100) for name in settings if name not in _KNOWN]


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
            "decoder_num_heads": max(1, width // MASK_TRANSFORMER_HEAD_DIM),
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
    num_heads = decoder.get("n_heads") or max(1, rows // SUBSPACE_DIM)
    check_whole("n_heads", num_heads)
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
    for name in ("decoder.head.bias", "decoder.mask_norm.bias"):
        if name in state_dict and state_dict[name].ndim == 1:
            return len(state_dict[name])
    raise ValueError("The checkpoint has no decoder.head.bias or decoder.mask_norm.bias, one number a class.")
