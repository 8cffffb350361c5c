import numpy as np
import PIL.Image
import pytest
import torch

from depict_hf.visualization import (
    SheetRow,
    class_shares,
    confidence_image,
    contact_sheet,
    draw_confidence,
    label_image,
    overlay,
)

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
NAMES = ["wall", "floor", "sky"]
IDS = np.array([[0, 0, 2], [2, 2, 255]])


def test_label_images_keep_ids_and_show_colours(tmp_path):
    label_image(torch.from_numpy(IDS), COLORS).save(tmp_path / "labels.png")
    read = PIL.Image.open(tmp_path / "labels.png")
    assert read.mode == "P" and np.array(read).tolist() == IDS.tolist()
    assert np.array(read.convert("RGB"))[:, 2].tolist() == [[0, 0, 255], [0, 0, 0]]


def test_overlays_blend_and_leave_ignored_pixels_alone():
    photo = np.full((2, 3, 3), 100, np.uint8)
    blended = np.array(overlay(PIL.Image.fromarray(photo), IDS, COLORS, alpha=0.25, contours=False))
    assert blended[0, 0].tolist() == [round(75 + 0.25 * 255), 75, 75]
    assert blended[1, 0].tolist() == [75, 75, round(75 + 0.25 * 255)]
    assert blended[1, 2].tolist() == [100, 100, 100]


def test_contours_run_where_classes_meet():
    """One pixel wide, on the first class's side; everything else stays as it is without them."""
    ids = np.zeros((20, 30), int)
    ids[5:15, 10:20] = 1
    photo = PIL.Image.new("RGB", (30, 20), (200, 200, 200))
    plain, drawn = (np.array(overlay(photo, ids, COLORS, contours=each)).astype(int) for each in (False, True))
    changed = (plain != drawn).any(axis=-1)
    expected = np.zeros_like(changed)
    expected[5:15, [9, 19]] = expected[[4, 14], 10:20] = True
    assert np.array_equal(changed, expected)
    assert (drawn[changed] < plain[changed].max() / 2).all()


@pytest.mark.parametrize(("width", "height"), [(2400, 240), (160, 1600), (24, 18), (1600, 1200)])
def test_a_legend_fits_pictures_of_any_shape(width, height):
    """Fails if letters grow with the longer side alone: a narrow picture would get a legend of several widths."""
    ids = np.arange(3).repeat(-(-height // 3))[:height, None].repeat(width, axis=1)
    picture = overlay(PIL.Image.new("RGB", (width, height)), ids, COLORS, NAMES)
    assert picture.width <= max(width, 130) and picture.height - height <= max(80, height / 4)


@pytest.mark.parametrize("size", [(40, 60), (300, 200), (1000, 2000)])
def test_a_legend_covers_nothing_and_lists_the_largest_class_first(size):
    ids = np.zeros(size, int)
    ids[: size[0] * 3 // 4] = 2
    photo = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    plain, legend = (np.array(overlay(photo, ids, COLORS, names)) for names in (None, NAMES))
    assert np.array_equal(legend[: size[0], : size[1]], plain)
    panel = legend[size[0] :].reshape(-1, 3)
    blue, red, green = (
        np.flatnonzero((panel == color).all(axis=1)) for color in ((0, 0, 255), (255, 0, 0), (0, 255, 0))
    )
    assert len(blue) == len(red) > 50 and len(green) == 0
    assert blue[0] < red[0]


def test_many_classes_fit_into_the_legend():
    """All 100 swatches are on the canvas, in columns, also where the photograph is narrower than one entry."""
    colors = [(index, 255 - index, 7) for index in range(100)]
    ids = np.arange(100).repeat(20).reshape(20, 100)
    picture = np.array(overlay(PIL.Image.new("RGB", (100, 20)), ids, colors, [f"class {i}" for i in range(100)]))
    seen = {tuple(color) for color in picture[20:].reshape(-1, 3).tolist()}
    assert set(colors) <= seen
    assert 0.4 < picture.shape[1] / (picture.shape[0] - 20) < 2.5


def test_a_long_name_leaves_room_for_columns():
    photo, ids = PIL.Image.new("RGB", (640, 90)), np.arange(3).repeat(640 * 30).reshape(90, 640)
    short, long = (overlay(photo, ids, COLORS, [name, *NAMES[1:]]) for name in ("wall" * 6, "wall" * 60))
    assert abs(long.width - short.width) < 20 and abs(long.height - short.height) < 20


def test_a_contact_sheet_has_photo_truth_and_prediction_side_by_side():
    """Of two rows of 60 x 40 pixels shown at that size; the legend lists what occurs in any map, and nothing else."""
    first, second, black = (90, 20, 160), (20, 160, 90), (0, 0, 0)
    rows = [
        SheetRow("a", PIL.Image.new("RGB", (60, 40), first), np.full((40, 60), 0), np.full((40, 60), 2)),
        SheetRow("b", PIL.Image.new("RGB", (60, 40), second), np.full((40, 60), 2), np.full((40, 60), 255)),
    ]
    pixels = np.array(contact_sheet(rows, COLORS, NAMES, column_width=60))
    tops = []
    for color, truth, prediction in ((first, COLORS[0], COLORS[2]), (second, COLORS[2], black)):
        found_rows, found_columns = np.nonzero((pixels == color).all(axis=-1))
        assert len(found_rows) == 60 * 40 and found_columns.min() == 4
        tops.append(found_rows.min())
        for left, expected in ((4 + 64, truth), (4 + 128, prediction)):
            assert (pixels[tops[-1] : tops[-1] + 40, left : left + 60] == expected).all()
    assert tops[0] + 40 < tops[1]
    legend = {tuple(color) for color in pixels[tops[1] + 44 :].reshape(-1, 3).tolist()}
    assert {COLORS[0], COLORS[2], black} <= legend and COLORS[1] not in legend


def test_contact_sheets_refuse_what_does_not_fit():
    photo = PIL.Image.new("RGB", (3, 2))
    with pytest.raises(ValueError, match="no rows"):
        contact_sheet([], COLORS, NAMES)
    with pytest.raises(
        ValueError, match=r"street: got a photograph of \(2, 3\) and label maps of \(2, 3\) and \(3, 2\)"
    ):
        contact_sheet([SheetRow("street", photo, IDS, IDS.T)], COLORS, NAMES)
    with pytest.raises(ValueError, match="1 names and 3 colours"):
        contact_sheet([SheetRow("street", photo, IDS, IDS)], COLORS, NAMES[:1])


def test_shares_are_sorted_fractions_of_the_image():
    assert class_shares(IDS, NAMES) == [("sky", 0.5), ("wall", pytest.approx(1 / 3))]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: label_image(IDS, COLORS[:2]), r"Got 2 classes and the ids \[2\] beyond them"),
        (lambda: class_shares(IDS - 1, NAMES), r"the ids \[-1, 254\] beyond them"),
        (lambda: class_shares(IDS / 2, NAMES), "float64, needed integers"),
        (lambda: overlay(PIL.Image.new("RGB", (2, 3)), IDS, COLORS), r"\(2, 3\) for a photograph of \(3, 2\)"),
        (lambda: overlay(PIL.Image.new("RGB", (3, 2)), IDS, COLORS, alpha=2), "Got alpha=2, needed 0"),
        (lambda: overlay(PIL.Image.new("RGB", (3, 2)), IDS, COLORS, NAMES[:2]), "Got 2 names and 3 colours"),
        (lambda: label_image(IDS, COLORS * 90), "Got 270 classes, needed at most 255"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("bits", "expected"), [(8, [[0, 255, 64], [0, 255, 128]]), (16, [[0, 65535, 16384], [0, 65535, 32768]])]
)
def test_confidences_in_grey_files_keep_their_scale(bits, expected, tmp_path):
    """Fails if the file is stretched, wraps around beyond 0 and 1, or loses its 16 bits in the file."""
    confidence_image(torch.tensor([[0, 1, 0.25], [-0.1, 1.1, 0.5]]), bits).save(tmp_path / "confidence.png")
    assert np.array_equal(np.array(PIL.Image.open(tmp_path / "confidence.png")), expected)


def test_the_scale_of_confidences_is_perceptually_even():
    """By CIE L*a*b*, another measure than the one it is made by: lightness falls steadily, without plateaus."""
    step = 4
    shades = draw_confidence(np.linspace(0, 1, 256)[None].repeat(32, 0))
    row = np.array(shades)[0, :256:step] / 255
    linear = np.where(row <= 0.04045, row / 12.92, ((row + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    lightness = np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)
    assert lightness[0] > 90 and lightness[-1] < 15
    falls = -np.diff(lightness)
    assert falls.min() > 0 and falls.max() < 2 * np.median(falls)


def test_confidences_are_drawn_at_the_top_left_above_their_scale():
    values = np.zeros((200, 300), dtype=np.float32)
    values[50:, 100:] = 1
    picture = np.array(draw_confidence(values))
    assert picture.shape[0] > 200 and picture.shape[1:] == (300, 3)
    assert len(np.unique(picture[:200, :300].reshape(-1, 3), axis=0)) == 2
    assert (picture[:200, :300].sum(-1) > 400).sum() == (values == 0).sum()
    assert np.array(draw_confidence(np.ones((3, 5)))).shape[1] > 5  # the scale stays legible below tiny maps


def test_confidences_of_another_form_are_refused():
    with pytest.raises(ValueError, match=r"Got probabilities of shape \(1, 2, 3\), needed one a pixel"):
        confidence_image(np.zeros((1, 2, 3)))
    with pytest.raises(ValueError, match="Got bits=12, needed 8 or 16"):
        confidence_image(np.zeros((2, 3)), 12)
