"""A user's own images: where splits and class names come from, in every arrangement of metadata."""

import json
from pathlib import Path

import pytest
from PIL import Image

from training.data.imagefolder import find_class_names, find_metadata, read_class_names
from training.data.loading import load_dataset_splits
from training.data.samples import SegmentationDataset

pytestmark = pytest.mark.usefixtures("datasets_cache")


def write_pair(folder: Path, name: str, value: int) -> dict[str, str]:
    """A photograph of one grey and a palette label map of one id, in `photos` and `maps`, and their line."""
    for each in ("photos", "maps"):
        (folder / each).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (value * 20,) * 3).save(folder / "photos" / f"{name}.png")
    label_map = Image.new("P", (6, 4), value)
    label_map.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    label_map.save(folder / "maps" / f"{name}.png")
    return {"file_name": f"photos/{name}.png", "label_file_name": f"maps/{name}.png"}


def write_metadata(folder: Path, rows: list[dict], name: str = "metadata.jsonl") -> None:
    if name.endswith(".csv"):
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n")


def values(splits, name: str) -> list[tuple[int, int]]:
    samples = SegmentationDataset(splits[name], 4)
    return [(int(sample["image"].unique()), int(sample["labels"].unique())) for sample in samples]


@pytest.mark.parametrize("metadata", ["metadata.jsonl", "metadata.csv"])
def test_splits_are_the_folders_with_metadata(tmp_path, metadata):
    """The words "test" and "training" in names of files and other folders say nothing."""
    for folder, ids in (("training", (0, 1)), ("val", (2,)), ("night", (3,))):
        rows = [write_pair(tmp_path / folder / "test_area", f"training_{value}", value) for value in ids]
        write_metadata(tmp_path / folder / "test_area", rows, metadata)
    splits = load_dataset_splits(tmp_path)
    assert splits.layout == "an imagefolder"
    assert {name: values(splits, name) for name in splits} == {
        "train": [(0, 0), (20, 1)],
        "validation": [(40, 2)],
        "night": [(60, 3)],
    }


def test_one_metadata_file_without_splits_is_the_train_split(tmp_path):
    rows = [write_pair(tmp_path, f"test_{value}", value) for value in (2, 1)]
    write_metadata(tmp_path, rows)
    splits = load_dataset_splits(tmp_path)
    assert list(splits) == ["train"]
    assert values(splits, "train") == [(40, 2), (20, 1)]


def test_one_metadata_file_whose_paths_begin_with_splits(tmp_path):
    rows = []
    for folder, value in (("train", 1), ("test", 2), ("train", 3)):
        row = write_pair(tmp_path / folder, str(value), value)
        rows.append({key: f"{folder}/{path}" for key, path in row.items()})
    write_metadata(tmp_path, rows)
    splits = load_dataset_splits(tmp_path)
    assert {name: values(splits, name) for name in splits} == {"train": [(20, 1), (60, 3)], "test": [(40, 2)]}
    write_metadata(tmp_path, [*rows, write_pair(tmp_path, "x", 0)])
    with pytest.raises(ValueError, match=r"1 of 4 paths do not begin with the name of a split, as .*x\.png"):
        load_dataset_splits(tmp_path)


def test_columns_named_by_two_file_names(tmp_path):
    row = write_pair(tmp_path, "a", 1)
    write_metadata(tmp_path, [{"image_file_name": row["file_name"], "mask_file_name": row["label_file_name"]}])
    assert values(load_dataset_splits(tmp_path), "train") == [(20, 1)]
    write_metadata(tmp_path, [{"file_name": row["file_name"], "label": row["label_file_name"]}])
    with pytest.raises(ValueError, match=r"0 columns that could be the label.*image, label.*end in _file_name"):
        SegmentationDataset(load_dataset_splits(tmp_path)["train"], 4)


def test_contradictory_metadata_is_refused(tmp_path):
    for folder in ("val", "dev"):
        row = write_pair(tmp_path / folder, "a", 1)
        write_metadata(tmp_path / folder, [row])
    with pytest.raises(ValueError, match=r"folders dev, val .*name the same split"):
        load_dataset_splits(tmp_path)
    write_metadata(tmp_path, [{"file_name": "val/photos/a.png"}])
    with pytest.raises(ValueError, match=r"metadata in .* and in its folders dev, val; keep either"):
        load_dataset_splits(tmp_path)


def test_broken_metadata_is_refused(tmp_path):
    write_pair(tmp_path, "a", 1)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "photos/a.png", \n')
    with pytest.raises(ValueError, match=r"The metadata in .* cannot be used; needed is a file_name.*JSON parse error"):
        load_dataset_splits(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"photo": "photos/a.png"}\n')
    with pytest.raises(ValueError, match=r"The metadata in .* cannot be used; needed is a file_name"):
        load_dataset_splits(tmp_path)


def test_folder_whose_readme_says_where_its_data_are_is_left_to_datasets(tmp_path):
    write_metadata(tmp_path, [write_pair(tmp_path, "a", 1)])
    assert find_metadata(tmp_path) == [tmp_path / "metadata.jsonl"]
    (tmp_path / "README.md").write_text("# Data\n---\nconfigs\n---\n")
    assert find_metadata(tmp_path) == [tmp_path / "metadata.jsonl"]
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n---\n# Data\n")
    assert find_metadata(tmp_path) == []


def test_class_names(tmp_path):
    assert find_class_names(tmp_path) is None
    (tmp_path / "classes.txt").write_text("road\n\nfence, wall \n")
    assert find_class_names(tmp_path) == ("road", "fence, wall")
    (tmp_path / "id2label.json").write_text('{"1": "fence, wall", "0": "road"}')
    assert find_class_names(tmp_path) == ("road", "fence, wall")
    (tmp_path / "id2label.json").write_text('["road", "sky"]')
    assert read_class_names(tmp_path / "id2label.json") == ("road", "sky")
    with pytest.raises(ValueError, match=r"id2label\.json and classes\.txt .* name different classes"):
        find_class_names(tmp_path)
    (tmp_path / "id2label.json").write_text('{"1": "road", "2": "sky"}')
    with pytest.raises(ValueError, match=r"has the ids \[1, 2\].*from 0 without a gap"):
        find_class_names(tmp_path)
    (tmp_path / "classes.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"classes\.txt has no names of classes"):
        read_class_names(tmp_path / "classes.txt")


def test_class_names_of_a_folder_go_with_its_splits(tmp_path):
    write_metadata(tmp_path, [write_pair(tmp_path, "a", 1)])
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    assert load_dataset_splits(tmp_path).class_names == ("a", "b", "c", "d")


def test_an_empty_metadata_file_is_refused(tmp_path):
    """For which `datasets` has an IndexError."""
    Image.new("RGB", (6, 4)).save(tmp_path / "1.png")
    (tmp_path / "metadata.jsonl").touch()
    with pytest.raises(ValueError, match=r"The metadata in .* cannot be used; needed is a file_name in each line"):
        load_dataset_splits(tmp_path)
