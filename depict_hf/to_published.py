"""Our models as files of the published code: what `conversion` reads, written."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from .configuration_depict import ENCODER_PRESETS
from .conversion import NORMALIZATIONS, PUBLISHED_SIZES, published_normalization
from .encoder_weights import rename_by
from .image_processing_depict import DepictImageProcessor
from .labels import class_names as class_names_of
from .modeling_depict import DepictForSemanticSegmentation
from .published_files import MASK_TRANSFORMER_HEAD_DIM, SUBSPACE_DIM

# Our parameter names and those of timm's VisionTransformer; each row is a full match.
_ENCODER_NAMES: list[tuple[str, str | None]] = [
    (r"embeddings\.cls_token", r"cls_token"),
    (r"embeddings\.distillation_token", r"dist_token"),
    (r"embeddings\.position_embeddings", r"pos_embed"),
    (r"embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"norm\.(\w+)", r"norm.\1"),
    (r"layers\.(\d+)\.attention\.qkv\.(\w+)", r"blocks.\1.attn.qkv.\2"),
    (r"layers\.(\d+)\.attention\.projection\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"layers\.(\d+)\.(norm[12]|mlp\.fc[12])\.(\w+)", r"blocks.\1.\2.\3"),
]
# The same for each kind of decoder.
_DECODER_NAMES: dict[str, list[tuple[str, str | None]]] = {
    "sa": [
        (r"class_tokens", r"cls_emb"),
        (r"layers\.(\d+)\.norm\.(\w+)", r"net.layers.\1.norm.\2"),
        (r"layers\.(\d+)\.(step_size)", r"net.layers.\1.fn.\2"),
        (r"layers\.(\d+)\.projection", r"net.layers.\1.fn.proj"),
        (r"norm\.(\w+)", r"decoder_norm.\1"),
        (r"mask_norm\.(\w+)", r"mask_norm.\1"),
    ],
    "ca": [
        (r"class_tokens", r"cls_emb"),
        (r"layers\.(\d+)\.norm\.(\w+)", r"snet.layers.\1.norm.\2"),
        (r"layers\.(\d+)\.(step_size)", r"snet.layers.\1.fn.\2"),
        (r"layers\.(\d+)\.projection", r"snet.layers.\1.fn.proj"),
        (r"cross_layers\.(\d+)\.norm\.(\w+)", r"cnet.layers.\1.norm.\2"),
        (r"cross_layers\.(\d+)\.(step_size)", r"cnet.layers.\1.fn.\2"),
        (r"cross_layers\.(\d+)\.projection", r"cnet.layers.\1.fn.proj"),
        (r"norm\.(\w+)", r"snorm.\1"),
        (r"class_norm\.(\w+)", r"cnorm.\1"),
        (r"mask_norm\.(\w+)", r"mask_norm.\1"),
    ],
    "cbsa": [
        (r"class_tokens", r"cls_emb"),
        (r"layers\.(\d+)\.norm\.(\w+)", r"net.layers.\1.norm.\2"),
        (r"layers\.(\d+)\.step_size", r"net.layers.\1.fn.step_x"),
        (r"layers\.(\d+)\.representative_step_size", r"net.layers.\1.fn.step_rep"),
        (r"layers\.(\d+)\.projection\.weight", r"net.layers.\1.fn.proj.weight"),
        (r"layers\.(\d+)\.output\.(\w+)", r"net.layers.\1.fn.to_out.\2"),
        (r"norm\.(\w+)", r"decoder_norm.\1"),
        (r"mask_norm\.(\w+)", r"mask_norm.\1"),
    ],
    "mask_transformer": [
        (r"class_tokens", r"cls_emb"),
        (r"input_projection\.(\w+)", r"proj_dec.\1"),
        (r"layers\.(\d+)\.attention\.qkv\.(\w+)", r"blocks.\1.attn.qkv.\2"),
        (r"layers\.(\d+)\.attention\.projection\.(\w+)", r"blocks.\1.attn.proj.\2"),
        (r"layers\.(\d+)\.(norm[12]|mlp\.fc[12])\.(\w+)", r"blocks.\1.\2.\3"),
        (r"norm\.(\w+)", r"decoder_norm.\1"),
        (r"patch_projection", r"proj_patch"),
        (r"class_projection", r"proj_classes"),
        (r"mask_norm\.(\w+)", r"mask_norm.\1"),
    ],
    "linear": [(r"classifier\.(\w+)", r"head.\1")],
}
_DECODER_CROSS_LAYERS, _DECODER_CROSS_HEAD_DIM = 3, 50
_IMAGENET_CLASSES = 1000


def write_published(
    model: DepictForSemanticSegmentation,
    image_processor: DepictImageProcessor,
    folder: str | Path,
    dataset: str | None = None,
) -> Path:
    """Save a model as `checkpoint.pth` and `variant.yml`, as the published code of DEPICT or of Segmenter reads them.

    `conversion.convert_checkpoint` brings back the same weights, bit for bit. The published code builds the ImageNet
    classifiers of its encoders, although it never uses them, and so the file has them, as zeros. The files have no
    place for class names (those of a published data set come back by its name), for `temperature`, `training_scenes`,
    and for a bound of the longer side, which the data set's name implies.

    Args:
        model: With a native encoder, as the published code has them.
        image_processor: With the means and deviations of the published code's "vit" or "deit".
        folder: Made if need be.
        dataset: Name of the data set for the variant; that of `PUBLISHED_SIZES` with the model's class names if None.

    Returns:
        The path of the checkpoint.

    Raises:
        FileExistsError: If one of the two files is there already.
        ValueError: If the published code cannot hold the model; the message has all reasons.

    Source:
        segm/model/factory.py, segm/model/vit.py and segm/eval/miou.py in rstrudel/segmenter@20d1bfa;
        model/decoder.py and model/factory.py in QishuaiWen/DEPICT@6c66e2b.
    """
    folder = Path(folder)
    checkpoint, variant = folder / "checkpoint.pth", folder / "variant.yml"
    for path in (checkpoint, variant):
        if path.exists():
            raise FileExistsError(f"{path} is there already; choose another folder, so that nothing is overwritten.")
    faults = _faults(model)
    kind = _normalization(image_processor)
    if kind is None:
        faults.append(
            f"image_mean={list(image_processor.image_mean)} with image_std={list(image_processor.image_std)}, needed "
            f"those of {' or '.join(NORMALIZATIONS)}"
        )
    if faults or kind is None:
        raise ValueError(f"The published code cannot hold this model: {'; '.join(faults)}.")
    settings = _variant(model, image_processor, kind, dataset or published_dataset(model))
    folder.mkdir(parents=True, exist_ok=True)
    # Tuples get the tag that the published code writes for them and reads.
    variant.write_text(yaml.dump(settings), encoding="utf-8")
    partial = checkpoint.with_name("checkpoint.pth.partial")  # a disk that is full leaves no half a checkpoint
    torch.save({"model": published_state_dict(model), "n_cls": model.config.num_labels}, partial)
    partial.replace(checkpoint)
    return checkpoint


def published_state_dict(model: DepictForSemanticSegmentation) -> dict[str, Tensor]:
    """Return the weights, float32 on the CPU, by their published names; the ImageNet classifiers are zeros.

    The shapes are those of our parameters.

    Raises:
        ValueError: If a parameter has no published name.
    """
    names = _DECODER_NAMES[model.config.decoder_type]
    encoder, decoder = _own_weights(model.encoder), _own_weights(model.decoder)
    encoder = timm_state_dict(encoder) | _classifiers(model)
    decoder = rename_by(decoder, names, f"decoders of kind {model.config.decoder_type!r}")
    return {f"encoder.{name}": value for name, value in encoder.items()} | {
        f"decoder.{name}": value for name, value in decoder.items()
    }


def published_dataset(model: DepictForSemanticSegmentation) -> str | None:
    """Name the published data set whose classes the model has, in their order; None if it has others."""
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    return next((each for each in PUBLISHED_SIZES if list(class_names_of(each)) == names), None)


def timm_state_dict(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the parameters of a native encoder the names of timm's `VisionTransformer`, without a classifier.

    The shapes stay as they are.

    Raises:
        ValueError: If one is not a native encoder's.
    """
    return rename_by(encoder, _ENCODER_NAMES, "native encoders")


def _own_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().float().cpu().contiguous() for name, value in module.state_dict().items()}


def _classifiers(model: DepictForSemanticSegmentation) -> dict[str, Tensor]:
    heads = ("head", "head_dist") if model.config.use_distillation_token else ("head",)
    width = model.config.hidden_size
    shapes = {"weight": (_IMAGENET_CLASSES, width), "bias": (_IMAGENET_CLASSES,)}
    return {f"{head}.{name}": torch.zeros(shape) for head in heads for name, shape in shapes.items()}


def _faults(model: DepictForSemanticSegmentation) -> list[str]:
    """Say in what the model differs from everything that the published code can build."""
    config: Any = model.config
    if config.backbone_config is not None:
        return [f"its encoder is a backbone of transformers ({config.backbone_config.model_type}), needed a native one"]
    needed: dict[str, Any] = {
        "num_channels": 3,
        "intermediate_size": 4 * config.hidden_size,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": 1e-5,
        "attention_probs_dropout_prob": config.hidden_dropout_prob,
    }
    if config.decoder_type in ("sa", "ca", "cbsa"):
        needed["decoder_head_dim"] = SUBSPACE_DIM
    if config.decoder_type == "ca":
        needed["decoder_cross_num_layers"] = _DECODER_CROSS_LAYERS
        needed["decoder_cross_head_dim"] = _DECODER_CROSS_HEAD_DIM
    if config.decoder_type == "mask_transformer":
        needed["decoder_num_heads"] = config.hidden_size // MASK_TRANSFORMER_HEAD_DIM
        needed["decoder_hidden_size"] = (None, config.hidden_size)
        needed["decoder_intermediate_size"] = (None, 4 * config.hidden_size)
    faults = []
    for name, value in needed.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if getattr(config, name) not in allowed:
            faults.append(f"{name}={getattr(config, name)}, needed {allowed[-1]}")
    if _side(config.image_size) is None:
        faults.append(f"image_size={config.image_size}, needed a square")
    return faults


def _side(image_size: Any) -> int | None:
    sides = set(np.atleast_1d(image_size).tolist())
    return sides.pop() if len(sides) == 1 else None


def _normalization(image_processor: DepictImageProcessor) -> str | None:
    """Name the published normalisation that the image processor has, rounded as in evaluation or not; None if none."""
    own = np.array([image_processor.image_mean, image_processor.image_std])
    for kind, exact in NORMALIZATIONS.items():
        if any(own.shape == np.shape(each) and (own == each).all() for each in (exact, published_normalization(kind))):
            return kind
    return None


def _variant(
    model: DepictForSemanticSegmentation, image_processor: DepictImageProcessor, kind: str, dataset: str | None
) -> dict[str, Any]:
    """Return what the published code reads of a variant; how the model was trained is not known to it."""
    config = model.config
    side = _side(config.image_size)
    crop_size = config.window_size or side
    shorter = dict(image_processor.size).get("shortest_edge") or crop_size
    decoder: dict[str, Any] = {"name": "linear" if config.decoder_type == "linear" else "mask_transformer"}
    if config.decoder_type != "linear":
        decoder |= {"n_layers": config.decoder_num_layers, "dropout": config.decoder_dropout}
    if config.decoder_type == "mask_transformer":
        decoder["drop_path_rate"] = config.decoder_drop_path_rate
    elif config.decoder_type != "linear":
        decoder["n_heads"] = config.decoder_num_heads
    return {
        "net_kwargs": {
            "backbone": _backbone(model),
            "image_size": (side, side),
            "patch_size": config.patch_size,
            "d_model": config.hidden_size,
            "n_heads": config.num_attention_heads,
            "n_layers": config.num_hidden_layers,
            "normalization": kind,
            "distilled": config.use_distillation_token,
            "dropout": config.hidden_dropout_prob,
            "drop_path_rate": config.drop_path_rate,
            "n_cls": config.num_labels,
            "decoder": decoder,
        },
        "dataset_kwargs": {
            **({} if dataset is None else {"dataset": dataset}),
            "image_size": shorter,
            "crop_size": crop_size,
            "normalization": kind,
        },
        "inference_kwargs": {
            "im_size": shorter,
            "window_size": crop_size,
            "window_stride": config.window_stride or crop_size,
        },
    }


def _backbone(model: DepictForSemanticSegmentation) -> str:
    """Return the published name of the encoder's shape, whose pretrained weights the published code loads at first."""
    config = model.config
    shape = (
        config.patch_size,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.use_distillation_token,
    )
    return next((name for name, preset in ENCODER_PRESETS.items() if preset == shape), "unnamed")
