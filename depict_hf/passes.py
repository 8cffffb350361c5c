"""The windows of many photographs, put together to full forward passes; what fails for one fails for it alone."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .image_processing_depict import DepictImageProcessor
from .modeling_depict import SegmentationModel
from .photo_files import check_resized
from .resampling import size_of
from .windows import CoarseScores, enlarge_to_window, enlarged_size, pad_to_multiple, window_corners

# Pixels of the photographs that may wait for others to fill a forward pass.
MAX_WAITING_PIXELS = 2**27

# How PyTorch on processors and ONNX Runtime say that memory is short; PyTorch on other devices has a class for it.
_OUT_OF_MEMORY = ("out of memory", "can't allocate", "not enough memory", "failed to allocate", "bad_alloc")


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
    """One photograph on its way: its size, the views begun so far, and what it failed with."""

    size: tuple[int, int]
    views: list[_View] = field(default_factory=list)
    error: MemoryError | None = None

    def fail(self) -> None:
        """Give up for lack of memory, and let go of what is known so far."""
        self.views.clear()
        self.error = memory_error(self.size)

    def is_complete(self) -> bool:
        return all(len(view.logits) == len(view.corners) for view in self.views)

    def finish(self) -> list[CoarseScores] | MemoryError:
        if self.error is not None:
            return self.error
        try:
            return [
                CoarseScores.from_windows(view.logits, view.corners, view.window, view.size, self.size, view.mirrored)
                for view in self.views
            ]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return memory_error(self.size)


@dataclass
class _Window:
    """One window that waits for a forward pass: `(channels, height, width)`, its view and its photograph."""

    pixels: Tensor
    view: _View
    job: _Job


@torch.inference_mode()
def stream_scores(
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    images: Iterable[Tensor | MemoryError],
    scales: tuple[float, ...],
    flip: bool,
    max_batch_pixels: int,
    max_photo_pixels: int,
) -> Iterator[list[CoarseScores] | MemoryError]:
    """Queue the windows of all photographs; run the model whenever a pass is full.

    Args:
        images: Upright photographs, `(channels, height, width)`, or the errors of those for which there was not enough
            memory already. They are taken as they are needed.
        model, image_processor, scales, flip, max_batch_pixels, max_photo_pixels: As for `inference.segment`.

    Yields:
        Per photograph, in order, its views as of `inference.score_stream`, or the error of one for which there was not
        enough memory; the others are not lost by that.

    Raises:
        ValueError: If a photograph would be resized to more than `max_photo_pixels`.
    """
    # Photographs whose windows have not all been run, or that wait for an earlier one of those.
    jobs: deque[_Job] = deque()
    queue: list[_Window] = []
    pixels = 0
    for image in images:
        job, window_pixels = _Job((0, 0)), 0
        windows: Iterator[_Window] = iter(())
        jobs.append(job)
        if isinstance(image, MemoryError):
            job.error = image
        else:
            job.size = size_of(image)
            check_photo(*job.size, model, image_processor, scales, max_photo_pixels)
            windows = _windows(model, image_processor, image, scales, flip, job, max_photo_pixels)
        try:
            for window in windows:
                window_pixels = window.pixels.shape[-2] * window.pixels.shape[-1]
                if queue and pixels + window_pixels > max_batch_pixels:
                    _run(model, queue)
                    pixels = 0
                if job.error is not None:
                    break
                queue.append(window)
                pixels += window_pixels
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            job.fail()
        del image, windows
        waiting_pixels = sum(job.size[0] * job.size[1] for job in jobs)
        if pixels + window_pixels > max_batch_pixels or waiting_pixels > MAX_WAITING_PIXELS:
            _run(model, queue)
            pixels = 0
        while jobs and jobs[0].is_complete():
            yield jobs.popleft().finish()
    _run(model, queue)
    while jobs:
        yield jobs.popleft().finish()


def check_photo(
    height: int,
    width: int,
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    scales: Iterable[float],
    max_photo_pixels: int,
) -> None:
    """Refuse a photograph of `height` x `width` pixels that would be resized to too many for the model.

    Raises:
        ValueError: If there are more than `max_photo_pixels` at one of the scales.
    """
    for scale in scales:
        size = height, width
        if image_processor.do_resize:
            size = image_processor.resize_size(height, width, _scaled_size(image_processor, scale))
        if model.config.window_size is not None:
            size = enlarged_size(*size, model.config.window_size)
        check_resized((height, width), size, max_photo_pixels)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, of whatever library and device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, Exception) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)


def memory_error(size: tuple[int, int]) -> MemoryError:
    """Make the error of a photograph of (height, width) pixels; it holds no tensors, as one that was caught does."""
    height, width = size
    return MemoryError(
        f"there is not enough memory to segment its {width} x {height} pixels; lower max_batch_pixels "
        "(--max-batch-pixels) or the scales, make it smaller, or close other programs"
    )


def _run(model: SegmentationModel, queue: list[_Window]) -> None:
    """Run the queued windows, those of one size together, and hand the logits to their views.

    Where memory is too short for them all, they are run one at a time, and photographs fail for which it is too short
    even so.
    """
    waiting = [window for window in queue if window.job.error is None]
    queue.clear()
    for size in dict.fromkeys(window.pixels.shape for window in waiting):
        windows = [window for window in waiting if window.pixels.shape == size]
        if not _run_together(model, windows):
            for window in windows:
                if window.job.error is None and not _run_together(model, [window]):
                    window.job.fail()


def _run_together(model: SegmentationModel, windows: list[_Window]) -> bool:
    """Run windows of one size, and say whether there was enough memory for that."""
    try:
        logits = model(torch.stack([window.pixels for window in windows])).logits
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    for window, each in zip(windows, logits, strict=True):
        window.view.logits.append(each)
    return True


def _windows(
    model: SegmentationModel,
    image_processor: DepictImageProcessor,
    image: Tensor,
    scales: tuple[float, ...],
    flip: bool,
    job: _Job,
    max_photo_pixels: int,
) -> Iterator[_Window]:
    """Cut windows at every scale, whose views the job gets."""
    window_size = model.config.window_size
    for scale in scales:
        [pixel_values] = image_processor(
            image,
            size=_scaled_size(image_processor, scale),
            input_data_format="channels_first",
            max_photo_pixels=max_photo_pixels,
        )["pixel_values"]
        pixel_values = pixel_values[None].to(model.device)
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
                yield _Window(pixels[0, :, top : top + window[0], left : left + window[1]], view, job)


def _scaled_size(image_processor: DepictImageProcessor, scale: float) -> dict[str, int]:
    """Return the image processor's size at a scale, whose sides are cut off to whole pixels."""
    return {name: int(side * scale) for name, side in dict(image_processor.size).items() if side is not None}
