"""Photographs and label maps in every usual file form, damaged files, and the meaning of ids."""

import io

import numpy as np
import pytest
import torch
from conftest import palette_image
from PIL import Image

from training.data.reading import LabelEncoding, UnreadableImageError, read_image, read_pair

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)
IDS = RNG.integers(0, 5, (12, 16), dtype=np.uint8)
FIVE = LabelEncoding.counted(5)


def encoded(image: Image.Image, image_format: str = "PNG", path: str | None = None, **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return {"bytes": buffer.getvalue(), "path": path}


@pytest.mark.parametrize(
    "label_map",
    [
        Image.fromarray(IDS),
        palette_image(IDS),
        Image.fromarray(IDS.astype(np.uint16)),
        Image.fromarray(np.stack([IDS] * 3, axis=-1)),
    ],
    ids=["8-bit", "palette", "16-bit", "rgb"],
)
def test_every_encoding_gives_the_ids(label_map):
    image, labels = read_pair(encoded(Image.fromarray(PHOTO)), encoded(label_map), FIVE)
    assert labels.dtype == torch.int64
    assert np.array_equal(labels, IDS)
    assert image.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0), PHOTO)


def test_small_palettes_are_unpacked():
    """PNG packs two ids of a small palette into a byte."""
    packed = encoded(palette_image(IDS), bits=4)
    assert packed["bytes"][24] == 4  # the bit depth in the file's header
    assert np.array_equal(read_pair(encoded(Image.fromarray(PHOTO)), packed, FIVE)[1], IDS)


def test_one_bit_masks_are_zero_and_one():
    mask = Image.fromarray(IDS > 2)
    assert mask.mode == "1"
    labels = read_pair(encoded(Image.fromarray(PHOTO)), encoded(mask), LabelEncoding.counted(2))[1]
    assert np.array_equal(labels, IDS > 2)


def test_16_bit_ids_above_255_are_classes_or_refused():
    ids = IDS.astype(np.uint16)
    ids[2, 3] = 299
    pair = (encoded(Image.fromarray(PHOTO)), encoded(Image.fromarray(ids)))
    assert np.array_equal(read_pair(*pair, LabelEncoding.counted(300))[1], ids)
    with pytest.raises(ValueError, match=r"label ids \[299\], needed 0 to 4, or 255 \(ignored\)"):
        read_pair(*pair, FIVE)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_photographs_of_other_modes_become_rgb(mode):
    photo = Image.fromarray(PHOTO).convert(mode)
    image_format = "TIFF" if mode == "CMYK" else "PNG"
    image, _ = read_pair(encoded(photo, image_format), encoded(Image.fromarray(IDS)), FIVE)
    assert np.array_equal(image.permute(1, 2, 0), np.array(photo.convert("RGB")))


def test_colour_coded_labels_are_refused():
    with pytest.raises(ValueError, match=r"channels that differ.*map each colour to its id first"):
        read_pair(encoded(Image.fromarray(PHOTO)), encoded(Image.fromarray(PHOTO)), FIVE)


def test_jpeg_labels_are_refused():
    with pytest.raises(ValueError, match="saved as JPEG, which changes ids"):
        read_pair(encoded(Image.fromarray(PHOTO)), encoded(Image.fromarray(IDS), "JPEG"), FIVE)


def test_photograph_is_turned_as_exif_says_and_the_map_must_fit_it():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by a quarter
    photo = encoded(Image.fromarray(PHOTO), exif=exif)
    turned = np.rot90(IDS, -1)
    image, labels = read_pair(photo, encoded(Image.fromarray(turned)), FIVE)
    assert np.array_equal(image.permute(1, 2, 0), np.rot90(PHOTO, -1))
    assert np.array_equal(labels, turned)
    with pytest.raises(ValueError, match=r"size \(12, 16\) for an image of size \(16, 12\).*EXIF"):
        read_pair(photo, encoded(Image.fromarray(IDS)), FIVE)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: b"", "it is empty, an image file was needed"),
        (lambda data: b"no image at all", "it is no image of a format that is read"),
    ],
    ids=["half", "empty", "text"],
)
def test_damaged_files_are_told_apart_from_wrong_ones(image_format, damage, message):
    good = encoded(Image.fromarray(IDS))
    bad = encoded(Image.fromarray(PHOTO), image_format, "street.jpg")
    bad["bytes"] = damage(bad["bytes"])
    with pytest.raises(UnreadableImageError, match=f"(?i)photograph street.jpg: .*{message}"):
        read_pair(bad, good, FIVE)
    with pytest.raises(UnreadableImageError, match=f"(?i)label map street.jpg: .*{message}"):
        read_pair(encoded(Image.fromarray(PHOTO)), bad, FIVE)


def test_missing_and_empty_files_are_unreadable(tmp_path):
    (tmp_path / "empty.png").touch()
    for name, message in (("none.png", "there is no such file"), ("empty.png", "it is empty, an image")):
        with pytest.raises(UnreadableImageError, match=message):
            read_image({"path": str(tmp_path / name), "bytes": None})
    with pytest.raises(UnreadableImageError, match="the dataset has none here"):
        read_image(None)


def test_encodings():
    ids = np.array([[0, 1, 4, 255]], dtype=np.uint8)
    assert LabelEncoding.counted(5).decode(ids).tolist() == [[0, 1, 4, 255]]
    assert LabelEncoding.counted(4, reduce_labels=True).decode(ids).tolist() == [[255, 0, 3, 255]]
    table = LabelEncoding.from_table({0: 2, 1: 255, 4: 0})
    assert table.decode(ids).tolist() == [[2, 255, 0, 255]]
    assert table.decode(ids.astype(np.int64)).tolist() == [[2, 255, 0, 255]]
    with pytest.raises(ValueError, match=r"Got label ids \[2, 200\], needed 0 and 4, or 1 and 255 \(ignored\)"):
        table.decode(np.array([2, 4, 200], dtype=np.uint8))
    with pytest.raises(ValueError, match=r"\[-2, 256, 70000\], needed 1 to 4, or 0 and 255 \(ignored\)"):
        LabelEncoding.counted(4, reduce_labels=True).decode(np.array([256, 70000, -2, 3]))
