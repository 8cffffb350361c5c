"""The command line, run as a user does, on tiny models."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import save_model, tiny_model
from pycocotools import mask as coco_mask

from depict_hf import DepictForSemanticSegmentation, DepictImageProcessor, hub, loading
from depict_hf.cli import main
from depict_hf.demo import answers
from depict_hf.inference import segment
from depict_hf.loading import load_model, native_dtype, override_protocol
from depict_hf.photo_files import MAX_PHOTO_PIXELS
from depict_hf.weight_files import file_checksum

PUBLISHED = Path(__file__).parent / "data" / "published"
SIZE = {"shortest_edge": 32}


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    names = {0: "sky", 1: "road", 2: "car", 3: "tree", 4: "sign"}
    tiny_model("ca", id2label=names, label2id={v: k for k, v in names.items()}).save_pretrained(folder)
    DepictImageProcessor(size=SIZE).save_pretrained(folder)
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
    assert main(["segment", str(photo), *arguments, "--alpha", "1", "--dtype", "float32"]) == 0

    model = DepictForSemanticSegmentation.from_pretrained(model_folder)
    processor = DepictImageProcessor.from_pretrained(model_folder)
    [expected] = segment(model, processor, [photo], scales=(1.0, 1.5), flip=True)
    labels = PIL.Image.open(output / "photo_labels.png")
    assert np.array_equal(np.array(labels), expected.numpy())
    picture = np.array(PIL.Image.open(output / "photo_overlay.png"))
    drawn = (picture[:40, :60] == np.array(labels.convert("RGB"))).all(axis=-1)
    assert drawn.mean() > 0.5  # all but the lines between the classes
    assert picture.shape[0] > 40

    printed = capsys.readouterr().out
    largest = int(torch.bincount(expected.flatten()).argmax())
    share = (expected == largest).float().mean().item()
    assert printed.splitlines()[1].split() == [f"{100 * share:.2f}", "%", model.config.id2label[largest]]
    assert printed.splitlines()[-1] == "The model gives every pixel one of 5 classes: sky, road, car, tree, sign."


@pytest.mark.parametrize(
    ("options", "stride", "scales", "flip"),
    [
        ([], 20, (1.0,), False),
        (["--quality", "balanced"], 20, (1.0,), False),
        (["--quality", "fast"], 32, (1.0,), False),
        (["--quality", "best"], 20, (0.75, 1.0, 1.25), True),
        (["--quality", "fast", "--window-stride", "8"], 8, (1.0,), False),
        (["--quality", "fast", "--window-size", "24"], 24, (1.0,), False),
        (["--quality", "fast", "--window-size", "none"], None, (1.0,), False),
        (["--quality", "best", "--scales", "0.5"], 20, (0.5,), True),
    ],
)
def test_qualities_are_settings(options, stride, scales, flip, tmp_path):
    """Fails if a quality has another protocol than it says, or outranks what is asked for."""
    folder = save_model(tmp_path / "model", window_size=32, window_stride=20)
    photo = save_photo(tmp_path / "photo.png")
    arguments = ["segment", str(photo), "--model", str(folder), "--output", str(tmp_path / "out"), "--format", "npy"]
    assert main([*arguments, "--dtype", "float32", *options]) == 0
    model, processor = load_model(folder)
    model.config.window_size = 24 if "24" in options else None if stride is None else 32
    model.config.window_stride = stride
    [expected] = segment(model, processor, [photo], scales=scales, flip=flip)
    assert np.array_equal(np.load(tmp_path / "out" / "photo_labels.npy"), expected.numpy())


def test_whole_images_are_fast_already_and_best_in_three_sizes(tmp_path):
    folder, photo = save_model(tmp_path / "model"), save_photo(tmp_path / "photo.png")
    maps = {}
    for quality in ("fast", "balanced", "best"):
        arguments = ["segment", str(photo), "--model", str(folder), "--output", str(tmp_path / quality)]
        assert main([*arguments, "--format", "npy", "--quality", quality]) == 0
        maps[quality] = np.load(tmp_path / quality / "photo_labels.npy")
    assert np.array_equal(maps["fast"], maps["balanced"]) and not np.array_equal(maps["best"], maps["balanced"])


def test_one_unreadable_photo_does_not_lose_the_others(model_folder, tmp_path, capsys, monkeypatch):
    first, last = save_photo(tmp_path / "a.png"), save_photo(tmp_path / "c.png")
    (tmp_path / "b.jpg").write_bytes(b"not a photograph")
    cut = save_photo(tmp_path / "cut.png")
    cut.write_bytes(cut.read_bytes()[:200])
    damaged_exif = tmp_path / "exif.webp"
    PIL.Image.new("RGB", (60, 40)).save(damaged_exif, exif=b"Exif\x00\x00MX\x00*\x00\x00\x00\x08\x00\x00")
    huge = tmp_path / "huge.png"
    PIL.Image.new("L", (200, 200)).save(huge)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 10_000)
    photos = [first, tmp_path / "b.jpg", cut, damaged_exif, huge, tmp_path / "missing.png", last]
    arguments = ["--model", str(model_folder), "--output", str(tmp_path / "out")]
    assert main(["segment", *map(str, photos), *arguments]) == 1
    assert sorted(path.name for path in (tmp_path / "out").glob("*_labels.png")) == ["a_labels.png", "c_labels.png"]
    errors = capsys.readouterr().err
    for path in photos[1:-1]:
        assert f"depict: {path}: " in errors


@pytest.mark.parametrize(
    ("option", "message"),
    [("--scales=0", "Got scales=(0.0,), needed one or more positive"), ("--alpha=2", "Got alpha=2.0, needed 0")],
)
def test_wrong_options_are_not_blamed_on_photos(option, message, model_folder, tmp_path, capsys):
    """Fails if every ValueError counts as an unreadable photograph: the second would be tried, with status 1."""
    photos = [str(save_photo(tmp_path / name)) for name in ("a.png", "b.png")]
    assert main(["segment", *photos, "--model", str(model_folder), "--output", str(tmp_path / "out"), option]) == 2
    errors = capsys.readouterr().err
    assert f"depict: {message}" in errors and errors.count(message) == 1


def test_folders_and_equal_names(model_folder, tmp_path):
    """Names that differ only in case count as equal, since some file systems take them so; one file counts once."""
    save_photo(tmp_path / "day" / "street.jpg", seed=1)
    save_photo(tmp_path / "night" / "Street.PNG", seed=2)
    (tmp_path / "night" / "notes.txt").write_text("no photograph")
    output = tmp_path / "out"
    folders = [str(tmp_path / "day"), str(tmp_path / "night"), str(tmp_path / "day" / "street.jpg")]
    assert main(["segment", *folders, "--model", str(model_folder), "--output", str(output)]) == 0
    names = {path.name for path in output.glob("*_labels.png")}
    assert names == {"street_labels.png", "Street_2_labels.png"}
    maps = [np.array(PIL.Image.open(output / name)) for name in sorted(names)]
    assert not np.array_equal(*maps)


def test_photos_are_not_overwritten(model_folder, tmp_path, capsys):
    photo, mask = save_photo(tmp_path / "a.png"), save_photo(tmp_path / "a_labels.png")
    before = mask.read_bytes()
    assert main(["segment", str(photo), str(mask), "--model", str(model_folder), "--output", str(tmp_path)]) == 2
    assert "a_labels.png is one of the photographs" in capsys.readouterr().err
    assert mask.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["segment", "EMPTY"], "holds no image files"),
        (["segment", "PHOTO", "--model", "EMPTY"], "cannot load the model"),
        (["segment", "PHOTO", "--model", "EMPTY", "--backend", "onnxruntime"], "EMPTY holds no model.onnx; make such"),
        (["export", "EMPTY", "OUT"], "cannot load the model"),
        (["export", "EMPTY", "EMPTY/.."], "is not an empty folder"),
        (["segment", "PHOTO"], "carries no model; name one"),
        (["convert", "EMPTY", "OUT"], "checkpoint.pth does not exist"),
        (["convert", "EMPTY", "EMPTY/.."], "is not an empty folder"),
        (["convert", "EMPTY", "PHOTO"], "is not an empty folder"),
    ],
)
def test_commands_that_cannot_start(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading, "DEFAULT_MODEL", tmp_path / "default_model")
    (tmp_path / "EMPTY").mkdir()
    save_photo(tmp_path / "PHOTO.png")
    paths = {"PHOTO": str(tmp_path / "PHOTO.png")}
    paths |= {name: str(tmp_path / name) for name in ("EMPTY", "OUT", "EMPTY/..")}
    assert main([paths.get(argument, argument) for argument in arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("depict: ") and message in errors


def change_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        # transformers fills these with random numbers, and drops those, with no more than a log entry.
        (lambda folder: change_config(folder, num_hidden_layers=3), "missing_keys: encoder.layers.2"),
        (lambda folder: change_config(folder, num_hidden_layers=1), "unexpected_keys: encoder.layers.1"),
        (lambda folder: change_config(folder, intermediate_size=96), "cannot load the model"),
        (lambda folder: change_config(folder, patch_size="small"), "'patch_size' expected int"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"not weights"), "cannot load the model"),
    ],
)
def test_damaged_models_are_refused(damage, message, model_folder, tmp_path, capsys):
    damage(model_folder)
    output = tmp_path / "out"
    photo = save_photo(tmp_path / "photo.png")
    assert main(["segment", str(photo), "--model", str(model_folder), "--output", str(output)]) == 2
    errors = capsys.readouterr().err
    assert f"{model_folder}" in errors and message in errors
    assert not output.exists()


@pytest.mark.parametrize("options", [[], ["--scales", "1", "1.5", "--flip"]])
def test_exported_models_label_as_pytorch_does(options, tmp_path, capsys):
    """Photographs of another shape than the window, which is what the file takes."""
    model, image_processor = tiny_model("linear", window_size=32, window_stride=20), DepictImageProcessor(size=SIZE)
    model.save_pretrained(tmp_path / "model")
    image_processor.save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "onnx")]) == 0
    assert "model.onnx: pixel_values of 32 x 32 pixels, in batches, to logits" in capsys.readouterr().out

    photo = save_photo(tmp_path / "photo.png")
    for folder, backend in (("model", "pytorch"), ("onnx", "onnxruntime")):
        arguments = ["--model", str(tmp_path / folder), "--backend", backend, "--output", str(tmp_path / backend)]
        dtype = ["--dtype", "float32"] if backend == "pytorch" else []
        assert main(["segment", str(photo), *arguments, *options, *dtype]) == 0
    maps = [np.array(PIL.Image.open(tmp_path / name / "photo_labels.png")) for name in ("pytorch", "onnxruntime")]
    assert len(np.unique(maps[0])) > 2
    assert (maps[0] == maps[1]).mean() > 0.999


def test_export_passes_its_options_on(model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--format", "torch-export", "--size", "40", "56", "--labels"]
    assert main(["export", str(model_folder), str(out), *arguments]) == 0
    assert "model.pt2: pixel_values of 40 x 56 pixels, in batches, to logits, labels" in capsys.readouterr().out
    outputs = torch.export.load(out / "model.pt2").module()(torch.zeros(1, 3, 40, 56))
    assert outputs["logits"].shape == (1, 5, 5, 7) and outputs["labels"].shape == (1, 40, 56)


def test_onnx_without_its_packages(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", str(model_folder), str(tmp_path / "out")]) == 2
    assert "depict: The package onnxscript is needed for ONNX" in capsys.readouterr().err


def test_unknown_devices_are_refused(model_folder, tmp_path, capsys):
    photo = save_photo(tmp_path / "photo.png")
    assert main(["segment", str(photo), "--model", str(model_folder), "--device", "abacus"]) == 2
    assert "depict: cannot load the model" in capsys.readouterr().err


def test_convert_writes_a_model_that_segments(tmp_path, capsys, monkeypatch):
    uploads = []
    monkeypatch.setattr(hub, "push", lambda folder, repo: uploads.append((folder, repo)) or "ADDRESS")
    out = tmp_path / "out"
    assert main(["convert", str(PUBLISHED / "ca_vit"), str(out), "--push-to-hub", "me/ca"]) == 0
    printed = capsys.readouterr().out
    assert "decoder ca, 9 classes" in printed and printed.endswith("Uploaded: ADDRESS\n")
    assert uploads == [(out, "me/ca")]
    record = json.loads((out / "conversion.json").read_text())
    assert record["checkpoint_sha256"] == file_checksum(PUBLISHED / "ca_vit" / "checkpoint.pth")
    assert record["name"] == "ca_vit" and str(PUBLISHED) not in json.dumps(record)

    photo = save_photo(tmp_path / "photo.png")
    assert main(["segment", str(photo), "--model", str(out), "--output", str(tmp_path / "maps")]) == 0
    assert PIL.Image.open(tmp_path / "maps" / "photo_labels.png").size == (60, 40)


def test_convert_reads_a_variant_from_elsewhere(tmp_path):
    """Nothing is uploaded unless asked for, and the file named is the one that is read."""
    shutil.copy(PUBLISHED / "ca_vit" / "checkpoint.pth", tmp_path / "weights.pth")
    text = (PUBLISHED / "ca_vit" / "variant.yml").read_text()
    assert "window_stride: " in text
    (tmp_path / "other.yml").write_text(text.replace("window_stride: ", "window_stride: 1 # "))
    arguments = [str(tmp_path / "weights.pth"), str(tmp_path / "out"), "--variant", str(tmp_path / "other.yml")]
    assert main(["convert", *arguments, "--protocol", "training"]) == 0
    assert DepictForSemanticSegmentation.from_pretrained(tmp_path / "out").config.window_stride == 1


FORMATS = "overlay,png,npy,coco,geojson"


def test_every_format_shows_the_same_map(model_folder, tmp_path, capsys):
    """And with --classes, pixels of other classes are 255 in label maps, and nothing elsewhere."""
    photo, out = save_photo(tmp_path / "photo.png"), tmp_path / "out"
    assert main(["segment", str(photo), "--model", str(model_folder), "--output", str(out), "--format", FORMATS]) == 0
    ids = np.load(out / "photo_labels.npy")
    assert ids.dtype == np.uint8 and ids.shape == (40, 60)
    assert np.array_equal(np.array(PIL.Image.open(out / "photo_labels.png")), ids)
    coco = json.loads((out / "photo_coco.json").read_text())
    assert coco["images"] == [{"id": 1, "file_name": "photo.png", "width": 60, "height": 40}]
    for annotation in coco["annotations"]:
        assert np.array_equal(coco_mask.decode(annotation["segmentation"]), ids == annotation["category_id"])
    features = json.loads((out / "photo.geojson").read_text())["features"]
    assert sum(each["properties"]["area"] for each in features) == 40 * 60

    some = tmp_path / "some"
    arguments = ["--model", str(model_folder), "--output", str(some), "--classes", "Road, tree", "--format", "npy"]
    capsys.readouterr()
    assert main(["segment", str(photo), *arguments, "--format", "geojson", "--json"]) == 0
    assert sorted(each.name for each in some.iterdir()) == ["photo.geojson", "photo_labels.npy"]
    assert np.array_equal(np.load(some / "photo_labels.npy"), np.where((ids == 1) | (ids == 3), ids, 255))
    assert {each["properties"]["class"] for each in json.loads((some / "photo.geojson").read_text())["features"]} == {
        "road",
        "tree",
    }
    [line] = capsys.readouterr().out.splitlines()
    assert set(json.loads(line)["shares"]) == {"road", "tree"}


@pytest.mark.parametrize(("bits", "options"), [(8, []), (16, ["16"])])
def test_confidences_are_those_of_the_engine(bits, options, model_folder, tmp_path, capsys):
    """Over scales and with a temperature; fails if confidence and margin are swapped, or of another protocol."""
    model, image_processor = load_model(model_folder)
    model.config.temperature = 3.0
    model.save_pretrained(model_folder)
    photo, out = save_photo(tmp_path / "photo.png"), tmp_path / "out"
    arguments = ["--model", str(model_folder), "--output", str(out), "--dtype", "float32", "--scales", "1", "1.5"]
    assert main(["segment", str(photo), *arguments, "--json", "--format", "png", "--confidence", *options]) == 0
    [expected] = segment(model, image_processor, [photo], (1.0, 1.5), return_confidence=True)
    assert np.array_equal(np.array(PIL.Image.open(out / "photo_labels.png")), expected.labels.numpy())
    for name, values in (("confidence", expected.confidence), ("margin", expected.margin.clamp(min=0))):
        written = np.array(PIL.Image.open(out / f"photo_{name}.png"))
        assert written.dtype == (np.uint8 if bits == 8 else np.uint16)
        assert np.abs(written / (2**bits - 1) - values.numpy()).max() <= 0.51 / (2**bits - 1)
    record = json.loads(capsys.readouterr().out)
    assert record["mean_confidence"] == pytest.approx(float(expected.confidence.mean()), abs=1e-5)
    names = ("labels", "confidence", "margin", "confidence_picture")
    assert record["files"] == [str(out / f"photo_{name}.png") for name in names]
    assert sorted(each.name for each in out.iterdir()) == sorted(f"photo_{name}.png" for name in names)


def test_photographs_behind_the_confidence_are_not_taken_for_bits(capsys):
    with pytest.raises(SystemExit):
        main(["segment", "--confidence", "photo.jpg"])
    assert "'photo.jpg' is neither 8 nor 16; name photographs before --confidence" in capsys.readouterr().err


def test_confidences_do_not_overwrite_photographs(model_folder, tmp_path, capsys):
    photos = [str(save_photo(tmp_path / name)) for name in ("a.png", "a_margin.png")]
    assert main(["segment", *photos, "--output", str(tmp_path), "--model", str(model_folder), "--confidence"]) == 2
    assert "a_margin.png is one of the photographs and would be overwritten" in capsys.readouterr().err


def test_json_lines_are_all_that_is_printed(model_folder, tmp_path, capsys):
    photos = [save_photo(tmp_path / "a.png"), tmp_path / "missing.png", save_photo(tmp_path / "b.png", seed=1)]
    arguments = ["--model", str(model_folder), "--output", str(tmp_path / "out"), "--json"]
    assert main(["segment", *map(str, photos), *arguments]) == 1
    captured = capsys.readouterr()
    first, error, second = map(json.loads, captured.out.splitlines())
    assert "gives every pixel one of 5 classes" in captured.err
    assert [first["file"], error["file"], second["file"]] == list(map(str, photos))
    assert set(error) == {"file", "error"}
    labels = np.array(PIL.Image.open(second["files"][1]))
    assert (second["width"], second["height"]) == (60, 40) and second["seconds"] >= 0
    for index, name in enumerate(["sky", "road", "car", "tree", "sign"]):
        if name in second["shares"]:
            assert second["shares"][name] == pytest.approx((labels == index).mean(), abs=1e-6)
            left, top, right, bottom = second["boxes"][name]
            rows, columns = np.nonzero(labels == index)
            assert (left, top, right - 1, bottom - 1) == (columns.min(), rows.min(), columns.max(), rows.max())


def test_sub_folders_are_mirrored(model_folder, tmp_path):
    """Not searched unless asked; results of an earlier run inside the folder are not taken for photographs."""
    root = tmp_path / "photos"
    for name in ("a.jpg", "day/b.jpg", "day/b.png", "night/deep/b.jpg"):
        save_photo(root / name)
    output = root / "segmented"
    arguments = ["segment", str(root), "--model", str(model_folder), "--output", str(output), "--format", "png"]
    assert main(arguments) == 0
    assert [str(each.relative_to(output)) for each in output.rglob("*.png")] == ["a_labels.png"]
    for _ in range(2):
        assert main([*arguments, "--recursive", "--overwrite"]) == 0
        assert {str(each.relative_to(output)) for each in output.rglob("*.png")} == {
            "a_labels.png",
            "day/b_labels.png",
            "day/b_2_labels.png",
            "night/deep/b_labels.png",
        }


def test_a_photograph_on_standard_input(model_folder, tmp_path, capsys, monkeypatch):
    photo = save_photo(tmp_path / "photo.jpg")
    arguments = ["--model", str(model_folder), "--output", str(tmp_path / "out"), "--format", "npy", "--json"]
    assert main(["segment", str(photo), *arguments]) == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(photo.read_bytes())))
    assert main(["segment", "-", *arguments]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[1])["file"] == "-"
    maps = [np.load(tmp_path / "out" / f"{name}_labels.npy") for name in ("photo", "stdin")]
    assert np.array_equal(*maps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "road,lake"], "'lake' is none of the model's classes: sky, road, car, tree, sign"),
        (["--window-stride", "8"], "Got window_stride=8 for whole images"),
        (["--max-batch-pixels", "0"], "Got max_batch_pixels=0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, model_folder, tmp_path, capsys):
    photo = save_photo(tmp_path / "photo.png")
    arguments = ["--model", str(model_folder), "--output", str(tmp_path / "out"), *options]
    assert main(["segment", str(photo), *arguments]) == 2
    assert f"depict: {message}" in capsys.readouterr().err


def test_the_protocol_can_be_changed(model_folder, tmp_path):
    """As `override_protocol` does it; fails if an option is not passed on."""
    photo = save_photo(tmp_path / "photo.png")
    arguments = ["--model", str(model_folder), "--output", str(tmp_path / "out"), "--format", "npy"]
    options = ["--size", "48", "--window-size", "32", "--window-stride", "16", "--max-batch-pixels", "3000"]
    options += ["--dtype", "float32"]
    assert main(["segment", str(photo), *arguments, *options]) == 0
    model, image_processor = load_model(model_folder)
    override_protocol(model, image_processor, 48, 32, 16)
    [expected] = segment(model, image_processor, [photo])
    assert np.array_equal(np.load(tmp_path / "out" / "photo_labels.npy"), expected.numpy())


def test_dtype_is_the_processors_own_unless_told(model_folder, tmp_path, capsys):
    """Fails if --dtype auto is not the default, or does not say what it took."""
    photo, native = save_photo(tmp_path / "photo.png"), str(native_dtype()).removeprefix("torch.")
    for options, dtype in (([], native), (["--dtype", "float32"], "float32")):
        arguments = ["--model", str(model_folder), "--output", str(tmp_path / dtype), "--device", "cpu", *options]
        assert main(["segment", str(photo), *arguments]) == 0
        assert f"depict: computes in {dtype} on cpu" in capsys.readouterr().err


def test_several_processes_write_what_one_writes(model_folder, tmp_path):
    """Names that clash, and a photograph that cannot be read, whose error is the status of all, come out alike."""
    root = tmp_path / "photos"
    for index, name in enumerate(["a.jpg", "a.png", "b.jpg", "day/a.jpg", "day/c.jpg"]):
        save_photo(root / name, seed=index)
    (root / "damaged.jpg").write_bytes(b"no photograph")
    options = ["--model", str(model_folder), "--recursive", "--format", FORMATS]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["segment", str(root), "--output", str(one), *options]) == 1
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "depict_hf"]
    result = subprocess.run(
        [*torchrun, "segment", str(root), "--output", str(two), *options, "--device", "cpu"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert result.returncode != 0 and "damaged.jpg" in result.stderr
    files = [{str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.*")} for out in (one, two)]
    assert len(files[0]) == 5 * 5 and files[0].keys() == files[1].keys()
    assert files[0] == files[1]
    assert result.stdout.count("gives every pixel one of") == 1


def test_training_commands_are_passed_on(capsys):
    for command in ("train", "evaluate", "calibrate"):
        with pytest.raises(SystemExit) as status:
            main([command, "--help"])
        assert status.value.code == 0
        assert f"usage: depict {command}" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "limit"), [("segment", MAX_PHOTO_PIXELS), ("demo", answers.MAX_PHOTO_PIXELS)])
def test_help_gives_the_limits_that_hold(command, limit, capsys):
    """The help is printed before what has the limits is imported, so that it has them a second time."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"({limit})" in capsys.readouterr().out


def test_training_that_is_not_installed_says_so(capsys, monkeypatch):
    for name in ("training.own_classes", "depict_hf.training", "depict_hf.training.own_classes"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["train"]) == 2
    assert "`depict train` is not part of this installation" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["-m", "depict_hf", "--help"], ["-m", "depict_hf", "--version"]])
def test_help_and_version_come_at_once(command, tmp_path):
    """Fails if anything heavy is imported before it is known what to do; twice the time promised, for busy machines."""
    began = time.monotonic()
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 1
    assert "depict" in result.stdout


@pytest.mark.parametrize(("suffix", "write"), [(".txt", "\n".join), (".json", lambda names: json.dumps(names))])
def test_convert_says_what_it_did(tmp_path, capsys, suffix, write):
    names = [f"kind {index}" for index in range(9)]
    (tmp_path / f"names{suffix}").write_text(write(names))
    arguments = [str(PUBLISHED / "ca_vit"), str(tmp_path / "out"), "--class-names", str(tmp_path / f"names{suffix}")]
    assert main(["convert", *arguments, "--im-size", "96"]) == 0
    printed = capsys.readouterr()
    for text in (
        "decoder ca, 9 classes",
        f"class names: read from {tmp_path / f'names{suffix}'}",
        "encoder: vit_tiny_patch16_384, 2 layers of width 48, patches of 16 pixels",
        "protocol: published, from the settings published for ade20k",
        "size {'shortest_edge': 96, 'longest_edge': 384}, window_size 64, window_stride 32",
        "parameters dropped: encoder.head.bias, encoder.head.weight",
    ):
        assert text in printed.out
    assert printed.err.count("depict:") == 0
    config = DepictForSemanticSegmentation.from_pretrained(tmp_path / "out").config
    assert config.id2label == dict(enumerate(names))


def test_convert_warns_of_a_data_set_without_published_figures(tmp_path, capsys):
    text = (PUBLISHED / "ca_vit" / "variant.yml").read_text()
    (tmp_path / "other.yml").write_text(text.replace("dataset: ade20k", "dataset: kitti"))
    arguments = [str(PUBLISHED / "ca_vit"), str(tmp_path / "out"), "--variant", str(tmp_path / "other.yml")]
    assert main(["convert", *arguments]) == 0
    assert capsys.readouterr().err.count("The data set kitti is none of those that the published figures are for") == 1
