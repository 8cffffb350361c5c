"""Label maps and confidences as pictures: palette images, overlays with a legend, contact sheets, and class shares."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from .configuration_depict import IGNORE_LABEL

LEGEND_NAME_LENGTH = 24  # longer names (ADE20K lists synonyms) would leave no room for a second column
CONTOUR_DARKNESS = 0.75
CONTOUR_PIXELS = 1200  # a photograph of so many pixels squared gets lines of two pixels, of twice as many of three
# In OKLab: lightness, green to red, blue to yellow. Colours on straight lines through them at equal distances look
# equally far apart, and grow evenly lighter, for colour-blind people too.
UNSURE_TO_SURE = ((0.97, -0.02, 0.08), (0.60, 0.10, -0.02), (0.22, 0.00, -0.09))
Color = tuple[int, int, int]


def label_image(segmentation, colors: list[Color]) -> PIL.Image.Image:
    """Draw a palette image whose pixel values are the class ids.

    Args:
        segmentation: `(height, width)` integer tensor or array; 255 marks pixels without a class, shown black.
        colors: RGB in 0 to 255, by class id.

    Raises:
        ValueError: If an id has no colour, or there are more than 255 colours.
    """
    ids = _ids(segmentation, len(colors))
    image = PIL.Image.fromarray(ids.astype(np.uint8), mode="P")
    palette = [value for color in colors for value in color]
    image.putpalette(palette + [0] * (768 - len(palette)))
    return image


def overlay(
    image: PIL.Image.Image,
    segmentation,
    colors: list[Color],
    names: list[str] | None = None,
    alpha: float = 0.5,
    contours: bool = True,
) -> PIL.Image.Image:
    """Blend a photograph with the classes' colours; draw lines between the classes and a legend below it.

    Args:
        image: The photograph; converted to RGB.
        segmentation: `(height, width)` integer tensor or array of the photograph's size; pixels of 255 stay as they
            are.
        colors: RGB in 0 to 255, by class id.
        names: Names by class id, for a legend of the classes that occur, largest share first, long ones cut short;
            without names there is none.
        alpha: Weight of the colours, 0 to 1.
        contours: Whether a dark line is drawn where one class meets another; in large photographs a wider one.

    Returns:
        RGB, as wide as the photograph (or the legend, if that is wider); the photograph is at the top left.

    Raises:
        ValueError: If sizes differ, an id has no colour, there are not as many names as colours, or `alpha` is out of
            its range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"Got alpha={alpha}, needed 0 (photograph only) to 1 (colours only).")
    if names is not None and len(names) != len(colors):
        raise ValueError(f"Got {len(names)} names and {len(colors)} colours, needed one of each per class.")
    ids = _ids(segmentation, len(colors))
    if ids.shape != (image.height, image.width):
        raise ValueError(
            f"Got a label map of {ids.shape} for a photograph of {(image.height, image.width)} (height, width); "
            "resize the logits to the photograph's size first."
        )
    photo = np.asarray(image.convert("RGB"), dtype=np.float32)
    table = np.zeros((256, 3), dtype=np.float32)
    table[: len(colors)] = colors
    weight = np.where(ids == IGNORE_LABEL, 0.0, alpha).astype(np.float32)[..., None]
    pixels = photo + weight * (table[ids] - photo)
    if contours:
        pixels[_contours(ids)] *= 1 - CONTOUR_DARKNESS
    blended = PIL.Image.fromarray(np.rint(pixels).astype(np.uint8))
    if names is None:
        return blended
    shares = [(colors[index], f"{_shorten(names[index])} {100 * share:.1f} %") for index, share in _shares(ids)]
    return _with_legend(blended, shares)


def _contours(ids: np.ndarray) -> np.ndarray:
    """Mark where a class meets another, `(height, width)`: lines of one pixel, or of more in large photographs."""
    lines = np.zeros(ids.shape, dtype=bool)
    lines[:, :-1] |= ids[:, :-1] != ids[:, 1:]
    lines[:-1] |= ids[:-1] != ids[1:]
    for _ in range(round((ids.size**0.5) / CONTOUR_PIXELS)):  # one pixel wider to the right and below each time
        lines[:, 1:] |= lines[:, :-1]
        lines[1:] |= lines[:-1]
    return lines


def confidence_image(probabilities, bits: int = 8) -> PIL.Image.Image:
    """Draw `round(probability * (2**bits - 1))` in grey: a probability is value / 255, or / 65535 in 16 bits.

    Args:
        probabilities: `(height, width)` tensor or array of 0 to 1; numbers beyond, as margins of several views can
            have, become the nearer end.
        bits: 8 or 16.

    Raises:
        ValueError: If these are not two dimensions, or there is another number of bits.
    """
    if bits not in (8, 16):
        raise ValueError(f"Got bits={bits}, needed 8 or 16: those that a grey PNG file has.")
    values = _probabilities(probabilities)
    return PIL.Image.fromarray(np.rint(values * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16))


def draw_confidence(probabilities) -> PIL.Image.Image:
    """Draw probabilities of labels, light where they are low, above a scale with their mean.

    Args:
        probabilities: As for `confidence_image`.

    Returns:
        RGB, as wide as the map (or the scale, if that is wider); the map is at the top left.
    """
    values = _probabilities(probabilities)
    colors = _scale_colors()
    picture = PIL.Image.fromarray(colors[np.rint(values * 255).astype(np.uint8)])
    font_size = max(12, round(values.size**0.5 / 45))
    font = PIL.ImageFont.load_default(font_size)
    gap = round(font_size / 2)
    bar_width = min(picture.width - 2 * gap, 24 * font_size)
    title = f"probability of the label (mean {values.mean():.3f})"
    width = max(bar_width, 12 * font_size, round(font.getlength(title)))
    canvas = PIL.Image.new(
        "RGB", (max(picture.width, width + 2 * gap), picture.height + round(4.5 * font_size)), "white"
    )
    canvas.paste(picture, (0, 0))
    top = picture.height + gap
    draw = PIL.ImageDraw.Draw(canvas)
    draw.text((gap, top), title, fill="black", font=font)
    top += round(1.3 * font_size)
    bar = PIL.Image.fromarray(colors[None]).resize((width, font_size), PIL.Image.Resampling.BILINEAR)
    canvas.paste(bar, (gap, top))
    draw.rectangle((gap, top, gap + width - 1, top + bar.height - 1), outline="black")
    for position, anchor in ((0, "la"), (0.25, "ma"), (0.5, "ma"), (0.75, "ma"), (1, "ra")):
        place = (gap + position * (width - 1), top + 1.1 * font_size)
        draw.text(place, f"{position:g}", fill="black", font=font, anchor=anchor)
    return canvas


def _probabilities(probabilities) -> np.ndarray:
    values = np.asarray(probabilities.cpu() if hasattr(probabilities, "cpu") else probabilities, dtype=np.float32)
    if values.ndim != 2:
        raise ValueError(f"Got probabilities of shape {values.shape}, needed one a pixel: (height, width).")
    return values.clip(0, 1)


def _scale_colors() -> np.ndarray:
    """Return `(256, 3)` uint8 RGB from probability 0 to 1.

    Source:
        The inverse of OKLab by its definition, Björn Ottosson, "A perceptual color space for image processing", 2020.
    """
    anchors = np.array(UNSURE_TO_SURE)
    places = np.concatenate([[0], np.linalg.norm(np.diff(anchors, axis=0), axis=1).cumsum()])
    lab = np.stack([np.interp(np.linspace(0, places[-1], 256), places, axis) for axis in anchors.T], axis=1)
    to_cones = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = ((lab @ to_cones.T) ** 3 @ to_rgb.T).clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.uint8)


class SheetRow(NamedTuple):
    """One photograph of a contact sheet; the label maps are `(height, width)` integers of the photograph's size."""

    title: str
    photo: PIL.Image.Image
    truth: np.ndarray
    prediction: np.ndarray


def contact_sheet(
    rows: Sequence[SheetRow], colors: list[Color], names: list[str], column_width: int = 320
) -> PIL.Image.Image:
    """Draw photographs with their true and predicted classes, one below the other, and a legend.

    Args:
        rows: Rows from top to bottom, each below its title.
        colors: RGB in 0 to 255, by class id; 255 in a label map is shown black.
        names: Names by class id; the legend lists the classes that occur in any map.
        column_width: Pixels of every picture.

    Returns:
        RGB.

    Raises:
        ValueError: If there are no rows, sizes within a row differ, an id has no colour, or there are not as many names
            as colours.
    """
    if not rows:
        raise ValueError("Got no rows, needed at least one photograph for a contact sheet.")
    if len(names) != len(colors):
        raise ValueError(f"Got {len(names)} names and {len(colors)} colours, needed one of each per class.")
    blocks, counts = [], np.zeros(256, dtype=np.int64)
    for row in rows:
        maps = _row_maps(row, len(colors))
        counts += sum(np.bincount(each.ravel(), minlength=256) for each in maps)
        size = (column_width, max(1, round(row.photo.height * column_width / row.photo.width)))
        pictures = [row.photo.convert("RGB").resize(size), *(label_image(each, colors).resize(size) for each in maps)]
        blocks.append((row.title, pictures))
    entries = [(colors[index], _shorten(names[index])) for index in np.flatnonzero(counts[:IGNORE_LABEL]).tolist()]
    if counts[IGNORE_LABEL]:
        entries.append(((0, 0, 0), "no class"))
    return _with_legend(_sheet_canvas(blocks, column_width), entries)


def class_shares(segmentation, names: list[str]) -> list[tuple[str, float]]:
    """Name and share of the image, as a fraction, of every class that occurs, largest first.

    Args:
        segmentation: `(height, width)` integer tensor or array; pixels of 255 count to the image but to no class.
        names: Names by class id.

    Raises:
        ValueError: If an id has no name.
    """
    return [(names[index], share) for index, share in _shares(_ids(segmentation, len(names)))]


def _shares(ids: np.ndarray) -> list[tuple[int, float]]:
    counts = np.bincount(ids.ravel(), minlength=256)[:IGNORE_LABEL]
    return [(int(index), counts[index] / ids.size) for index in np.argsort(-counts, kind="stable") if counts[index]]


def _ids(segmentation, num_classes: int) -> np.ndarray:
    """Return a `(height, width)` array of ids below `num_classes`, or 255."""
    if num_classes > IGNORE_LABEL:
        raise ValueError(
            f"Got {num_classes} classes, needed at most {IGNORE_LABEL}: a palette image holds 8 bits, and "
            f"{IGNORE_LABEL} marks pixels without a class; merge classes first."
        )
    ids = np.asarray(segmentation.cpu() if hasattr(segmentation, "cpu") else segmentation)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"Got a label map of shape {ids.shape} and {ids.dtype}, needed integers (height, width).")
    wrong = np.unique(ids[((ids < 0) | (ids >= num_classes)) & (ids != IGNORE_LABEL)])
    if wrong.size:
        raise ValueError(
            f"Got {num_classes} classes and the ids {wrong[:10].tolist()} beyond them, needed ids from 0 to "
            f"{num_classes - 1}, or {IGNORE_LABEL}; pass the names and colours of all classes."
        )
    return ids


def _row_maps(row: SheetRow, num_classes: int) -> list[np.ndarray]:
    """Return the checked label maps of a row: truth, prediction."""
    maps = [_ids(each, num_classes) for each in (row.truth, row.prediction)]
    if any(each.shape != (row.photo.height, row.photo.width) for each in maps):
        raise ValueError(
            f"{row.title}: got a photograph of {(row.photo.height, row.photo.width)} and label maps of "
            f"{maps[0].shape} and {maps[1].shape} (height, width), needed one size."
        )
    return maps


def _sheet_canvas(blocks: list[tuple[str, list[PIL.Image.Image]]], column_width: int) -> PIL.Image.Image:
    """Lay pictures out in three columns under their headings, each row under its title."""
    gap = max(4, column_width // 40)
    font_size = max(12, column_width // 22)
    font = PIL.ImageFont.load_default(font_size)
    line_height = round(1.5 * font_size)
    height = line_height + sum(line_height + pictures[0].height + gap for _, pictures in blocks)
    canvas = PIL.Image.new("RGB", (3 * column_width + 4 * gap, height), "white")
    draw = PIL.ImageDraw.Draw(canvas)
    lefts = [gap + column * (column_width + gap) for column in range(3)]
    for left, heading in zip(lefts, ("photograph", "truth", "prediction"), strict=True):
        draw.text((left, line_height / 2), heading, fill="gray", font=font, anchor="lm")
    top = line_height
    for title, pictures in blocks:
        draw.text((gap, top + line_height / 2), title, fill="black", font=font, anchor="lm")
        top += line_height
        for left, picture in zip(lefts, pictures, strict=True):
            canvas.paste(picture, (left, top))
        top += pictures[0].height + gap
    return canvas


def _with_legend(image: PIL.Image.Image, entries: list[tuple[Color, str]]) -> PIL.Image.Image:
    """Put a panel with these entries below the picture, as wide as that or, for many entries, about square."""
    # Legible at full size, and also when the whole picture is fitted to a screen.
    font_size = max(12, round((image.width * image.height) ** 0.5 / 65))
    font = PIL.ImageFont.load_default(font_size)
    swatch, gap = font_size, round(font_size / 2)
    widest = max((font.getlength(text) for _, text in entries), default=0)
    column_width = swatch + 3 * gap + round(widest)
    row_height = swatch + gap
    square = round((len(entries) * row_height / column_width) ** 0.5)
    num_columns = max(1, min(len(entries), max(square, (image.width - gap) // column_width)))
    num_rows = -(-len(entries) // num_columns)

    panel_width = max(image.width, gap + num_columns * column_width)
    canvas = PIL.Image.new("RGB", (panel_width, image.height + gap + num_rows * row_height), "white")
    canvas.paste(image, (0, 0))
    draw = PIL.ImageDraw.Draw(canvas)
    for position, (color, text) in enumerate(entries):
        column, row = divmod(position, num_rows)
        left, top = gap + column * column_width, image.height + gap + row * row_height
        draw.rectangle((left, top, left + swatch - 1, top + swatch - 1), fill=color, outline="black")
        draw.text((left + swatch + gap, top + swatch / 2), text, fill="black", font=font, anchor="lm")
    return canvas


def _shorten(name: str) -> str:
    return name if len(name) <= LEGEND_NAME_LENGTH else name[: LEGEND_NAME_LENGTH - 1].rstrip(" ,") + "…"
