"""Image files from the outside: what is opened, how each kind of picture comes out, and one error for what does not.

Nothing here knows of models. Photographs and label maps are both read by `read_image`; photographs go on to
`inference.load_photo`, which makes 8-bit RGB of them.

    What the file holds                  What comes out
    8-bit RGB, 1 bit, 8-bit grey         as it is; grey in all three channels
    transparency of any kind, of a       laid over white
    palette or a single colour too
    palette                              its colours
    16-bit grey                          divided by 257 and rounded; 32-bit integers likewise where a value exceeds 255,
                                         and refused where one is negative or exceeds 65535
    16-bit RGB                           the upper 8 bits, which is how Pillow decodes it
    float                                refused, since nothing says what white is
    CMYK, YCbCr, Lab, HSV                Pillow's conversion to RGB; colour profiles are not applied
    several pictures: GIF, APNG, WebP    the first one, with a note (that of an MPO file without, since its others are
    and AVIF animations, TIFF pages      previews and depths of the same photograph)
    an EXIF orientation                  turned upright
    cut off, damaged, empty              refused
    more than `max_pixels` pixels        refused by its header, before it is decoded
    no file but a folder, pipe, device   refused without opening it
"""

import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import PIL
import PIL.ExifTags
import PIL.Image
import PIL.ImageFile

# Formats of Pillow that are opened, and the suffixes by which folders are searched for them. Photographs and label maps
# come in these. All others stay closed: their decoders are seldom used and little tested, some start other programs
# (EPS) or are recognised by next to nothing (SPIDER, TGA). HEIF is there only where the user registered a decoder, by
# `pillow_heif.register_heif_opener()`.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".mpo"),
    "PNG": (".png", ".apng"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k"),
    "HEIF": (),
}
PHOTO_SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)

# Pixels that a photograph may have unless the caller says otherwise: 134 million, which cameras of 100 megapixels and
# long panoramas stay below.
MAX_PHOTO_PIXELS = 2**27

# What holds the orientation, too, and is left out of a picture that has been turned.
_METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
SEVERAL_PICTURES = "it holds several pictures (an animation, or pages), of which only the first is taken"


class UnreadableImageError(OSError, ValueError):
    """A file, or an image that is decoded only when it is used, from which no picture can be read.

    The message is one line without the file's name: what arrived, and what to do.
    """


class MissingImageError(UnreadableImageError, FileNotFoundError):
    """There is no file of this name."""


def read_image(
    source: str | os.PathLike[str] | bytes | BinaryIO, max_pixels: int = MAX_PHOTO_PIXELS
) -> tuple[PIL.Image.Image, str | None]:
    """Read one picture of any mode, decoded and upright.

    Args:
        source: Path of a file, content of a file, or a binary file that can seek.
        max_pixels: Width times height that the file may declare. `PIL.Image.MAX_IMAGE_PIXELS` holds as well: Pillow
            warns beyond it, and refuses what has more than twice as many.

    Returns:
        The picture, whose `format` is the file's; and a note for the user, or None.

    Raises:
        UnreadableImageError: If there is no such file, it is none, or no picture can be read from it, whatever the
            reason. It is an `OSError` and a `ValueError`. What is wrong with this package's own code, and
            `KeyboardInterrupt`, come through as they are.
        OSError: If the file was opened but the system cannot read on.
    """
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), max_pixels)
    if isinstance(source, (str, os.PathLike)):
        with _open_file(Path(source)) as file:
            return _read(file, max_pixels)
    if not hasattr(source, "read"):
        raise UnreadableImageError(f"it is a {type(source).__name__}; needed is a path, bytes or a binary file")
    return _read(source, max_pixels)


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Decode an image if that has not been done, and turn it as its EXIF orientation says.

    Returns:
        The image itself where there is nothing to turn, else a new one without EXIF data.

    Raises:
        UnreadableImageError: If it cannot be decoded, or its EXIF data be read, which hold the orientation.
    """
    with decoding(image.size):
        image.load()
        turn = _TURNS.get(image.getexif().get(PIL.ExifTags.Base.Orientation, 1))
        if turn is None:
            return image
        turned = image.transpose(turn)
    turned.format = image.format
    turned.info = {name: value for name, value in turned.info.items() if name not in _METADATA}
    return turned


def grey_or_colored(image: PIL.Image.Image, to_rgb: bool | None) -> PIL.Image.Image:
    """Decode an image that may only have been opened; with `to_rgb`, make it RGB or RGBA if it has 8 bits or fewer.

    Raises:
        UnreadableImageError: If Pillow cannot, whatever it raised.
    """
    with decoding(image.size):
        image.load()
        if image.mode == "1":
            image = image.convert("L")
        elif image.mode == "La":  # multiplied by its opacity, as is RGBa
            image = image.convert("LA")
        if not to_rgb or image.mode[0] in "IF":
            return image
        transparent = "A" in image.getbands() or image.mode == "RGBa" or image.info.get("transparency") is not None
        mode = "RGBA" if transparent else "RGB"
        return image if image.mode == mode else image.convert(mode)


def check_resized(size: tuple[int, int], resized: tuple[int, int], max_photo_pixels: int) -> None:
    """Refuse a photograph that would be resized to more pixels than allowed, as one of 5000 x 1 is by its short side.

    Args:
        size, resized: (height, width) before and after.

    Raises:
        ValueError: If there are more than `max_photo_pixels`.
    """
    if resized[0] * resized[1] > max_photo_pixels:
        raise ValueError(
            f"it has {size[1]} x {size[0]} pixels, which become {resized[1]} x {resized[0]} for the model, more than "
            f"the {max_photo_pixels} allowed; crop it, or raise max_photo_pixels (--max-photo-pixels)"
        )


@contextmanager
def decoding(size: tuple[int, int] | None = None) -> Iterator[None]:
    """Make whatever Pillow raises within an `UnreadableImageError`; nothing but calls of Pillow belongs there.

    Its decoders raise almost anything on damaged files: SyntaxError, TypeError, struct.error, RuntimeError, and
    warnings where these are errors.

    Args:
        size: (width, height) that the image declares, for the message.
    """
    try:
        yield
    except UnreadableImageError:
        raise
    except Exception as error:
        raise UnreadableImageError(_reason(error, size)) from error


def shown(name: object) -> str:
    r"""Write a file's name for people, on one line: what cannot be printed or encoded as `\n`, `\x1b` or `\udce9`."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(name))


def shown_lines(text: object) -> str:
    """Write a text of several lines for people, each as `shown` does."""
    return "\n".join(map(shown, str(text).split("\n")))


def allowed_pixels(max_photo_pixels: int | None) -> int:
    """Let this process open photographs of so many pixels, `MAX_PHOTO_PIXELS` for None, and no larger ones.

    Pillow's own limit, which holds for the whole process, is raised where it is lower, and its warnings are silenced:
    what they say is damaged metadata, or a size that `read_image` refuses. For commands, not for libraries.
    """
    allowed = MAX_PHOTO_PIXELS if max_photo_pixels is None else max_photo_pixels
    if max_photo_pixels is not None and PIL.Image.MAX_IMAGE_PIXELS is not None:
        PIL.Image.MAX_IMAGE_PIXELS = max(PIL.Image.MAX_IMAGE_PIXELS, allowed)
    warnings.filterwarnings("ignore", module=r"PIL\.")
    return allowed


def _open_file(path: Path) -> BinaryIO:
    """Open a regular file; anything else is refused unopened, since opening a pipe waits for somebody to write."""
    try:
        if not stat.S_ISREG(kind := path.stat().st_mode):
            raise UnreadableImageError(_no_file(kind))
        return path.open("rb")
    except UnreadableImageError:
        raise
    except FileNotFoundError as error:
        if path.is_symlink():
            text = "it is a link to a file that does not exist; remove it, or put the file back"
        else:
            text = "there is no such file; check its name and folder"
        raise MissingImageError(text) from error
    except (OSError, ValueError) as error:  # ValueError: characters that no name can have
        reason = getattr(error, "strerror", None) or error
        raise UnreadableImageError(f"it cannot be opened ({_line(reason)}); check its name and permissions") from error


def _no_file(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return f"it is a folder in which no image files are found ({' '.join(PHOTO_SUFFIXES)}); name an image file"
    kinds = {stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket", stat.S_ISCHR: "device", stat.S_ISBLK: "device"}
    kind = next((name for is_kind, name in kinds.items() if is_kind(mode)), "special file")
    return f"it is a {kind}, not an image file; save what comes from it as a file first"


def _read(file: BinaryIO, max_pixels: int) -> tuple[PIL.Image.Image, str | None]:
    with decoding():
        file.seek(0)
        if not file.read(1):
            raise UnreadableImageError("it is empty, an image file was needed; get it again")
        PIL.Image.init()
        image = PIL.Image.open(file, formats=[name for name in FORMATS if name in PIL.Image.OPEN])
        is_jpeg = image.format in ("JPEG", "MPO")
        several = getattr(image, "is_animated", False) and not is_jpeg
    width, height = image.size
    if width * height > max_pixels:
        raise UnreadableImageError(
            f"it has {width} x {height} pixels, more than the {max_pixels} allowed; make it smaller, or raise "
            "max_photo_pixels (--max-photo-pixels)"
        )
    if image.format == "TIFF" and not _is_covered(image):
        raise UnreadableImageError(f"parts of its {width} x {height} pixels are missing; get it again")
    if is_jpeg and not _has_end(file):
        raise UnreadableImageError("it is cut off, the end of its JPEG data is missing; get it again")
    return upright(image), SEVERAL_PICTURES if several else None


def _is_covered(image: PIL.ImageFile.ImageFile) -> bool:
    """Whether the strips or blocks of a TIFF file reach its last pixel; Pillow leaves black what is in none."""
    extents = [each[1] or (0, 0, 0, 0) for each in image.tile]
    # Its size may be turned already, so that only the area tells.
    area = max((each[2] for each in extents), default=0) * max((each[3] for each in extents), default=0)
    return area >= image.width * image.height


def _has_end(file: BinaryIO) -> bool:
    """Whether a JPEG file has an end marker behind the start of its first scan.

    Pillow finds a file that ends too early by itself, but decodes one whose rest is zeros, as a broken download leaves
    it, to grey. Within a scan, the marker's bytes cannot occur otherwise.
    """
    position = file.tell()
    file.seek(2)
    while len(head := file.read(4)) == 4 and head[0] == 0xFF and head[1] != 0xDA:
        # Of several 0xFF in a row, all but the last only fill up.
        file.seek(-3 if head[1] == 0xFF else int.from_bytes(head[2:], "big") - 2, os.SEEK_CUR)
    found, scan, start, block = head[:2] != b"\xff\xda", file.tell(), file.seek(0, os.SEEK_END), b""
    # In blocks from the end, where it nearly always is.
    while not found and start > scan:
        start, stop = max(scan, start - 2**16), start
        file.seek(start)
        block = file.read(stop - start) + block[:1]
        found = b"\xff\xd9" in block
    file.seek(position)
    return found


def _reason(error: Exception, size: tuple[int, int] | None) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        known = ", ".join(name for name in FORMATS if name in PIL.Image.OPEN)
        return f"it is no image of a format that is read ({known}), or is damaged; get it again, or save it as PNG"
    if isinstance(error, MemoryError):
        pixels = f" its {size[0]} x {size[1]} pixels" if size else " it"
        return f"there is not enough memory to decode{pixels}; make it smaller, or close other programs"
    if isinstance(error, (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning)):
        return f"it is too large ({_line(error)}); make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"
    return f"it cannot be decoded ({_line(error)}), so it is damaged or cut off; get it again, or save it anew"


def _line(reason: object) -> str:
    """Write what another library says as one short line."""
    text = shown(" ".join(str(reason).split()))[:200]
    return text or type(reason).__name__
