"""Cases of tests/corpus: data sets."""

import json
from collections.abc import Iterator
from typing import Any

import PIL.Image

from .bases import DATA_SETS, encode, label_map
from .cases import BASES
from .corpus_cases import Case, refused, right


def data_sets() -> Iterator[Case]:
    for name in DATA_SETS:
        yield Case(f"data-sound-{name}", {}, {"kind": "data", "base": name}, right())

    def damaged(name: str, base: str, file: str, content: str | bytes, message: str, error: str = "ValueError") -> Case:
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        return Case(f"data-{base}-{name}", {file: data}, {"kind": "data", "base": base}, refused(message, error))

    path = "annotations/instances.json"
    coco = json.loads((BASES / "coco" / path).read_text())

    def annotation(**values: Any) -> str:
        content = json.loads(json.dumps(coco))
        content["annotations"][1] |= values
        return json.dumps(content)

    for name, values, message in (
        ("far-corner", {"segmentation": [[1, 1, 1e9, 1, 8, 8]]}, "numbers up to 131072"),
        ("nan-corner", {"segmentation": [[1, 1, float("nan"), 1, 8, 8]]}, "numbers up to 131072"),
        ("odd-numbers", {"segmentation": [[1, 1, 8, 1, 8, 8, 3]]}, "pairs of numbers"),
        ("two-corners", {"segmentation": [[1, 1, 8, 1]]}, "fewer than three points"),
        ("text-corner", {"segmentation": [["x"] * 6]}, "pairs of numbers"),
        ("no-outline", {"segmentation": []}, "has no outline"),
        ("category", {"category_id": 99}, "has the category 99"),
        ("runs-of-another-size", {"segmentation": {"size": [3, 3], "counts": [9]}}, "the photograph of (16, 24)"),
        ("negative-runs", {"segmentation": {"size": [16, 24], "counts": [-1, 385]}}, "no numbers of pixels"),
        ("too-few-runs", {"segmentation": {"size": [16, 24], "counts": [5, 5]}}, "run lengths of 10 pixels"),
        ("damaged-runs", {"segmentation": {"size": [16, 24], "counts": "\x00zz"}}, "no run lengths"),
        ("endless-runs", {"segmentation": {"size": [16, 24], "counts": "o" * 40}}, "no run lengths"),
        ("too-few-packed-runs", {"segmentation": {"size": [16, 24], "counts": "0`0"}}, "run lengths of 16 pixels"),
    ):
        yield damaged(name, "coco", path, annotation(**values), message)
    content = json.loads(json.dumps(coco))
    content["images"][0]["file_name"] = "../../outside.png"
    yield damaged("leads-outside", "coco", path, json.dumps(content), "there is no photograph")
    content["images"][0] |= {"file_name": "0.png", "height": 10**9, "width": 10**9}
    yield damaged("huge-image", "coco", path, json.dumps(content), "needed are at most 134217728")
    yield damaged(
        "boxes-only",
        "coco",
        path,
        json.dumps(coco | {"annotations": [{"id": 1, "bbox": [1, 2, 3, 4]}]}),
        "bounding boxes only",
    )
    yield damaged("brackets", "coco", path, "[" * 5000, "Found 0 columns that could be the label")
    shapes = json.loads((BASES / "labelme" / "0.json").read_text())
    for name, values, message in (
        (
            "text-point",
            {"shapes": [{"label": "cat", "points": [["a", 1]], "shape_type": "polygon"}]},
            "could not convert string",
        ),
        (
            "mask-of-noise",
            {"shapes": [{"label": "cat", "points": [[1, 2], [4, 5]], "shape_type": "mask", "mask": "!!"}]},
            "it is empty",
        ),
    ):
        yield damaged(name, "labelme", "0.json", json.dumps(shapes | values), message)
    entities = '<!ENTITY e0 "x">' + "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 10))
    xml = (BASES / "cvat" / "annotations.xml").read_text()
    for name, old, new, message in (
        ("run-beyond", 'rle="2,2"', 'rle="2,999999999"', "needed 2 x 2"),
        ("no-number", 'xtl="1"', 'xtl="one"', "could not convert string"),
        ("not-closed", "</annotations>", "", "Found no photographs with label maps"),
        (
            "entities",
            "<annotations>",
            f"<!DOCTYPE a [{entities}]><annotations>&e9;",
            "Found no photographs with label maps",
        ),
    ):
        yield damaged(name, "cvat", "annotations.xml", xml.replace(old, new, 1), message)
    for name, content, message in (
        ("absolute", '{"file_name": "/etc/passwd", "label_file_name": "m0.png"}', "must be a relative path"),
        ("missing", '{"file_name": "9.png", "label_file_name": "m0.png"}', "needed at least 3"),
        ("no-object", "[1, 2]", "The metadata in"),
        ("not-json", "{", "The metadata in"),
    ):
        yield damaged(name, "metadata", "metadata.jsonl", content, message)
    for name, content, message in (
        ("two-of-a-colour", "name,r,g,b\nsky,0,0,0\nroad,255,0,0\ntree,255,0,0\n", "to two classes"),
        ("no-colour", "name,r,g,b\nsky,0,0,0\nroad,255\n", "is shorter than its header"),
        ("colour-missing", "name,r,g,b\nsky,0,0,0\nroad,255,0,0\n", "1 of its colours are not in classes.csv"),
        ("beyond-255", "name,r,g,b\nsky,0,0,0\nroad,999,0,0\ntree,0,255,0\n", "three numbers from 0 to 255"),
    ):
        yield damaged(name, "colored", "classes.csv", content, message)
    yield damaged("names-not-utf8", "pairs", "classes.txt", b"sk\xff\nroad\ntree", "is not in UTF-8")
    yield damaged("escape-in-a-name", "pairs", "classes.txt", "sky\nro\x1b[2Jad\ntree", "control characters")
    yield damaged("name-missing", "pairs", "classes.txt", "sky\nroad", "Got label ids [2]")
    yield damaged(
        "map-of-other-ids",
        "pairs",
        "train/masks/0.png",
        encode(PIL.Image.fromarray(label_map() * 3), "PNG"),
        "Got label ids [3, 6, 253]",
    )
    yield damaged(
        "cut-map", "pairs", "train/masks/0.png", (BASES / "pairs/train/masks/0.png").read_bytes()[:50], "cannot be read"
    )
    yield damaged("unreadable-yaml", "hub", "README.md", "---\nid2label:\n  0: [\n---\n", "cannot be read; correct it")
    parquet = (BASES / "hub" / "data" / "train-00000-of-00001.parquet").read_bytes()
    yield damaged("cut", "hub", "data/train-00000-of-00001.parquet", parquet[:3000], "cannot be read")
    skipping = {"kind": "data", "base": "pairs", "skip": True}
    cut = {"train/images/0.png": (BASES / "pairs/train/images/0.png").read_bytes()[:200]}
    yield Case("data-pairs-left-out", cut, skipping, right(images={"train": 1, "validation": 2, "test": 1}))
    loop = {"kind": "data", "base": "pairs", "special": {"train/masks/0.png": "link:0.png"}}
    yield Case("data-pairs-loop", {}, loop, refused("Too many levels of symbolic links"))
    pipe = {"kind": "data", "base": "pairs", "special": {"train/images/0.png": "pipe"}}
    yield Case("data-pairs-pipe", {}, pipe, right(images={"train": 1, "validation": 2, "test": 1}))
