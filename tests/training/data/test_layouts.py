"""Tiny folders in each official layout: which files make a pair, and which classes their ids become."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from depict_hf.labels import class_names
from training.data.checks import label_encoding
from training.data.loading import load_dataset_splits
from training.data.samples import SegmentationDataset
from training.recipes import get_recipe


def write(path: Path, value: int, ids: list[int] | None = None) -> None:
    """A photograph, all of one grey, or a label map with `ids` in its first row and `value` elsewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((4, 6, 3) if ids is None else (4, 6), value, dtype=np.uint8)
    if ids is not None:
        pixels[0, : len(ids)] = ids
    Image.fromarray(pixels).save(path, quality=95) if path.suffix == ".jpg" else Image.fromarray(pixels).save(path)


def check(folder: Path, dataset: str, expected: dict[str, list[tuple[int, list[int]]]]) -> None:
    """Compare the grey of each photograph and the first row of its classes."""
    splits = load_dataset_splits(folder)
    names = class_names(dataset)
    assert splits.class_names == tuple(names)
    assert list(splits) == list(expected)
    for name, pairs in expected.items():
        samples = SegmentationDataset(splits[name], len(names), encoding=label_encoding(splits, names, False))
        found = [(int(sample["image"][0, 2, 2]), sample["labels"][0].tolist()) for sample in samples]
        assert found == pairs


def test_ade20k_ignores_zero_and_counts_from_one(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for folder, name, grey in (
        ("training", "ADE_train_2", 20),
        ("training", "ADE_train_1", 10),
        ("validation", "v", 30),
    ):
        write(root / "images" / folder / f"{name}.jpg", grey)
        write(root / "annotations" / folder / f"{name}.png", grey, [0, 1, 2, 150, 255])
    expected = {
        "train": [(10, [255, 0, 1, 149, 255, 9]), (20, [255, 0, 1, 149, 255, 19])],
        "validation": [(30, [255, 0, 1, 149, 255, 29])],
    }
    check(tmp_path, "ade20k", expected)
    check(root, "ade20k", expected)
    splits = load_dataset_splits(root)
    # The recipes say the same of ADE20K, so both may be said.
    assert label_encoding(splits, class_names("ade20k"), True) == label_encoding(splits, class_names("ade20k"), False)
    write(root / "annotations" / "validation" / "v.png", 30, [151])
    samples = SegmentationDataset(splits["validation"], 150, encoding=splits.encoding)
    with pytest.raises(ValueError, match=r"v.jpg\): Got label ids \[151\], needed 1 to 150, or 0 and 255 \(ignored\)"):
        samples[0]


def cityscapes(root: Path, kind: str, ids: list[int], fill: int) -> None:
    for folder, city, grey in (("train", "aachen", 10), ("train", "bochum", 20), ("val", "ulm", 30)):
        name = f"{city}_000000_000019"
        write(root / "leftImg8bit" / folder / city / f"{name}_leftImg8bit.png", grey)
        write(root / "gtFine" / folder / city / f"{name}_gtFine_{kind}.png", fill, ids)
        write(root / "gtFine" / folder / city / f"{name}_gtFine_color.png", 77)
    write(root / "leftImg8bit" / "test" / "bonn" / "bonn_000000_000019_leftImg8bit.png", 40)


def test_cityscapes_label_ids_become_train_ids(tmp_path):
    cityscapes(tmp_path, "labelIds", [0, 6, 7, 11, 29, 33], 26)
    row = [255, 255, 0, 2, 255, 18]
    check(tmp_path, "cityscapes", {"train": [(10, row), (20, row)], "validation": [(30, row)]})
    splits = load_dataset_splits(tmp_path)
    samples = SegmentationDataset(splits["train"], 19, encoding=splits.encoding)
    assert samples[0]["labels"][1].tolist() == [13] * 6
    with pytest.raises(ValueError, match="Got reduce_labels for Cityscapes"):
        label_encoding(splits, class_names("cityscapes"), True)
    # Of each official id, its train id (34 ids, -1 for license plates is not stored in label maps).
    official = [255] * 7 + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    official += [255, 255, 16, 17, 18]
    assert splits.encoding.decode(np.arange(34)).tolist() == official


def test_cityscapes_train_ids_are_used_as_they_are_where_there_are_no_label_ids(tmp_path):
    cityscapes(tmp_path, "labelTrainIds", [255, 0, 18], 13)
    row = [255, 0, 18, 13, 13, 13]
    check(tmp_path, "cityscapes", {"train": [(10, row), (20, row)], "validation": [(30, row)]})


def test_pascal_context_keeps_its_ids_and_splits_by_lists(tmp_path):
    root = tmp_path / "VOC2010"
    for name, grey in (("2008_000002", 10), ("2008_000003", 20), ("2008_000007", 30), ("2008_000008", 40)):
        write(root / "JPEGImages" / f"{name}.jpg", grey)
        if grey < 40:
            write(root / "SegmentationClassContext" / f"{name}.png", grey, [0, 1, 59, 255])
    lists = root / "ImageSets" / "SegmentationContext"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2008_000003\n2008_000002\n")
    (lists / "val.txt").write_text("2008_000007\n")
    row = [0, 1, 59, 255]
    expected = {
        "train": [(10, [*row, 10, 10]), (20, [*row, 20, 20])],
        "validation": [(30, [*row, 30, 30])],
    }
    check(tmp_path, "pascal_context", expected)
    (lists / "val.txt").write_text("2008_000007\n2008_000008\n")
    with pytest.raises(ValueError, match=r"Pascal Context, but is incomplete.*1 of 2 label maps.*2008_000008"):
        load_dataset_splits(tmp_path)
    (lists / "val.txt").unlink()
    with pytest.raises(ValueError, match=r"Found no .*val\.txt, which says what belongs to the validation split"):
        load_dataset_splits(tmp_path)


@pytest.mark.parametrize("first_version", [True, False])
def test_camvid_ignores_its_twelfth_id(tmp_path, first_version):
    for folder, grey in (("train", 10), ("val", 20), ("test", 30)):
        names = (f"{folder}_00001", f"{folder}annot_00001") if first_version else ("0001TP_006690",) * 2
        write(tmp_path / folder / f"{names[0]}.png", grey)
        write(tmp_path / f"{folder}annot" / f"{names[1]}.png", 3, [0, 10, 11])
    row = [0, 10, 255, 3, 3, 3]
    check(tmp_path, "camvid", {"train": [(10, row)], "validation": [(20, row)], "test": [(30, row)]})


def test_incomplete_and_ambiguous_folders_are_refused(tmp_path):
    write(tmp_path / "images" / "training" / "ADE_a.jpg", 1)
    write(tmp_path / "images" / "training" / "ADE_b.jpg", 1)
    write(tmp_path / "annotations" / "training" / "ADE_a.png", 1, [1])
    with pytest.raises(ValueError, match=r"ADE20K.*incomplete\. Found 1 of 2 label maps in .*training; missing.*_b\."):
        load_dataset_splits(tmp_path)
    write(tmp_path / "annotations" / "training" / "ADE_b.png", 1, [1])
    assert len(load_dataset_splits(tmp_path)["train"]) == 2
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "images/training/ADE_a.jpg"}\n')
    with pytest.raises(ValueError, match=r"looks like ADE20K.*but also holds metadata.jsonl"):
        load_dataset_splits(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "trainannot").mkdir()
    with pytest.raises(ValueError, match=r"folders of ADE20K .* and of CamVid"):
        load_dataset_splits(tmp_path)


def test_empty_folders_of_a_layout_are_refused(tmp_path):
    (tmp_path / "gtFine" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"looks like Cityscapes .*but holds no photographs with label maps"):
        load_dataset_splits(tmp_path)


@pytest.mark.parametrize("recipe", ["ade20k_vit_tiny_sa", "cityscapes_vit_large_sa", "pascal_context_vit_large_sa"])
def test_rows_of_the_paper_end_with_the_validation_split(recipe):
    """The only labelled one beside the training split in all three layouts."""
    splits = (
        get_recipe(recipe).data.train_split,
        get_recipe(recipe).data.validation_split,
        get_recipe(recipe).data.test_split,
    )
    assert splits == ("train", "validation", "validation")


def test_fingerprint_changes_with_a_file(tmp_path):
    for folder in ("train", "val"):
        write(tmp_path / folder / "a.png", 1)
        write(tmp_path / f"{folder}annot" / "a.png", 3, [0])
    splits = load_dataset_splits(tmp_path)
    first, same = (SegmentationDataset(splits["train"], 11, encoding=splits.encoding).fingerprint for _ in range(2))
    other_ids = SegmentationDataset(splits["train"], 11).fingerprint
    write(tmp_path / "trainannot" / "a.png", 3, [0, 1, 2, 3, 4])
    changed = SegmentationDataset(splits["train"], 11, encoding=splits.encoding).fingerprint
    assert first == same
    assert len({first, other_ids, changed}) == 3
