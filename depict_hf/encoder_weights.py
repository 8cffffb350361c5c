"""Weights of pretrained vision transformers, of timm or transformers, into the native encoder."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from torch import Tensor

from .modeling_depict import DepictForSemanticSegmentation
from .vit import ViTEmbeddings, ViTEncoder, resize_positions
from .weight_files import check_archive, check_finite, load_checked, one_line

# Types of parameters, as torch writes them.
FLOATS = ("torch.float32", "torch.float16", "torch.bfloat16", "torch.float64")

# Parameter names of timm's VisionTransformer, which the published code took over, and ours; each row is a full match;
# None drops the parameter (ImageNet classifiers).
TIMM_NAMES = [
    (r"(head|head_dist)\.(weight|bias)", None),
    (r"(cls_token)", r"embeddings.\1"),
    (r"dist_token", r"embeddings.distillation_token"),
    (r"pos_embed", r"embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(\w+)", r"embeddings.projection.\1"),
    (r"norm\.(\w+)", r"norm.\1"),
    (r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"layers.\1.attention.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"layers.\1.attention.projection.\2"),
    (r"blocks\.(\d+)\.(norm[12]|mlp\.fc[12])\.(\w+)", r"layers.\1.\2.\3"),
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


def load_encoder(model: DepictForSemanticSegmentation, state_dict: Mapping[str, Tensor]) -> None:
    """Load pretrained weights of a plain vision transformer into `model.encoder`, in place.

    Position embeddings of another grid are resized bilinearly to the model's. `layer_norm_eps` is the model's own: for
    the outputs of the source, build the model with the source's (timm 1e-6, transformers' ViT 1e-12); the published
    code trains with 1e-5 from either.

    Args:
        model: A model with a native encoder of the same shape.
        state_dict: Parameters of a timm VisionTransformer (AugReg, DeiT, distilled or not), or of transformers' ViT or
            DeiT with or without a head. Classifiers, pooler and mask token are dropped.

    Raises:
        ValueError: If a parameter is missing, left over or of another shape.
    """
    if any(name.endswith("patch_embeddings.projection.weight") for name in state_dict):
        stripped = {re.sub(r"^(vit|deit)\.", "", name): value for name, value in state_dict.items()}
        renamed = _join_qkv(rename_by(stripped, _TRANSFORMERS_NAMES, "transformers' ViT and DeiT"))
    else:
        renamed = rename_by(state_dict, TIMM_NAMES, "timm's vision transformers")
    encoder = cast(ViTEncoder, model.encoder)
    name = "embeddings.position_embeddings"
    if name in renamed:
        renamed[name] = _fit_positions(renamed[name], encoder.embeddings)
    load_exactly(encoder, renamed)


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """Read the parameters of a pretrained model, for `load_encoder`, without executing anything.

    Args:
        source: A weights file (`.safetensors`, or a pickle of tensors), a folder with `model.safetensors`, or the name
            of a repository on the Hub that has one, such as "timm/vit_small_patch16_384.augreg_in21k_ft_in1k".

    Returns:
        Tensors by name, in the file's names, shapes and dtypes.

    Raises:
        OSError: If there is no such file or repository.
        ValueError: If the file is damaged, holds more than tensors, or values that are NaN or infinite.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "model.safetensors"
    elif not path.is_file():
        path = Path(hf_hub_download(str(source), "model.safetensors"))
    if path.suffix == ".safetensors":
        return load_checked(path)
    content = load_data(path)
    nested = isinstance(content, dict) and isinstance(content.get("model"), dict)
    return check_tensors(content["model"] if nested else content, path)


def _fit_positions(positions: Tensor, embeddings: ViTEmbeddings) -> Tensor:
    """Resize position embeddings of a square grid to the grid of `embeddings`."""
    num_patches = positions.shape[1] - embeddings.num_prefix_tokens
    side = math.isqrt(num_patches)
    if side**2 != num_patches:
        raise ValueError(
            f"{positions.shape[1]} position embeddings less {embeddings.num_prefix_tokens} prefix tokens are no square "
            "grid; check `use_distillation_token`."
        )
    return resize_positions(positions, (side, side), embeddings.grid_size)


def load_data(path: str | Path) -> Any:
    """Read a pickle of tensors, plain values and numpy's scalars, on the CPU; no code in it is run.

    Raises:
        ValueError: If the file is of another kind.
    """
    # Schedulers and records of training hold numbers of numpy, whose constructors its files name by the module of
    # the release that wrote them.
    scalar = np.float64(0).__reduce__()[0]
    numbers = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    kinds: list[Any] = [np.dtype, *{type(np.dtype(kind)) for kind in ("?", "i4", "i8", "u1", "f2", "f4", "f8")}]
    check_archive(path)
    try:
        with torch.serialization.safe_globals([*numbers, *kinds]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    # Of a damaged file, the reader raises errors of any kind.
    except Exception as error:
        raise ValueError(
            f"{path} is no pickle of tensors and plain values, is damaged, or holds code, which is never run: "
            f"{one_line(error, 200)}"
        ) from error


def check_tensors(tensors: Any, path: str | Path) -> dict[str, Tensor]:
    """Return what a file holds, if that is dense numbers by name, all finite and none larger than the file.

    Raises:
        ValueError: If it is anything else; names the tensor.
    """
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError(f"{path} holds a {type(tensors).__name__} of weights, needed tensors by name.")
    size = Path(path).stat().st_size
    for name, value in tensors.items():
        kind = f"{value.dtype} {value.layout}" if isinstance(value, Tensor) else type(value).__name__
        if (
            not isinstance(name, str)
            or not name.isprintable()
            or kind.partition(" ")[0] not in FLOATS
            or not kind.endswith("torch.strided")
        ):
            raise ValueError(
                f"{path} holds {one_line(repr(name), 100)} as {kind}, needed dense floating-point tensors."
            )
        if value.is_meta or value.numel() * value.itemsize > min(value.untyped_storage().nbytes(), size):
            raise ValueError(
                f"{path} holds {name} of shape {tuple(value.shape)}, of which it has less numbers than that; copy or "
                "download it again."
            )
    check_finite(tensors.items(), str(path))
    return dict(tensors)


def rename_by(state_dict: Mapping[str, Tensor], table: list[tuple[str, str | None]], source: str) -> dict[str, Tensor]:
    """Give parameters the names that `table` has for them; what it gives None is dropped.

    Args:
        table: Rows of a pattern for a whole name, and its replacement, as of `re`.
        source: Whose names they are, for the error.

    Raises:
        ValueError: If no row fits a name.
    """
    renamed, unknown = {}, []
    for name, value in state_dict.items():
        for pattern, replacement in table:
            match = re.fullmatch(pattern, name)
            if match:
                if replacement is not None:
                    ours = match.expand(replacement)
                    if ours in renamed:
                        raise ValueError(
                            f"Several parameters are {ours}, among them {name}; needed those of one model."
                        )
                    renamed[ours] = value
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


def load_exactly(module: torch.nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Load parameters, in place, none of which is missing, left over or of another shape; ValueError else."""
    check_exactly(module, state_dict)
    module.load_state_dict(state_dict)


def check_exactly(module: torch.nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Raise ValueError where parameters of a module are missing, left over or of another shape; it needs no values."""
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
