"""One forward pass, with the tokens between its layers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..image_processing_depict import DepictImageProcessor
from ..inference import Photo, load_photo
from ..modeling_depict import DepictForSemanticSegmentation
from ..photo_files import check_resized, upright
from ..resampling import size_of
from ..vit import LayerRecord
from ..windows import enlarge_to_window, enlarged_size, pad_to_multiple, window_corners


@dataclass(frozen=True, eq=False)
class Recording:
    """What a forward pass left behind. All tensors keep the model's device and dtype.

    Attributes:
        decoder_type: As in `DepictConfig`.
        num_labels: Number of classes.
        grid_size: `(grid_height, grid_width)`, in patches.
        area: `(top, left, height, width)` in pixels of the resized photograph that the record covers. The grid may
            reach beyond its bottom and right by padding of less than one patch.
        logits: `(batch, num_labels, grid_height, grid_width)`, as the decoder returns them.
        encoder_output: Patch tokens that enter the decoder, `(batch, patches, hidden)`.
        decoder_tokens: Tokens before the first and after every decoder layer, `(batch, tokens, width)` each: the
            patches, row-major, and except in "ca" the class tokens behind them. Empty for "linear".
        cross_tokens: In "ca" the class tokens before the first and after every cross-attention layer,
            `(batch, num_labels, hidden)` each; else empty.
        encoder_tokens: Tokens after the embeddings and after every encoder layer, prefix tokens included, if asked.
        encoder_attentions: Attention weights `(batch, heads, tokens, tokens)` of each layer that was asked for.
    """

    decoder_type: str
    num_labels: int
    grid_size: tuple[int, int]
    area: tuple[int, int, int, int]
    logits: Tensor
    encoder_output: Tensor
    decoder_tokens: tuple[Tensor, ...] = ()
    cross_tokens: tuple[Tensor, ...] = ()
    encoder_tokens: tuple[Tensor, ...] = ()
    encoder_attentions: dict[int, Tensor] = field(default_factory=dict)

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def patch_tokens(self) -> tuple[Tensor, ...]:
        """Patch tokens before the first and after every decoder layer, `(batch, patches, width)` each.

        For "linear", which has no layers, the encoder's output alone.
        """
        if not self.decoder_tokens:
            return (self.encoder_output,)
        return tuple(tokens[:, : self.num_patches] for tokens in self.decoder_tokens)

    @property
    def class_tokens(self) -> tuple[Tensor, ...]:
        """Class tokens before the first and after every layer that moves them, `(batch, num_labels, width)` each.

        In "ca" those are the cross-attention layers. Empty for "linear".
        """
        if self.decoder_type == "ca":
            return self.cross_tokens
        return tuple(tokens[:, self.num_patches :] for tokens in self.decoder_tokens)


@torch.no_grad()
def record(
    model: DepictForSemanticSegmentation,
    pixel_values: Tensor,
    encoder_tokens: bool = False,
    encoder_attentions: Sequence[int] = (),
    origin: tuple[int, int] = (0, 0),
) -> Recording:
    """Run images once, each as a whole, and keep what lies between the decoder's layers.

    `config.window_size` does not apply: an input larger than one window is processed as one, by more tokens than the
    model sees in `segment`. To look at what `segment` does, pass one window (see `analyze`).

    Args:
        model: A model in evaluation mode.
        pixel_values: `(batch, channels, height, width)`, as the image processor prepares them.
        encoder_tokens: Whether to keep the encoder's tokens too.
        encoder_attentions: Encoder layers whose attention weights are kept. They need a second pass of the encoder,
            since fused attention does not compute them; while it runs, the weights of all layers exist.
        origin: (top, left) of the input in the resized photograph, for `Recording.area`.

    Returns:
        The record; its logits are bit for bit those of the model without it.

    Raises:
        ValueError: If the model is in training mode, the input is not a batch of images, or the encoder has no such
            layer.
    """
    if model.training:
        raise ValueError("The model is in training mode, where dropout makes each pass another; call model.eval().")
    if pixel_values.ndim != 4:
        raise ValueError(
            f"Got pixel_values of shape {tuple(pixel_values.shape)}, needed (batch, channels, height, width); prepare "
            "photographs with DepictImageProcessor, or call `analyze`."
        )
    padded = pad_to_multiple(pixel_values.to(model.device, model.dtype), model.config.encoder_patch_size)
    encoder, decoder = LayerRecord(keep_hidden_states=encoder_tokens), LayerRecord(keep_hidden_states=True)
    decoder.cross = LayerRecord(keep_hidden_states=True)
    patches, grid_size = model.encoder(padded, encoder)
    logits = model.decoder(patches, grid_size, decoder)
    attentions = {}
    if encoder_attentions:
        eager = LayerRecord(keep_attentions=True)
        model.encoder(padded, eager)
        wrong = [layer for layer in encoder_attentions if not 0 <= layer < len(eager.attentions)]
        if wrong:
            raise ValueError(
                f"Got encoder_attentions={list(encoder_attentions)}, but the encoder returned attention weights of "
                f"{len(eager.attentions)} layers; choose among 0 to {len(eager.attentions) - 1}."
            )
        attentions = {layer: eager.attentions[layer] for layer in encoder_attentions}
    return Recording(
        model.config.decoder_type,
        model.config.num_labels,
        tuple(grid_size),
        (*origin, *pixel_values.shape[-2:]),
        logits,
        patches,
        tuple(decoder.hidden_states),
        # The first of them is the weights' own memory.
        tuple(tokens.clone() for tokens in decoder.cross.hidden_states),
        tuple(encoder.hidden_states),
        attentions,
    )


def analyze(
    model: DepictForSemanticSegmentation,
    image_processor: DepictImageProcessor,
    photo: Photo,
    window: int | None = None,
    encoder_tokens: bool = False,
    encoder_attentions: Sequence[int] = (),
) -> Recording:
    """Run a photograph once, at the image processor's size, and keep what lies between the decoder's layers.

    Args:
        model: A model in evaluation mode.
        photo: PIL image, uint8 array `(height, width, 3)`, or path of an image file; turned upright by its EXIF
            orientation.
        window: For a model with `config.window_size`, the number of one of its windows, counted from 0 row by row.
            Without it, the whole resized photograph is processed as one, also by such a model.
        encoder_tokens: As in `record`.
        encoder_attentions: As in `record`.

    Returns:
        A record with a batch of one.

    Raises:
        ValueError: As `record` does; or if there is no such window.
        OSError: If the file cannot be read.
    """
    if isinstance(photo, PIL.Image.Image):
        photo = upright(photo)
    elif not isinstance(photo, np.ndarray):
        photo = load_photo(photo)
    pixel_values = image_processor(photo, return_tensors="pt")["pixel_values"]
    origin = (0, 0)
    if window is not None:
        size = model.config.window_size
        if size is None:
            raise ValueError(f"Got window={window}, but model.config.window_size is None; omit `window`.")
        enlarged = enlarged_size(*size_of(pixel_values), size)
        check_resized(size_of(pixel_values), enlarged, image_processor.max_photo_pixels)
        pixel_values = enlarge_to_window(pixel_values, size)
        corners = window_corners(size_of(pixel_values), size, model.config.window_stride or size)
        if not 0 <= window < len(corners):
            raise ValueError(f"Got window={window}, but the photograph has windows 0 to {len(corners) - 1}.")
        origin = corners[window]
        pixel_values = pixel_values[..., origin[0] : origin[0] + size, origin[1] : origin[1] + size]
    return record(model, pixel_values, encoder_tokens, encoder_attentions, origin)
