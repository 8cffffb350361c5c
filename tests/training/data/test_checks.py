"""All faults of a dataset are reported by name before anything is computed, and what is left out is said."""

import io
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from training import train
from training.data import inspection
from training.data.checks import describe_classes, inspect_samples, label_encoding, open_samples
from training.data.layouts import Splits
from training.data.loading import load_dataset_splits
from training.data.reading import UnreadableImageError
from training.data.samples import SegmentationDataset, count_pixels

NAMES = ("road", "car", "sky")
IMAGE = datasets.Image()


pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def folder(tmp_path) -> Path:
    """An imagefolder of six palette pairs: id 2 fills map 0, id 1 the top row of the others; their last row is 255."""
    for split, count in (("train", 6), ("validation", 2)):
        (tmp_path / split).mkdir()
        rows = []
        for index in range(count):
            ids = np.zeros((4, 6), dtype=np.uint8)
            ids[0] = 1
            ids[-1] = 255
            if index == 0:
                ids[:] = 2
            label_map = Image.fromarray(ids, mode="P")
            label_map.putpalette(list(range(256)) * 3)
            label_map.save(tmp_path / split / f"{index}_labels.png")
            photo = np.random.default_rng(index).integers(0, 256, (4, 6, 3), dtype=np.uint8)
            Image.fromarray(photo).save(tmp_path / split / f"{index}.jpg")
            rows.append(f'{{"file_name": "{index}.jpg", "label_file_name": "{index}_labels.png"}}\n')
        (tmp_path / split / "metadata.jsonl").write_text("".join(rows))
    return tmp_path


def halve(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])


def test_sound_data_are_counted(folder, capsys):
    samples = open_samples(load_dataset_splits(folder), "train", NAMES)
    expected = [5 * 12, 5 * 6, 24]
    assert samples.pixels.tolist() == expected
    assert count_pixels(samples).tolist() == expected
    assert count_pixels(SegmentationDataset(samples.dataset, 3)).tolist() == expected
    assert capsys.readouterr().out == "Split train: 6 of 6 images, 20.8% of pixels ignored\n"


@pytest.mark.parametrize("workers", [0, 2])
def test_all_unreadable_files_are_named_and_can_be_left_out(folder, capsys, workers):
    halve(folder / "train" / "1.jpg")
    halve(folder / "train" / "4_labels.png")
    (folder / "train" / "3.jpg").write_bytes(b"")
    (folder / "train" / "5.jpg").unlink()
    splits = load_dataset_splits(folder)
    with pytest.raises(ValueError) as raised:
        open_samples(splits, "train", NAMES, num_workers=workers)
    lines = str(raised.value).splitlines()
    assert lines[0] == "4 of 6 images of split train cannot be read:"
    for line, index, words in (
        (lines[1], 1, f"photograph {folder / 'train' / '1.jpg'}: "),
        (lines[2], 3, f"photograph {folder / 'train' / '3.jpg'}: it is empty, an image file was needed"),
        (lines[3], 4, f"label map {folder / 'train' / '4_labels.png'}: "),
        (lines[4], 5, f"photograph {folder / 'train' / '5.jpg'}: there is no such file"),
    ):
        assert line.startswith(f"  image {index}: {words}")
    assert "skip_unreadable=true" in lines[5]
    assert capsys.readouterr().out == ""

    samples = open_samples(splits, "train", NAMES, skip_unreadable=True, num_workers=workers)
    assert len(samples) == 2
    assert samples.left_out == tuple(str(folder / "train" / f"{index}.jpg") for index in (1, 3, 4, 5))
    assert [samples[index]["labels"][0, 0].item() for index in range(2)] == [2, 1]
    assert samples.pixels.tolist() == [12, 6, 24]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("Split train: 2 of 6 images")
    assert [line[: len("  left out: image 1")] for line in printed[1:]] == [
        f"  left out: image {index}" for index in (1, 3, 4, 5)
    ]


def test_wrong_label_maps_are_refused_even_if_unreadable_ones_are_left_out(folder):
    halve(folder / "train" / "1.jpg")
    Image.fromarray(np.full((4, 6), 3, dtype=np.uint8)).save(folder / "train" / "2_labels.png")
    Image.fromarray(np.zeros((6, 4), dtype=np.uint8)).save(folder / "train" / "3_labels.png")
    colours = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(colours).save(folder / "train" / "4_labels.png")
    with pytest.raises(ValueError) as raised:
        open_samples(load_dataset_splits(folder), "train", NAMES, skip_unreadable=True)
    lines = str(raised.value).splitlines()
    assert lines[0] == "3 of 6 label maps of split train do not suit:"
    assert "Image 2 of split train" in lines[1]
    assert "2.jpg): Got label ids [3], needed 0 to 2, or 255 (ignored)" in lines[1]
    assert "3.jpg): Got a segmentation map of size (6, 4) for an image of size (4, 6)" in lines[2]
    assert "4.jpg): Got a segmentation map of shape (3, 4, 6) with channels that differ" in lines[3]
    with pytest.raises(ValueError, match=r"(?s)1 of 6 images .* cannot be read.*3 of 6 label maps"):
        open_samples(load_dataset_splits(folder), "train", NAMES)


def test_data_are_read_once_for_each_of_their_states(folder, monkeypatch):
    readings = []

    def count(samples, num_workers):
        readings.append(len(samples))
        return inspect_samples(samples, num_workers)

    monkeypatch.setattr(inspection, "inspect_samples", count)
    splits = load_dataset_splits(folder)
    first = open_samples(splits, "train", NAMES)
    assert open_samples(splits, "train", NAMES) is first
    assert open_samples(load_dataset_splits(folder), "train", NAMES).pixels.tolist() == first.pixels.tolist()
    assert readings == [6]
    open_samples(splits, "validation", NAMES)
    open_samples(splits, "train", (*NAMES, "tree"))
    # What ids mean is not part of what was read.
    assert readings == [6, 2]
    # The same name and the same metadata, but another image.
    data = (folder / "train" / "1.jpg").read_bytes()
    (folder / "train" / "1.jpg").write_bytes(data[:-40])
    os.utime(folder / "train" / "1.jpg", (1, 1))
    with pytest.raises(ValueError, match=r"1\.jpg"):
        open_samples(load_dataset_splits(folder), "train", NAMES)
    (folder / "train" / "1.jpg").write_bytes(data)
    assert len(open_samples(load_dataset_splits(folder), "train", NAMES)) == 6


def test_what_could_not_be_read_is_looked_at_again(folder, monkeypatch):
    """A folder of the network that was away for a moment must not leave an image out for ever."""
    read_ids, away = inspection.read_ids, ["1.jpg"]

    def read(photograph, label_map):
        if os.path.basename(photograph["path"]) in away:
            raise UnreadableImageError("the network is away")
        return read_ids(photograph, label_map)

    monkeypatch.setattr(inspection, "read_ids", read)
    for names in (["1.jpg"], ["1.jpg"], []):
        away[:] = names
        samples = open_samples(load_dataset_splits(folder), "train", NAMES, skip_unreadable=True)
        assert [os.path.basename(name) for name in samples.left_out] == names
        assert len(samples) == 6 - len(names)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"unreadable": []}', "null"])
def test_what_was_kept_of_a_reading_may_be_damaged(folder, datasets_cache, damage):
    first = open_samples(load_dataset_splits(folder), "train", NAMES)
    [kept] = (datasets_cache / "depict_checks").glob("*.json")
    kept.write_text(damage)
    assert open_samples(load_dataset_splits(folder), "train", NAMES).pixels.tolist() == first.pixels.tolist()


def test_images_in_the_dataset_itself_are_named_where_they_have_names():
    buffer = io.BytesIO()
    Image.new("L", (6, 4), 1).save(buffer, "PNG")
    rows = [{"bytes": buffer.getvalue()[:30], "path": path} for path in ("street.png", None)]
    columns = {"image": rows, "label": [{"bytes": buffer.getvalue(), "path": None}] * 2}
    dataset = datasets.Dataset.from_dict(columns, datasets.Features({"image": IMAGE, "label": IMAGE}), split="train")
    with pytest.raises(ValueError) as raised:
        open_samples({"train": dataset}, "train", NAMES)
    assert "image 0: photograph street.png: " in str(raised.value)
    assert "image 1: photograph (no name): " in str(raised.value)


def test_split_without_labels_is_refused(folder):
    for index in range(2):
        Image.new("L", (6, 4), 255).save(folder / "validation" / f"{index}_labels.png")
    with pytest.raises(ValueError, match="Split validation has no labelled pixel in 2 images; its labels may be"):
        open_samples(load_dataset_splits(folder), "validation", NAMES)


def write_masks(folder: Path, split: str, values: tuple[int, ...]) -> None:
    """Masks whose rows hold the values in turn."""
    for path in sorted((folder / split).glob("*_labels.png")):
        rows = np.resize(np.array(values, dtype=np.uint8), 4)
        Image.fromarray(np.repeat(rows[:, None], 6, axis=1)).save(path)


def test_masks_of_0_and_255_are_two_classes(folder, capsys):
    for split in ("train", "validation"):
        write_masks(folder, split, (0, 0, 255, 0))
    samples = open_samples(load_dataset_splits(folder), "validation", ("wall", "crack"))
    assert samples[0]["labels"][:, 0].tolist() == [0, 0, 1, 0]
    assert samples.pixels.tolist() == [36, 12]
    assert "masks hold only 0 and 255; 255 is class 1, crack, and not ignored" in capsys.readouterr().out
    for names in (NAMES, ("crack",)):
        with pytest.raises(ValueError, match=rf"only 0 and 255.*there are {len(names)} class names.*background,crack"):
            open_samples(load_dataset_splits(folder), "train", names)


def test_255_is_ignored_where_any_split_has_another_id(folder, capsys):
    write_masks(folder, "train", (0, 1, 255))
    write_masks(folder, "validation", (0, 255))
    samples = open_samples(load_dataset_splits(folder), "validation", ("wall", "crack"))
    assert samples[0]["labels"][:, 0].tolist() == [0, 255, 0, 255]
    assert "classes without a pixel: crack" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1, 2, 3), r"Ids begin at 1: no label map holds 0.*Pass reduce_labels=true"),
        ((0, 2, 3), r"Ids go from 0 to 3, which are 4, and there are 3 class names.*name it first.*reduce_labels=true"),
        ((0, 90, 200), r"(?s)ids 0, 90, 200, with gaps.*classes\.csv.*NAME1,90,90,90\n  NAME2,200,200,200"),
        ((0, 1, 2, 4), r"ids up to 4, for which 5 class names are needed, and there are 3"),
    ],
)
def test_ids_that_mean_nothing_are_explained(folder, values, message):
    write_masks(folder, "train", values)
    with pytest.raises(ValueError, match=message):
        open_samples(load_dataset_splits(folder), "train", NAMES)


def test_maps_made_before_exif_turned_the_photograph_are_explained(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(folder / "train" / "0.jpg", exif=exif)
    with pytest.raises(ValueError, match=r"0\.jpg\).*size \(4, 6\) for an image of size \(6, 4\).*EXIF orientation 6"):
        open_samples(load_dataset_splits(folder), "train", NAMES)


def test_class_names_of_the_dataset_must_agree(folder):
    named = Splits({}, "an imagefolder", ("Road ", "car", "sky"))
    label_encoding(named, NAMES, False)
    assert describe_classes(named, NAMES) == "Data: an imagefolder. Classes, named by the dataset: 0 road, 1 car, 2 sky"
    assert "not named by the dataset, so by the recipe" in describe_classes({}, NAMES)
    with pytest.raises(ValueError, match=r"3 class names.*has 3; the first that differs is 1: 'bus' and 'car'"):
        label_encoding(named, ("road", "bus", "sky"), False)
    with pytest.raises(ValueError, match=r"2 class names.*has 3\. Pass its own with class_names="):
        label_encoding(named, NAMES[:2], False)
    (folder / "classes.txt").write_text("road\nsky\ncar\n")
    with pytest.raises(ValueError, match=r"the first that differs is 1: 'car' and 'sky'"):
        open_samples(load_dataset_splits(folder), "train", NAMES)


def test_training_is_refused_before_it_starts_with_the_faults_of_all_splits(folder, tmp_path, capsys):
    """The backbone, which would be read next, does not exist."""
    halve(folder / "train" / "1.jpg")
    halve(folder / "validation" / "0.jpg")
    arguments = ["camvid_dinov2_small_sa", str(folder), str(tmp_path / "run"), "--backbone", str(tmp_path / "none")]
    arguments += ["test_split=validation", "batch_size=2", "num_workers=0"]
    assert train.main([*arguments, "class_names=road,car"]) == 1
    error = capsys.readouterr().err
    assert "3 of 6 label maps" not in error
    for text in ("1 of 6 images of split train", "1.jpg", "1 of 2 images of split validation", "0.jpg", "ids [2]"):
        assert text in error
    (folder / "names.txt").write_text("\n".join(NAMES))
    arguments += [f"class_names={folder / 'names.txt'}", "skip_unreadable=true"]
    assert train.main(arguments) == 1
    printed = capsys.readouterr()
    assert "none" in printed.err
    assert "cannot be read" not in printed.err
    assert "Classes, not named by the dataset, so by the recipe: 0 road, 1 car, 2 sky" in printed.out
    assert "Split train: 5 of 6 images" in printed.out
    assert printed.out.count("left out: image") == 2
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_classes_beyond_the_ignored_id_are_counted():
    ids = np.array([[3, 255, 299, 299]], dtype=np.uint16)
    features = datasets.Features({"image": IMAGE, "label": IMAGE})
    columns = {"image": [Image.new("RGB", (4, 1))], "label": [Image.fromarray(ids)]}
    samples = open_samples(
        {"train": datasets.Dataset.from_dict(columns, features, split="train")}, "train", [str(i) for i in range(300)]
    )
    assert samples.pixels.nonzero().flatten().tolist() == [3, 299]
    assert samples.pixels[299] == 2
