"""Streams: every image once, disjoint parts for processes and workers, the same order again after a resume."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from conftest import save_backbone, save_split
from PIL import Image

from training import train
from training.data.augmentation import TrainingAugmentation
from training.data.reading import LabelEncoding
from training.data.streaming import CHECKED_IMAGES, StreamingDataset, check_stream, count_images, store
from training.recipes import get_recipe

IMAGES = 24
ENCODING = LabelEncoding.counted(IMAGES)
# Neither scale nor crop nor colours change, so that an item shows which image it is.
AUGMENTATION = TrainingAugmentation(8, 8, scale_range=(1.0, 1.0), photometric=False)


def png(value: int) -> dict:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), value).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{value}.png"}


def make_stream(files: int = 4, damaged: tuple[int, ...] = (), wrong: tuple[int, ...] = ()):
    """Image i is of grey i and labelled i; in `files` files of equal size."""
    photos, labels = ([png(value) for value in range(IMAGES)] for _ in range(2))
    for value in damaged:
        photos[value]["bytes"] = photos[value]["bytes"][:40]
    for value in wrong:
        labels[value] = png(200)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"image": photos, "label": labels}, features, split="train")
    return dataset.to_iterable_dataset(num_shards=files)


def make_part(stream, process: int = 0, processes: int = 1, images: int | None = None, batch_size: int = 2, **kwargs):
    images = IMAGES // processes if images is None else images
    return StreamingDataset(
        stream,
        ENCODING,
        AUGMENTATION,
        seed=1,
        images_per_epoch=images,
        batch_size=batch_size,
        shuffle_buffer=5,
        process_index=process,
        num_processes=processes,
        **kwargs,
    )


def read(dataset: StreamingDataset, epoch: int = 0, workers: int = 0) -> list[int]:
    """Which images come in an epoch, in their order."""
    dataset.set_epoch(epoch)
    values = []
    loader = torch.utils.data.DataLoader(dataset, batch_size=dataset.batch_size, num_workers=workers)
    for batch in loader:
        assert batch["pixel_values"].shape == (dataset.batch_size, 3, 8, 8)
        grey, labels = batch["pixel_values"][:, 0, 0, 0], batch["labels"][:, 0, 0]
        assert torch.equal(grey, labels)
        values += grey.tolist()
    return values


def test_an_epoch_has_each_image_once_in_an_order_of_its_own():
    dataset = make_part(make_stream())
    first, second, again = read(dataset, 0), read(dataset, 1), read(dataset, 0)
    assert sorted(first) == sorted(second) == list(range(IMAGES))
    assert first == again
    assert first != second
    assert first != sorted(first)
    assert len(dataset) == IMAGES


@pytest.mark.parametrize(("files", "workers"), [(4, 0), (4, 2), (3, 0)])
def test_processes_share_images_without_overlap(files, workers):
    """Whole files each, or of three files every second image."""
    parts = [read(make_part(make_stream(files), process, 2), 1, workers) for process in range(2)]
    assert [len(part) for part in parts] == [12, 12]
    assert sorted(parts[0] + parts[1]) == list(range(IMAGES))


def test_all_processes_have_equally_many_images_however_files_divide():
    """Of two files for two workers, one has three images only and begins again."""
    stream = datasets.concatenate_datasets([make_stream(1).take(3), make_stream(1).skip(3)])
    dataset = make_part(stream, images=22)
    values = read(dataset, workers=2)
    assert len(values) == 22
    # Twelve of one worker, of three images, and ten of the other.
    assert {value: values.count(value) for value in (0, 1, 2)} == {0: 4, 1: 4, 2: 4}
    assert len(set(values)) == 3 + 10


def test_transforms_differ_between_images_and_epochs_only():
    augmentation = TrainingAugmentation(8, 8, scale_range=(1.0, 1.0))

    def pixels(epoch: int) -> torch.Tensor:
        dataset = StreamingDataset(make_stream(1).take(2).repeat(1), ENCODING, augmentation, 1, 2, 1)
        dataset.set_epoch(epoch)
        return torch.stack([item["pixel_values"] for item in dataset])

    assert torch.equal(pixels(0), pixels(0))
    assert not torch.equal(pixels(0), pixels(1))


def test_processes_draw_their_own_transforms():
    """The same image for both: only what is drawn can differ."""
    augmentation = TrainingAugmentation(8, 8, scale_range=(1.0, 1.0))
    stream = datasets.concatenate_datasets([make_stream(1).skip(20).take(1)] * 8)
    parts = [
        list(StreamingDataset(stream, ENCODING, augmentation, 1, 4, 1, process_index=process, num_processes=2))
        for process in range(2)
    ]
    assert [item["labels"][0, 0].item() for part in parts for item in part] == [20] * 8
    first, second = (torch.stack([item["pixel_values"] for item in part]) for part in parts)
    assert not torch.equal(first, second)


def test_loader_goes_on_in_the_middle_of_an_epoch():
    dataset = make_part(make_stream())
    whole = dataset.loader(1)
    assert len(whole) == 12
    whole.set_epoch(3)
    expected = [batch["labels"][:, 0, 0].tolist() for batch in whole]
    rest = skip_first_batches(make_part(make_stream()).loader(1), 5)
    rest.set_epoch(3)
    assert [batch["labels"][:, 0, 0].tolist() for batch in rest] == expected[5:]


def test_no_more_workers_than_files():
    assert make_part(make_stream(2)).loader(8).num_workers == 2
    assert make_part(make_stream(4), 0, 2).loader(8).num_workers == 2
    assert make_part(make_stream(3), 0, 2).num_files == 3  # none divides, so each process reads all


def test_faults_among_the_first_images_are_found_before_training():
    check_stream(make_stream(), ENCODING)
    faulty = make_stream(damaged=(3, 9), wrong=(7,))
    with pytest.raises(ValueError) as raised:
        check_stream(faulty, ENCODING)
    lines = str(raised.value).splitlines()
    assert lines[0] == f"3 of the first {CHECKED_IMAGES} images of the stream are at fault:"
    assert "Image 3 of the stream cannot be read: photograph 3.png: " in lines[1]
    assert "Image 7 of the stream (7.png): Got label ids [200], needed 0 to 23" in lines[2]
    assert "Image 9 of the stream cannot be read: photograph 9.png: " in lines[3]
    check_stream(make_stream(damaged=(3, 9)), ENCODING, skip_unreadable=True)
    with pytest.raises(ValueError, match="1 of the first"):
        check_stream(faulty, ENCODING, skip_unreadable=True)


def test_later_faults_stop_training_or_are_left_out(capsys):
    with pytest.raises(ValueError, match=r"An image of the stream cannot be read: photograph 9\.png"):
        read(make_part(make_stream(damaged=(9,))))
    with pytest.raises(ValueError, match=r"An image of the stream \(7\.png\): Got label ids \[200\]"):
        read(make_part(make_stream(wrong=(7,)), skip_unreadable=True))
    assert capsys.readouterr().err == ""
    values = read(make_part(make_stream(damaged=(9,)), images=22, skip_unreadable=True))
    assert len(set(values)) == 22
    assert 9 not in values
    assert capsys.readouterr().err.startswith("left out: An image of the stream cannot be read: photograph 9.png")
    with pytest.raises(ValueError, match="no image that can be read; use fewer processes or workers"):
        read(make_part(make_stream(damaged=range(IMAGES)), skip_unreadable=True))


def test_a_run_trains_on_a_stream(tmp_path, datasets_cache):
    """From a folder in Hub layout to the trained model: two epochs of two steps, of five images."""
    for split, count in (("train", 5), ("validation", 2)):
        rows = [png(value) for value in range(count)]
        save_split(tmp_path / "scenes", split, rows, rows)
    save_backbone(tmp_path / "backbone", num_hidden_layers=1)
    fields = ["class_names=a,b,c,d,e", "streaming=true", "num_train_images=5", "test_split=validation", "epochs=2"]
    fields += ["cache_features=false", "batch_size=2", "size=28", "crop_size=28", "num_workers=1", "warmup_steps=1"]
    fields += ["evaluate_every_epochs=1", "precision=float32"]
    names = [str(tmp_path / name) for name in ("scenes", "run", "backbone")]
    assert train.main(["camvid_dinov2_small_linear", *names[:2], "--backbone", names[2], *fields]) == 0
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"]) == (4, 2.0)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["num_images"] == 2


def test_number_of_images_is_given_or_known():
    stream = make_stream()
    assert count_images(stream, "train", 7) == 7
    with pytest.raises(ValueError, match="streamed split train is not known; pass num_train_images=NUMBER"):
        count_images(stream, "train", None)
    stream.info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=24)})
    assert count_images(stream, "train", None) == 24


def test_a_split_is_stored_for_evaluation(datasets_cache):
    dataset = store(make_stream(2).take(5), "validation")
    assert str(dataset.split) == "validation"
    assert [int(np.array(row["label"])[0, 0]) for row in dataset] == [0, 1, 2, 3, 4]
    assert dataset.features["image"] == datasets.Image()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["streaming=true"], "streaming with cache_features or class_balance, which read all images"),
        (["streaming=true", "cache_features=false", "class_balance=0.5"], "streaming with cache_features"),
        (["shuffle_buffer=0"], "shuffle_buffer=0, needed at least 1"),
    ],
)
def test_recipes_that_a_stream_cannot_serve_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        get_recipe("camvid_dinov2_small_sa").override(fields)


def test_stream_of_unknown_columns_is_refused():
    with pytest.raises(ValueError, match="columns are not known before it is read; leave streaming out"):
        make_part(datasets.IterableDataset.from_generator(lambda: iter([{"image": 1}])))
