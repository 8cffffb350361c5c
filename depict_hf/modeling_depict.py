"""`DepictForSemanticSegmentation`: encoder, decoder, windows and loss behind the interface of transformers."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AutoBackbone
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from .configuration_depict import DepictConfig
from .decoders import DECODERS, ContractBroadcastAttention, MaskTransformerDecoder, SubspaceAttention
from .pretrained_depict import CheckedPreTrainedModel
from .resampling import product_dtype, resize_bilinear, size_of, upsampling_bands, without_autocast
from .vit import LayerRecord, ViTEmbeddings, ViTEncoder
from .windows import cut_windows, enlarge_to_window, merge_windows, pad_to_multiple, window_corners

# The image-segmentation pipeline logs an error for models that this table does not name.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["depict"] = "DepictForSemanticSegmentation"

# Windows, over all images of the batch, that share one forward pass: enough to keep a processor busy, few enough
# that their activations do not outgrow those of a training step.
WINDOWS_PER_PASS = 8

# Devices that check values on their own, and end the program with the message where they find a wrong one. "meta" has
# no values.
ASSERTS_LATER = ("cuda", "meta")


@dataclass
class DepictSemanticSegmenterOutput(SemanticSegmenterOutput):
    """`SemanticSegmenterOutput` with the decoder's layers beside the encoder's.

    Attributes:
        loss: Scalar, where labels were given.
        logits: `(batch, num_labels, height, width)`, covering exactly the input image: on the patch grid where both
            sides are multiples of the patch, else at the input's size; at the input's size after windows.
        hidden_states: Encoder tokens after the embeddings and after every block, before the last LayerNorm,
            `(batch, prefix + patches, hidden)` each.
        attentions: Encoder attention weights, `(batch, heads, tokens, tokens)` each.
        decoder_hidden_states: Tokens that enter the decoder and leave each of its layers: patch tokens, in "sa" and
            "mask_transformer" followed by the class tokens.
        decoder_attentions: Weights of those layers, `(batch, heads, tokens, tokens)` each; in "cbsa" of the
            representatives, `(batch, heads, 100, tokens)`.
        cross_hidden_states: In "ca" the class queries before and after every layer, `(batch, num_labels, hidden)`.
        cross_attentions: In "ca" the weights of those layers, `(batch, heads, num_labels, patches)` each.
    """

    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_hidden_states: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


class SegmentationModel(Protocol):
    """What `inference.segment` needs of a model: a `DepictForSemanticSegmentation` or an exported one (`onnx_backend`).

    Attributes:
        config: Window size and stride, temperature, and the side of a patch.
        training: Whether it is in training mode, in which it is refused.
        device: Where it takes images.
        dtype: Type that it computes in.
    """

    config: DepictConfig
    training: bool

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, pixel_values: Tensor, /) -> DepictSemanticSegmenterOutput: ...


class BackboneEncoder(nn.Module):
    """A transformers backbone behind the interface of `ViTEncoder`."""

    def __init__(self, config: DepictConfig):
        super().__init__()
        self.patch_size = config.encoder_patch_size
        # Code that travels with a backbone is not run, nor is anybody asked whether it may be.
        self.backbone = AutoBackbone.from_config(config.backbone_config, trust_remote_code=False)
        self.hidden_size = self.backbone.channels[-1]

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def forward(self, pixel_values: Tensor, record: LayerRecord) -> tuple[Tensor, tuple[int, int]]:
        """Encode as `ViTEncoder` does; the record receives what the backbone itself reports.

        Raises:
            ValueError: If the backbone's last feature map is not the patch grid.
        """
        implementation = self.backbone.config._attn_implementation
        if record.keep_attentions:
            # Fused kernels do not compute attention weights.
            self.backbone.set_attn_implementation("eager")
        try:
            output = self.backbone(
                pixel_values,
                output_hidden_states=record.keep_hidden_states,
                output_attentions=record.keep_attentions,
            )
        finally:
            if record.keep_attentions:
                self.backbone.set_attn_implementation(implementation)
        feature_map = output.feature_maps[-1]
        height, width = size_of(pixel_values)
        grid_size = (height // self.patch_size, width // self.patch_size)
        if feature_map.ndim != 4 or tuple(feature_map.shape[-2:]) != grid_size:
            raise ValueError(
                f"The backbone {self.backbone.config.model_type!r} returned a feature map of shape "
                f"{tuple(feature_map.shape)} where the patch grid is {grid_size}; DEPICT needs a plain patch grid. "
                "Choose another `out_features` or another backbone."
            )
        record.hidden_states.extend(output.hidden_states or ())
        record.attentions.extend(output.attentions or ())
        return feature_map.flatten(2).transpose(1, 2), grid_size


class DepictPreTrainedModel(CheckedPreTrainedModel):
    """Weight initialisation and capabilities."""

    config: DepictConfig
    config_class = DepictConfig
    base_model_prefix = "depict"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTEmbeddings", "ViTLayer", "SubspaceAttention", "ContractBroadcastAttention"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Start weights as the published code does; `initializer_range` is its 0.02."""
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ViTEmbeddings):
            for token in (module.cls_token, module.distillation_token, module.position_embeddings):
                if token is not None:
                    init.trunc_normal_(token, std=std)
        elif isinstance(module, SubspaceAttention):
            init.normal_(module.projection, std=module.projection.shape[1] ** -0.5)
            init.normal_(module.step_size)
        elif isinstance(module, ContractBroadcastAttention):
            init.normal_(module.step_size)
            init.normal_(module.representative_step_size)
        elif isinstance(module, MaskTransformerDecoder):
            for projection in (module.patch_projection, module.class_projection):
                init.normal_(projection, std=projection.shape[0] ** -0.5)
        if hasattr(module, "class_tokens"):
            init.trunc_normal_(module.class_tokens, std=std)


class DepictForSemanticSegmentation(DepictPreTrainedModel):
    """DEPICT, or Segmenter, for semantic segmentation.

    Attributes:
        encoder: Image to patch tokens: `ViTEncoder`, or `BackboneEncoder` around `backbone_config`.
        decoder: Patch tokens to logits on the patch grid; one of `decoders.DECODERS`.

    Source:
        Wen and Li, NeurIPS 2024; `Segmenter`, segm/model/segmenter.py in rstrudel/segmenter@20d1bfa.
    """

    # The loss is a mean over this batch's pixels: Trainer must divide it by the accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: DepictConfig):
        super().__init__(config)
        self.encoder = ViTEncoder(config) if config.backbone_config is None else BackboneEncoder(config)
        self.decoder = DECODERS[config.decoder_type](config, self.encoder.hidden_size)
        self.post_init()
        # FSDP refuses names of modules that a model does not have.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(present.intersection(self._no_split_modules))

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> DepictSemanticSegmenterOutput | tuple:
        """Segment images.

        Args:
            pixel_values: `(batch, channels, height, width)`, normalised; any size.
            labels: `(batch, height, width)` class ids, of any size that shows the same area; 0 to num_labels - 1, or
                `config.semantic_loss_ignore_index`.
            output_hidden_states: Whether to return the tokens after every layer.
            output_attentions: Whether to return the attention weights of every layer, computed eagerly.
            return_dict: Whether to return an output object instead of a tuple.

        Returns:
            See `DepictSemanticSegmenterOutput`. In evaluation mode, inputs with a side longer than
            `config.window_size` are processed by windows.

        Raises:
            ValueError: If an input has the wrong shape, a label is no class id, or layers are asked for where the
                image is processed by windows.
            RuntimeError: In place of the ValueError for a label, with the same message but for the label, where the
                model is compiled. On CUDA the message is printed, and an operation after this call raises.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        self._check_pixel_values(pixel_values)
        if labels is not None:
            self._check_labels(labels, pixel_values)
        pixel_values = pixel_values.to(self.dtype)

        encoder_record, decoder_record, cross_record = (
            LayerRecord(bool(output_hidden_states), bool(output_attentions)) for _ in range(3)
        )
        decoder_record.cross = cross_record
        if self._needs_windows(pixel_values):
            if output_hidden_states or output_attentions:
                raise ValueError(
                    f"Hidden states and attentions were asked for, but an input of {tuple(pixel_values.shape[-2:])} "
                    f"pixels is cut into windows of {self.config.window_size}; set `model.config.window_size = None` "
                    "or pass one window at a time."
                )
            logits = self._windowed_logits(pixel_values)
        else:
            logits = self._whole_logits(pixel_values, encoder_record, decoder_record)
        loss = None
        if labels is not None:
            loss = segmentation_loss(logits, labels, self.config.semantic_loss_ignore_index)

        output = DepictSemanticSegmenterOutput(
            loss=loss,
            logits=logits,
            hidden_states=tuple(encoder_record.hidden_states) or None,
            attentions=tuple(encoder_record.attentions) or None,
            decoder_hidden_states=tuple(decoder_record.hidden_states) or None,
            decoder_attentions=tuple(decoder_record.attentions) or None,
            cross_hidden_states=tuple(cross_record.hidden_states) or None,
            cross_attentions=tuple(cross_record.attentions) or None,
        )
        return output if return_dict else output.to_tuple()

    def _whole_logits(self, pixel_values: Tensor, encoder_record: LayerRecord, decoder_record: LayerRecord) -> Tensor:
        """Compute logits of whole images, on the patch grid or, where that would cover padding, at the input's size."""
        padded = pad_to_multiple(pixel_values, self.config.encoder_patch_size)
        patches, grid_size = self.encoder(padded, encoder_record)
        logits = self.decoder(patches, grid_size, decoder_record)
        if padded.shape != pixel_values.shape:
            logits = merge_windows([logits], [(0, 0)], size_of(pixel_values), size_of(padded))
        return logits

    def _needs_windows(self, pixel_values: Tensor) -> bool:
        window_size = self.config.window_size
        return not self.training and window_size is not None and max(pixel_values.shape[-2:]) > window_size

    def _windowed_logits(self, pixel_values: Tensor) -> Tensor:
        """Compute the merged logits of all windows, at the input's size."""
        window_size = self.config.window_size
        assert window_size is not None  # or `_needs_windows` is false
        window_stride = self.config.window_stride or window_size
        batch_size, size = pixel_values.shape[0], size_of(pixel_values)
        enlarged = enlarge_to_window(pixel_values, window_size)
        enlarged_size = size_of(enlarged)
        corners = window_corners(enlarged_size, window_size, window_stride)
        windows = cut_windows(enlarged, corners, window_size)
        logits = torch.cat(
            [self._whole_logits(part, LayerRecord(), LayerRecord()) for part in windows.split(WINDOWS_PER_PASS)]
        )
        return merge_windows(list(logits.split(batch_size)), corners, enlarged_size, window_size, size)

    def _check_pixel_values(self, pixel_values: Tensor) -> None:
        channels = self.config.num_channels if self.config.backbone_config is None else None
        if pixel_values.ndim != 4 or (channels is not None and pixel_values.shape[1] != channels):
            raise ValueError(
                f"Got pixel_values of shape {tuple(pixel_values.shape)}, needed (batch, {channels or 'channels'}, "
                "height, width); prepare images with DepictImageProcessor."
            )

    def _check_labels(self, labels: Tensor, pixel_values: Tensor) -> None:
        if labels.ndim != 3 or labels.shape[0] != pixel_values.shape[0] or labels.is_floating_point():
            raise ValueError(
                f"Got labels of shape {tuple(labels.shape)} and dtype {labels.dtype}, needed integers of shape "
                f"({pixel_values.shape[0]}, height, width), one map per image."
            )
        ignore_index, num_labels = self.config.semantic_loss_ignore_index, self.config.num_labels
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= num_labels))
        needed = (
            f"needed ids from 0 to {num_labels - 1} or {ignore_index} (ignored); check `num_labels`, "
            "`do_reduce_labels` and the mask's encoding."
        )
        if torch.compiler.is_compiling() or labels.device.type in ASSERTS_LATER:
            # Reading values would break a compiled graph, and have the processor wait for the accelerator.
            torch._assert_async(~wrong.any(), f"Got labels that are no class ids, {needed}")
        elif wrong.any():
            raise ValueError(f"Got labels {labels[wrong].unique()[:10].tolist()}, {needed}")


def segmentation_loss(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Average the cross-entropy over the pixels that are not ignored; zero where all are.

    Args:
        logits: `(batch, num_labels, h, w)`; upsampled bilinearly to the labels' size.
        labels: `(batch, height, width)`, integers.

    Source:
        `train_one_epoch`, segm/engine.py in rstrudel/segmenter@20d1bfa, where a batch without labels gives NaN.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if torch.compiler.is_compiling():
        # The number of bands would bind a compiled graph to one size.
        logits = resize_bilinear(logits, size_of(labels))
        total = F.cross_entropy(logits, labels.long(), ignore_index=ignore_index, reduction="sum")
    else:
        wide = resize_bilinear(logits, (logits.shape[-2], labels.shape[-1]))
        total = _CrossEntropyByBands.apply(wide, labels, ignore_index)
    return total / (labels != ignore_index).sum().clamp(min=1)


class _CrossEntropyByBands(torch.autograd.Function):
    """Sum of the cross-entropy of logits upsampled in height, which exist for a band of rows at a time.

    The gradient of a band is taken and brought back to the coarse rows while the band's probabilities are there, in
    the forward pass.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        """Return the sum over all pixels that are not ignored.

        Args:
            logits: `(batch, num_labels, h, width)`, float32 or float64.
            labels: `(batch, height, width)`, integers.
        """
        needs_gradient = ctx.needs_input_grad[0]
        dtype = product_dtype(logits.dtype, logits.device)
        rows = logits.permute(2, 0, 1, 3).contiguous()
        gradient = torch.zeros_like(rows) if needs_gradient else None
        total = logits.new_zeros(())
        with without_autocast(logits.device):
            for band, operator, used in upsampling_bands(len(rows), labels.shape[1], rows[0].numel(), logits, dtype):
                scores = torch.tensordot(operator, rows[used].to(dtype), dims=1).to(logits.dtype).log_softmax(dim=2)
                targets = labels[:, band].transpose(0, 1)[:, :, None]
                kept = targets != ignore_index
                targets = torch.where(kept, targets, 0).long()
                total -= (scores.gather(2, targets) * kept).sum()
                if gradient is not None:
                    scores = scores.exp_().scatter_add_(2, targets, scores.new_full((), -1).expand(targets.shape))
                    gradient[used] += torch.tensordot(operator.T, scores.mul_(kept).to(dtype), dims=1)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None]:
        [gradient] = ctx.saved_tensors
        return (gradient * grad_output).permute(1, 2, 0, 3), None, None
