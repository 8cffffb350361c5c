"""A photograph from a file, of any kind that `photo_files` knows, upright and in 8-bit RGB."""

from pathlib import Path
from typing import BinaryIO

import PIL.Image

from .image_processing_depict import DepictImageProcessor
from .passes import is_out_of_memory
from .photo_files import MAX_PHOTO_PIXELS, UnreadableImageError, grey_or_colored, read_image, upright

# What reading a photograph raises, whatever its decoder raised.
UNREADABLE = (OSError, ValueError)


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
    if image.mode != "RGB" or image.info.get("transparency") is not None:
        image = grey_or_colored(image, to_rgb=True)
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise UnreadableImageError(
            "its values are floats, of which nothing says what is white; save it with 8 or 16 bits per channel"
        )
    try:
        pixels = DepictImageProcessor().process_image(image, do_convert_rgb=True)
        return PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy())
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UnreadableImageError(
            f"there is not enough memory to convert its {image.width} x {image.height} pixels; make it smaller"
        ) from error
