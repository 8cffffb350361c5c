"""Image files of every kind: what comes out of them, and that every damage is one error of one class."""

import io
import os
import socket
import warnings

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from depict_hf import DepictImageProcessor
from depict_hf.inference import UNREADABLE, load_photo, read_photo
from depict_hf.photo_files import FORMATS, MissingImageError, UnreadableImageError, read_image, shown, upright

RNG = np.random.default_rng(0)
SCENE = (np.add.outer(np.arange(40), np.arange(60))[..., None] * [1, 2, 2] + RNG.integers(0, 40, (40, 60, 3))).astype(
    np.uint8
)
PHOTO = PIL.Image.fromarray(SCENE)


def encode(image: PIL.Image.Image, image_format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def pixels_of(encoded: bytes) -> np.ndarray:
    return np.array(load_photo(io.BytesIO(encoded)))


ENCODINGS = {
    "jpeg": ("JPEG", {}),
    "progressive": ("JPEG", {"progressive": True}),
    "png": ("PNG", {}),
    "bmp": ("BMP", {}),
    "gif": ("GIF", {}),
    "ppm": ("PPM", {}),
    "webp": ("WEBP", {"lossless": True}),
    "tiff": ("TIFF", {}),
    "tiff_lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "avif": ("AVIF", {}),
    "jpeg2000": ("JPEG2000", {}),
}


@pytest.fixture(params=ENCODINGS)
def encoded(request) -> bytes:
    image_format, options = ENCODINGS[request.param]
    PIL.Image.init()
    if image_format not in PIL.Image.SAVE:
        pytest.skip(f"this Pillow cannot write {image_format}")
    return encode(PHOTO, image_format, **options)


class TestFormats:
    def test_each_is_read_as_pillow_reads_it(self, encoded, tmp_path):
        """By content, path and open file; the picture is decoded, so that it outlives its file."""
        expected = np.array(PIL.Image.open(io.BytesIO(encoded)).convert("RGB"))
        path = tmp_path / "photo"
        path.write_bytes(encoded)
        assert np.array_equal(np.array(read_image(encoded)[0].convert("RGB")), expected)
        with path.open("rb") as file:
            from_file, note = read_photo(file)
        path.write_bytes(b"")
        assert np.array_equal(np.array(from_file), expected) and note is None

    def test_all_others_stay_closed(self, tmp_path):
        """Fails if Pillow may guess: a TGA file of a few bytes, say, whose first ones say nothing."""
        for image_format in ("TGA", "ICO", "PCX", "SGI", "EPS", "PDF"):
            with pytest.raises(UnreadableImageError, match=r"no image of a format that is read \(JPEG, PNG, .*PNG$"):
                read_image(encode(PHOTO, image_format))
        assert not {"EPS", "SPIDER", "TGA", "ICO"} & set(FORMATS)

    def test_a_cut_file_never_passes_as_half_a_picture(self, encoded):
        """Fails if a decoder is told to fill up what is missing, or a format's end is not asked for."""
        whole = pixels_of(encoded)
        for length in sorted({*range(0, len(encoded), len(encoded) // 40), *range(len(encoded) - 3, len(encoded))}):
            try:
                assert np.array_equal(pixels_of(encoded[:length]), whole), length  # only trailing metadata is missing
            except UnreadableImageError as error:
                assert "\n" not in str(error) and ";" in str(error)

    @pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on damaged tags
    @pytest.mark.parametrize("seed", range(4))
    def test_damage_is_one_error_or_a_picture(self, encoded, seed):
        rng = np.random.default_rng(seed)
        for _ in range(15):
            damaged = np.frombuffer(encoded, np.uint8).copy()
            damaged[rng.integers(0, len(damaged) if seed % 2 else 100, 3)] = rng.integers(0, 256, 3)
            try:
                assert load_photo(io.BytesIO(damaged.tobytes()), 10**6).mode == "RGB"
            except UNREADABLE as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_whose_rest_is_zeros_is_cut_off(progressive):
    """As a download leaves it that got space for all, but not all; Pillow decodes the rest to grey."""
    whole = encode(PHOTO.resize((600, 400)), "JPEG", progressive=progressive)
    exif = PIL.Image.Exif()
    exif[0x010E] = b"\xff\xd8 thumbnail \xff\xd9".decode("latin-1")  # an end marker, but none of the photograph
    with_exif = encode(PHOTO.resize((600, 400)), "JPEG", progressive=progressive, exif=exif)
    for each in (whole, with_exif):
        for kept in (len(each) // 2, len(each) - 2):
            with pytest.raises(UnreadableImageError, match="cut off"):
                read_image(each[:kept] + bytes(200_000))
    # What stands behind the end, such as a phone's film, is none of the photograph.
    behind = b"\x00\xff\xda" + bytes(200_000)
    assert np.array_equal(pixels_of(whole + behind), pixels_of(whole))


def test_a_tiff_without_its_last_strips_is_refused():
    """Pillow leaves the missing strips black; fails if the header alone decides."""
    whole = encode(PHOTO, "TIFF")
    tag = b"\x01\x01\x04\x00\x01\x00\x00\x00"  # height, one 32-bit integer (Pillow writes 16 bits where it can)
    short = b"\x01\x01\x03\x00\x01\x00\x00\x00"
    position = max(whole.find(tag), whole.find(short)) + 8
    higher = whole[:position] + (4000).to_bytes(4, "little") + whole[position + 4 :]
    rows = b"\x16\x01\x03\x00\x01\x00\x00\x00"  # rows per strip, as before
    assert rows in whole or b"\x16\x01\x04\x00" in whole
    with pytest.raises(UnreadableImageError, match="parts of its 60 x 4000 pixels are missing; get it again"):
        read_image(higher)


class TestModes:
    """One rule for each, by value."""

    def test_sixteen_bit_grey(self):
        values = RNG.integers(0, 65536, (4, 5)).astype(np.uint16)
        expected = np.round(values / 257).astype(np.uint8)
        for image_format in ("PNG", "TIFF"):
            pixels = pixels_of(encode(PIL.Image.fromarray(values), image_format))
            assert all(np.array_equal(pixels[..., channel], expected) for channel in range(3))

    def test_sixteen_bit_rgb_keeps_the_upper_bits(self):
        """A PNG written by hand: Pillow writes none."""
        import struct
        import zlib

        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        values = RNG.integers(0, 65536, (4, 5, 3)).astype(">u2")
        rows = b"".join(b"\0" + row.tobytes() for row in values)
        png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0))
        png += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        assert np.array_equal(pixels_of(png), (values >> 8).astype(np.uint8))

    def test_thirty_two_bit_integers(self):
        small, large = np.array([[0, 7, 255]], np.int32), np.array([[0, 257, 65535]], np.int32)
        assert pixels_of(encode(PIL.Image.fromarray(small), "TIFF"))[0, :, 0].tolist() == [0, 7, 255]
        assert pixels_of(encode(PIL.Image.fromarray(large), "TIFF"))[0, :, 0].tolist() == [0, 1, 255]
        for value in (-1, 65536):
            with pytest.raises(ValueError, match=r"rescale the image to 0\.\.255 or 0\.\.65535"):
                pixels_of(encode(PIL.Image.fromarray(np.array([[value, 3]], np.int32)), "TIFF"))

    def test_floats_are_refused(self):
        with pytest.raises(UnreadableImageError, match="floats, of which nothing says what is white; save it with 8"):
            pixels_of(encode(PIL.Image.fromarray(SCENE[..., 0].astype(np.float32)), "TIFF"))

    def test_cmyk_and_grey(self):
        cmyk = PIL.Image.fromarray(RNG.integers(0, 256, (4, 5, 4), np.uint8), "CMYK")
        assert np.array_equal(pixels_of(encode(cmyk, "TIFF")), np.array(cmyk.convert("RGB")))
        for mode in ("L", "1"):
            grey = PHOTO.convert(mode)
            expected = np.array(grey.convert("L"))[..., None].repeat(3, axis=-1)
            assert np.array_equal(pixels_of(encode(grey, "PNG")), expected)

    def test_transparency_is_laid_over_white(self):
        """Alpha, a palette's transparent entries, and a single transparent colour: each as a hand computes it."""
        rgba = RNG.integers(0, 256, (4, 5, 4), np.uint8)
        share = rgba[..., 3:] / 255
        expected = rgba[..., :3] * share + 255 * (1 - share)
        assert np.abs(pixels_of(encode(PIL.Image.fromarray(rgba), "PNG")) - expected).max() <= 1
        assert (
            np.abs(pixels_of(encode(PIL.Image.fromarray(rgba), "WEBP", lossless=True, exact=True)) - expected).max()
            <= 1
        )

        palette = PIL.Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
        palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
        for transparency in (1, b"\xff\x00\xff"):
            pixels = pixels_of(encode(palette, "PNG", transparency=transparency))
            assert pixels.tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]
        assert pixels_of(encode(palette, "GIF", transparency=1)).tolist() == pixels.tolist()

        colors = PIL.Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
        assert pixels_of(encode(colors, "PNG", transparency=(4, 5, 6))).tolist() == [[[1, 2, 3], [255, 255, 255]]]

    @pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
    def test_the_first_of_several_with_a_note(self, image_format):
        if image_format not in PIL.Image.SAVE_ALL:
            pytest.skip(f"this Pillow writes no animated {image_format}")
        first, second = PIL.Image.new("RGB", (20, 10), (200, 30, 30)), PIL.Image.new("RGB", (20, 10), (0, 0, 250))
        file = io.BytesIO(encode(first, image_format, save_all=True, append_images=[second, first]))
        photo, note = read_photo(file)
        assert np.abs(np.array(photo).astype(int) - [200, 30, 30]).max() <= 6
        assert note is not None and "only the first" in note
        # Another's file stays as open and readable as it was.
        assert np.array_equal(np.array(read_photo(file)[0]), np.array(photo))

    def test_previews_of_a_photograph_need_no_note(self):
        file = io.BytesIO(encode(PHOTO, "MPO", save_all=True, append_images=[PHOTO.resize((6, 4))]))
        photo, note = read_photo(file)
        assert photo.size == PHOTO.size and note is None

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP"])
    def test_orientations(self, image_format, orientation):
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        file = encode(PHOTO, image_format, exif=exif)
        image = read_image(file)[0]
        expected = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(file)))
        assert np.array_equal(np.array(image), np.array(expected)) and image.format == image_format
        assert np.array_equal(np.array(upright(image)), np.array(expected))  # not turned again


class TestBoundary:
    @pytest.mark.parametrize(
        "error", [RuntimeError("decoder"), TypeError("a\nb"), AttributeError("x"), MemoryError(), RecursionError()]
    )
    @pytest.mark.parametrize("place", ["open", "load", "getexif"])
    def test_whatever_a_decoder_raises_is_the_files_error(self, error, place, tmp_path, monkeypatch):
        PHOTO.save(tmp_path / "photo.png")

        def raises(*args, **options):
            raise error

        owner = PIL.Image if place == "open" else PIL.PngImagePlugin.PngImageFile
        monkeypatch.setattr(owner, place, raises)
        with pytest.raises(UnreadableImageError) as caught:
            load_photo(tmp_path / "photo.png")
        assert isinstance(caught.value, OSError) and isinstance(caught.value, ValueError)
        assert "\n" not in str(caught.value) and caught.value.__cause__ is error
        assert ("not enough memory" in str(caught.value)) == isinstance(error, MemoryError)

    def test_warnings_that_are_errors(self, monkeypatch):
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 2000)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UnreadableImageError, match="too large"):
                read_image(encode(PHOTO, "PNG"))

    def test_errors_of_others_come_through(self, monkeypatch):
        """Fails if the boundary is around more than the decoding."""
        file = io.BytesIO(encode(PHOTO, "PNG"))
        for error in (KeyboardInterrupt, SystemExit):
            monkeypatch.setattr(
                PIL.PngImagePlugin.PngImageFile, "load", lambda *args, error=error: (_ for _ in ()).throw(error())
            )
            with pytest.raises(error):
                read_image(file)
        monkeypatch.undo()
        monkeypatch.setattr("depict_hf.photo_files._has_end", lambda file: undefined)  # noqa: F821
        with pytest.raises(NameError):
            read_image(encode(PHOTO, "JPEG"))

    def test_an_image_that_was_only_opened(self):
        """Decoders run when it is used, in the image processor too."""
        cut = encode(PHOTO, "PNG")[:2000]
        for use in (
            upright,
            lambda image: DepictImageProcessor()(image),
            lambda image: DepictImageProcessor()(PHOTO, segmentation_maps=image),
        ):
            with pytest.raises(UnreadableImageError, match="cut off"):
                use(PIL.Image.open(io.BytesIO(cut)))

    def test_names_given_to_the_image_processor(self, tmp_path):
        """Decoded by transformers' means otherwise, which raise RuntimeError and know fewer formats."""
        image_processor = DepictImageProcessor(do_resize=False)
        for name in ("photo.png", "photo.tif"):
            PHOTO.save(tmp_path / name)
            [expected], [given] = (image_processor(each)["pixel_values"] for each in (PHOTO, str(tmp_path / name)))
            assert np.array_equal(given, expected)
        (tmp_path / "photo.png").write_bytes(encode(PHOTO, "PNG")[:2000])
        for path in ("photo.png", "missing.png"):
            with pytest.raises(UnreadableImageError):
                image_processor([str(tmp_path / path)])

    def test_too_many_pixels_are_refused_by_the_header(self):
        """The pixels themselves are missing, so that decoding would say something else."""
        header = encode(PIL.Image.new("L", (9000, 9000)), "PNG")[:60]
        with pytest.raises(
            UnreadableImageError, match=r"has 9000 x 9000 pixels, more than the 80999999 allowed; .*--max"
        ):
            read_image(header, 80_999_999)
        with pytest.raises(UnreadableImageError, match="cut off"):
            read_image(header, 81_000_000)

    def test_what_is_no_file(self, tmp_path, monkeypatch):
        """A pipe must not be opened: that waits until somebody writes into it."""
        (tmp_path / "empty.jpg").touch()
        (tmp_path / "folder.png").mkdir()
        (tmp_path / "broken.png").symlink_to(tmp_path / "nothing.png")
        (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
        os.mkfifo(tmp_path / "pipe.png")
        with socket.socket(socket.AF_UNIX) as server:
            monkeypatch.chdir(tmp_path)  # the name of a socket may have 107 bytes
            server.bind("socket.png")
        expected = {
            tmp_path / "empty.jpg": "it is empty",
            tmp_path / "folder.png": "it is a folder in which no image files are found",
            tmp_path / "pipe.png": "it is a pipe, not an image file",
            tmp_path / "socket.png": "it is a socket",
            tmp_path / "loop.png": r"it cannot be opened \(.*symbolic links",
            tmp_path / ("a" * 300): r"it cannot be opened \(File name too long\)",
            "/dev/zero": "it is a device, not an image file",
            "zero\0byte.png": r"it cannot be opened \(embedded null",
            "lone \ud800.png": r"it cannot be opened \(.*surrogates",
        }
        for path, message in expected.items():
            with pytest.raises(UnreadableImageError, match=message):
                load_photo(path)
        for path, message in {
            "broken.png": "link to a file that does not exist",
            "missing.png": "no such file",
        }.items():
            with pytest.raises(MissingImageError, match=message):
                load_photo(tmp_path / path)
        with pytest.raises(FileNotFoundError):
            load_photo(tmp_path / "missing.png")
        with pytest.raises(UnreadableImageError, match="it is a int; needed is a path, bytes or a binary file"):
            load_photo(3)


def test_names_are_shown_on_one_line():
    assert shown("Grüße 1.png") == "Grüße 1.png"
    assert shown("a\nb\x1b[31m\u202e.png") == r"a\nb\x1b[31m\u202e.png"
    assert shown(os.fsdecode(b"caf\xe9.png")) == r"caf\udce9.png"
    shown(os.fsdecode(bytes(range(1, 256)))).encode("utf-8")
