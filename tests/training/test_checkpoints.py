"""Which checkpoint a run continues from, and which run may continue."""

import dataclasses
import json

import pytest

from training.optimization.checkpoints import (
    check_same_run,
    discard_unfinished,
    find_checkpoint,
    is_complete,
    mark_complete,
    publish,
)
from training.recipes import camvid_dinov2_small


def make_checkpoint(output, step, complete=True):
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    if complete:
        mark_complete(folder)
    return str(folder)


def test_the_last_whole_checkpoint_is_taken(tmp_path):
    """By number, not by name: 10 comes after 9."""
    make_checkpoint(tmp_path, 9)
    expected = make_checkpoint(tmp_path, 10)
    make_checkpoint(tmp_path, 11, complete=False)
    make_checkpoint(tmp_path / "other", 12)
    assert find_checkpoint(tmp_path, resume=True) == expected


@pytest.mark.parametrize("complete", [True, False])
def test_a_run_is_not_overwritten(tmp_path, complete):
    make_checkpoint(tmp_path, 7, complete)
    with pytest.raises(ValueError, match="holds checkpoint-7; pass --resume"):
        find_checkpoint(tmp_path, resume=False)


@pytest.mark.parametrize("make_partial", [True, False])
def test_without_a_whole_checkpoint_a_run_starts_anew(tmp_path, make_partial):
    if make_partial:
        make_checkpoint(tmp_path, 7, complete=False)
    assert find_checkpoint(tmp_path, resume=True) is None
    assert find_checkpoint(tmp_path / "nowhere", resume=True) is None


def test_another_recipe_does_not_continue_a_run(tmp_path):
    recipe = camvid_dinov2_small("sa")
    path = tmp_path / "recipe.json"
    check_same_run(recipe, path)  # nothing there yet
    path.write_text(json.dumps({"recipe": dataclasses.asdict(recipe)}))
    check_same_run(recipe.replace(num_workers=7), path)
    with pytest.raises(ValueError, match=r"epochs=3, there 120; batch_size=4, there 8"):
        check_same_run(recipe.replace(batch_size=4, epochs=3), path)


def test_a_checkpoint_is_published_whole_and_the_oldest_go(tmp_path):
    """By number, not by name or age; the folder that a checkpoint was written in is discarded."""
    for step in (9, 10, 11):
        written = tmp_path / "unfinished" / f"checkpoint-{step}"
        (written / "part").mkdir(parents=True)
        (written / "part" / "weights").write_bytes(bytes([step]))
        publish(written, tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-11"]
    assert (tmp_path / "checkpoint-11" / "part" / "weights").read_bytes() == bytes([11])
    assert is_complete(tmp_path / "checkpoint-11")
    discard_unfinished(tmp_path)
    assert not (tmp_path / "unfinished").exists()


def test_a_checkpoint_takes_the_place_of_a_broken_one(tmp_path):
    make_checkpoint(tmp_path, 9, complete=False)
    (tmp_path / "checkpoint-9" / "leftover").write_text("half")
    written = tmp_path / "unfinished" / "checkpoint-9"
    written.mkdir(parents=True)
    (written / "weights").write_text("whole")
    publish(written, tmp_path, keep=1)
    assert {path.name for path in (tmp_path / "checkpoint-9").iterdir()} == {"weights", "complete.json"}


@pytest.mark.parametrize("damage", ["truncated", "deleted", "half a mark"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage, capsys):
    whole = make_checkpoint(tmp_path, 1)
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "weights").write_text("all of them")
    mark_complete(folder)
    assert find_checkpoint(tmp_path, resume=True) == str(folder)
    if damage == "truncated":
        (folder / "weights").write_text("all of")
    elif damage == "deleted":
        (folder / "weights").unlink()
    else:
        (folder / "complete.json").write_text('{"wei')
    assert find_checkpoint(tmp_path, resume=True) == whole
    assert "checkpoint-2 is incomplete and is passed over" in capsys.readouterr().err
