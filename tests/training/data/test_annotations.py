"""COCO, LabelMe and CVAT: label maps that are drawn, compared pixel by pixel, and what is left out or refused."""

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.formats.shapes import inside_circle, inside_polygon, inside_rectangle, place_mask
from training.data.loading import load_dataset_splits
from training.data.samples import SegmentationDataset

pytestmark = pytest.mark.usefixtures("datasets_cache")


def photo(path: Path, grey: int = 0) -> None:
    """Six by four pixels of one grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (grey,) * 3).save(path)


def png(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def maps_of(splits, name: str = "train") -> list[list[list[int]]]:
    samples = SegmentationDataset(splits[name], len(splits.class_names), encoding=splits.encoding)
    return [sample["labels"].tolist() for sample in samples]


def greys_of(splits, name: str = "train") -> list[int]:
    return [int(sample["image"][0, 0, 0]) for sample in SegmentationDataset(splits[name], 255)]


def test_pixels_belong_to_the_shape_that_holds_their_centre():
    square = inside_polygon([(1, 0), (3, 0), (3, 2), (1, 2)], 4, 6)
    assert square.astype(int).tolist() == [[0, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0] * 6, [0] * 6]
    # Reversed, beyond the picture, and with a hole where it overlaps itself.
    assert np.array_equal(inside_polygon([(1, 2), (3, 2), (3, 0), (1, 0)], 4, 6), square)
    assert inside_polygon([(-9, -9), (2.4, -9), (2.4, 99), (-9, 99)], 4, 6).sum(axis=0).tolist() == [4, 4, 0, 0, 0, 0]
    triangle = inside_polygon([(0, 0), (4, 0), (0, 4)], 4, 4)
    assert triangle.sum(axis=1).tolist() == [3, 2, 1, 0] or triangle.sum(axis=1).tolist() == [4, 3, 2, 1]
    ring = [(0, 0), (6, 0), (6, 4), (0, 4), (0, 0), (1, 1), (5, 1), (5, 3), (1, 3), (1, 1)]
    assert inside_polygon(ring, 4, 6).astype(int).tolist() == [[1] * 6, [1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 1], [1] * 6]
    assert np.array_equal(inside_rectangle([(3, 2), (1, 0)], 4, 6), square)
    # A quarter turn about the centre (3, 2): 4 x 2 pixels become 2 x 4.
    assert inside_rectangle([(1, 1), (5, 3)], 4, 6, 90).astype(int).tolist() == [[0, 0, 1, 1, 0, 0]] * 4
    circle = inside_circle((2, 2), (3.6, 2), 4, 6)
    assert circle.astype(int).tolist() == [
        [0, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 0, 0],
    ]
    placed = place_mask(np.ones((2, 3), dtype=bool), 4, -1, 4, 6)
    assert placed.astype(int).tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6, [0] * 6, [0] * 6]


def coco(images: list[str], annotations: list[dict], categories: dict[int, str]) -> dict:
    return {
        "images": [{"id": 10 + index, "file_name": name, "height": 4, "width": 6} for index, name in enumerate(images)],
        "annotations": [{"id": index, **each} for index, each in enumerate(annotations)],
        "categories": [{"id": key, "name": name} for key, name in categories.items()],
    }


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


SMALL = [[1, 1, 3, 1, 3, 3, 1, 3]]
LARGE = [[0, 0, 5, 0, 5, 4, 0, 4]]
# Columns first: outside 20 pixels, the last column inside.
LAST_COLUMN = {"size": [4, 6], "counts": [20, 4]}


def test_coco_draws_small_objects_over_large_ones_and_crowds_below(tmp_path):
    annotations = [
        {"image_id": 10, "category_id": 7, "segmentation": SMALL, "iscrowd": 0},
        {"image_id": 10, "category_id": 3, "segmentation": LARGE, "iscrowd": 0},
        {"image_id": 10, "category_id": 7, "segmentation": {"size": [4, 6], "counts": [16, 8]}, "iscrowd": 1},
    ]
    write(
        tmp_path / "annotations" / "instances_train2017.json",
        coco(["a.jpg", "b.jpg"], annotations, {7: "cat", 3: "sofa"}),
    )
    # Another task's file and boxes of people are not read.
    write(tmp_path / "annotations" / "captions_train2017.json", coco(["a.jpg"], [{"image_id": 10, "caption": "x"}], {}))
    for grey, name in enumerate("ab"):
        photo(tmp_path / "train2017" / f"{name}.jpg", 20 * grey)
    splits = load_dataset_splits(tmp_path)
    assert splits.layout == "COCO polygons or run lengths (annotations/instances_train2017.json)"
    assert splits.class_names == ("background", "sofa", "cat")
    row = [1, 1, 1, 1, 1, 2]
    assert maps_of(splits)[0] == [row, [1, 2, 2, 1, 1, 2], [1, 2, 2, 1, 1, 2], row]
    assert maps_of(splits)[1] == [[0] * 6] * 4
    assert greys_of(splits) == [0, 20]
    assert "1 photographs without any object are wholly background" in splits.notes


def test_coco_splits_by_names_of_files_or_folders_and_run_lengths(tmp_path):
    import pycocotools.mask

    compressed = pycocotools.mask.frPyObjects(LAST_COLUMN, 4, 6)
    text = {"size": [4, 6], "counts": compressed["counts"].decode()}
    for split, shape in (("train", LAST_COLUMN), ("valid", text)):
        annotation = {"image_id": 10, "category_id": 0, "segmentation": shape, "iscrowd": 0}
        content = coco(["a.jpg"], [annotation], {0: "leaf", 5: "background"})
        write(tmp_path / split / "_annotations.coco.json", content)
        photo(tmp_path / split / "a.jpg", {"train": 20, "valid": 40}[split])
    splits = load_dataset_splits(tmp_path)
    # A category that is called so is the background.
    assert splits.class_names == ("background", "leaf")
    for name, grey in (("train", 20), ("validation", 40)):
        assert maps_of(splits, name) == [[[0, 0, 0, 0, 0, 1]] * 4]
        assert greys_of(splits, name) == [grey]


def test_coco_panoptic_ignores_what_has_no_segment(tmp_path):
    ids = np.array([[0, 1, 1, 256, 256, 70000]] * 4)
    pixels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    segments = [{"id": 1, "category_id": 2}, {"id": 256, "category_id": 1}, {"id": 70000, "category_id": 2}]
    for split in ("train", "val"):
        annotation = {"image_id": 10, "file_name": "a.png", "segments_info": segments}
        content = coco(["a.jpg"], [], {1: "road", 2: "sky"}) | {"annotations": [annotation]}
        write(tmp_path / "annotations" / f"panoptic_{split}.json", content)
        # Instances of the same split say less.
        instances = coco(["a.jpg"], [{"image_id": 10, "category_id": 1, "segmentation": SMALL}], {1: "road", 2: "sky"})
        write(tmp_path / "annotations" / f"instances_{split}.json", instances)
        path = tmp_path / "annotations" / f"panoptic_{split}" / "a.png"
        path.parent.mkdir()
        Image.fromarray(pixels).save(path)
        photo(tmp_path / split / "a.jpg", 20)
    splits = load_dataset_splits(tmp_path)
    assert splits.layout.startswith("COCO panoptic")
    assert list(splits) == ["train", "validation"]
    assert splits.class_names == ("road", "sky")
    assert maps_of(splits, "validation") == [[[255, 1, 1, 0, 0, 1]] * 4]
    pixels[0, 0] = 9
    Image.fromarray(pixels).save(tmp_path / "annotations" / "panoptic_val" / "a.png")
    with pytest.raises(ValueError, match=r"(?s)1 of 2 label maps cannot be made.*segments \[592137\] are not listed"):
        load_dataset_splits(tmp_path)


def test_coco_faults_are_reported_together(tmp_path):
    annotations = [
        {"image_id": 10, "category_id": 1, "segmentation": [[1, 1, 2, 2]]},
        {"image_id": 11, "category_id": 9, "segmentation": SMALL},
        {"image_id": 12, "category_id": 1, "segmentation": {"size": [6, 4], "counts": [24]}},
    ]
    write(tmp_path / "labels.json", coco(["a.jpg", "b.jpg", "c.jpg"], annotations, {1: "leaf"}))
    for name in "ab":
        photo(tmp_path / "images" / f"{name}.jpg")
    with pytest.raises(ValueError, match=r"(?s)names 1 photographs of 3 wrongly:.*there is no photograph c\.jpg"):
        load_dataset_splits(tmp_path)
    photo(tmp_path / "images" / "c.jpg")
    with pytest.raises(ValueError) as raised:
        load_dataset_splits(tmp_path)
    lines = str(raised.value).splitlines()
    assert lines[0] == "3 of 3 label maps cannot be made:"
    assert "a.jpg: annotation 0 has a polygon of fewer than three points" in lines[1]
    assert "b.jpg: annotation 1 has the category 9, which the file does not name" in lines[2]
    assert "c.jpg: annotation 2 is of (6, 4), the photograph of (4, 6)" in lines[3]
    write(
        tmp_path / "labels.json", coco(["a.jpg"], [{"image_id": 10, "category_id": 1, "bbox": [0, 0, 1, 1]}], {1: "x"})
    )
    with pytest.raises(ValueError, match="COCO file with bounding boxes only"):
        load_dataset_splits(tmp_path)


def test_coco_without_pycocotools_says_what_to_install(tmp_path, monkeypatch):
    write(tmp_path / "a.json", coco(["a.jpg"], [{"image_id": 10, "category_id": 1, "segmentation": SMALL}], {1: "x"}))
    photo(tmp_path / "a.jpg")
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(ImportError, match=r"a\.json holds COCO annotations.*pip install pycocotools"):
        load_dataset_splits(tmp_path)


def test_label_maps_are_drawn_once_for_each_state_of_the_annotations(tmp_path, datasets_cache):
    path = tmp_path / "a.json"
    write(path, coco(["a.jpg"], [{"image_id": 10, "category_id": 1, "segmentation": SMALL}], {1: "x"}))
    photo(tmp_path / "a.jpg")
    first = maps_of(load_dataset_splits(tmp_path))
    [drawn] = datasets_cache.rglob("depict_label_maps/*/*.png")
    changed = drawn.stat().st_mtime_ns
    load_dataset_splits(tmp_path)
    assert drawn.stat().st_mtime_ns == changed
    write(path, coco(["a.jpg"], [{"image_id": 10, "category_id": 1, "segmentation": LARGE}], {1: "x"}))
    assert maps_of(load_dataset_splits(tmp_path)) != first


def shape(label: str, points: list, kind: str = "polygon", **more) -> dict:
    return {"label": label, "points": points, "shape_type": kind, **more}


def labelme(path: Path, shapes: list[dict], **more) -> None:
    content = {"version": "5.2.1", "flags": {}, "shapes": shapes, "imagePath": f"{path.stem}.jpg", "imageData": None}
    write(path, content | {"imageHeight": 4, "imageWidth": 6} | more)


BOTTOM = [[0, 2], [6, 2], [6, 4], [0, 4]]


def test_labelme_draws_shapes_in_their_order(tmp_path):
    mask = png(np.array([[255, 0], [0, 255]], dtype=np.uint8))
    shapes = [
        shape("road", BOTTOM),
        shape("car", [[1, 1], [3, 3]], "rectangle"),
        shape("__ignore__", [[5.5, 0.5], [5.9, 0.5]], "circle"),
        shape("bike", [[4, 2], [5, 3]], "mask", mask=mask),
        shape("wire", [[0, 0], [6, 0]], "line"),
    ]
    labelme(tmp_path / "a.json", shapes)
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "b.jpg")
    splits = load_dataset_splits(tmp_path)
    assert splits.layout == "LabelMe (1 JSON files)"
    assert splits.class_names == ("background", "bike", "car", "road")
    assert maps_of(splits) == [[[0, 0, 0, 0, 0, 255], [0, 2, 2, 0, 0, 0], [3, 2, 2, 3, 1, 3], [3, 3, 3, 3, 3, 1]]]
    assert "1 shapes of type line have no area and are left out" in splits.notes
    assert "1 photographs without a JSON file are left out: b.jpg" in splits.notes
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\nroad\ncar\nbike\n")
    assert load_dataset_splits(tmp_path).class_names == ("_background_", "road", "car", "bike")
    (tmp_path / "labels.txt").write_text("_background_\nroad\n")
    with pytest.raises(ValueError, match="are called bike, car, which the file of class names there does not list"):
        load_dataset_splits(tmp_path)


def test_labelme_finds_photographs_beside_elsewhere_or_inside(tmp_path):
    photo(tmp_path / "train" / "images" / "a.jpg", 20)
    labelme(tmp_path / "train" / "labels" / "a.json", [shape("road", BOTTOM)], imagePath="..\\images\\a.jpg")
    inside = png(np.full((4, 6, 3), 60, dtype=np.uint8))
    labelme(tmp_path / "test" / "b.json", [shape("road", BOTTOM)], imageData=inside, imagePath="gone.jpg")
    splits = load_dataset_splits(tmp_path)
    assert (greys_of(splits, "train"), greys_of(splits, "test")) == ([20], [60])
    assert maps_of(splits, "test") == [[[0] * 6, [0] * 6, [1] * 6, [1] * 6]]
    labelme(tmp_path / "test" / "c.json", [shape("road", BOTTOM)], imagePath="lost.jpg")
    labelme(tmp_path / "test" / "d.json", [shape("road", BOTTOM)], imageData="AAAA", imagePath="lost.jpg")
    with pytest.raises(
        ValueError, match=r"(?s)2 of 4 LabelMe.*c\.json: there is no photograph lost.*its imageData is no"
    ):
        load_dataset_splits(tmp_path)


CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta><job><labels>
    <label><name>road</name><color>#ff0000</color></label><label><name>car</name></label><label><name>sky</name></label>
  </labels></job></meta>
  <image id="0" name="day/a.jpg" width="6" height="4"{subset}>
    <polygon label="car" points="1,1;3,1;3,3;1,3" z_order="1"/>
    <polygon label="road" points="0.0,2.0;6.0,2.0;6.0,4.0;0.0,4.0" z_order="0"/>
    <mask label="sky" rle="1, 2, 1" left="4" top="0" width="2" height="2" z_order="0"/>
    <box label="car" xtl="4" ytl="3" xbr="5" ybr="4" z_order="0"/>
    <polyline label="car" points="1,1;3,1" z_order="0"/>
    <tag label="sky"/>
  </image>
  <image id="1" name="b.jpg" width="6" height="4"{other}/>
</annotations>
"""


def test_cvat_draws_by_depth(tmp_path):
    (tmp_path / "annotations.xml").write_text(CVAT.format(subset="", other=""))
    photo(tmp_path / "images" / "day" / "a.jpg", 20)
    photo(tmp_path / "images" / "b.jpg", 40)
    splits = load_dataset_splits(tmp_path)
    assert splits.layout == "CVAT for images (annotations.xml)"
    assert splits.class_names == ("background", "road", "car", "sky")
    first, second = maps_of(splits)
    assert first == [[0, 0, 0, 0, 0, 3], [0, 2, 2, 0, 3, 0], [1, 2, 2, 1, 1, 1], [1, 1, 1, 1, 2, 1]]
    assert second == [[0] * 6] * 4
    assert greys_of(splits) == [20, 40]
    assert "1 shapes of type polyline have no area and are left out" in splits.notes
    (tmp_path / "annotations.xml").write_text(CVAT.format(subset=' subset="Train"', other=' subset="Validation"'))
    assert [greys_of(load_dataset_splits(tmp_path), name) for name in ("train", "validation")] == [[20], [40]]
    (tmp_path / "annotations.xml").write_text(CVAT.format(subset=' subset="Train"', other=""))
    with pytest.raises(ValueError, match=r"1 photographs, such as .*b\.jpg, are in no subset"):
        load_dataset_splits(tmp_path)
    (tmp_path / "annotations.xml").write_text(CVAT.format(subset="", other="").replace("1, 2, 1", "1, 2"))
    with pytest.raises(ValueError, match=r"\(mask sky\) cannot be drawn: its run lengths give 3 pixels, needed 2 x 2"):
        load_dataset_splits(tmp_path)


def test_several_layouts_at_once_are_refused(tmp_path):
    (tmp_path / "annotations.xml").write_text(CVAT.format(subset="", other=""))
    photo(tmp_path / "images" / "day" / "a.jpg")
    photo(tmp_path / "images" / "b.jpg")
    labelme(tmp_path / "images" / "b.json", [shape("road", BOTTOM)])
    with pytest.raises(ValueError, match=r"several layouts: CVAT for images \(annotations\.xml\) and LabelMe"):
        load_dataset_splits(tmp_path)
