"""The command line, run as a user does, on tiny models."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_model

from depict_hf import DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.cli import main
from depict_hf.inference import segment

PUBLISHED = Path(__file__).parent / "data" / "published"


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    names = {0: "sky", 1: "road", 2: "car", 3: "tree", 4: "sign"}
    tiny_model("ca", id2label=names, label2id={v: k for k, v in names.items()}).save_pretrained(folder)
    DepictImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
    return folder


def save_photo(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).resize((60, 40)).save(path)
    return path


def test_pictures_and_table(model_folder, tmp_path, capsys):
    photo = save_photo(tmp_path / "photo.png")
    output = tmp_path / "out"
    arguments = ["--model", str(model_folder), "--output", str(output), "--scales", "1", "1.5", "--flip"]
    assert main(["segment", str(photo), *arguments]) == 0

    model = DepictForSemanticSegmentation.from_pretrained(model_folder)
    processor = DepictImageProcessor.from_pretrained(model_folder)
    [expected] = segment(model, processor, [photo], scales=(1.0, 1.5), flip=True)
    assert np.array_equal(np.array(PIL.Image.open(output / "photo_labels.png")), expected.numpy())
    picture = PIL.Image.open(output / "photo_overlay.png")
    assert picture.width >= 60 and picture.height > 40

    printed = capsys.readouterr().out
    largest = int(torch.bincount(expected.flatten()).argmax())
    share = (expected == largest).float().mean().item()
    assert printed.splitlines()[1].split() == [f"{100 * share:.2f}", "%", model.config.id2label[largest]]


def test_one_unreadable_photo_does_not_lose_the_others(model_folder, tmp_path, capsys):
    first, last = save_photo(tmp_path / "a.png"), save_photo(tmp_path / "c.png")
    (tmp_path / "b.jpg").write_bytes(b"not a photograph")
    cut = save_photo(tmp_path / "cut.png")
    cut.write_bytes(cut.read_bytes()[:200])
    photos = [str(path) for path in (first, tmp_path / "b.jpg", cut, tmp_path / "missing.png", last)]
    assert main(["segment", *photos, "--model", str(model_folder), "--output", str(tmp_path / "out")]) == 1
    assert sorted(path.name for path in (tmp_path / "out").glob("*_labels.png")) == ["a_labels.png", "c_labels.png"]
    errors = capsys.readouterr().err
    for name in ("b.jpg", "cut.png", "missing.png"):
        assert f"{tmp_path / name}: " in errors


def test_folders_and_equal_names(model_folder, tmp_path):
    save_photo(tmp_path / "day" / "street.jpg", seed=1)
    save_photo(tmp_path / "night" / "street.PNG", seed=2)
    (tmp_path / "night" / "notes.txt").write_text("no photograph")
    output = tmp_path / "out"
    folders = [str(tmp_path / "day"), str(tmp_path / "night")]
    assert main(["segment", *folders, "--model", str(model_folder), "--output", str(output)]) == 0
    names = {path.name for path in output.glob("*_labels.png")}
    assert names == {"street_labels.png", "street_2_labels.png"}
    maps = [np.array(PIL.Image.open(output / name)) for name in sorted(names)]
    assert not np.array_equal(*maps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["segment", "EMPTY"], "holds no image files"),
        (["segment", "PHOTO", "--model", "EMPTY"], "EMPTY"),
        (["convert", "EMPTY", "OUT"], "checkpoint.pth does not exist"),
        (["convert", "EMPTY", "EMPTY/.."], "is not empty"),
    ],
)
def test_commands_that_cannot_start(arguments, message, tmp_path, capsys):
    (tmp_path / "EMPTY").mkdir()
    save_photo(tmp_path / "PHOTO.png")
    paths = {"PHOTO": str(tmp_path / "PHOTO.png")}
    paths |= {name: str(tmp_path / name) for name in ("EMPTY", "OUT", "EMPTY/..")}
    assert main([paths.get(argument, argument) for argument in arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("depict: ") and message in errors


def test_convert_writes_a_model_that_segments(tmp_path, capsys, monkeypatch):
    uploads = []
    for kind in (DepictForSemanticSegmentation, DepictImageProcessor):
        monkeypatch.setattr(kind, "push_to_hub", lambda self, repo: uploads.append((type(self).__name__, repo)))
    out = tmp_path / "out"
    assert main(["convert", str(PUBLISHED / "ca_vit"), str(out), "--push-to-hub", "me/ca"]) == 0
    assert "decoder ca, 9 classes" in capsys.readouterr().out
    assert uploads == [("DepictForSemanticSegmentation", "me/ca"), ("DepictImageProcessor", "me/ca")]

    photo = save_photo(tmp_path / "photo.png")
    assert main(["segment", str(photo), "--model", str(out), "--output", str(tmp_path / "maps")]) == 0
    assert PIL.Image.open(tmp_path / "maps" / "photo_labels.png").size == (60, 40)
