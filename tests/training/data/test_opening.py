"""From a folder that somebody brings to checked splits, class names, and a text; names in features and READMEs."""

import argparse
from pathlib import Path

import datasets
import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image

from training.data import LabelEncoding, check_stream, load_dataset_splits, open_data, open_samples
from training.data.naming import names_in_features, names_in_readme
from training.evaluation.arguments import add_data_arguments, load_samples

pytestmark = pytest.mark.usefixtures("datasets_cache")


def bring(folder: Path, values: tuple[int, ...] = (0, 1, 2), count: int = 12) -> None:
    """Photographs that differ and masks whose columns hold the values in turn, four rows each."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        photo = np.random.default_rng(index).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(photo).save(folder / "images" / f"{index}.png")
        ids = np.resize(np.array(values, dtype=np.uint8), (4, 6))
        Image.fromarray(ids).save(folder / "masks" / f"{index}.png")


def test_a_folder_of_images_and_masks_is_described_and_split(tmp_path, capsys):
    bring(tmp_path)
    (tmp_path / "classes.txt").write_text("road\ncar\nsky\nfence\n")
    data = open_data(tmp_path)
    assert data.class_names == ("road", "car", "sky", "fence")
    assert list(data.samples) == ["train", "validation", "test"]
    counts = [len(each) for each in data.samples.values()]
    assert sum(counts) == 12
    text = str(data)
    assert "Data: photographs in images/ and label maps in masks/." in text
    assert "Classes, named by the data: 0 road, 1 car, 2 sky, 3 fence" in text
    assert f"{counts[0]} train, {counts[1]} validation, {counts[2]} test" in text
    assert "  car         33.33       33.33       33.33" in text
    assert "Warning: classes without a pixel in train, fence, cannot be learned" in text
    for name, samples in data.samples.items():
        assert open_samples(data.splits, name, data.class_names) is samples
        assert samples.pixels.tolist() == [8 * len(samples)] * 3 + [0]
    assert capsys.readouterr().out == ""  # the caller prints


def test_unnamed_classes_are_counted_and_given_ones_compared(tmp_path):
    bring(tmp_path)
    data = open_data(tmp_path)
    assert data.class_names == ("class 0", "class 1", "class 2")
    assert "which nobody names" in data.description
    assert open_data(tmp_path, ["road", "car", "sky"]).class_names == ("road", "car", "sky")
    with pytest.raises(ValueError, match="Ids go from 0 to 2, which are 3, and there are 2 class names"):
        open_data(tmp_path, ["road", "car"])
    (tmp_path / "classes.txt").write_text("road\ncar\nsky\n")
    with pytest.raises(ValueError, match=r"2 class names.*has 3"):
        open_data(tmp_path, ["road", "car"])


def test_masks_of_0_and_255_are_two_classes_named_or_not(tmp_path):
    bring(tmp_path, (0, 255))
    for names, expected in ((None, ("background", "foreground")), (("wall", "crack"), ("wall", "crack"))):
        data = open_data(tmp_path, names)
        assert data.class_names == expected
        assert f"255 is class 1, {expected[1]}, and not ignored" in data.description
        assert data.samples["test"][0]["labels"][0].tolist() == [0, 1] * 3
    with pytest.raises(ValueError, match=r"hold only 0 and 255.*there are 1 class names"):
        open_data(tmp_path, ["crack"])


def test_streams_of_masks_of_0_and_255_are_refused(tmp_path):
    bring(tmp_path, (0, 255))
    stream = load_dataset_splits(tmp_path, streaming=True)["train"]
    with pytest.raises(
        ValueError, match="class 0 and ignored pixels only, as masks of 0 and 255 do; without streaming"
    ):
        check_stream(stream, LabelEncoding.counted(2))


def test_evaluation_finds_the_test_split_that_training_left_out(tmp_path, capsys):
    bring(tmp_path)
    data = open_data(tmp_path, ["a", "b", "c"])
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    arguments = parser.parse_args([str(tmp_path)])
    samples = load_samples(arguments, data.class_names, False, PartialState(cpu=True))
    expected = data.samples["test"]
    assert [samples.name(index) for index in range(len(samples))] == [
        expected.name(index) for index in range(len(expected))
    ]
    assert "it has no splits, so they are made" in capsys.readouterr().out


def test_ids_from_1_and_grey_levels_without_names_are_explained(tmp_path):
    bring(tmp_path, (1, 2, 3))
    with pytest.raises(ValueError, match=r"Ids begin at 1: no label map holds 0.*reduce_labels=true"):
        open_data(tmp_path)
    data = open_data(tmp_path, reduce_labels=True)
    assert data.class_names == ("class 0", "class 1", "class 2")
    assert data.samples["train"][0]["labels"][0].tolist() == [0, 1, 2] * 2
    bring(tmp_path, (0, 1, 2))
    for path in (tmp_path / "masks").iterdir():
        Image.fromarray(np.resize(np.array([0, 65535], dtype=np.uint16), (4, 6))).save(path)
    with pytest.raises(ValueError, match=r"ids up to 65535.*write 255 there instead"):
        open_data(tmp_path)
    bring(tmp_path, (0, 100, 200))
    with pytest.raises(ValueError, match=r"(?s)ids 0, 100, 200, with gaps.*name,r,g,b\n  NAME0,0,0,0\n  NAME1,100,100"):
        open_data(tmp_path)
    (tmp_path / "classes.csv").write_text("name,r,g,b\nwall,0,0,0\ncrack,100,100,100\nmoss,200,200,200\n")
    assert open_data(tmp_path).samples["train"][0]["labels"][0].tolist() == [0, 1, 2] * 2


def test_faults_of_all_splits_come_together_and_duplicates_are_named(tmp_path):
    for split in ("train", "val"):
        bring(tmp_path / split, count=3)
    data = open_data(tmp_path)
    assert data.splits["test"] is data.splits["validation"]
    assert data.samples["test"] is data.samples["validation"]
    [warning] = data.warnings
    assert warning.startswith("3 photographs lie in several splits")
    assert f"{tmp_path / 'train' / 'images' / '0.png'} (train) and {tmp_path / 'val' / 'images' / '0.png'}" in warning
    (tmp_path / "train" / "images" / "1.png").write_bytes(b"damaged")
    Image.new("L", (5, 4)).save(tmp_path / "val" / "masks" / "2.png")
    Image.new("L", (6, 4)).save(tmp_path / "train" / "masks" / "0.png", "JPEG")
    with pytest.raises(ValueError) as raised:
        open_data(tmp_path)
    for words in (
        "1 of 3 images of split train cannot be read",
        "1.png: it is no image of a format that is read",
        "1 of 3 label maps of split train do not suit",
        "Got a label map saved as JPEG",
        "1 of 3 label maps of split validation do not suit",
        "Got a segmentation map of size (4, 5) for an image of size (4, 6)",
    ):
        assert words in str(raised.value)


def test_twenty_faults_are_shown(tmp_path):
    bring(tmp_path, count=60)
    for path in (tmp_path / "masks").iterdir():
        Image.new("L", (5, 4)).save(path)
    with pytest.raises(ValueError) as raised:
        open_data(tmp_path, ["a", "b"])
    lines = str(raised.value).splitlines()
    first = next(index for index, line in enumerate(lines) if "of split train do not suit" in line)
    count = int(lines[first].split()[0])
    assert all(line.startswith("  Image") for line in lines[first + 1 : first + 21])
    assert lines[first + 21] == f"  and {count - 20} more"


def test_names_in_features_of_the_hub():
    names = datasets.ClassLabel(names=["road", "car"])
    scenes = datasets.ClassLabel(names=["street", "beach", "room"])
    image = datasets.Image()
    for features in (
        {"image": image, "label": image, "classes": datasets.List(names)},
        {"image": image, "annotation": image, "scene_category": scenes, "objects": datasets.List({"category": names})},
        {"image": image, "label": image, "segments": {"class_id": names}, "id": datasets.Value("int32")},
    ):
        assert names_in_features(datasets.Features(features)) == ("road", "car")
    assert names_in_features(datasets.Features({"image": image, "scene_category": scenes})) is None
    two = {"image": image, "class": names, "label_kind": datasets.ClassLabel(names=["fine", "coarse"])}
    assert names_in_features(datasets.Features(two)) is None


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("---\nid2label: {0: road, 1: traffic light, 255: void}\n---\n", ("road", "traffic light")),
        ("---\nlicense: mit\n---\n`label`: 0 sky, 1 sign\nsymbol; 255 is void.\n", ("sky", "sign symbol")),
        ("Labels are 0: sky, 1: road, 2: car.", ("sky", "road", "car")),
        ("640 x 480 pixels, 0 of them, 1 GB.", None),
        ("Some: 0 sky, 1 road. Others: 0 car, 1 tree.", None),
        ("Nothing", None),
    ],
)
def test_names_in_readmes(tmp_path, text, names):
    (tmp_path / "README.md").write_text(text)
    assert names_in_readme(tmp_path) == names


def test_names_of_a_readme_are_used_where_ids_fit(tmp_path):
    """In Hub layout; the README's names are only likely, so a recipe's own are not compared with them."""
    rows = []
    for value in (0, 1):
        image = Image.new("RGB", (6, 4), (value,) * 3)
        ids = Image.fromarray(np.full((4, 6), value, dtype=np.uint8))
        rows += [(image, ids)] * 3
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    dataset = datasets.Dataset.from_dict(
        {"image": [image for image, _ in rows], "label": [ids for _, ids in rows]}, features
    )
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        dataset.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text("`label`: 0 sky, 1 road; 255 is ignored.\n")
    data = open_data(tmp_path)
    assert data.class_names == ("sky", "road")
    assert "by the names that the data suggest" in data.description
    assert open_data(tmp_path, ["a", "b"]).class_names == ("a", "b")
    assert data.warnings[0].startswith("12 photographs lie in several splits")
