"""Photographs to label maps: the published single- and multi-scale protocol, with bounded memory."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from transformers.image_utils import ChannelDimension

from .image_processing_depict import DepictImageProcessor
from .modeling_depict import SegmentationModel
from .passes import MAX_WAITING_PIXELS as MAX_WAITING_PIXELS
from .passes import check_photo, is_out_of_memory, memory_error, stream_scores
from .photo_files import upright
from .ranges import MOST_SIZE, check_whole
from .rgb_photo import UNREADABLE as UNREADABLE
from .rgb_photo import load_photo as load_photo
from .rgb_photo import read_photo as read_photo
from .rgb_photo import rgb_photo as rgb_photo
from .windows import CoarseScores, Segmentation, label_views

Photo = PIL.Image.Image | np.ndarray | str | Path

# Pixels that share a forward pass unless the caller says otherwise: 8 windows of 512 x 512.
MAX_BATCH_PIXELS = 2**21


@overload
def segment(
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    images: Iterable[Photo],
    scales: Sequence[float] = ...,
    flip: bool = ...,
    max_batch_pixels: int = ...,
    return_confidence: Literal[False] = False,
    max_photo_pixels: int | None = ...,
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
    max_photo_pixels: int | None = ...,
) -> list[Tensor] | list[Segmentation]: ...


def segment(
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    images: Iterable[Photo],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    max_batch_pixels: int = MAX_BATCH_PIXELS,
    return_confidence: bool = False,
    max_photo_pixels: int | None = None,
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
        max_photo_pixels: Pixels that a photograph may have, in its file and resized for the model at any scale; bounds
            the memory that a photograph needs. By default the image processor's, which is 134 million.

    Returns:
        Per photograph `(height, width)` class ids, int64, on the CPU; with confidence, named tuples of those as
        `labels`, and `confidence` and `margin`, float32, also `(height, width)` and on the CPU: the probability of the
        label, and what it is above the next class's. Probabilities are the softmax of the logits at the photograph's
        size, divided by `model.config.temperature`, and averaged over scales and flips.

    Raises:
        ValueError: If the model is in training mode, an argument is not of the form above, or a photograph has, or
            would be resized to, too many pixels.
        OSError: If a file cannot be read.
        MemoryError: If there is not enough memory for a photograph even if its windows are run one at a time.

    Source:
        `inference`, segm/model/utils.py in rstrudel/segmenter@20d1bfa.
    """
    options = (scales, flip, max_batch_pixels, return_confidence, max_photo_pixels)
    stream = segment_stream(model, image_processor, images, *options)
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
    max_photo_pixels: int | None = None,
) -> Iterator[Tensor] | Iterator[Segmentation]:
    """Do as `segment` does for any number of photographs: one label map after the other, in their order.

    Photographs are taken from `images` only as they are needed to fill a forward pass.

    Yields:
        What `segment` returns for each photograph: `(height, width)` int64 on the CPU, or a `Segmentation` of maps.

    Raises:
        MemoryError, OSError, ValueError: As `segment`.
    """
    views = score_stream(model, image_processor, images, scales, flip, max_batch_pixels, max_photo_pixels)
    # `map` holds no photograph's scores while the next ones are computed.
    results: Iterator[Any] = map(_labeller(model, return_confidence), views)
    return results


def score_stream(
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    images: Iterable[Photo],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    max_batch_pixels: int = MAX_BATCH_PIXELS,
    max_photo_pixels: int | None = None,
) -> Iterator[list[CoarseScores]]:
    """Yield the coarse scores that `segment_stream` labels photographs by, for those who need more than labels.

    Args:
        model, image_processor, images, scales, flip, max_batch_pixels, max_photo_pixels: As for `segment`, with the
            same errors.

    Yields:
        Per photograph its views, on the model's device: for every scale one and, with `flip`, its mirror image.
        `windows.score_bands` brings them to the photograph's size band by band.
    """
    return map(_or_raise, _scores(model, image_processor, images, scales, flip, max_batch_pixels, max_photo_pixels))


def _scores(
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    images: Iterable[Photo],
    scales: Sequence[float],
    flip: bool,
    max_batch_pixels: int,
    max_photo_pixels: int | None,
) -> Iterator[list[CoarseScores] | MemoryError]:
    """Do as `score_stream` does, but yield the error of a photograph in its place; check the arguments at once."""
    if isinstance(images, (str, Path, np.ndarray, PIL.Image.Image)):
        raise ValueError(f"Got one {type(images).__name__}, needed a list of photographs; pass [image].")
    if model.training:
        raise ValueError("The model is in training mode, with dropout and without windows; call model.eval() first.")
    scales = tuple(scales)
    numbers = all(isinstance(scale, (int, float)) and not isinstance(scale, bool) for scale in scales)
    if not scales or not numbers or not all(0 < scale <= MOST_SIZE for scale in scales):
        raise ValueError(f"Got scales={scales}, needed one or more positive numbers, at most {MOST_SIZE}.")
    window_size, window_stride = model.config.window_size, model.config.window_stride
    if window_size is not None:
        check_whole("model.config.window_size", window_size)
        check_whole("model.config.window_stride", window_stride or window_size, 1, window_size)
    if scales != (1.0,) and not image_processor.do_resize:
        raise ValueError(f"Got scales={scales}, but the image processor does not resize; set its do_resize=True.")
    if max_batch_pixels < 1:
        raise ValueError(f"Got max_batch_pixels={max_batch_pixels}, needed at least 1.")
    if max_photo_pixels is None:
        max_photo_pixels = image_processor.max_photo_pixels
    if max_photo_pixels < 1:
        raise ValueError(f"Got max_photo_pixels={max_photo_pixels}, needed at least 1.")
    read = partial(_as_tensor, image_processor=image_processor, max_photo_pixels=max_photo_pixels)
    options = (scales, flip, max_batch_pixels, max_photo_pixels)
    return stream_scores(model, image_processor, map(read, images), *options)


def _or_raise(views: list[CoarseScores] | MemoryError) -> list[CoarseScores]:
    if isinstance(views, MemoryError):
        raise views
    return views


@dataclass(frozen=True)
class SegmentedFile:
    """What `segment_files` yields for a file.

    Attributes:
        path: Path of the photograph.
        result: What `finish` returned; None where the photograph cannot be segmented.
        error: Why it cannot be read, one of `UNREADABLE`, or a MemoryError; None where it could be segmented.
        note: What the user should know, such as that a file holds several pictures; None where there is nothing.
    """

    path: Path
    result: Any = None
    error: Exception | None = None
    note: str | None = None


def segment_files(
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    paths: Iterable[str | Path],
    finish: Callable[[Path, PIL.Image.Image, Any], Any],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    max_batch_pixels: int = MAX_BATCH_PIXELS,
    return_confidence: bool = False,
    max_photo_pixels: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Generator[SegmentedFile, None, None]:
    """Segment image files while the next ones are read and decoded, and the last ones are written, by other threads.

    Args:
        finish: Called in another thread, one file at a time and in order, with path, upright photograph and what
            `segment` returns for it; draws and writes whatever is wanted.
        stopped: Asked before each photograph whether it and all later ones are to be left out.

    Yields:
        One result per path, in order, up to where it was stopped. Files that cannot be read, or for which there is not
        enough memory, do not end the run; whatever else `finish` raises does.
    """
    if max_photo_pixels is None:
        max_photo_pixels = image_processor.max_photo_pixels
    ahead = 2  # Files read before, and files waiting to be written after, those in the model.
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        in_model: deque[_ReadFile] = deque()
        finishing: deque[tuple[_ReadFile, Future | Exception]] = deque()
        read = partial(_read, model, image_processor, scales=scales, max_photo_pixels=max_photo_pixels)

        def photos() -> Iterator[PIL.Image.Image]:
            for file in _read_ahead(reader, read, paths, ahead):
                if stopped():
                    return
                in_model.append(file)
                if not isinstance(file.photo, Exception):
                    yield file.photo

        def pass_on(segmentation: Tensor | Segmentation | MemoryError | None) -> None:
            """Hand the first file in the model, and unreadable ones before it, to the writer."""
            while in_model:
                file = in_model.popleft()
                if isinstance(file.photo, Exception):
                    finishing.append((file, file.photo))
                elif isinstance(segmentation, MemoryError):
                    finishing.append((file, segmentation))
                    return
                else:
                    finishing.append((file, writer.submit(finish, file.path, file.photo, segmentation)))
                    return

        options = (scales, flip, max_batch_pixels, max_photo_pixels)
        views = _scores(model, image_processor, photos(), *options)
        for segmentation in map(partial(_label_or_error, _labeller(model, return_confidence)), views):
            pass_on(segmentation)
            del segmentation
            while len(finishing) > ahead:
                yield _finished(*finishing.popleft())
        pass_on(None)  # Only unreadable files can be left.
        while finishing:
            yield _finished(*finishing.popleft())


class _ReadFile(NamedTuple):
    """A file and what came out of it: its photograph, or why there is none, and a note for the user."""

    path: Path
    photo: PIL.Image.Image | Exception
    note: str | None = None


def _read_ahead(
    reader: ThreadPoolExecutor, read: Callable[[Path], _ReadFile], paths: Iterable[str | Path], ahead: int
) -> Iterator[_ReadFile]:
    reading: deque[Future[_ReadFile]] = deque()
    for path in map(Path, paths):
        reading.append(reader.submit(read, path))
        if len(reading) > ahead:
            yield reading.popleft().result()
    while reading:
        yield reading.popleft().result()


def _read(
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    path: Path,
    scales: Sequence[float],
    max_photo_pixels: int,
) -> _ReadFile:
    """Read a photograph that fits into memory after it was resized, too."""
    try:
        photo, note = read_photo(path, max_photo_pixels)
        check_photo(photo.height, photo.width, model, image_processor, scales, max_photo_pixels)
    except UNREADABLE as error:
        _forget_frames(error)
        return _ReadFile(path, error)
    return _ReadFile(path, photo, note)


def _forget_frames(error: BaseException) -> None:
    """Let go of where an error and its causes were raised, since that keeps the pictures that were read there."""
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__


def _finished(file: _ReadFile, outcome: Future | Exception) -> SegmentedFile:
    if isinstance(outcome, Exception):
        return SegmentedFile(file.path, error=outcome)
    try:
        return SegmentedFile(file.path, outcome.result(), note=file.note)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        assert not isinstance(file.photo, Exception)
        return SegmentedFile(file.path, error=memory_error((file.photo.height, file.photo.width)))


def _labeller(model: SegmentationModel, return_confidence: bool) -> Callable[[list[CoarseScores]], Any]:
    temperature = getattr(model.config, "temperature", 1.0)
    return partial(_label, return_confidence=return_confidence, temperature=temperature)


def _label_or_error(label: Callable[[list[CoarseScores]], Any], views: list[CoarseScores] | MemoryError) -> Any:
    if isinstance(views, MemoryError):
        return views
    try:
        return label(views)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return memory_error((views[0].vertical.target_length, views[0].horizontal.target_length))


@torch.inference_mode()
def _label(views: list[CoarseScores], return_confidence: bool, temperature: float) -> Tensor | Segmentation:
    """Return what `segment` returns for one photograph."""
    labels, confidence, margin = label_views(views, return_confidence, temperature)
    labels = labels.cpu().long()
    if confidence is None or margin is None:
        return labels
    return Segmentation(labels, confidence.cpu(), margin.cpu())


def _as_tensor(photo: Photo, image_processor: DepictImageProcessor, max_photo_pixels: int) -> Tensor | MemoryError:
    """Return a photograph upright, `(channels, height, width)` uint8, or the error where memory is too short for it."""
    if isinstance(photo, (str, Path)):
        photo = load_photo(photo, max_photo_pixels)
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
    # Else the first axis of an array that is 1, 3 or 4 pixels high would count as its channels.
    axes = ChannelDimension.LAST if isinstance(photo, np.ndarray) else None
    try:
        return image_processor.process_image(photo, image_processor.do_convert_rgb, axes)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        height, width = photo.shape[:2] if isinstance(photo, np.ndarray) else reversed(photo.size)
        return memory_error((height, width))
