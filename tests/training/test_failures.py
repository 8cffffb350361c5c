"""Images, losses, weights and disks that fail in the middle of a run: what is kept, and the one line that says it."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from conftest import training_arguments
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from training import train
from training.data import samples as samples_module
from training.optimization import SegmentationTrainer
from training.optimization.checkpoints import is_complete

FIELDS = ("report_to=none", "sample_pictures=0", "epochs=3", "save_every_steps=1")


def run(dataset, backbone, output, *fields, resume=False):
    arguments = training_arguments(str(dataset), backbone, output, *FIELDS, *fields)
    return train.main([*arguments, *(["--resume"] if resume else [])])


@pytest.fixture
def folder_of_files(tmp_path):
    """Photographs and label maps as files, five to train on, four of them in an epoch."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    for split, count in (("train", 5), ("validation", 3), ("test", 2)):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for index in range(count):
            ids = rng.integers(0, 5, (4, 4), np.uint8).repeat(8, 0).repeat(12, 1)
            Image.fromarray(np.stack([ids * 50] * 3, axis=-1)).save(folder / split / "images" / f"{index}.png")
            Image.fromarray(ids).save(folder / split / "masks" / f"{index}.png")
    (folder / "classes.txt").write_text("sky\nroad\ntree\ncar\npole\n")
    return folder


@pytest.fixture
def before_step(monkeypatch):
    """Has something happen just before an optimiser step, counted from 1, reads its images; returns what was waited."""
    waited = []

    def install(step: int, happen) -> list:
        get_batch_samples = SegmentationTrainer.get_batch_samples

        def get(self, *args):
            if self.state.global_step == step - 1:
                happen()
            return get_batch_samples(self, *args)

        monkeypatch.setattr(SegmentationTrainer, "get_batch_samples", get)
        monkeypatch.setattr(samples_module.time, "sleep", waited.append)
        return waited

    return install


@pytest.mark.parametrize("workers", [0, 1])
def test_photographs_that_cannot_be_read_any_more_end_a_run(
    workers, folder_of_files, backbone_folder, tmp_path, before_step, capsys
):
    """Also where another process reads them, whose stack nobody needs."""

    def damage():
        for path in (folder_of_files / "train" / "images").iterdir():
            path.write_bytes(path.read_bytes()[:60])

    before_step(3, damage)
    assert run(folder_of_files, backbone_folder, tmp_path / "run", f"num_workers={workers}") == 1
    message = capsys.readouterr().err
    [line] = [each for each in message.splitlines() if each.startswith("error: ")]
    assert "of split train cannot be read: photograph" in line and "images/" in line
    assert "Traceback" not in message and "worker" not in message
    assert is_complete(tmp_path / "run" / "checkpoint-2")


def test_they_are_read_again_before_that(folder_of_files, backbone_folder, tmp_path, before_step, monkeypatch):
    away = folder_of_files / "train" / "images"
    waited = before_step(3, lambda: away.rename(away.with_name("away")))

    def come_back(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            away.with_name("away").rename(away)

    monkeypatch.setattr(samples_module.time, "sleep", come_back)
    assert run(folder_of_files, backbone_folder, tmp_path / "run") == 0
    assert waited == [0.5, 2.0]


def test_they_are_left_out_where_the_recipe_says_so(folder_of_files, backbone_folder, tmp_path, before_step, capsys):
    """Of validation images, one is left, and decides the figures alone; without any photograph no weight moves."""

    def damage():
        for path in (folder_of_files / "train" / "masks").iterdir():
            path.write_bytes(b"")
        for name in ("0.png", "2.png"):
            (folder_of_files / "validation" / "images" / name).unlink()

    before_step(3, damage)
    assert run(folder_of_files, backbone_folder, tmp_path / "run", "skip_unreadable=true", "keep_best=false") == 0
    message = capsys.readouterr().err
    assert "left out: Image" in message and "of split validation cannot be read: photograph" in message
    before, after = (load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors") for step in (5, 6))
    assert all(torch.isfinite(each).all() for each in after.values())
    assert all(torch.equal(after[name], each) for name, each in before.items() if not name.startswith("decoder"))
    log = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    present = {name for each in log if each["step"] == 6 for name in each if name.startswith("eval_iou_")}
    ids = np.unique(np.array(Image.open(folder_of_files / "validation" / "masks" / "1.png")))
    assert {f"eval_iou_{('sky', 'road', 'tree', 'car', 'pole')[index]}" for index in ids} <= present


def test_a_loss_that_is_not_finite_names_the_images_of_its_step(
    folder_of_files, backbone_folder, tmp_path, monkeypatch, capsys
):
    compute_loss = SegmentationTrainer.compute_loss
    seen = []

    def spoil(self, *args, **kwargs):
        loss = compute_loss(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 else loss

    read = samples_module.SegmentationDataset.__getitem__

    def note(self, index):
        if self.split == "train":
            seen.append(self.name(index))
        return read(self, index)

    monkeypatch.setattr(SegmentationTrainer, "compute_loss", spoil)
    monkeypatch.setattr(samples_module.SegmentationDataset, "__getitem__", note)
    assert run(folder_of_files, backbone_folder, tmp_path / "run", "batch_size=2") == 1
    message = capsys.readouterr().err
    # The last two that were read are those of the fourth step.
    assert f"Its images are {seen[-2]}, {seen[-1]}. Lower learning_rate" in message
    assert "the weights of step 3 are in" in message


def test_weights_that_are_not_finite_become_no_checkpoint(
    dataset_folder, backbone_folder, tmp_path, monkeypatch, capsys
):
    """A finite loss may have gradients that are not, and the loss of the next step would be too late."""
    check_loss = SegmentationTrainer.check_loss

    def spoil(self):
        check_loss(self)
        if self.state.global_step == 2:
            self.model.decoder.mask_norm.weight.grad[1] = float("inf")

    monkeypatch.setattr(SegmentationTrainer, "check_loss", spoil)
    assert run(dataset_folder, backbone_folder, tmp_path) == 1
    message = capsys.readouterr().err
    assert (
        "1 of the weights' tensors are not finite after optimiser step 3, such as decoder.mask_norm.weight" in message
    )
    assert f"the weights of step 2 are in {tmp_path}/checkpoint-2" in message
    assert not is_complete(tmp_path / "checkpoint-3")
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nframe #0: ..."),
    ],
    ids=["system", "safetensors", "torch"],
)
def test_a_full_disk_keeps_the_checkpoint_before(error, dataset_folder, backbone_folder, tmp_path, monkeypatch, capsys):
    """Nothing is left of the one that did not fit, and the run goes on from the one before when there is room."""
    save = torch.save

    def fill(content, path, *args, **kwargs):
        if "checkpoint-3" in str(path):
            raise error
        save(content, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill)
        assert run(dataset_folder, backbone_folder, tmp_path) == 1
    [line] = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
    assert "The checkpoint of optimiser step 3 cannot be written" in line
    assert f"the weights of step 2 are in {tmp_path}/checkpoint-2. Make room there" in line
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert run(dataset_folder, backbone_folder, tmp_path, resume=True) == 0


def test_the_best_checkpoint_is_refused_where_it_was_damaged(
    dataset_folder, backbone_folder, tmp_path, monkeypatch, capsys
):
    finish = SegmentationTrainer.finish

    def damage(self):
        path = tmp_path / f"checkpoint-{self.state.best_global_step}" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        return finish(self)

    monkeypatch.setattr(SegmentationTrainer, "finish", damage)
    assert run(dataset_folder, backbone_folder, tmp_path, "keep_best=true") == 1
    assert "which holds the best weights, is damaged (model.safetensors is not what" in capsys.readouterr().err
    assert not (tmp_path / "model.safetensors").exists()


def test_damaged_features_are_named_and_computed_again(dataset_folder, backbone_folder, tmp_path, monkeypatch, capsys):
    fields = ["cache_features=true", "window_size=none", "window_stride=none"]

    train_once = SegmentationTrainer.train

    def damage(self, *args, **kwargs):
        self.train_dataset._path(1).write_bytes(b"\xff" * 64)
        return train_once(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTrainer, "train", damage)
        assert run(dataset_folder, backbone_folder, tmp_path, *fields) == 1
    [line] = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
    path = line.partition(" in ")[2].partition(" cannot be read")[0]
    assert path.endswith("000001.safetensors") and "delete that file" in line
    os.unlink(path)
    assert run(dataset_folder, backbone_folder, tmp_path, *fields, resume=True) == 0
