"""Photographs to label maps: the published single- and multi-scale protocol, with bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, overload

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from .image_processing_depict import DepictImageProcessor
from .modeling_depict import SegmentationModel
from .photo_files import MAX_PHOTO_PIXELS, UnreadableImageError, read_image, upright
from .resampling import size_of
from .windows import CoarseScores, Segmentation, enlarge_to_window, label_views, pad_to_multiple, window_corners

Photo = PIL.Image.Image | np.ndarray | str | Path

# Pixels that share a forward pass unless the caller says otherwise: 8 windows of 512 x 512.
MAX_BATCH_PIXELS = 2**21

# Pixels of the photographs that may wait for others to fill a forward pass.
MAX_WAITING_PIXELS = 2**27

# What reading a photograph raises, whatever its decoder raised.
UNREADABLE = (OSError, ValueError)


@overload
def segment(
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    images: Iterable[Photo],
    scales: Sequence[float] = ...,
    flip: bool = ...,
    max_batch_pixels: int = ...,
    return_confidence: Literal[False] = False,
) -> list[Tensor]: ...


@overload
def segment(
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    images: Iterable[Photo],
    scales: Sequence[float] = ...,
    flip: bool = ...,
    max_batch_pixels: int = ...,
    *,
    return_confidence: bool,
) -> list[Tensor] | list[Segmentation]: ...


def segment(
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    images: Iterable[Photo],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    max_batch_pixels: int = MAX_BATCH_PIXELS,
    return_confidence: bool = False,
) -> list[Tensor] | list[Segmentation]:
    """Label every pixel of photographs of any size.

    Each photograph is resized by the image processor to its size times each scale; logits are brought back to the
    photograph's size; where there are several scales or flips, their probabilities are averaged. The window
    size and stride are those of `model.config`. Logits of all classes never exist at full size.

    Args:
        model: A model in evaluation mode, on any device.
        image_processor: Its `size` is the one at scale 1.
        images: PIL images, uint8 arrays `(height, width, 3)`, or paths of image files. Images and files are turned
            upright by their EXIF orientation, which is the size that counts.
        scales: The published multi-scale protocol uses 0.5, 0.75, 1, 1.25, 1.5 and 1.75.
        flip: Whether to add the horizontal mirror image at every scale.
        max_batch_pixels: Pixels of all images or windows that share a forward pass, over photographs, scales and
            flips; bounds the memory that the model needs. A single one that is larger is processed alone.
        return_confidence: Whether to return how sure each pixel's label is, too. The labels are the same either way.

    Returns:
        Per photograph `(height, width)` class ids, int64, on the CPU; with confidence, named tuples of those as
        `labels`, and `confidence` and `margin`, float32, also `(height, width)` and on the CPU: the probability of the
        label, and what it is above the next class's. Probabilities are the softmax of the logits at the photograph's
        size, divided by `model.config.temperature`, and averaged over scales and flips.

    Raises:
        ValueError: If the model is in training mode, or an argument is not of the form above.
        OSError: If a file cannot be read.

    Source:
        `inference`, segm/model/utils.py in rstrudel/segmenter@20d1bfa.
    """
    stream = segment_stream(model, image_processor, images, scales, flip, max_batch_pixels, return_confidence)
    results: list[Any] = list(stream)
    return results


def segment_stream(
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    images: Iterable[Photo],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    max_batch_pixels: int = MAX_BATCH_PIXELS,
    return_confidence: bool = False,
) -> Iterator[Tensor] | Iterator[Segmentation]:
    """Do as `segment` does for any number of photographs: one label map after the other, in their order.

    Photographs are taken from `images` only as they are needed to fill a forward pass.
    """
    views = score_stream(model, image_processor, images, scales, flip, max_batch_pixels)
    temperature = getattr(model.config, "temperature", 1.0)
    # `map` holds no photograph's scores while the next ones are computed.
    results: Iterator[Any] = map(partial(_label, return_confidence=return_confidence, temperature=temperature), views)
    return results


def score_stream(
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    images: Iterable[Photo],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    max_batch_pixels: int = MAX_BATCH_PIXELS,
) -> Iterator[list[CoarseScores]]:
    """Yield the coarse scores that `segment_stream` labels photographs by, for those who need more than labels.

    Args:
        model, image_processor, images, scales, flip, max_batch_pixels: As for `segment`, with the same errors.

    Yields:
        Per photograph its views, on the model's device: for every scale one and, with `flip`, its mirror image.
        `windows.score_bands` brings them to the photograph's size band by band.
    """
    if isinstance(images, (str, Path, np.ndarray, PIL.Image.Image)):
        raise ValueError(f"Got one {type(images).__name__}, needed a list of photographs; pass [image].")
    if model.training:
        raise ValueError("The model is in training mode, with dropout and without windows; call model.eval() first.")
    scales = tuple(scales)
    if not scales or min(scales) <= 0:
        raise ValueError(f"Got scales={scales}, needed one or more positive numbers.")
    if scales != (1.0,) and not image_processor.do_resize:
        raise ValueError(f"Got scales={scales}, but the image processor does not resize; set its do_resize=True.")
    if max_batch_pixels < 1:
        raise ValueError(f"Got max_batch_pixels={max_batch_pixels}, needed at least 1.")
    return _stream(model, image_processor, images, scales, flip, max_batch_pixels)


@dataclass(frozen=True)
class SegmentedFile:
    """What `segment_files` yields for a file.

    Attributes:
        path: Path of the photograph.
        result: What `finish` returned; None where the photograph cannot be read.
        error: Why it cannot be read, one of `UNREADABLE`; None where it can.
    """

    path: Path
    result: Any = None
    error: Exception | None = None


def segment_files(
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    paths: Iterable[str | Path],
    finish: Callable[[Path, PIL.Image.Image, Any], Any],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    max_batch_pixels: int = MAX_BATCH_PIXELS,
    return_confidence: bool = False,
) -> Iterator[SegmentedFile]:
    """Segment image files while the next ones are read and decoded, and the last ones are written, by other threads.

    Args:
        finish: Called in another thread, one file at a time and in order, with path, upright photograph and what
            `segment` returns for it; draws and writes whatever is wanted.

    Yields:
        One result per path, in order. Files that cannot be read do not end the run; what `finish` raises does.
    """
    ahead = 2  # Files read before, and files waiting to be written after, those in the model.
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        in_model: deque[tuple[Path, PIL.Image.Image | Exception]] = deque()
        finishing: deque[tuple[Path, Future | Exception]] = deque()

        def photos() -> Iterator[PIL.Image.Image]:
            for path, photo in _read_ahead(reader, paths, ahead):
                in_model.append((path, photo))
                if not isinstance(photo, Exception):
                    yield photo

        def pass_on(segmentation: Tensor | Segmentation | None) -> None:
            """Hand the first file in the model, and unreadable ones before it, to the writer."""
            while in_model:
                path, photo = in_model.popleft()
                if isinstance(photo, Exception):
                    finishing.append((path, photo))
                else:
                    finishing.append((path, writer.submit(finish, path, photo, segmentation)))
                    return

        options = (scales, flip, max_batch_pixels, return_confidence)
        for segmentation in segment_stream(model, image_processor, photos(), *options):
            pass_on(segmentation)
            del segmentation
            while len(finishing) > ahead:
                yield _finished(*finishing.popleft())
        pass_on(None)  # Only unreadable files can be left.
        while finishing:
            yield _finished(*finishing.popleft())


def load_photo(path: str | Path | BinaryIO, max_photo_pixels: int = MAX_PHOTO_PIXELS) -> PIL.Image.Image:
    """Read a photograph upright, in 8-bit RGB.

    What comes out for every kind of picture says `depict_hf.photo_files`; of animations and pages it is the first.

    Args:
        path: Of a file in one of `photo_files.FORMATS`; or such a file, open for reading bytes.
        max_photo_pixels: Width times height that a file may declare, which is asked before it is decoded.

    Raises:
        UnreadableImageError: If the file is missing, no file, damaged or cut off, too large, or no photograph. It is an
            `OSError` and a `ValueError`, of one line.
    """
    return read_photo(path, max_photo_pixels)[0]


def read_photo(
    path: str | Path | BinaryIO, max_photo_pixels: int = MAX_PHOTO_PIXELS
) -> tuple[PIL.Image.Image, str | None]:
    """Do as `load_photo` does, and also return a note for the user, or None."""
    image, note = read_image(path, max_photo_pixels)
    return rgb_photo(image), note


def rgb_photo(image: PIL.Image.Image) -> PIL.Image.Image:
    """Make an image of any mode upright and 8-bit RGB, as `load_photo` returns it.

    Raises:
        UnreadableImageError: If it cannot be decoded, or holds floats.
        ValueError: If it holds integers beyond 16 bits.
    """
    image = upright(image)
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    if image.mode == "F":
        raise UnreadableImageError(
            "its values are floats, of which nothing says what is white; save it with 8 or 16 bits per channel"
        )
    try:
        pixels = DepictImageProcessor().process_image(image, do_convert_rgb=True)
        return PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy())
    except MemoryError as error:
        raise UnreadableImageError(
            f"there is not enough memory to convert its {image.width} x {image.height} pixels; make it smaller"
        ) from error


def _read_ahead(
    reader: ThreadPoolExecutor, paths: Iterable[str | Path], ahead: int
) -> Iterator[tuple[Path, PIL.Image.Image | Exception]]:
    reading: deque[tuple[Path, Future]] = deque()
    for path in map(Path, paths):
        reading.append((path, reader.submit(load_photo, path)))
        if len(reading) > ahead:
            yield _read(*reading.popleft())
    while reading:
        yield _read(*reading.popleft())


def _read(path: Path, photo: Future) -> tuple[Path, PIL.Image.Image | Exception]:
    try:
        return path, photo.result()
    except UNREADABLE as error:
        return path, error


def _finished(path: Path, outcome: Future | Exception) -> SegmentedFile:
    if isinstance(outcome, Exception):
        return SegmentedFile(path, error=outcome)
    return SegmentedFile(path, outcome.result())


@dataclass
class _View:
    """One photograph at one scale, mirrored or not, and the logits of its windows as far as they are known.

    Args:
        corners: (top, left) pixels per window, row by row.
        window: (height, width) pixels of a window.
        size: (height, width) pixels of the resized photograph, without padding.
        mirrored: Whether it is the mirror image.
        logits: Per corner `(num_labels, h, w)` in the model's dtype.
    """

    corners: list[tuple[int, int]]
    window: tuple[int, int]
    size: tuple[int, int]
    mirrored: bool
    logits: list[Tensor] = field(default_factory=list)


@dataclass
class _Job:
    """One photograph on its way: its size and the views begun so far."""

    size: tuple[int, int]
    views: list[_View] = field(default_factory=list)

    def finish(self) -> list[CoarseScores]:
        return [
            CoarseScores.from_windows(view.logits, view.corners, view.window, view.size, self.size, view.mirrored)
            for view in self.views
        ]


@torch.inference_mode()
def _label(views: list[CoarseScores], return_confidence: bool, temperature: float) -> Tensor | Segmentation:
    """Return what `segment` returns for one photograph."""
    labels, confidence, margin = label_views(views, return_confidence, temperature)
    labels = labels.cpu().long()
    if confidence is None or margin is None:
        return labels
    return Segmentation(labels, confidence.cpu(), margin.cpu())


@torch.inference_mode()
def _stream(
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    images: Iterable[Photo],
    scales: tuple[float, ...],
    flip: bool,
    max_batch_pixels: int,
) -> Iterator[list[CoarseScores]]:
    """Queue the windows of all photographs; run the model whenever a pass is full."""
    # Photographs whose windows have not all been run, or that wait for an earlier one of those.
    jobs: deque[_Job] = deque()
    queue: list[tuple[Tensor, _View]] = []
    pixels = 0
    for photo in images:
        image = _as_tensor(photo, image_processor)
        del photo
        jobs.append(_Job(size_of(image)))
        for window, view in _windows(model, image_processor, image, scales, flip, jobs[-1]):
            window_pixels = window.shape[-2] * window.shape[-1]
            if queue and pixels + window_pixels > max_batch_pixels:
                _run(model, queue)
                pixels = 0
            queue.append((window, view))
            pixels += window_pixels
        del image
        waiting_pixels = sum(job.size[0] * job.size[1] for job in jobs)
        if pixels + window_pixels > max_batch_pixels or waiting_pixels > MAX_WAITING_PIXELS:
            _run(model, queue)
            pixels = 0
        while jobs and _complete(jobs[0]):
            yield jobs.popleft().finish()
    _run(model, queue)
    while jobs:
        yield jobs.popleft().finish()


def _complete(job: _Job) -> bool:
    return all(len(view.logits) == len(view.corners) for view in job.views)


def _run(model: SegmentationModel, queue: list[tuple[Tensor, _View]]) -> None:
    """Run the queued windows, those of one size together, and hand the logits to their views."""
    for size in dict.fromkeys(window.shape for window, _ in queue):
        entries = [entry for entry in queue if entry[0].shape == size]
        logits = model(torch.stack([window for window, _ in entries])).logits
        for (_, view), each in zip(entries, logits, strict=True):
            view.logits.append(each)
    queue.clear()


def _windows(
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    image: Tensor,
    scales: tuple[float, ...],
    flip: bool,
    job: _Job,
) -> Iterator[tuple[Tensor, _View]]:
    """Cut windows `(channels, height, width)` at every scale; yield each with its view, which the job gets."""
    window_size = model.config.window_size
    for scale in scales:
        edges = {name: int(side * scale) for name, side in dict(image_processor.size).items() if side is not None}
        pixel_values = image_processor(image, size=edges, return_tensors="pt")["pixel_values"].to(model.device)
        if window_size is not None:
            pixel_values = enlarge_to_window(pixel_values, window_size)
        size = size_of(pixel_values)
        for mirrored in (False, True) if flip else (False,):
            pixels = pixel_values.flip(-1) if mirrored else pixel_values
            if window_size is not None:
                window = (window_size, window_size)
                corners = window_corners(size, window_size, model.config.window_stride or window_size)
            else:
                # Else the model would pad, and return logits at the input's size; exported graphs pad by themselves.
                if not getattr(model, "pads", False):
                    pixels = pad_to_multiple(pixels, model.config.encoder_patch_size)
                window = size_of(pixels)
                corners = [(0, 0)]
            view = _View(corners, window, size, mirrored)
            job.views.append(view)
            for top, left in corners:
                yield pixels[0, :, top : top + window[0], left : left + window[1]], view


def _as_tensor(photo: Photo, image_processor: DepictImageProcessor) -> Tensor:
    """Return a photograph upright, `(channels, height, width)` uint8."""
    if isinstance(photo, (str, Path)):
        photo = load_photo(photo)
    if isinstance(photo, np.ndarray):
        if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8:
            raise ValueError(
                f"Got an array of shape {photo.shape} and dtype {photo.dtype}, needed uint8 (height, width, 3); "
                "pass a PIL image to have other kinds converted."
            )
    elif isinstance(photo, PIL.Image.Image):
        photo = upright(photo)
    else:
        raise ValueError(f"Got a {type(photo).__name__}, needed a PIL image, a uint8 array or a path.")
    return image_processor.process_image(photo, do_convert_rgb=image_processor.do_convert_rgb)
