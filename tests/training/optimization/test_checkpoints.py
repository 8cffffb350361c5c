"""Which checkpoint a run continues from, and which run may continue."""

import dataclasses
import errno
import json
import os
import re
import stat

import pytest
from accelerate import Accelerator
from transformers import TrainerState

from training.optimization.checkpoints import (
    CheckpointKeeper,
    changed_file,
    check_same_run,
    discard_unfinished,
    find_checkpoint,
    free_fields,
    is_complete,
    mark_complete,
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
    names = recipe.data.class_names
    with pytest.raises(ValueError, match="class_names="):
        check_same_run(recipe.replace(class_names=(*names[1:], names[0])), path)


def test_other_circumstances_do_not_continue_a_run(tmp_path):
    recipe = camvid_dinov2_small("sa")
    path = tmp_path / "recipe.json"
    before = {"processes": 2, "data": {"train": {"images": 367, "digest": "a1"}}}
    path.write_text(json.dumps({"recipe": dataclasses.asdict(recipe)} | before))
    check_same_run(recipe, path, before)
    with pytest.raises(ValueError, match="processes=1, there 2"):
        check_same_run(recipe, path, before | {"processes": 1})
    with pytest.raises(ValueError, match=r"data=.*'a2'.*there.*'a1'"):
        check_same_run(recipe, path, before | {"data": {"train": {"images": 367, "digest": "a2"}}})
    path.write_text(json.dumps({"recipe": dataclasses.asdict(recipe)}))  # of an earlier version
    check_same_run(recipe, path, before)


def test_what_may_change_depends_on_the_recipe():
    """Readers of a stream share it out; the best model is one of those that were evaluated."""
    recipe = camvid_dinov2_small("sa").replace(cache_features=False)
    assert {"num_workers", "evaluate_every_epochs"} <= free_fields(recipe)
    assert "num_workers" not in free_fields(recipe.replace(streaming=True))
    assert "evaluate_every_epochs" not in free_fields(recipe.replace(keep_best=True))
    assert "evaluate_every_epochs" not in free_fields(recipe.replace(early_stopping=3))


@pytest.mark.parametrize("best", [None, 9])
def test_a_checkpoint_is_completed_and_the_oldest_go(tmp_path, best):
    """By number, not by name or age; the best one stays."""
    state = TrainerState(best_global_step=best)
    for state.global_step in (8, 9, 10, 11):
        folder = tmp_path / f"checkpoint-{state.global_step}" / "part"
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(bytes([state.global_step]))
        assert not is_complete(folder.parent)
        CheckpointKeeper(tmp_path, Accelerator(cpu=True)).on_save(None, state, None)
    kept = {path.name for path in tmp_path.glob("checkpoint-*") if is_complete(path)}
    assert kept == {"checkpoint-10", "checkpoint-11"} | ({"checkpoint-9"} if best else set())
    assert (tmp_path / "checkpoint-11" / "part" / "weights").read_bytes() == bytes([11])


def test_what_a_killed_run_left_is_deleted(tmp_path):
    """A checkpoint that is written again must not be marked by an older mark."""
    whole = make_checkpoint(tmp_path, 8)
    make_checkpoint(tmp_path, 9, complete=False)
    discard_unfinished(tmp_path)
    assert [str(path) for path in tmp_path.iterdir()] == [whole]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_folders_that_cannot_be_synchronised_are_no_obstacle(tmp_path, monkeypatch, code):
    synchronized = []

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, "not for folders")
        synchronized.append(descriptor)

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, refuse_folders)
    (tmp_path / "weights").write_text("all of them")
    mark_complete(tmp_path)
    assert is_complete(tmp_path) and len(synchronized) == 2


@pytest.mark.parametrize(("code", "only_files"), [(errno.EIO, False), (errno.ENOSPC, False), (errno.EINVAL, True)])
def test_other_errors_of_the_disk_are_raised(tmp_path, monkeypatch, code, only_files):
    """A full or broken disk, and a file that cannot be synchronised."""

    def fail(descriptor):
        if not (only_files and stat.S_ISDIR(os.fstat(descriptor).st_mode)):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    (tmp_path / "weights").write_text("all of them")
    with pytest.raises(OSError, match=re.escape(os.strerror(code))):
        mark_complete(tmp_path)
    assert not is_complete(tmp_path)


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


def written(folder, **files: bytes):
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    mark_complete(folder)
    return folder


@pytest.mark.parametrize("place", [0, 500, 999])
def test_a_checkpoint_that_changed_since_is_passed_over_by_its_checksum(tmp_path, place, capsys):
    """One bit, so that sizes say nothing; it goes when the run goes on, as its step will be written again."""
    good = written(tmp_path / "checkpoint-3", weights=bytes(1000))
    damaged = written(tmp_path / "checkpoint-5", weights=bytes(1000), optimizer=b"ok")
    data = bytearray(1000)
    data[place] ^= 64
    (damaged / "weights").write_bytes(data)
    assert is_complete(damaged) and changed_file(damaged) == "weights" and changed_file(good) is None
    assert find_checkpoint(tmp_path, resume=True) == str(good)
    assert "checkpoint-5 is damaged (weights is not what was written) and is passed over" in capsys.readouterr().err
    discard_unfinished(tmp_path, str(good))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_without_a_good_checkpoint_it_is_said_that_a_run_begins_anew(tmp_path, capsys):
    (written(tmp_path / "checkpoint-3", weights=b"abc") / "weights").write_bytes(b"abd")
    assert find_checkpoint(tmp_path, resume=True) is None
    assert f"No whole checkpoint is left in {tmp_path}; the run begins anew." in capsys.readouterr().err


def test_checkpoints_of_earlier_versions_have_sizes_only(tmp_path):
    folder = written(tmp_path / "checkpoint-3", weights=b"abc")
    (folder / "complete.json").write_text(json.dumps({"weights": 3}))
    assert find_checkpoint(tmp_path, resume=True) == str(folder)
    (folder / "weights").write_bytes(b"ab")
    assert find_checkpoint(tmp_path, resume=True) is None


@pytest.mark.parametrize(
    "mark",
    [
        "[]",
        "7",
        "[" * 100_000,
        "\x00",
        '{"weights": "x"}',
        '{"weights": {"bytes": 3}}',
        '{"weights": {"bytes": null, "sha256": ""}}',
        '{"weights": {"bytes": 4, "sha256": "ab"}}',
    ],
)
def test_a_damaged_mark_is_none(tmp_path, mark):
    folder = written(tmp_path / "checkpoint-3", weights=b"abc")
    (folder / "complete.json").write_text(mark)
    assert not is_complete(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"recipe": 3}', '{"recipe": {"data": 3}}', '{"recipe": {}, "sessions": 4}', "[" * 100_000]
)
def test_a_damaged_record_is_refused(tmp_path, text):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"recipe.json is no record of a run \(.*put it back from a copy"):
        check_same_run(camvid_dinov2_small("sa"), path)
