"""Label maps as COCO and GeoJSON, read back by pycocotools and by filling the polygons."""

import itertools
import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from depict_hf.formats import class_boxes, coco_file, geojson_file, polygons, run_lengths, signed_area

NAMES = ["sky", "road", "car"]


def random_map(seed: int, height: int = 23, width: int = 31) -> np.ndarray:
    """Blobs and single pixels, with holes in holes and pixels that touch at corners, and some without a class."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 3, (height // 4 + 1, width // 4 + 1)).repeat(4, axis=0).repeat(4, axis=1)
    ids = coarse[:height, :width].astype(np.uint8)
    noisy = rng.random(ids.shape) < 0.15
    ids[noisy] = rng.choice([0, 1, 2, 255], noisy.sum())
    return ids


def fill(rings, shape) -> np.ndarray:
    """Even-odd rule at the centres of the pixels, from the vertical sides alone."""
    crossings = np.zeros((shape[0], shape[1] + 1), dtype=int)
    for ring in rings:
        assert ring[0] == ring[-1]
        for (x, y), (next_x, next_y) in itertools.pairwise(ring):
            assert (x == next_x) != (y == next_y), "sides run along pixels, and no point stands on a straight line"
            if x == next_x:
                crossings[min(y, next_y) : max(y, next_y), x] += 1
    return crossings.cumsum(axis=1)[:, :-1] % 2 == 1


def components(mask: np.ndarray) -> int:
    """Areas of pixels that share sides, counted by flooding."""
    left, count = mask.copy(), 0
    while left.any():
        count += 1
        front = [tuple(np.argwhere(left)[0])]
        while front:
            row, column = front.pop()
            if 0 <= row < left.shape[0] and 0 <= column < left.shape[1] and left[row, column]:
                left[row, column] = False
                front += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    return count


@pytest.mark.parametrize("seed", range(10))
def test_polygons_give_back_the_label_map(seed):
    """Areas, holes and what touches at corners: each polygon alone is one connected area, and they do not overlap."""
    ids = random_map(seed)
    collection = json.loads(json.dumps(geojson_file(ids, NAMES)))
    drawn = np.full(ids.shape, 255)
    for feature in collection["features"]:
        rings, properties = feature["geometry"]["coordinates"], feature["properties"]
        mask = fill(rings, ids.shape)
        assert components(mask) == 1
        assert (drawn[mask] == 255).all()
        assert NAMES[properties["class_id"]] == properties["class"] and properties["area"] == mask.sum()
        assert [np.sign(signed_area(ring)) for ring in rings] == [1] + [-1] * (len(rings) - 1)
        drawn[mask] = properties["class_id"]
    assert np.array_equal(drawn, ids)


def test_a_ring_around_an_island_is_a_polygon_with_a_hole_and_another():
    mask = np.zeros((7, 7), bool)
    mask[1:6, 1:6] = True
    mask[2:5, 2:5] = False
    mask[3, 3] = True
    first, second = polygons(mask)
    assert [len(first), len(second)] == [2, 1]
    assert sorted(map(tuple, second[0][:-1])) == [(3, 3), (3, 4), (4, 3), (4, 4)]
    assert signed_area(first[0]) == 25 and signed_area(first[1]) == -9


@pytest.mark.parametrize("mask", [np.zeros((3, 4), bool), np.ones((3, 4), bool), np.eye(5, dtype=bool)])
def test_extreme_masks(mask):
    assert len(polygons(mask)) == components(mask)
    assert np.array_equal(coco_mask.decode(run_lengths(mask)), mask)


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_are_those_of_pycocotools(seed):
    """Long runs too, which need several characters each, and shrinking ones, whose differences are negative."""
    for mask in (random_map(seed) == 1, random_map(seed, 400, 300) == 0):
        expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert run_lengths(mask) == {"size": expected["size"], "counts": expected["counts"].decode()}


def test_coco_files_are_read_by_pycocotools(tmp_path):
    """Two of them joined, as for a folder of photographs."""
    maps = [random_map(seed) for seed in (1, 2)]
    files = [coco_file(ids, NAMES, f"{i}.jpg", i) for i, ids in enumerate(maps, 1)]
    joined = {key: files[0][key] + files[1][key] for key in ("images", "annotations")}
    (tmp_path / "all.json").write_text(json.dumps(joined | {"categories": files[0]["categories"]}))
    coco = COCO(str(tmp_path / "all.json"))
    assert len(coco.anns) == 6
    for image_id, ids in enumerate(maps, 1):
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[image_id])):
            mask = coco.annToMask(annotation)
            assert np.array_equal(mask, ids == annotation["category_id"])
            assert annotation["area"] == mask.sum()
            assert annotation["bbox"] == coco_mask.toBbox(annotation["segmentation"]).tolist()


def test_boxes_exclude_their_last_row_and_column():
    ids = np.full((5, 6), 255)
    ids[1:3, 2:5] = 1
    ids[4, 5] = 7
    assert class_boxes(ids, 3) == {1: (2, 1, 5, 3)}
