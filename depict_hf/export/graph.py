"""What an exported file computes, as a module that can be traced: one window, whole images or photographs."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modeling_depict import DepictForSemanticSegmentation
from ..vit import LayerRecord, ViTEncoder, resize_positions


class ExportedGraph(nn.Module):
    """What an exported file computes: from a batch of images, a dict of named tensors.

    Input and outputs:
        pixel_values: `(batch, channels, height, width)` float32, as `DepictImageProcessor` makes them; with
            `preprocessing` photographs, `(batch, height, width, channels)` uint8 in 0..255, as
            `numpy.asarray(PIL.Image)` gives them.
        logits: `(batch, num_labels, height, width)` float32, scores of all classes for every pixel of exactly the
            input. Where the encoder sees the input itself and its sides are always multiples of the patch,
            `(batch, num_labels, height / patch, width / patch)` in its place, over exactly the same area;
            `has_pixel_logits` tells.
        labels: Only where asked for: `(batch, height, width)` class ids of the input's pixels; uint8, or int64 where
            there are more than 256 classes.

    Args:
        model: A model in evaluation mode; not changed.
        labels: Whether label maps are an output.
        pad: Whether what the encoder sees is zero-padded to multiples of the patch, so that it may have any size;
            without it, both sides must be such multiples. Of no consequence with `windows`.
        windows: Whether the model's windows are cut and merged by the graph, as `inference.segment` does; the input
            may then have any size.
        preprocessing: Settings of the image processor (`to_dict`) where rescaling and normalisation are part of the
            graph; None where the input is normalised already.
        resize: Whether the image processor's resizing is part of the graph, too; outputs are at the input's size.
        fp16: Whether encoder and decoder compute in half precision.
        seen_size: (height, width) pixels of what the encoder sees, where it always sees the same; a native encoder's
            position embeddings are resized for it here.
    """

    def __init__(
        self,
        model: DepictForSemanticSegmentation,
        labels: bool,
        pad: bool,
        windows: bool = False,
        preprocessing: dict[str, Any] | None = None,
        resize: bool = False,
        fp16: bool = False,
        seen_size: tuple[int, int] | None = None,
    ):
        super().__init__()
        config = model.config
        self.patch_size = config.encoder_patch_size
        self.encoder: nn.Module = model.encoder
        self.decoder: nn.Module = model.decoder
        if seen_size is not None:
            height, width = (-(-side // self.patch_size) for side in seen_size)
            self.encoder = fix_positions(self.encoder, (height, width))
        self.dtype = torch.float32
        if fp16:
            self.dtype = torch.float16
            self.encoder, self.decoder = copy.deepcopy(self.encoder).half(), copy.deepcopy(self.decoder).half()
        self.label_dtype = torch.uint8 if config.num_labels <= 256 else torch.int64
        self.labels, self.preprocessing = labels, preprocessing
        self.windows = windows
        self.window_size: int = config.window_size or 0
        self.window_stride: int = config.window_stride or self.window_size
        self.pad = bool(self.window_size % self.patch_size) if windows else pad
        self.size = dict((preprocessing or {}).get("size") or {}) if resize else {}
        self.has_pixel_logits = pad or windows or resize
        self.output_names = ["logits", *(["labels"] if labels else [])]

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        images = pixel_values if self.preprocessing is None else pixel_values.permute(0, 3, 1, 2)
        size = images.shape[-2:]
        if self.preprocessing is not None:
            images = self._normalized(images.float(), self.preprocessing)
        logits = self._by_windows(images, size) if self.windows else self._whole(images, size)
        outputs = {"logits": logits}
        if self.labels:
            pixels = logits if self.has_pixel_logits else _enlarge(logits, size)
            outputs["labels"] = pixels.argmax(dim=1).to(self.label_dtype)
        return outputs

    def _normalized(self, images: Tensor, settings: dict[str, Any]) -> Tensor:
        """`(batch, channels, height, width)` in 0..255 as the image processor hands them to the model."""
        if self.size:
            images = _enlarge(images, resized_sides(images.shape[-2:], self.size)).round().clamp(0, 255)
        if settings["do_rescale"]:
            images = images * settings["rescale_factor"]
        if settings["do_normalize"]:
            mean, std = (torch.tensor(settings[name]).reshape(-1, 1, 1) for name in ("image_mean", "image_std"))
            images = (images - mean) / std
        return images

    def _whole(self, images: Tensor, size: Sequence[int]) -> Tensor:
        """Return logits of images that the encoder sees whole."""
        logits, padded_size = self._scores(images)
        if not self.has_pixel_logits:
            return logits
        vertical, horizontal = (
            _rows(_rows(_unit(grid), padded)[:side], target)
            for grid, padded, side, target in zip(logits.shape[-2:], padded_size, images.shape[-2:], size, strict=True)
        )
        return vertical @ logits @ horizontal.T

    def _by_windows(self, images: Tensor, size: Sequence[int]) -> Tensor:
        """Return logits of images that are cut into windows; all windows share one pass."""
        window = self.window_size
        if not window_always_fits(self.size, window):
            images = _enlarge(images, enlarged_sides(images.shape[-2:], window))
        sides = images.shape[-2:]
        tops, lefts = (self._starts(side) for side in sides)
        inside = torch.arange(window)
        # (batch, channels, tops, window, lefts, window) to (batch * tops * lefts, channels, window, window)
        windows = images[:, :, tops[:, None] + inside][..., lefts[:, None] + inside]
        counts = (images.shape[0], tops.shape[0], lefts.shape[0])
        logits, padded_size = self._scores(windows.permute(0, 2, 4, 1, 3, 5).flatten(0, 2))
        logits = logits.unflatten(0, counts).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        vertical, horizontal = (
            _rows(self._averages(starts, padded, side), target)
            for starts, padded, side, target in zip((tops, lefts), padded_size, sides, size, strict=True)
        )
        return vertical @ logits @ horizontal.T

    def _starts(self, length: int) -> Tensor:
        """Return the first pixels of the windows along one side, as `windows.window_starts`."""
        count = (length - self.window_size + self.window_stride - 1) // self.window_stride + 1
        return (torch.arange(count) * self.window_stride).clamp(max=length - self.window_size)

    def _averages(self, starts: Tensor, padded: int, length: int) -> Tensor:
        """Write upsampling and averaging windows along one side, as `resampling.axis_operator` without resizing.

        Returns:
            `(length, windows * grid)`.
        """
        upsample = _rows(torch.eye(padded // self.patch_size), padded)
        place = torch.arange(length)[:, None] - starts
        inside = (place >= 0) & (place < self.window_size)
        weights = inside / inside.sum(dim=1, keepdim=True)
        return (upsample[place.clamp(0, self.window_size - 1)] * weights[..., None]).flatten(1)

    def _scores(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return logits on the patch grid, and the (height, width) pixels that the grid covers."""
        height, width = images.shape[-2:]
        patch = self.patch_size
        if self.pad:
            # Unconditional, unlike `windows.pad_to_multiple`: a graph cannot ask whether there is something to pad.
            images = F.pad(images, (0, -width % patch, 0, -height % patch))
        else:
            # Changes nothing, but fails where the sides are no multiples; convolution would drop their last pixels.
            cut = (*images.shape[:2], height // patch, patch, width // patch, patch)
            images = images.reshape(cut).reshape(images.shape)
        patches, grid_size = self.encoder(images.to(self.dtype), LayerRecord())
        height, width = images.shape[-2:]
        return self.decoder(patches, grid_size, LayerRecord()).float(), (height, width)


def resized_sides(sides: Sequence[int], size: dict[str, int]) -> Sequence[int | torch.SymInt]:
    """Do as `DepictImageProcessor.resize_size`, in integers alone and without asking which side is the shorter one."""
    if size.get("height"):
        return [size["height"], size["width"]]
    shortest, longest = size["shortest_edge"], size.get("longest_edge")
    result: list[int | torch.SymInt] = []
    for side, other in (sides, sides[::-1]):
        new = torch.sym_max(shortest, _rounded(side * shortest, other))
        if longest:
            new = torch.sym_max(1, torch.sym_min(new, torch.sym_min(longest, _rounded(side * longest, other))))
        result.append(new)
    return result


def enlarged_sides(sides: Sequence[int], window_size: int) -> Sequence[int | torch.SymInt]:
    """Compute as `windows.enlarge_to_window` does: images whose shorter side is below the window grow until it fits."""
    return [
        torch.sym_max(torch.sym_max(side, window_size), side * window_size // other)
        for side, other in (sides, sides[::-1])
    ]


def window_always_fits(size: dict[str, int], window_size: int) -> bool:
    """Whether an image that was resized by `size`, a size of the image processor, is never smaller than a window."""
    if size.get("height"):
        return min(size["height"], size["width"]) >= window_size
    return size.get("shortest_edge", 0) >= window_size and not size.get("longest_edge")


def fix_positions(encoder: nn.Module, grid_size: tuple[int, int]) -> nn.Module:
    """Return a native encoder with its position embeddings resized for good, in a copy; backbones stay as they are."""
    if not isinstance(encoder, ViTEncoder):
        return encoder
    encoder = copy.deepcopy(encoder)
    embeddings = encoder.embeddings
    resized = resize_positions(embeddings.position_embeddings, embeddings.grid_size, grid_size)
    embeddings.position_embeddings = nn.Parameter(resized, requires_grad=False)
    embeddings.grid_size = grid_size
    return encoder


def trace(graph: ExportedGraph, channels: int, size: tuple[int, int] | None) -> torch.export.ExportedProgram:
    """Trace with a free batch and, unless `size` = (height, width) fixes them, free sides."""
    patch_size = graph.patch_size
    first = 2 if graph.preprocessing is None else 1
    sides: dict[int, Any] = {}
    if size is None and (graph.pad or graph.has_pixel_logits):
        sides = {first: torch.export.Dim.DYNAMIC, first + 1: torch.export.Dim.DYNAMIC}
    elif size is None:
        names = ("grid_height", "grid_width")
        sides = {first + axis: patch_size * torch.export.Dim(name, min=2) for axis, name in enumerate(names)}
    # Lengths that differ from each other, so that none is taken for another one.
    height, width = size or (11 * patch_size - graph.pad, 13 * patch_size - graph.pad)
    if size is None and graph.windows:
        height, width = height + graph.window_size, width + graph.window_size + graph.window_stride
    if graph.preprocessing is None:
        example = torch.zeros(2, channels, height, width)
    else:
        example = torch.zeros(2, height, width, channels, dtype=torch.uint8)
    shapes = {"pixel_values": {0: torch.export.Dim.DYNAMIC} | sides}
    with torch.no_grad():
        return torch.export.export(graph, (example,), dynamic_shapes=shapes, strict=False)


def _rounded(numerator: int, denominator: int) -> int:
    """Return the quotient of positive integers, rounded to the nearest one, halves upwards."""
    return (2 * numerator + denominator) // (2 * denominator)


def _unit(length: int) -> Tensor:
    index = torch.arange(length)
    return (index[:, None] == index).float()


def _enlarge(images: Tensor, size: Sequence[Any]) -> Tensor:
    """Resize as `resampling.resize_bilinear` does, without asking whether the size already fits."""
    return F.interpolate(images, size=list(size), mode="bilinear", align_corners=False)


def _rows(matrix: Tensor, length: int) -> Tensor:
    """Resize the rows of a matrix bilinearly to `length` of them."""
    return _enlarge(matrix[None, None], (length, matrix.shape[1]))[0, 0]
