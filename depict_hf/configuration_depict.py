"""Every architectural choice of DEPICT and of its black-box counterpart, Segmenter, in one configuration."""

import inspect
from functools import wraps
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .ranges import MOST_LAYERS, MOST_SIZE, check_class_name, check_nested, check_number, check_whole, shown

# The label of pixels without a class, in label maps and in the loss.
IGNORE_LABEL = 255

DECODER_TYPES = ("sa", "ca", "cbsa", "mask_transformer", "linear")

# (patch_size, hidden_size, num_hidden_layers, num_attention_heads, use_distillation_token), by the names that the
# published code (segm/config.yml in rstrudel/segmenter@20d1bfa) and timm give to the backbones.
ENCODER_PRESETS = {
    "vit_tiny_patch16_384": (16, 192, 12, 3, False),
    "vit_small_patch16_384": (16, 384, 12, 6, False),
    "vit_base_patch16_384": (16, 768, 12, 12, False),
    "vit_large_patch16_384": (16, 1024, 24, 16, False),
    "vit_small_patch32_384": (32, 384, 12, 6, False),
    "vit_base_patch32_384": (32, 768, 12, 12, False),
    "vit_large_patch32_384": (32, 1024, 24, 16, False),
    "vit_base_patch8_384": (8, 768, 12, 12, False),
    "deit_tiny_distilled_patch16_224": (16, 192, 12, 3, True),
    "deit_small_distilled_patch16_224": (16, 384, 12, 6, True),
    "deit_base_distilled_patch16_224": (16, 768, 12, 12, True),
    "deit_base_distilled_patch16_384": (16, 768, 12, 12, True),
}


# Settings by which transformers would take settings or code from elsewhere, in files that are not to be trusted.
_ELSEWHERE = ("configuration_files", "attn_implementation", "experts_implementation", "fusion_config", "kernel_config")


def _plain_errors(cls):
    """Have a strict dataclass raise ValueError, in one line, where a value is of the wrong type."""

    def plain(method):
        @wraps(method)
        def call(self, *args, **kwargs):
            try:
                method(self, *args, **kwargs)
            except StrictDataclassError as error:
                raise ValueError(" ".join(str(error).split())[:400]) from error

        return call

    cls.__init__ = plain(cls.__init__)
    cls.__setattr__ = plain(cls.__setattr__)
    return cls


@_plain_errors
@strict
class DepictConfig(PreTrainedConfig):
    """Configuration of [`DepictForSemanticSegmentation`].

    The encoder is either the plain vision transformer described by `image_size` to `initializer_range`, or, where
    `backbone_config` is given, that backbone; the encoder fields are then not used.

    Args:
        image_size: Pixels, one number or (height, width); the position embeddings form a grid of
            `image_size // patch_size`. Inputs of other sizes are welcome.
        patch_size: Side of a patch in pixels.
        num_channels: Channels of the input.
        hidden_size: Width of the encoder's tokens, and of the tokens that enter the decoder.
        num_hidden_layers: Encoder blocks.
        num_attention_heads: Heads of an encoder block; must divide `hidden_size`.
        intermediate_size: Hidden width of an encoder block's MLP.
        hidden_act: Activation of the MLPs; "gelu" is the exact one.
        qkv_bias: Whether query, key and value have biases.
        hidden_dropout_prob: Dropout on embeddings, attention outputs and MLPs of the encoder.
        attention_probs_dropout_prob: Dropout on attention weights of the encoder.
        drop_path_rate: Stochastic depth of the last encoder block; grows linearly from zero at the first.
        layer_norm_eps: Epsilon of the encoder's LayerNorms. The decoders always use 1e-5.
        use_distillation_token: Whether DeiT's second prefix token is present.
        initializer_range: Standard deviation of the truncated normal that weights and tokens start from.
        backbone_config: Configuration, or its dict with `model_type`, of any `AutoBackbone` whose last feature map
            is one plain patch grid (DINOv2, DINOv3, BEiT, ...).
        decoder_type: "sa" (DEPICT, self-attention), "ca" (DEPICT, cross-attention), "cbsa" (the same authors'
            linear-time follow-up), "mask_transformer" or "linear" (Segmenter).
        decoder_num_layers: Layers that refine the patch tokens.
        decoder_num_heads: Subspaces of a DEPICT layer, heads of a "mask_transformer" layer.
        decoder_head_dim: Dimension of one subspace.
        decoder_cross_num_layers: Layers that refine the class queries of "ca".
        decoder_cross_head_dim: Dimension of one subspace in those layers.
        decoder_dropout: Dropout on the decoder's attention weights; in "mask_transformer" everywhere in its blocks.
        decoder_hidden_size: Width of "mask_transformer"; by default the encoder's.
        decoder_intermediate_size: Hidden width of its MLPs; by default four times its width.
        decoder_drop_path_rate: Stochastic depth of its last block.
        window_size: Side in pixels of the square windows that inputs larger than one window are cut into in
            evaluation mode; by default every input is processed whole.
        window_stride: Pixels between windows; by default `window_size`.
        semantic_loss_ignore_index: Label that the loss leaves out.
        training_scenes: What the model was trained on, in words that continue "was trained on", for those who use it.
        temperature: Divides the logits before the softmax that confidences are taken from; labels do not depend on it.

    Raises:
        ValueError: If a value is out of its range, or two of them do not fit together.

    Source:
        segm/config.yml in rstrudel/segmenter@20d1bfa; model/decoder.py in QishuaiWen/DEPICT@6c66e2b.
    """

    model_type = "depict"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="dinov2", optional=True)
    }

    image_size: int | list[int] | tuple[int, int] = 512
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    intermediate_size: int = 1536
    hidden_act: str = "gelu"
    qkv_bias: bool = True
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    layer_norm_eps: float = 1e-5
    use_distillation_token: bool = False
    initializer_range: float = 0.02
    backbone_config: dict | PreTrainedConfig | None = None
    decoder_type: str = "sa"
    decoder_num_layers: int = 3
    decoder_num_heads: int = 3
    decoder_head_dim: int = 100
    decoder_cross_num_layers: int = 3
    decoder_cross_head_dim: int = 50
    decoder_dropout: float | int = 0.0
    decoder_hidden_size: int | None = None
    decoder_intermediate_size: int | None = None
    decoder_drop_path_rate: float | int = 0.0
    window_size: int | None = None
    window_stride: int | None = None
    semantic_loss_ignore_index: int = IGNORE_LABEL
    training_scenes: str | None = None
    temperature: float | int = 1.0

    def __post_init__(self, **kwargs):
        self._check_names(kwargs)
        if isinstance(self.backbone_config, dict):
            self.backbone_config = _backbone_config(self.backbone_config)
        super().__post_init__(**kwargs)
        if self.backbone_config is None:
            self._check_encoder()
        self._check_decoder()
        self._check_windows()
        self._check_labels()
        check_number("initializer_range", self.initializer_range, 0, 100)
        check_whole("semantic_loss_ignore_index", self.semantic_loss_ignore_index, -(2**31), 2**31 - 1)
        if not 1e-6 <= self.temperature <= 1e6:
            raise ValueError(
                f"temperature={self.temperature} must be positive and finite, from 1e-06 to 1e+06; 1 changes nothing."
            )

    @classmethod
    def _get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read a `config.json`; refuse what would take settings or code from elsewhere."""
        try:
            settings, kwargs = super()._get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (OSError, ValueError):
            raise
        # Of JSON that is too deep, or no object, transformers raises errors of many kinds.
        except Exception as error:
            raise ValueError(
                f"config.json of {pretrained_model_name_or_path} is no JSON object of settings ({error}); copy or "
                "download it again."
            ) from error
        if not isinstance(settings, dict):
            return settings, kwargs
        found = [name for name in _ELSEWHERE if settings.get(name) is not None]
        if found:
            raise ValueError(
                f"config.json of {pretrained_model_name_or_path} has {', '.join(found)}, which may take code or "
                "settings from elsewhere; remove it from the file, and pass it as an argument if you want it."
            )
        return settings, kwargs

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "DepictConfig":
        """Configure one of the paper's encoders, by its published name.

        Args:
            name: A key of `ENCODER_PRESETS`, for example "vit_small_patch16_384".
            overrides: Any field of the configuration; they win over the preset.

        Raises:
            ValueError: If the name is not known.

        Source:
            segm/config.yml in rstrudel/segmenter@20d1bfa. Its "mask_transformer" decoder has two layers, heads of
            dimension 64 and dropout 0.1 (segm/model/factory.py), which the preset sets for that decoder.
        """
        if name not in ENCODER_PRESETS:
            raise ValueError(f"Unknown encoder preset {name!r}; choose one of {', '.join(ENCODER_PRESETS)}.")
        patch_size, hidden_size, num_layers, num_heads, distilled = ENCODER_PRESETS[name]
        fields: dict[str, Any] = {
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "intermediate_size": 4 * hidden_size,
            "use_distillation_token": distilled,
        }
        fields |= published_decoder_fields(overrides.get("decoder_type"), hidden_size)
        return cls(**(fields | overrides))

    @property
    def encoder_patch_size(self) -> int:
        """Side in pixels of the patches that the encoder, native or backbone, cuts.

        Raises:
            ValueError: If the backbone does not cut square patches.
        """
        if self.backbone_config is None:
            return self.patch_size
        backbone_config: Any = self.backbone_config  # no dict any more, since `__post_init__`
        size = getattr(backbone_config, "patch_size", None)
        if isinstance(size, (list, tuple)) and len(set(size)) == 1:
            size = size[0]
        if not isinstance(size, int):
            raise ValueError(
                f"The backbone {backbone_config.model_type!r} has patch_size={size!r}; DEPICT needs one feature "
                "map of square patches, as of DINOv2, DINOv3 or BEiT. Choose such a backbone."
            )
        return size

    @property
    def grid_size(self) -> tuple[int, int]:
        """(height, width) in patches of the native encoder's learned position embeddings."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height // self.patch_size, width // self.patch_size

    def _check_encoder(self) -> None:
        for name in ("patch_size", "num_channels", "hidden_size", "num_attention_heads", "intermediate_size"):
            self._check_positive(name)
        self._check_positive("num_hidden_layers", MOST_LAYERS)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            self._check_probability(name)
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"Unknown hidden_act={shown(self.hidden_act)}; choose one of {', '.join(sorted(ACT2FN))}.")
        if not 0 < self.layer_norm_eps <= 1:
            raise ValueError(
                f"layer_norm_eps={self.layer_norm_eps} must be positive and at most 1; the published models use 1e-5."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}; "
                "change one of them."
            )
        if not isinstance(self.image_size, int) and len(self.image_size) != 2:
            raise ValueError(f"image_size={shown(self.image_size)} must be one number of pixels or (height, width).")
        for side in (self.image_size,) if isinstance(self.image_size, int) else self.image_size:
            check_whole("image_size", side)
        if min(self.grid_size) < 1:
            raise ValueError(
                f"image_size={self.image_size} does not hold one patch of patch_size={self.patch_size}; "
                "enlarge image_size."
            )

    def _check_decoder(self) -> None:
        if self.decoder_type not in DECODER_TYPES:
            raise ValueError(
                f"Unknown decoder_type={shown(self.decoder_type)}; choose one of {', '.join(DECODER_TYPES)}."
            )
        if self.num_labels < 2 and self.decoder_type != "linear":
            raise ValueError(
                f"num_labels={self.num_labels}, but decoder_type={self.decoder_type!r} normalises over the classes and "
                "needs at least 2; add a class for the background."
            )
        for name in ("decoder_num_layers", "decoder_cross_num_layers"):
            self._check_positive(name, MOST_LAYERS)
        for name in ("decoder_num_heads", "decoder_head_dim", "decoder_cross_head_dim"):
            self._check_positive(name)
        for name in ("decoder_hidden_size", "decoder_intermediate_size"):
            if getattr(self, name) is not None:
                self._check_positive(name)
        for name in ("decoder_dropout", "decoder_drop_path_rate"):
            self._check_probability(name)
        width = self.decoder_hidden_size or (self.hidden_size if self.backbone_config is None else None)
        if self.decoder_type == "mask_transformer" and width is not None and width % self.decoder_num_heads:
            raise ValueError(
                f"The decoder's width {width} is not divisible by decoder_num_heads={self.decoder_num_heads}; change "
                "decoder_num_heads or decoder_hidden_size."
            )

    def _check_windows(self) -> None:
        if self.window_size is None:
            if self.window_stride is not None:
                raise ValueError(f"window_stride={self.window_stride} needs a window_size; set both or neither.")
            return
        self._check_positive("window_size")
        patch_size = self.patch_size if self.backbone_config is None else getattr(self.backbone_config, "patch_size", 1)
        if isinstance(patch_size, int) and self.window_size < patch_size:
            raise ValueError(
                f"window_size={self.window_size} does not hold one patch of {patch_size} pixels; enlarge the window."
            )
        if self.window_stride is not None:
            self._check_positive("window_stride")
            if self.window_stride > self.window_size:
                raise ValueError(
                    f"window_stride={self.window_stride} is larger than window_size={self.window_size} and would skip "
                    "pixels; lower the stride or enlarge the window."
                )

    def _check_labels(self) -> None:
        """Refuse ids with gaps, too many classes, and names whose ids the two tables do not agree on."""
        names: dict[Any, Any] = self.id2label or {}
        check_whole("num_labels", len(names))
        if set(names) != set(range(len(names))):
            raise ValueError(f"id2label has the ids {sorted(names)[:10]} ...; number classes from 0 without a gap.")
        for name in names.values():
            check_class_name(name)
        ids: dict[Any, Any] = self.label2id or {}
        for name, index in ids.items():
            if not str(index).isdecimal() or int(index) >= len(names):
                raise ValueError(f"label2id gives {name!r} the id {index!r}, but id2label has 0 to {len(names) - 1}.")
        if len(set(names.values())) == len(names):
            for index, name in names.items():
                if int(ids.get(name, index)) != index:
                    raise ValueError(f"id2label says {index} is {name!r}, but label2id {ids[name]}; correct one.")

    def _check_names(self, further: dict[str, Any]) -> None:
        """Refuse what would take the place of methods, cannot be what it says, or is too much to look at."""
        for name in further:
            found = inspect.getattr_static(type(self), name, None)
            settable = found is None or (isinstance(found, property) and found.fset is not None)
            if not settable and name != "model_type":
                raise ValueError(f"{name!r} is no setting, but belongs to the class DepictConfig; remove it.")
        if self.id2label is not None and not isinstance(self.id2label, dict):
            raise ValueError(f"id2label={shown(self.id2label)} must be names by id.")
        check_nested("settings", {name: value for name, value in further.items() if name != "name_or_path"})
        if further.get("num_labels") is not None:
            check_whole("num_labels", further["num_labels"])
        for dtype in (self.dtype, further.get("torch_dtype")):
            meant = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
            if dtype is not None and not isinstance(meant, torch.dtype):
                raise ValueError(f"Unknown dtype={shown(dtype)}; choose float32, bfloat16 or float16.")

    def _check_positive(self, name: str, most: int = MOST_SIZE) -> None:
        check_whole(name, getattr(self, name), 1, most)

    def _check_probability(self, name: str) -> None:
        if not 0 <= getattr(self, name) < 1:
            raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1.")


def _backbone_config(settings: dict[str, Any]) -> PreTrainedConfig:
    """Make a backbone's configuration of what stands in a file; ValueError where that cannot be one."""
    model_type = settings.get("model_type")
    if model_type is None:
        raise ValueError(
            "`backbone_config` is a dict without `model_type`, which names the backbone's architecture; add it, "
            'for example {"model_type": "dinov2", ...}, or pass a configuration object.'
        )
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING or "timm" in model_type:
        raise ValueError(
            f"`backbone_config` has model_type={shown(model_type)}, which transformers has no backbone of itself for; "
            'choose one that it has, such as "dinov2".'
        )
    check_nested("backbone_config", settings)
    try:
        return CONFIG_MAPPING[model_type].from_dict(dict(settings))
    # Every architecture has checks, and errors, of its own.
    except Exception as error:
        raise ValueError(
            f"`backbone_config` is no configuration of {model_type!r}: {' '.join(str(error).split())[:400]}."
        ) from error


def published_decoder_fields(decoder_type: str | None, hidden_size: int) -> dict[str, int | float]:
    """Return the fields in which the published "mask_transformer" differs from the defaults, which are DEPICT's.

    Source:
        segm/config.yml and segm/model/factory.py in rstrudel/segmenter@20d1bfa: two layers, heads of dimension 64,
        dropout 0.1.
    """
    if decoder_type != "mask_transformer":
        return {}
    return {"decoder_num_layers": 2, "decoder_num_heads": max(1, hidden_size // 64), "decoder_dropout": 0.1}
