"""Which checkpoint a run continues from, and which run may continue."""

import dataclasses
import json

import pytest

from training.checkpoints import check_same_run, find_checkpoint, mark_complete
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
    check_same_run(dataclasses.replace(recipe, num_workers=7), path)
    with pytest.raises(ValueError, match=r"epochs=3, there 120; batch_size=4, there 8"):
        check_same_run(dataclasses.replace(recipe, batch_size=4, epochs=3), path)
