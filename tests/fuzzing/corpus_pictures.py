"""Cases of tests/corpus: photographs and label maps."""

import random
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image

from .bases import encode, label_map, photographs, scene
from .corpus_cases import Case, refused, right
from .mutations import damaged_bytes, png_chunk

SEED = 0
UNREADABLE = "UnreadableImageError"


def sound_photographs() -> Iterator[Case]:
    """Every format and mode as the table in depict_hf/photo_files.py says."""
    mean = [float(each) for each in scene().mean((0, 1))]
    upright = [scene()[row, column].tolist() for row in (0, -1) for column in (0, -1)]
    turned = np.rot90(scene(), -1)
    turned_corners = [turned[row, column].tolist() for row in (0, -1) for column in (0, -1)]
    red = [[each[0]] * 3 for each in upright]
    for name in photographs():
        stem, _, suffix = name.partition(".")
        description = {"kind": "photograph", "base": f"photographs/{name}", "file": name}
        lossless = suffix in ("png", "bmp", "ppm", "tif") and "jpeg" not in stem
        near = {} if suffix == "webp" else {"mean": mean}  # which shifts colours by more than 1
        if stem == "foreign":
            expected = refused("it is no image of a format that is read", UNREADABLE)
        elif stem == "floats":
            expected = refused("its values are floats", UNREADABLE)
        elif stem == "exif":
            expected = right(size=[16, 24], note=False, **({"corners": turned_corners} if lossless else near))
        elif stem in ("animation", "pages", "previews"):
            expected = right(size=[24, 16], note=stem != "previews")
        elif stem == "deep" and lossless:
            expected = right(size=[24, 16], corners=red)
        elif stem == "rgb" and lossless:
            expected = right(size=[24, 16], corners=upright)
        elif stem == "rgb":
            expected = right(size=[24, 16], **near)
        elif stem == "plain":
            expected = right(size=[4, 3], corners=[[0, 7, 14], [63, 70, 77], [168, 175, 182], [231, 238, 245]])
        else:
            expected = right(size=[24, 16], note=False)
        yield Case(f"photograph-sound-{stem}-{suffix}", {}, description, expected)


def damaged_photographs() -> Iterator[Case]:
    sound = photographs()
    rng = random.Random(SEED)

    def damaged(name: str, file: str, data: bytes, expected: dict[str, Any], **options: Any) -> Case:
        return Case(f"photograph-{name}", {file: data}, {"kind": "photograph", "file": file, **options}, expected)

    for name in ("rgb.png", "rgb.jpg", "lossless.webp", "rgb.avif", "palette.gif", "rgb.bmp", "rgb.ppm", "rgb.tif"):
        suffix = name.partition(".")[2]
        half = sound[name][: len(sound[name]) // 2]
        base = {"base": f"photographs/{name}", "cut_from": name}
        yield damaged(f"half-{suffix}", f"half.{suffix}", half, refused(";", UNREADABLE), **base)
    for number in range(24):
        name = rng.choice([each for each in sound if not each.startswith(("foreign", "floats"))])
        suffix = name.partition(".")[2]
        data = damaged_bytes(rng, sound[name], list(sound.values()))[1]
        # Which damages a decoder overlooks is its own affair.
        either = right() | refused(";", UNREADABLE)
        yield damaged(f"random-{number}-{suffix}", f"damaged.{suffix}", data, either)
    header = png_chunk(b"IHDR", struct.pack(">II", 65500, 65500) + bytes([8, 2, 0, 0, 0]))
    bomb = sound["rgb.png"][:8] + header
    yield damaged("bomb", "bomb.png", bomb + sound["rgb.png"][33:], refused("it is too large", UNREADABLE))
    yield damaged(
        "too-large", "large.png", sound["rgb.png"], refused("more than the 100 allowed", UNREADABLE), max_pixels=100
    )
    yield damaged("empty", "empty.jpg", b"", refused("it is empty", UNREADABLE))
    yield damaged("text", "text.png", b"<html>404</html>", refused("no image of a format", UNREADABLE))
    zeros = sound["rgb.jpg"][:-2] + bytes(3000)
    yield damaged("rest-of-zeros", "zeros.jpg", zeros, refused("the end of its JPEG data is missing", UNREADABLE))
    tall = bytearray(sound["rgb.tif"])
    place = tall.find(b"\x01\x01\x04\x00\x01\x00\x00\x00") + 8
    tall[place : place + 4] = struct.pack("<I", 32)
    yield damaged(
        "missing-strips", "strips.tif", bytes(tall), refused("parts of its 24 x 32 pixels are missing", UNREADABLE)
    )
    for special, message in (
        ("folder", "it is a folder"),
        ("pipe", "it is a pipe"),
        ("socket", "it is a socket"),
        ("link:photo.png", "it cannot be opened"),
    ):
        kind = special.partition(":")[0]
        description = {"kind": "photograph", "file": "photo.png", "special": {"photo.png": special}}
        yield Case(f"photograph-{kind}", {}, description, refused(message, UNREADABLE))
    description = {"kind": "photograph", "file": "photo.png", "special": {"photo.png": "link:nowhere.png"}}
    yield Case("photograph-broken-link", {}, description, refused("does not exist", "MissingImageError"))
    yield Case(
        "photograph-missing", {}, {"kind": "photograph", "file": "no.png"}, refused("no such file", "MissingImageError")
    )


def label_maps() -> Iterator[Case]:
    """Ids of every mode: right by value, or refused since nobody knows what they mean."""
    ids = label_map().astype(np.int64)
    row = ids[8].tolist()
    plain = PIL.Image.fromarray(ids.astype(np.uint8))
    pixels = {str(key): int((ids == key).sum()) for key in np.unique(ids)}
    as_it_is = right(size=[16, 24], pixels=pixels, row=row)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    palette = plain.copy()
    palette.putpalette([each for index in range(256) for each in (index, 255 - index, 9)])
    opaque = PIL.Image.merge("LA", (plain, PIL.Image.new("L", plain.size, 255)))
    half = PIL.Image.merge("LA", (plain, PIL.Image.new("L", plain.size, 200)))
    large = np.where(ids == 2, 300, ids)
    lying = PIL.Image.fromarray(np.rot90(ids).astype(np.uint8))
    made = {
        "grey": (encode(plain, "PNG"), as_it_is),
        "palette": (encode(palette, "PNG"), as_it_is),
        "palette-transparency": (encode(palette, "PNG", transparency=1), as_it_is),
        "equal-channels": (encode(plain.convert("RGB"), "PNG"), as_it_is),
        "opaque": (encode(opaque, "PNG"), as_it_is),
        "transparent": (encode(half, "PNG"), refused("partly transparent")),
        "colours": (encode(PIL.Image.fromarray(scene()), "PNG"), refused("channels that differ")),
        "deep": (encode(PIL.Image.fromarray(ids.astype(np.uint16)), "PNG"), as_it_is),
        "deep-300": (encode(PIL.Image.fromarray(large.astype(np.uint16)), "PNG"), refused("Got label ids [300]")),
        "signed": (encode(PIL.Image.fromarray(ids.astype(np.int32)), "TIFF"), as_it_is),
        "negative": (encode(PIL.Image.fromarray(ids.astype(np.int32) - 1), "TIFF"), refused("the negative id -1")),
        "floats": (encode(PIL.Image.fromarray(ids.astype(np.float32)), "TIFF"), as_it_is),
        "fractions": (encode(PIL.Image.fromarray((ids / 2).astype(np.float32)), "TIFF"), refused("no whole numbers")),
        "pages": (encode(plain, "TIFF", save_all=True, append_images=[plain]), refused("several pictures")),
        "jpeg": (encode(plain, "JPEG"), refused("saved as JPEG")),
        "other-size": (encode(plain.crop((0, 0, 20, 16)), "PNG"), refused("must be equal")),
        "lying": (encode(lying, "PNG"), refused("must be equal")),
        "lying-and-turned": (encode(lying, "PNG", exif=exif), as_it_is),
        "bilevel": (
            encode(PIL.Image.fromarray(ids == 1), "PNG"),
            right(pixels={"0": int((ids != 1).sum()), "1": pixels["1"]}),
        ),
        "beyond": (encode(PIL.Image.fromarray(np.where(ids == 2, 7, ids).astype(np.uint8)), "PNG"), refused("[7]")),
        "cut": (encode(plain, "PNG")[:60], refused("label map", UNREADABLE)),
        "empty": (b"", refused("it is empty", UNREADABLE)),
    }
    description = {
        "kind": "label_map",
        "base": "photographs/rgb.png",
        "photograph": "rgb.png",
        "file": "map",
        "classes": 3,
    }
    for name, (data, expected) in made.items():
        yield Case(f"label_map-{name}", {"map": data}, description, expected)
    turned = {"base": "photographs/exif.png", "photograph": "exif.png"}
    lying_map = {"map": encode(plain, "PNG")}
    yield Case("label_map-photograph-turned", lying_map, description | turned, refused("EXIF orientation 6"))
