"""Columns, splits and label maps of datasets; samples that depend on seed, epoch and index alone."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from depict_hf import DepictImageProcessor
from training.data.augmentation import TrainingAugmentation
from training.data.loading import find_columns, get_split, load_dataset_splits
from training.data.samples import EvaluationDataset, SegmentationDataset, TrainingDataset

IMAGE, NUMBER = datasets.Image(), datasets.Value("int64")
RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)
IDS = RNG.integers(0, 5, (12, 16), dtype=np.uint8)


def make_dataset(label_maps: list[Image.Image], photos: list | None = None) -> datasets.Dataset:
    photos = photos or [Image.fromarray(PHOTO)] * len(label_maps)
    features = datasets.Features({"image": IMAGE, "label": IMAGE})
    return datasets.Dataset.from_dict({"image": photos, "label": label_maps}, features=features, split="train")


def make_samples(count: int = 3, **kwargs) -> SegmentationDataset:
    photos = [Image.fromarray(np.roll(PHOTO, shift, axis=0)) for shift in range(count)]
    labels = [Image.fromarray(np.roll(IDS, shift, axis=0)) for shift in range(count)]
    return SegmentationDataset(make_dataset(labels, photos), num_labels=5, **kwargs)


@pytest.mark.parametrize(
    ("columns", "given", "expected"),
    [
        ({"image": IMAGE, "label": IMAGE}, (None, None), ("image", "label")),
        ({"annotation": IMAGE, "image": IMAGE, "instances": IMAGE}, (None, None), ("image", "annotation")),
        ({"image": IMAGE, "label": NUMBER, "mask": IMAGE}, (None, None), ("image", "mask")),
        ({"left": IMAGE, "truth": IMAGE}, ("left", "truth"), ("left", "truth")),
        ({"image": IMAGE, "label": IMAGE, "mask": IMAGE}, (None, "mask"), ("image", "mask")),
    ],
)
def test_columns_are_found_or_given(columns, given, expected):
    assert find_columns(datasets.Features(columns), *given) == expected


@pytest.mark.parametrize(
    ("columns", "given", "message"),
    [
        ({"image": IMAGE, "label": IMAGE, "mask": IMAGE}, (None, None), r"2 columns.*label, mask.*label_column=NAME"),
        ({"image": IMAGE, "label": NUMBER}, (None, None), r"0 columns.*the label.*columns: image, label; .*: image\)"),
        ({"left": IMAGE, "label": IMAGE}, (None, None), r"the image \(none\).*image_column=NAME.*left, label"),
        ({"image": IMAGE, "label": IMAGE}, (None, "labels"), r"label_column='labels'.*columns: image, label"),
        ({"image": IMAGE, "label": NUMBER}, (None, "label"), "label_column='label', which is no column of images"),
    ],
)
def test_ambiguous_or_missing_columns_are_refused(columns, given, message):
    with pytest.raises(ValueError, match=message):
        find_columns(datasets.Features(columns), *given)


def test_local_folder_in_hub_layout(tmp_path):
    make_dataset([Image.fromarray(IDS)]).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    make_dataset([Image.fromarray(IDS)] * 2).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    splits = load_dataset_splits(tmp_path)
    assert len(get_split(splits, "test")) == 2
    sample = SegmentationDataset(get_split(splits, "train"), 5)[0]
    assert np.array_equal(sample["image"].permute(1, 2, 0), PHOTO)
    assert np.array_equal(sample["labels"], IDS)
    with pytest.raises(ValueError, match=r"split 'validation'.*train, test"):
        get_split(splits, "validation")


@pytest.mark.parametrize(
    ("name", "shifts"),
    [("train", [0, 1, 2, 3, 4]), ("train[:60%]", [0, 1, 2]), ("train[60%:]", [3, 4]), ("train[1:3]", [1, 2])],
)
def test_splits_and_their_parts(name, shifts):
    maps = [Image.fromarray(np.roll(IDS, shift, axis=0)) for shift in range(5)]
    samples = SegmentationDataset(get_split({"train": make_dataset(maps)}, name), 5)
    assert len(samples) == len(shifts)
    for sample, shift in zip(samples, shifts, strict=True):
        assert np.array_equal(sample["labels"], np.roll(IDS, shift, axis=0))


def test_dataset_saved_to_disk(tmp_path):
    datasets.DatasetDict(train=make_dataset([Image.fromarray(IDS)])).save_to_disk(tmp_path)
    sample = SegmentationDataset(load_dataset_splits(tmp_path)["train"], 5)[0]
    assert np.array_equal(sample["labels"], IDS)


def test_folders_that_are_no_dataset_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_dataset_splits(tmp_path / "none")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.rst").write_text("nothing")
    with pytest.raises(ValueError, match=r"(?s)Found no photographs with label maps.*notes.*metadata\.jsonl.*ADE20K"):
        load_dataset_splits(tmp_path / "notes")


def test_reduced_labels_and_the_ignored_one():
    ids = IDS.copy()
    ids[0] = 255
    sample = SegmentationDataset(make_dataset([Image.fromarray(ids)]), 4, reduce_labels=True)[0]
    expected = np.where((ids == 0) | (ids == 255), 255, ids.astype(int) - 1)
    assert np.array_equal(sample["labels"], expected)


def test_label_that_is_no_class_names_the_image():
    ids = IDS.copy()
    ids[3, 4], ids[5, 6] = 7, 200
    samples = SegmentationDataset(make_dataset([Image.fromarray(IDS), Image.fromarray(ids)]), 5)
    assert samples[0]["labels"].max() == 4
    with pytest.raises(ValueError, match=r"Image 1 of split train: Got label ids \[7, 200\], needed 0 to 4"):
        samples[1]


def test_corrupt_image_is_named(tmp_path):
    path = tmp_path / "broken.png"
    Image.fromarray(PHOTO).save(path)
    path.write_bytes(path.read_bytes()[:200])
    samples = SegmentationDataset(make_dataset([Image.fromarray(IDS)], [str(path)]), 5)
    with pytest.raises(ValueError, match=r"Image 0 of split train cannot be read: photograph .*broken\.png: .*trunc"):
        samples[0]


def test_map_of_another_size_is_refused():
    samples = SegmentationDataset(make_dataset([Image.fromarray(IDS[:-1])]), 5)
    with pytest.raises(ValueError, match=r"Image 0 of split train: .*\(11, 16\)"):
        samples[0]


def test_samples_left_out_are_noted(tmp_path):
    paths = []
    for shift in range(4):
        paths.append(str(tmp_path / f"{shift}.png"))
        Image.fromarray(np.roll(PHOTO, shift, axis=0)).save(paths[-1])
    samples = SegmentationDataset(make_dataset([Image.fromarray(IDS)] * 4, paths), 5)
    rest = samples.without([2, 0])
    assert rest.left_out == (paths[0], paths[2])
    assert [rest.name(index) for index in range(len(rest))] == [paths[1], paths[3]]
    assert np.array_equal(rest[1]["image"].permute(1, 2, 0), np.roll(PHOTO, 3, axis=0))
    assert rest.fingerprint != samples.fingerprint


def make_training_dataset(seed: int) -> TrainingDataset:
    augmentation = TrainingAugmentation(size=12, crop_size=8)
    return TrainingDataset(make_samples(), augmentation, seed)


def test_samples_depend_on_seed_epoch_and_index_alone():
    dataset, same, other_seed = make_training_dataset(1), make_training_dataset(1), make_training_dataset(2)
    first = dataset[1]["pixel_values"]
    dataset[0]  # reading another sample in between changes nothing
    torch.manual_seed(99)
    assert torch.equal(dataset[1]["pixel_values"], first)
    assert torch.equal(same[1]["pixel_values"], first)
    assert not torch.equal(other_seed[1]["pixel_values"], first)
    dataset.set_epoch(1)
    assert not torch.equal(dataset[1]["pixel_values"], first)
    dataset.set_epoch(0)
    assert torch.equal(dataset[1]["pixel_values"], first)


def test_samples_do_not_depend_on_workers():
    dataset = make_training_dataset(1)
    dataset.set_epoch(3)
    batches = [
        next(iter(torch.utils.data.DataLoader(dataset, batch_size=3, num_workers=workers))) for workers in (0, 2)
    ]
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])
    assert torch.equal(batches[0]["labels"], batches[1]["labels"])


def test_workers_that_stay_learn_of_the_next_epoch():
    """Workers of an earlier epoch have a copy of the dataset that was made then."""
    dataset = make_training_dataset(1)
    loaders = [
        torch.utils.data.DataLoader(dataset, 3, num_workers=1, persistent_workers=stay) for stay in (True, False)
    ]
    for epoch in (0, 3, 1):
        dataset.set_epoch(epoch)
        batches = [next(iter(loader))["pixel_values"] for loader in loaders]
        assert torch.equal(*batches), epoch


def test_evaluation_keeps_labels_at_full_resolution():
    processor = DepictImageProcessor(size={"shortest_edge": 24})
    sample = EvaluationDataset(make_samples(), processor)[1]
    assert np.array_equal(sample["labels"], np.roll(IDS, 1, axis=0))
    expected = processor(Image.fromarray(np.roll(PHOTO, 1, axis=0)), return_tensors="pt")["pixel_values"][0]
    assert expected.shape == (3, 24, 32)
    assert torch.equal(sample["pixel_values"], expected)
