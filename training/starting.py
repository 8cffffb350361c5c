"""The model that training of one's own classes starts from: what a source gives, and what has to be made anew."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, ViTConfig, ViTModel
from transformers.utils import cached_file

from depict_hf import DepictConfig, DepictForSemanticSegmentation
from depict_hf.configuration_depict import published_decoder_fields
from depict_hf.loading import load_model, model_source
from depict_hf.weight_files import one_line

from .recipe_model import load_backbone

# Of the weights of transformers' ViT, and of the native encoder's.
VIT_NAMES = {
    "patch_embeddings.projection": "projection",
    "attention.o_proj": "attention.projection",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layernorm": "norm",
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Start:
    """A model for one's own classes, before it is trained.

    Args:
        source: What was asked for.
        model: float32, every weight trainable.
        kept: Names of weights that were taken from the source.
        new: Names of weights that are random.
        image_mean, image_std: Means and deviations of each channel, for values in 0 to 1, in the encoder's training.
        notes: Sentences on what had to be assumed.
    """

    source: str
    model: DepictForSemanticSegmentation
    kept: tuple[str, ...]
    new: tuple[str, ...]
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    notes: tuple[str, ...] = ()

    def describe(self) -> list[str]:
        """Say in lines what was kept and what is new."""
        sizes = {name: value.numel() for name, value in self.model.state_dict().items()}
        config = self.model.config
        lines = [
            f"Start: {self.source}; encoder {_encoder_name(config)}, decoder {config.decoder_type}, "
            f"{config.num_labels} classes",
            f"  kept: {_summary(self.kept, sizes)}",
            f"  new: {_summary(self.new, sizes)}",
        ]
        return lines + [f"  {note}" for note in self.notes]


def start_from(source: str, class_names: tuple[str, ...], decoder_type: str | None = None) -> Start:
    """Return a model for these classes with everything of the source that does not depend on its own classes.

    Args:
        source: "default", a folder or Hub name of a model of this package, or of a backbone that `AutoBackbone` knows.
        class_names: Names in the order of their ids. A model of the very same classes is kept whole.
        decoder_type: Kind of decoder of the model; a source's own decoder is kept if it is of that type. None is the
            source's own, or DEPICT's "sa" where the source is a backbone.

    Raises:
        OSError: If there is no such source.
        ValueError: If its weights cannot be loaded whole, or it is neither a model of this package nor a backbone.
    """
    place = str(model_source(source))
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    except OSError:
        raise
    # Of damaged settings, and of code that would have to be trusted, transformers raises errors of many kinds.
    except Exception as error:
        raise ValueError(
            f"Got --from {source}, which transformers cannot read: {one_line(error)} Name a model of this package, or "
            "a backbone such as facebook/dinov2-small."
        ) from error
    labels = {"id2label": dict(enumerate(class_names)), "label2id": {name: i for i, name in enumerate(class_names)}}
    if isinstance(config, DepictConfig):
        return _from_model(source, config, labels, decoder_type)
    if isinstance(config, ViTConfig):
        return _from_vit(source, place, config, labels, decoder_type or "sa")
    return _from_backbone(source, place, config, labels, decoder_type or "sa")


def class_dependent(config: DepictConfig) -> set[str]:
    """Names of the weights whose shapes follow from the number of classes."""
    shapes = []
    for extra in (0, 1):
        names = {"id2label": {index: str(index) for index in range(config.num_labels + extra)}}
        with torch.device("meta"):
            model = DepictForSemanticSegmentation(_with(config, names))
        shapes.append({name: value.shape for name, value in model.state_dict().items()})
    return {name for name, shape in shapes[0].items() if shapes[1][name] != shape}


def _from_model(source: str, config: DepictConfig, labels: dict, decoder_type: str | None) -> Start:
    old, image_processor = load_model(source)
    decoder_type = decoder_type or config.decoder_type
    # What holds for the weights that are there now, not for those that will be trained.
    fields = labels | {"window_size": None, "window_stride": None, "training_scenes": None, "temperature": 1.0}
    same_classes = old.config.id2label == labels["id2label"]
    if decoder_type != config.decoder_type:
        # Widths and numbers of layers of one kind of decoder are not meant for another.
        defaults = DepictConfig()
        decoder_fields = [name for name in config.to_dict() if name.startswith("decoder_")]
        fields |= {name: getattr(defaults, name) for name in decoder_fields}
        fields |= {"decoder_type": decoder_type} | published_decoder_fields(decoder_type, old.encoder.hidden_size)
    model = DepictForSemanticSegmentation(_with(old.config, fields))
    dropped = set() if same_classes else class_dependent(config)
    if decoder_type != config.decoder_type:
        dropped |= {name for name in old.state_dict() if name.startswith("decoder.")}
    kept = {name: value for name, value in old.state_dict().items() if name not in dropped}
    missing, unexpected = model.load_state_dict(kept, strict=False)
    assert not unexpected, unexpected
    notes: tuple[str, ...] = ()
    if same_classes and not missing:
        notes = ("its classes are the very same, so that all of it is trained further",)
    if source == "default":
        notes += ("the default model was trained on CamVid, for non-commercial use (CC BY-NC 4.0), as is what follows",)
    return Start(
        source,
        model,
        tuple(kept),
        tuple(missing),
        tuple(image_processor.image_mean),
        tuple(image_processor.image_std),
        notes,
    )


def _from_backbone(source: str, place: str, config: PreTrainedConfig, labels: dict, decoder_type: str) -> Start:
    width = getattr(config, "hidden_size", 0)
    fields = labels | {"decoder_type": decoder_type} | published_decoder_fields(decoder_type, width)
    try:
        model = DepictForSemanticSegmentation(DepictConfig(backbone_config=config, **fields))
    # Of damaged settings, every architecture raises errors of its own.
    except Exception as error:
        raise ValueError(
            f"Got --from {source}, of the architecture {config.model_type!r}, which cannot be an encoder here: "
            f"{one_line(error)} Name a model of this package, or a backbone such as facebook/dinov2-small."
        ) from error
    load_backbone(model, place)
    return _with_new_decoder(source, place, config, model)


def _from_vit(source: str, place: str, config: ViTConfig, labels: dict, decoder_type: str) -> Start:
    """Start from a ViT of transformers, which is no backbone there, as the native encoder."""
    shared = ["image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads"]
    shared += ["intermediate_size", "hidden_act", "qkv_bias", "layer_norm_eps"]
    fields: dict = {name: getattr(config, name) for name in shared} | labels | {"decoder_type": decoder_type}
    fields |= published_decoder_fields(decoder_type, config.hidden_size)
    model = DepictForSemanticSegmentation(DepictConfig(**fields))
    vit, loading = ViTModel.from_pretrained(
        place, add_pooling_layer=False, dtype=torch.float32, output_loading_info=True
    )
    if loading["missing_keys"]:
        raise ValueError(f"{source} lacks weights of ViT, among them {sorted(loading['missing_keys'])[:5]}.")
    weights = {}
    for name, value in vit.state_dict().items():
        for theirs, ours in VIT_NAMES.items():
            name = name.replace(theirs, ours)
        weights[name] = value
    for index in range(config.num_hidden_layers):
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            parts = [weights.pop(f"layers.{index}.attention.{part}_proj.{kind}") for part in "qkv"]
            weights[f"layers.{index}.attention.qkv.{kind}"] = torch.cat(parts)
    model.encoder.load_state_dict(weights)
    return _with_new_decoder(source, place, config, model)


def _with_new_decoder(source: str, place: str, config: PreTrainedConfig, model: DepictForSemanticSegmentation) -> Start:
    names = tuple(model.state_dict())
    kept = tuple(name for name in names if name.startswith("encoder."))
    mean, std, notes = _normalization(place, config.model_type)
    return Start(source, model, kept, tuple(name for name in names if name not in kept), mean, std, notes)


def _normalization(place: str, model_type: str) -> tuple[tuple, tuple, tuple[str, ...]]:
    """Return means and deviations as the backbone's image processor has them, else those usual for its architecture."""
    path = cached_file(place, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    settings = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    if "image_mean" in settings and "image_std" in settings:
        return tuple(settings["image_mean"]), tuple(settings["image_std"]), ()
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if "dino" in model_type else ((0.5,) * 3, (0.5,) * 3)
    return mean, std, (f"it has no preprocessor_config.json: colours are normalised as usual for {model_type}",)


def _with(config: DepictConfig, fields: dict) -> DepictConfig:
    """Copy a configuration with other fields."""
    values = {name: value for name, value in config.to_dict().items() if name not in ("num_labels", "auto_map")}
    return DepictConfig.from_dict(values | fields)


def _encoder_name(config: DepictConfig) -> str:
    if config.backbone_config is None:
        return f"ViT, {config.num_hidden_layers} blocks, width {config.hidden_size}, patch {config.patch_size}"
    backbone: Any = config.backbone_config
    return f"{backbone.model_type}, width {backbone.hidden_size}, patch {config.encoder_patch_size}"


def _summary(names: tuple[str, ...], sizes: dict[str, int]) -> str:
    """List numbers of weights by part, and the names of a few tensors."""
    if not names:
        return "nothing"
    parts = []
    for part in ("encoder", "decoder"):
        inside = [name for name in names if name.startswith(f"{part}.")]
        if not inside:
            continue
        number = sum(sizes[name] for name in inside)
        total = sum(size for name, size in sizes.items() if name.startswith(f"{part}."))
        listed = f" ({', '.join(inside)})" if len(inside) <= 4 else ""
        parts.append(f"{'all' if number == total else f'{number:,} of'} {total:,} weights of the {part}{listed}")
    return ", ".join(parts)
