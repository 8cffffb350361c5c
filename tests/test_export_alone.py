"""Exported files as their users meet them: photographs in, label maps out, without torch, transformers or depict_hf."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import PIL.Image
import pytest
import torch
from conftest import tiny_model
from transformers import Dinov2Config

import depict_hf
from depict_hf import DepictImageProcessor, cli
from depict_hf.export import TOLERANCES, check, export_model, graph, writing
from depict_hf.inference import load_photo, segment
from depict_hf.loading import load_model, override_protocol
from depict_hf.onnx_backend import load_onnx

STREET = Path(__file__).parent / "data" / "street.jpg"
NAMES = ("sky", "road", "tree", "car", "pole")
EXACT = {"atol": 1e-4, "rtol": 1e-4}

# The example of the README, behind a wall.
ALONE = """
import sys

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "transformers", "depict_hf"):
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, Wall())
model, photo_path, out = sys.argv[1:]

import json
import numpy as np
import onnxruntime
import PIL.Image
import PIL.ImageOps

session = onnxruntime.InferenceSession(model)
about = session.get_modelmeta().custom_metadata_map
names = json.loads(about["class_names"])
photo = PIL.ImageOps.exif_transpose(PIL.Image.open(photo_path)).convert("RGB")
[labels] = session.run(["labels"], {"pixel_values": np.asarray(photo)[None]})[0]
for index, count in enumerate(np.bincount(labels.ravel(), minlength=len(names))):
    print(f"{names[index]:12} {count / labels.size:6.1%}")
PIL.Image.fromarray(labels).save(out)
"""


def layers(**overrides):
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    one = {"num_hidden_layers": 1, "decoder_num_layers": 1, "decoder_cross_num_layers": 1}
    return tiny_model(overrides.pop("decoder_type", "sa"), **(names | one | overrides))


def segment_alone(path: Path, out: Path, photo: Path = STREET) -> np.ndarray:
    command = [sys.executable, "-c", ALONE, str(path), str(photo), str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) > 1
    return np.array(PIL.Image.open(out))


def run(path: Path, values: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"pixel_values": values}), strict=True))


def agree(labels, expected) -> float:
    assert np.shape(labels) == np.shape(expected)
    return (np.asarray(labels) == np.asarray(expected)).mean()


@pytest.fixture(scope="module")
def whole_photographs(tmp_path_factory):
    """A model with windows whose file takes photographs as they are, and what it was made from."""
    folder = tmp_path_factory.mktemp("photographs")
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, mlp_ratio=2, image_size=32, patch_size=8,
        layerscale_value=1.0, out_indices=[1],
    )  # fmt: skip
    model = layers(backbone_config=config, window_size=36, window_stride=20)
    image_processor = DepictImageProcessor(
        size={"shortest_edge": 50}, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.1)
    )
    exported = export_model(
        model, image_processor, folder, labels=True, dynamic=True, preprocess=True, license="cc-by-4.0"
    )
    return model, image_processor, exported


def photographs() -> list[np.ndarray]:
    """Larger and smaller than the protocol's size, landscape, portrait and square, one of the size itself."""
    street = load_photo(STREET)
    sizes = [(480, 360), (120, 333), (31, 40), (50, 50), (500, 61)]
    return [np.asarray(street.resize(size)) for size in sizes]


def test_photographs_of_any_size_are_labelled_as_by_segment(whole_photographs):
    """Resizing, normalisation, the order of channels, windows and their average: all in the file."""
    model, image_processor, exported = whole_photographs
    expected = segment(model, image_processor, photographs())
    for photo, labels in zip(photographs(), expected, strict=True):
        outputs = run(exported.path, np.stack([photo, photo[::-1]]))
        assert outputs["logits"].shape == (2, 5, *photo.shape[:2]) and outputs["labels"].dtype == np.uint8
        assert agree(outputs["labels"][0], labels) > 0.99
        assert agree(outputs["labels"], outputs["logits"].argmax(axis=1)) > 0.9999
    assert len(expected[0].unique()) > 2


def test_without_torch_transformers_and_this_package(whole_photographs, tmp_path):
    model, image_processor, exported = whole_photographs
    [expected] = segment(model, image_processor, [STREET])
    assert agree(segment_alone(exported.path, tmp_path / "labels.png"), expected) > 0.999


def test_the_file_says_what_it_is(whole_photographs):
    _, _, exported = whole_photographs
    file = onnx.load(exported.path)
    onnx.checker.check_model(file)
    assert [(each.domain, each.version) for each in file.opset_import] == [("", 18)] and file.ir_version == 8
    # Exporters write this machine's folders and source code into every node.
    assert not [node for node in file.graph.node if node.metadata_props or node.doc_string]
    inside = {each.key: each.value for each in file.metadata_props}
    beside = json.loads((exported.path.parent / "model.json").read_text())
    for about in (
        inside,
        {name: value if isinstance(value, str) else json.dumps(value) for name, value in beside.items()},
    ):
        assert json.loads(about["class_names"]) == list(NAMES)
        assert json.loads(about["image_mean"]) == [0.4, 0.5, 0.6] and json.loads(about["image_std"]) == [0.2, 0.3, 0.1]
        assert json.loads(about["size"]) == {"shortest_edge": 50}
        assert (about["license"], about["protocol"], about["window_size"]) == ("cc-by-4.0", "windows inside", "36")
        assert json.loads(about["input"])["layout"] == ["batch", "height", "width", "channels"]
        assert about["version"] and "as they are" in about["usage"] and "every 20" in about["usage"]
    assert beside["agreement"]["equal_labels"] > 0.99
    [pixel_values], outputs = file.graph.input, file.graph.output
    assert pixel_values.name == "pixel_values" and [each.name for each in outputs] == ["logits", "labels"]
    sides = [side.dim_param or side.dim_value for side in pixel_values.type.tensor_type.shape.dim]
    assert sides == ["batch", "height", "width", 3]


def test_segment_uses_such_files_too(whole_photographs):
    """By the settings beside them, which leave out what the file does; what can no longer be chosen is refused."""
    model, image_processor, exported = whole_photographs
    found, settings = load_model(exported.path.parent, backend="onnxruntime")
    photos = photographs()
    for labels, expected in zip(segment(found, settings, photos), segment(model, image_processor, photos), strict=True):
        assert agree(labels, expected) > 0.99
    for choice in ({"size": 30}, {"window_size": 16}, {"window_size": "none"}, {"window_stride": 8}):
        with pytest.raises(ValueError, match="exported file resizes photographs and cuts windows by itself"):
            override_protocol(found, settings, **choice)
    with pytest.raises(ValueError, match=r"Got torch.float32, but the graph normalises by itself and takes uint8"):
        found(torch.zeros(1, 3, 40, 40))


@torch.no_grad()
def test_windows_inside_without_preprocessing(tmp_path):
    """Images that are smaller than a window on one side or both grow first, as in the published protocol."""
    model = layers(decoder_type="ca", window_size=32, window_stride=20)
    image_processor = DepictImageProcessor(size={"shortest_edge": 50})
    exported = export_model(model, image_processor, tmp_path, dynamic=True)
    generator = torch.Generator().manual_seed(2)
    for shape in ((1, 3, 50, 67), (3, 3, 90, 32), (2, 3, 32, 32), (1, 3, 20, 70), (1, 3, 20, 27), (1, 3, 47, 20)):
        pixel_values = torch.randn(*shape, generator=generator)
        expected = check.reference_logits(model, pixel_values, tuple(shape[2:]), windows=True)
        if max(shape[2:]) > 32:
            torch.testing.assert_close(expected, model(pixel_values).logits, **EXACT)
        found = run(exported.path, pixel_values.numpy())["logits"]
        torch.testing.assert_close(torch.from_numpy(found), expected, **EXACT)
    found = load_onnx(tmp_path)
    options = {"scales": (0.7, 1.2), "flip": True}
    [labels] = segment(found, image_processor, [STREET], **options)
    [expected] = segment(model, image_processor, [STREET], **options)
    assert agree(labels, expected) > 0.999
    with pytest.raises(ValueError, match="exported file cuts windows by itself"):
        override_protocol(found, image_processor, window_size=20)
    with pytest.raises(ValueError, match=r"Got dynamic for format 'torch-export', .* choose .onnx., or drop dynamic"):
        export_model(model, image_processor, tmp_path / "out", "torch-export", dynamic=True)


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ({"shortest_edge": 40, "longest_edge": 60}, (333, 120)),
        ({"shortest_edge": 40, "longest_edge": 60}, (91, 100)),
        ({"height": 30, "width": 44}, (50, 100)),
        ({"shortest_edge": 48}, (480, 361)),
        ({"shortest_edge": 48}, (20, 7)),
    ],
)
def test_sizes_in_the_graph_are_the_image_processors(size, shape):
    assert tuple(graph.resized_sides(shape, size)) == DepictImageProcessor(size=size).resize_size(*shape)


def test_whole_images_with_preprocessing(tmp_path):
    """Models without windows; bounded sizes, and no normalisation where the image processor has none."""
    model = layers(decoder_type="linear")
    image_processor = DepictImageProcessor(size={"shortest_edge": 40, "longest_edge": 60}, do_normalize=False)
    exported = export_model(model, image_processor, tmp_path, preprocess=True, labels=True)
    for photo in photographs()[:3]:
        [expected] = segment(model, image_processor, [photo])
        assert agree(run(exported.path, photo[None])["labels"][0], expected) > 0.99
    assert exported.metadata["protocol"] == "whole image of any size" and exported.metadata["image_mean"] is None


def test_one_window_takes_bytes(tmp_path):
    """Fixed sizes are not resized; `segment` cuts the windows from bytes as well."""
    model = layers(decoder_type="linear", window_size=32, window_stride=20)
    image_processor = DepictImageProcessor(size={"shortest_edge": 50})
    exported = export_model(model, image_processor, tmp_path, preprocess=True)
    assert exported.size == (32, 32) and exported.metadata["protocol"] == "one window"
    assert "resize the shorter side to 50" in exported.metadata["usage"]
    found, settings = load_model(tmp_path, backend="onnxruntime")
    [labels], [expected] = segment(found, settings, [STREET]), segment(model, image_processor, [STREET])
    assert agree(labels, expected) > 0.999


def test_fp16_keeps_inputs_and_outputs(tmp_path):
    model = layers(window_size=32)
    exported = export_model(model, DepictImageProcessor(), tmp_path, fp16=True)
    file = onnx.load(exported.path).graph
    weights = [each for each in file.initializer if len(each.dims) >= 2 and min(each.dims[-2:]) > 5]
    assert {each.data_type for each in weights} == {onnx.TensorProto.FLOAT16}
    assert {each.type.tensor_type.elem_type for each in (*file.input, *file.output)} == {onnx.TensorProto.FLOAT}
    pixel_values = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(pixel_values).logits.numpy()
    difference = abs(run(exported.path, pixel_values.numpy())["logits"] - expected).max()
    assert 0 < difference < 0.02 * abs(expected).max()
    assert exported.metadata["precision"] == "fp16" and model.dtype == torch.float32


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_rounding_that_changes_too_much_is_refused(precision, tmp_path, monkeypatch):
    """The check comes after rounding, not before it."""
    strict = check.Tolerance(1.0, 1e-7)
    monkeypatch.setitem(TOLERANCES, precision, strict)
    message = rf"cannot be exported for computation in {precision} .*the file differs .*; leave {precision} out"
    with pytest.raises(ValueError, match=message):
        export_model(layers(window_size=32), DepictImageProcessor(), tmp_path / "out", **{precision: True})
    assert not list(tmp_path.iterdir())


def test_wrong_order_of_channels_is_refused(tmp_path, monkeypatch):
    """The photograph tells red from blue; noise of equal channels would not."""
    normalized = graph.ExportedGraph._normalized
    monkeypatch.setattr(graph.ExportedGraph, "_normalized", lambda self, *args: normalized(self, *args).flip(1))
    options = {"file_format": "torch-export", "size": (64, 88), "preprocess": True}
    with pytest.raises(ValueError, match="the file differs from the model"):
        export_model(layers(decoder_type="linear"), DepictImageProcessor(), tmp_path, **options)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_nothing_remains_of_an_interrupted_export(error, tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()

    def stop(path, names):
        assert path.is_file()
        raise error

    monkeypatch.setattr(writing, "_runner", stop)
    for folder in (tmp_path / "new", tmp_path / "kept"):
        with pytest.raises((KeyboardInterrupt, ValueError)):
            export_model(layers(decoder_type="linear"), DepictImageProcessor(), folder, "torch-export", size=(32, 32))
    assert [each.name for each in tmp_path.rglob("*")] == ["kept"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"int8": True, "fp16": True}, "Got int8 and fp16; choose one"),
        ({"dynamic": True, "size": (32, 32)}, r"Got dynamic for any size together with size=\(32, 32\)"),
        ({"preprocess": True, "resample": 3}, "resizes by bicubic, but files only bilinearly .* --size"),
        ({"preprocess": True, "do_antialias": True}, "resizes by bilinear with antialiasing, but files"),
        ({"photo": "MISSING"}, "The photograph MISSING cannot be read"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, tmp_path):
    names = ("resample", "do_antialias", "image_mean")
    image_processor = DepictImageProcessor(**{name: options[name] for name in names if name in options})
    options = {name: value for name, value in options.items() if name not in names}
    with pytest.raises(ValueError, match=message):
        export_model(layers(decoder_type="linear"), image_processor, tmp_path / "out", **options)
    with pytest.raises(ValueError, match=r"out\.onnx, which looks like a file; name a folder"):
        export_model(layers(decoder_type="linear"), image_processor, tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_licences_come_from_configuration_and_card(tmp_path):
    model = layers(decoder_type="linear")
    assert writing.find_license(model) == "unknown"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert writing.find_license(loaded) == "unknown"
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A card\n")
    assert writing.find_license(loaded) == "apache-2.0"
    loaded.config.license = "mit"
    assert writing.find_license(loaded) == "mit"
    assert writing.find_license(depict_hf.default_model()[0]) == "cc-by-nc-4.0"


def test_the_command_prints_the_agreement_on_the_users_photograph(tmp_path, capsys):
    layers(decoder_type="linear", window_size=32).save_pretrained(tmp_path / "model")
    DepictImageProcessor(size={"shortest_edge": 40}).save_pretrained(tmp_path / "model")
    options = ["--preprocess", "--format", "torch-export", "--photo", str(STREET), "--license", "mit"]
    assert cli.main(["export", str(tmp_path / "model"), str(tmp_path / "out"), *options]) == 0
    printed = capsys.readouterr().out
    assert "model.pt2: pixel_values of 32 x 32 pixels, in batches, to logits" in printed
    assert "on the given photograph of 480 x 360 pixels: " in printed
    assert "equal labels (at least 99.9% needed)" in printed
    assert "one window" in printed and "licence mit" in printed
    files = {"depict.json": ""}
    torch.export.load(tmp_path / "out" / "model.pt2", extra_files=files)
    assert json.loads(files["depict.json"])["license"] == "mit"


@pytest.mark.slow
def test_the_default_model_without_this_package(tmp_path):
    """As an ordinary user would: export, then onnxruntime, numpy and PIL."""
    out = tmp_path / "out"
    assert cli.main(["export", "default", str(out), "--dynamic", "--preprocess", "--labels"]) == 0
    [expected] = segment(*depict_hf.default_model(), [STREET])
    assert agree(segment_alone(out / "model.onnx", tmp_path / "labels.png"), expected) > 0.999
