"""Small folders in every format that a user may bring: which files make a pair, and the values of their label maps."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from training.data.formats import voc
from training.data.loading import load_dataset_splits
from training.data.reading import LabelEncoding, UnreadableImageError
from training.data.samples import SegmentationDataset

ROWS = np.array([[0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2], [0, 0, 0, 0, 0, 0], [255, 1, 1, 1, 1, 2]], dtype=np.uint8)
COLORS = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 255: (224, 224, 192)}


pytestmark = pytest.mark.usefixtures("datasets_cache")


def photo(path: Path, grey: int = 0, size: tuple[int, int] = (6, 4)) -> None:
    """A photograph of one grey, (width, height) pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey,) * 3).save(path)


def mask(path: Path, ids: np.ndarray = ROWS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids).save(path)


def color_mask(path: Path, ids: np.ndarray = ROWS, mode: str = "RGB") -> None:
    """The same with colours instead of ids, or with a palette in an order of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((*ids.shape, 3), dtype=np.uint8)
    for index, color in COLORS.items():
        pixels[ids == index] = color
    image = Image.fromarray(pixels)
    (image if mode == "RGB" else image.convert("P", palette=Image.Palette.ADAPTIVE)).save(path)


def ids_of(splits, name: str = "train", num_labels: int = 3) -> list[np.ndarray]:
    encoding = splits.encoding or LabelEncoding.counted(num_labels)
    return [sample["labels"].numpy() for sample in SegmentationDataset(splits[name], num_labels, encoding=encoding)]


def names_of(splits) -> dict[str, list[str]]:
    """Photographs' names by split."""
    found = {}
    for name, split in splits.items():
        rows = split.select_columns("image").cast_column("image", datasets.Image(decode=False))
        found[name] = [Path(row["image"]["path"]).name for row in rows]
    return found


@pytest.mark.parametrize(
    ("photograph", "label_map"),
    [
        ("images/{}.jpg", "masks/{}.png"),
        ("Images/{}.JPG", "Labels/{}.png"),
        ("imgs/{}.jpeg", "annotations/{}.png"),
        ("photos/{}.png", "ground_truth/{}.png"),
        ("images/{}.jpg", "masks/{}_mask.png"),
        ("images/img_{}.jpg", "masks/mask_{}.png"),
        ("images/{}_sat.jpg", "gt/{}-gt.png"),
        ("images/jpg/{}.jpg", "SegmentationMasks/{}_label_map.png"),
        ("all/{}.jpg", "all/{}.png"),
        ("{}.jpg", "{}_mask.png"),
        ("{}.png", "{}_label.png"),
        ("{}.jpg", "masks/{}.png"),
        ("mine/2024/images/a/{}.jpg", "mine/2024/masks/a/{}.png"),
        ("images/{}.png", "labels/{}_P.png"),
        ("images/{}_left.png", "gt/{}.png"),
        ("images/{}.jpg", "annotations/trimaps/{}.png"),
    ],
)
def test_photographs_and_label_maps_find_each_other(tmp_path, photograph, label_map):
    for name, shift in (("10", 0), ("9", 1)):
        photo(tmp_path / photograph.format(name), 10 * shift)
        mask(tmp_path / label_map.format(name), np.roll(ROWS, shift))
    splits = load_dataset_splits(tmp_path)
    assert list(splits) == ["train"]
    assert [each["image"].unique().tolist() for each in SegmentationDataset(splits["train"], 3)] == [[0], [10]]
    for found, shift in zip(ids_of(splits), (0, 1), strict=True):
        assert np.array_equal(found, np.roll(ROWS, shift))


@pytest.mark.parametrize(
    ("photograph", "label_map"),
    [
        ("images/{}/1.jpg", "masks/{}/1.png"),
        ("{}/images/1.jpg", "{}/masks/1.png"),
        ("{}_images/1.jpg", "{}_masks/1.png"),
        ("images_{}/1.jpg", "labels_{}/1_gt.png"),
        ("{}/1.jpg", "{}/1_mask.png"),
        ("images/{}/1.jpg", "annotations/{}/1.png"),
    ],
)
def test_splits_are_folders_above_or_below(tmp_path, photograph, label_map):
    for shift, split in enumerate(("training", "val", "test")):
        photo(tmp_path / photograph.format(split))
        mask(tmp_path / label_map.format(split), np.roll(ROWS, shift))
    splits = load_dataset_splits(tmp_path)
    assert list(splits) == ["train", "validation", "test"]
    for shift, name in enumerate(splits):
        [found] = ids_of(splits, name)
        assert np.array_equal(found, np.roll(ROWS, shift))


def test_splits_of_photographs_hold_for_label_maps_without(tmp_path):
    for split, name in (("train", "a"), ("val", "b")):
        photo(tmp_path / "images" / split / f"{name}.jpg")
        mask(tmp_path / "masks" / f"{name}.png")
    assert names_of(load_dataset_splits(tmp_path)) == {"train": ["a.jpg"], "validation": ["b.jpg"]}
    photo(tmp_path / "images" / "c.jpg")
    mask(tmp_path / "masks" / "c.png")
    with pytest.raises(ValueError, match=r"1 of 3 photographs, such as images/c\.jpg, lie in no folder of a split"):
        load_dataset_splits(tmp_path)


def test_lists_of_names_are_splits_where_there_are_no_folders(tmp_path):
    for name in "abc":
        photo(tmp_path / "images" / f"{name}.jpg")
        mask(tmp_path / "masks" / f"{name}.png")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "train.txt").write_text("c\nimages/a.jpg\n")
    (tmp_path / "splits" / "val.txt").write_text("b\n")
    assert names_of(load_dataset_splits(tmp_path)) == {"train": ["a.jpg", "c.jpg"], "validation": ["b.jpg"]}
    # Lists that leave some out say nothing.
    (tmp_path / "splits" / "val.txt").write_text("")
    assert names_of(load_dataset_splits(tmp_path)) == {"train": ["a.jpg", "b.jpg", "c.jpg"]}


def test_files_without_a_counterpart_are_left_out_and_named(tmp_path):
    for name in "abc":
        photo(tmp_path / "images" / f"{name}.jpg")
    for name in "bcd":
        mask(tmp_path / "masks" / f"{name}.png")
    splits = load_dataset_splits(tmp_path)
    assert names_of(splits) == {"train": ["b.jpg", "c.jpg"]}
    assert splits.notes == (
        "1 files without a label map are left out: images/a.jpg",
        "1 files that are label maps without a photograph are left out: masks/d.png",
    )


def test_ambiguous_names_are_refused(tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    mask(tmp_path / "masks" / "b.png")
    with pytest.raises(ValueError, match=r"1 photographs, such as images/a\.jpg.*no two have the same name"):
        load_dataset_splits(tmp_path)
    mask(tmp_path / "masks" / "a.png")
    mask(tmp_path / "labels" / "a.png")
    with pytest.raises(ValueError, match=r"images/a\.jpg has 2 label maps, labels/a\.png and masks/a\.png"):
        load_dataset_splits(tmp_path)
    (tmp_path / "labels" / "a.png").unlink()
    photo(tmp_path / "images" / "a.png")
    with pytest.raises(ValueError, match=r"masks/a\.png could belong to images/a\.jpg and images/a\.png"):
        load_dataset_splits(tmp_path)


def test_unknown_folders_are_told_what_is_supported(tmp_path):
    photo(tmp_path / "stuff" / "a.jpg")
    (tmp_path / "stuff" / "notes.md").write_text("x")
    with pytest.raises(
        ValueError, match=r"(?s)It holds stuff/ \(1 \.jpg, 1 \.md\).*COCO.*The simplest: put photographs"
    ):
        load_dataset_splits(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="It holds no files"):
        load_dataset_splits(tmp_path / "empty")


TABLES = {
    "classes.csv": "name,r,g,b\nwall,0,0,0\ncrack,128,0,0\nmoss,0,128,0\nvoid,224,224,192\n",
    "class_dict.csv": "name, r, g, b\nwall, 0, 0, 0\ncrack, 128, 0, 0\nmoss, 0, 128, 0\nVoid, 224, 224, 192\n",
    "colors.csv": "id;color;label\n2;#008000;moss\n0;#000000;wall\n1;#800000;crack\n9;#e0e0c0;ignore\n",
    "colors.json": '{"wall": [0, 0, 0], "crack": [128, 0, 0], "moss": "#008000", "void": [224, 224, 192]}',
    "classes.json": '[{"name": "wall", "color": "#000000"}, {"name": "crack", "color": [128, 0, 0]},'
    ' {"name": "moss", "color": [0, 128, 0]}, {"name": "void", "color": "#E0E0C0"}]',
    "colormap.json": '{"#000000": "wall", "#800000": "crack", "#008000": "moss", "#e0e0c0": "void"}',
    "label_colors.txt": "0 0 0\t\twall\n128 0 0\tcrack\n0 128 0\tmoss\n224 224 192\tVoid\n",
    "labelmap.txt": "# label:color_rgb:parts:actions\n"
    "wall:0,0,0::\ncrack:128,0,0::\nmoss:0,128,0::\nvoid:224,224,192::\n",
    "classes.txt": "wall 0 0 0\ncrack 128 0 0\nmoss 0 128 0\nvoid 224 224 192\n",
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_colours_become_ids_by_a_table(tmp_path, table, mode):
    photo(tmp_path / "images" / "a.jpg")
    color_mask(tmp_path / "masks" / "a.png", mode=mode)
    (tmp_path / table).write_text(TABLES[table])
    splits = load_dataset_splits(tmp_path)
    assert splits.class_names == ("wall", "crack", "moss")
    assert np.array_equal(ids_of(splits)[0], ROWS)
    assert splits.layout.endswith(f"coloured as {table} says")
    # A mask that was painted anew is drawn anew.
    color_mask(tmp_path / "masks" / "a.png", ROWS[::-1].copy(), mode)
    assert np.array_equal(ids_of(load_dataset_splits(tmp_path))[0], ROWS[::-1])


def test_colours_become_ids_beside_metadata(tmp_path):
    photo(tmp_path / "train" / "a.jpg")
    color_mask(tmp_path / "train" / "a_mask.png")
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "a.jpg", "label_file_name": "a_mask.png"}\n')
    with pytest.raises(ValueError, match=r"hold colours, and no table says"):
        load_dataset_splits(tmp_path)
    (tmp_path / "classes.csv").write_text(TABLES["classes.csv"])
    splits = load_dataset_splits(tmp_path)
    assert splits.class_names == ("wall", "crack", "moss")
    assert np.array_equal(ids_of(splits)[0], ROWS)
    assert splits.layout == "an imagefolder, coloured as classes.csv says"


def test_a_table_names_the_classes_of_masks_that_hold_ids_already(tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    mask(tmp_path / "masks" / "a.png")
    (tmp_path / "classes.csv").write_text(TABLES["classes.csv"])
    splits = load_dataset_splits(tmp_path)
    assert splits.class_names == ("wall", "crack", "moss")
    assert np.array_equal(ids_of(splits)[0], ROWS)


def test_grey_levels_become_ids_by_a_table_of_greys(tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    mask(
        tmp_path / "masks" / "a.png", np.array([[0, 127, 255], [255, 0, 127]], dtype=np.uint8).repeat(2, 0).repeat(2, 1)
    )
    (tmp_path / "classes.csv").write_text("name,r,g,b\nwall,0,0,0\ncrack,127,127,127\nmoss,255,255,255\n")
    assert ids_of(load_dataset_splits(tmp_path))[0][::2, ::2].tolist() == [[0, 1, 2], [2, 0, 1]]


def test_colours_without_a_table_are_listed_with_the_file_to_write(tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    color_mask(tmp_path / "masks" / "a.png")
    with pytest.raises(ValueError) as raised:
        load_dataset_splits(tmp_path)
    message = str(raised.value)
    assert "#008000    0 128   0  20.83% of pixels" in message
    assert f"Write {tmp_path / 'classes.csv'} with these lines" in message
    # Written as the message says, with names filled in, it works.
    lines = message[message.index("  name,r,g,b") :].replace("  ", "")
    for number, name in enumerate(("wall", "crack", "moss", "void")):
        lines = lines.replace(f"NAME{number},", f"{name},")
    (tmp_path / "classes.csv").write_text(lines)
    splits = load_dataset_splits(tmp_path)
    assert np.array_equal(ids_of(splits)[0], ROWS)


def test_colours_beyond_the_table_and_transparency_are_refused_together(tmp_path):
    for name in "abc":
        photo(tmp_path / "images" / f"{name}.jpg")
        color_mask(tmp_path / "masks" / f"{name}.png")
    (tmp_path / "classes.csv").write_text("name,r,g,b\nwall,0,0,0\ncrack,128,0,0\nmoss,0,128,0\nvoid,224,224,192\n")
    Image.new("RGB", (6, 4), (1, 2, 3)).save(tmp_path / "masks" / "a.png")
    Image.new("RGBA", (6, 4), (0, 0, 0, 9)).save(tmp_path / "masks" / "c.png")
    with pytest.raises(ValueError) as raised:
        load_dataset_splits(tmp_path)
    lines = str(raised.value).splitlines()
    assert lines[0] == "2 of 3 label maps cannot be made:"
    assert "a.png: 1 of its colours are not in classes.csv: #010203 (100.0%)" in lines[1]
    assert "c.png: it is partly transparent" in lines[2]


def test_damaged_masks_are_left_to_the_check_of_all_files(tmp_path):
    for name in "ab":
        photo(tmp_path / "images" / f"{name}.jpg")
        color_mask(tmp_path / "masks" / f"{name}.png", np.random.default_rng(0).choice([0, 1, 2], (4, 6)))
    (tmp_path / "classes.csv").write_text(TABLES["classes.csv"])
    data = (tmp_path / "masks" / "b.png").read_bytes()
    (tmp_path / "masks" / "b.png").write_bytes(data[: len(data) * 3 // 4])
    samples = SegmentationDataset(load_dataset_splits(tmp_path)["train"], 3)
    assert samples[0]["labels"].shape == (4, 6)
    with pytest.raises(UnreadableImageError, match=r"label map .*masks/b\.png"):
        samples[1]


def test_masks_of_many_colours_are_no_label_maps(tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    mask(tmp_path / "masks" / "a.png", np.random.default_rng(0).integers(0, 256, (10, 10, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"(?s)hold 100 colours.*So many come from JPEG"):
        load_dataset_splits(tmp_path)


def test_grey_masks_of_three_channels_stay_ids(tmp_path):
    photo(tmp_path / "images" / "a.jpg", size=(6, 8))
    mask(tmp_path / "masks" / "a.png", np.stack([np.tile(ROWS, (2, 1))] * 3, axis=-1))
    assert np.array_equal(ids_of(load_dataset_splits(tmp_path))[0], np.tile(ROWS, (2, 1)))


def voc_folder(root: Path, names: list[str], **lists: list[str]) -> None:
    for shift, name in enumerate(names):
        photo(root / "JPEGImages" / f"{name}.jpg")
        image = Image.fromarray(np.roll(ROWS, shift), mode="P")
        image.putpalette([channel for index in range(256) for channel in COLORS.get(index, (9, 9, 9))])
        (root / "SegmentationClass").mkdir(exist_ok=True)
        image.save(root / "SegmentationClass" / f"{name}.png")
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split, listed in lists.items():
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(listed) + "\n")


def test_pascal_voc_splits_by_lists_and_ignores_borders(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    names = ["2007_000001", "2007_000002", "2007_000003"]
    photo(root / "JPEGImages" / "2007_000009.jpg")
    voc_folder(root, names, train=names[1:], val=names[:1], trainval=names, test=["2010_000001"])
    splits = load_dataset_splits(tmp_path)
    assert splits.layout.startswith("Pascal VOC")
    assert names_of(splits) == {"train": [f"{each}.jpg" for each in names[1:]], "validation": [f"{names[0]}.jpg"]}
    assert np.array_equal(ids_of(splits, "train")[1], np.roll(ROWS, 2))
    assert splits.suggested_names == voc.VOC_CLASSES and len(voc.VOC_CLASSES) == 21
    assert splits.notes == ("split test is left out, as none of its 1 label maps is there",)
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("2007_000001\n2007_000009\n")
    with pytest.raises(ValueError, match=r"of 2 photographs .* of split train, 1 are missing: 2007_000009"):
        load_dataset_splits(tmp_path)


def test_cvat_segmentation_masks_are_coloured_by_their_labelmap(tmp_path):
    voc_folder(tmp_path, ["a", "b"], default=["b"])
    for name in "ab":
        color_mask(tmp_path / "SegmentationClass" / f"{name}.png")
        color_mask(tmp_path / "SegmentationObject" / f"{name}.png")
    (tmp_path / "labelmap.txt").write_text(TABLES["labelmap.txt"].replace("void:224,224,192::\n", ""))
    splits = load_dataset_splits(tmp_path)
    assert splits.layout == "CVAT's segmentation masks"
    assert splits.class_names == ("wall", "crack", "moss")
    assert names_of(splits) == {"train": ["b.jpg"]}
    assert np.array_equal(ids_of(splits)[0], ROWS)
    for path in (tmp_path / "JPEGImages").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="holds no photographs in JPEGImages; export again with images saved"):
        load_dataset_splits(tmp_path)
