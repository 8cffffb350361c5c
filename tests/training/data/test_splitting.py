"""Splits made by a hash of names: which photograph comes into which, and that it stays there."""

import io
from pathlib import Path

import datasets
import pytest
from PIL import Image

from training.data.layouts import Splits, dataset_of_files
from training.data.splitting import SHARES, assign, complete_splits


def folder_of(root: Path, names: list[str]) -> Splits:
    pairs = [(root / "images" / f"{name}.jpg", root / "masks" / f"{name}.png") for name in names]
    return Splits({"train": dataset_of_files(pairs, "train")}, folder=root)


def names_of(splits: Splits) -> dict[str, list[str]]:
    found = {}
    for name, split in splits.items():
        rows = split.select_columns("image").cast_column("image", datasets.Image(decode=False))
        found[name] = [Path(row["image"]["path"] or "").stem for row in rows]
    return found


def test_shares_and_stability_when_images_are_added():
    keys = [f"image_{index}" for index in range(2000)]
    before = dict(zip(keys[::2], assign(keys[::2], SHARES), strict=True))
    after = dict(zip(keys, assign(keys, SHARES), strict=True))
    assert all(after[key] == split for key, split in before.items())
    for name, share in SHARES.items():
        # Three standard deviations of 2000 draws are 0.031 at most.
        assert list(after.values()).count(name) / 2000 == pytest.approx(share, abs=0.031)
    # Of these names once and for all, in any version and on any machine.
    assert [after[f"image_{index}"] for index in range(8)] == FIRST_EIGHT


FIRST_EIGHT = ["train", "validation", "train", "train", "train", "train", "validation", "train"]


@pytest.mark.parametrize("count", [3, 4, 5, 8, 12])
def test_every_split_has_an_image_where_there_are_three(count):
    for start in range(30):
        keys = [f"{start} {index}" for index in range(count)]
        assigned = assign(keys, SHARES)
        assert set(assigned) == set(SHARES)
        assert sorted(zip(keys[::-1], assign(keys[::-1], SHARES), strict=True)) == sorted(
            zip(keys, assigned, strict=True)
        )


def test_fewer_than_three_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="Got 2 photographs, needed at least 3, one for each of train, validation, test"
    ):
        complete_splits(folder_of(tmp_path, ["a", "b"]))


def test_the_split_follows_from_the_path_in_the_folder_wherever_that_is(tmp_path):
    names = [f"{number}/photo" for number in range(40)]
    here = names_of(complete_splits(folder_of(tmp_path / "here", names)))
    splits = complete_splits(folder_of(tmp_path / "there", names))
    assert names_of(splits) == here
    assert [len(split) for split in splits.values()] == [len(each) for each in here.values()]
    assert min(map(len, here.values())) > 1  # though all have the same name
    assert splits.notes[0].startswith("it has no splits, so they are made (70% train, 15% validation, 15% test)")


def test_images_without_a_name_are_told_apart_by_their_content():
    def encoded(grey: int) -> dict:
        buffer = io.BytesIO()
        Image.new("L", (2, 2), grey).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})

    def splits_of(greys: list[int]) -> dict[str, set[bytes]]:
        rows = [encoded(grey) for grey in greys]
        dataset = datasets.Dataset.from_dict({"image": rows, "label": rows}, features)
        parts = complete_splits(Splits({"train": dataset}))
        return {
            name: {row["image"]["bytes"] for row in part.cast_column("image", datasets.Image(decode=False))}
            for name, part in parts.items()
        }

    assert splits_of(list(range(30))) == splits_of(list(range(29, -1, -1)))


def test_missing_splits_are_made_of_others(tmp_path):
    names = [f"{number}" for number in range(30)]
    whole = folder_of(tmp_path, names)["train"]
    both = complete_splits(Splits({"train": whole, "validation": whole}, folder=tmp_path))
    assert both["test"] is both["validation"]
    assert "no test split, so the validation split is used for both" in both.notes[0]
    with_test = complete_splits(Splits({"train": whole, "test": whole}, folder=tmp_path))
    parts = names_of(with_test)
    assert sorted(parts["train"] + parts["validation"], key=int) == names
    assert 1 <= len(parts["validation"]) < 12
    assert len(parts["test"]) == 30
    complete = Splits({"train": whole, "validation": whole, "test": whole})
    assert complete_splits(complete) is complete
    streamed = Splits({"train": whole.to_iterable_dataset()})
    assert complete_splits(streamed) is streamed
