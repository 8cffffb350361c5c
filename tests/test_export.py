"""Exported files against the models they came from, and ONNX Runtime behind `segment`."""

import copy
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import DECODER_TYPES, tiny_model
from transformers import Dinov2Config

import depict_hf
from depict_hf import DepictImageProcessor
from depict_hf.export import export_model, writing
from depict_hf.inference import load_photo, segment
from depict_hf.onnx_backend import load_onnx, start_session
from depict_hf.vit import LayerRecord

STREET = Path(__file__).parent / "data" / "street.jpg"
PATCH = 8
# Logits of the tiny models are of order one; graphs add up in another order.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def export_tiny(decoder_type: str = "sa", **overrides):
    """One layer of everything: exporting takes seconds per layer."""
    layers = {"num_hidden_layers": 1, "decoder_num_layers": 1, "decoder_cross_num_layers": 1}
    return tiny_model(decoder_type, **(layers | overrides))


def backbone() -> Dinov2Config:
    return Dinov2Config(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        mlp_ratio=2,
        image_size=32,
        patch_size=PATCH,
        layerscale_value=1.0,
        out_indices=[1],
    )


def random_images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def expected_outputs(model, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of exactly the images, on the patch grid where it fits and else of every pixel, and label maps."""
    height, width = pixel_values.shape[-2:]
    padded = F.pad(pixel_values, (0, -width % PATCH, 0, -height % PATCH))
    logits = model(padded).logits
    full = F.interpolate(logits, padded.shape[-2:], mode="bilinear", align_corners=False)[..., :height, :width]
    return logits if padded.shape == pixel_values.shape else full, full.argmax(dim=1)


def at_pixels(logits: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    return F.interpolate(logits, pixel_values.shape[-2:], mode="bilinear", align_corners=False)


def run(folder: Path, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """The outputs of a folder's ONNX file, by ONNX Runtime alone."""
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {"pixel_values": pixel_values.numpy()})
    return dict(zip(names, map(torch.from_numpy, values), strict=True))


def share_equal(maps: torch.Tensor, others: torch.Tensor) -> float:
    assert maps.shape == others.shape
    return (maps == others).float().mean().item()


@pytest.fixture(scope="module")
def any_size(tmp_path_factory):
    """A model, and its ONNX export for images of any size, with label maps."""
    folder = tmp_path_factory.mktemp("any_size")
    model = export_tiny()
    exported = export_model(model, DepictImageProcessor(size={"shortest_edge": 50}), folder, labels=True)
    assert exported == (folder / "model.onnx", None, ["logits", "labels"])
    return model, folder


@pytest.fixture(scope="module")
def one_window(tmp_path_factory):
    """A model with windows that are no multiples of the patch, and its ONNX export."""
    folder = tmp_path_factory.mktemp("one_window")
    model = export_tiny("ca", window_size=36, window_stride=20)
    exported = export_model(model, DepictImageProcessor(size={"shortest_edge": 50}), folder)
    assert exported.size == (36, 36)
    return model, folder


# The traced grid is 11 x 13; among these are the grid of the position embeddings (4 x 4) and a single row.
@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, 3, 43, 59), (2, 3, 97, 75), (1, 3, 88, 104), (1, 3, 7, 64)])
def test_any_size_and_batch(any_size, shape):
    model, folder = any_size
    pixel_values = random_images(*shape)
    outputs = run(folder, pixel_values)
    logits, labels = expected_outputs(model, pixel_values)
    # Of every pixel, whether there was something to pad or not: what users find does not depend on the size.
    torch.testing.assert_close(outputs["logits"], at_pixels(logits, pixel_values), **TOLERANCE)
    assert outputs["labels"].dtype == torch.uint8
    assert share_equal(outputs["labels"], labels) > 0.999

    found = load_onnx(folder)(pixel_values).logits
    torch.testing.assert_close(found, at_pixels(logits, pixel_values), **TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"scales": (0.6, 1.3), "flip": True}])
def test_photographs_get_the_same_labels(any_size, one_window, options):
    """Of both kinds of graph, for a landscape and a portrait photograph and one narrower than a window."""
    photo = load_photo(STREET)
    photos = [photo, photo.rotate(90, expand=True), photo.crop((100, 50, 400, 80))]
    for model, folder in (any_size, one_window):
        image_processor = DepictImageProcessor.from_pretrained(folder)
        assert image_processor.size == {"shortest_edge": 50}
        expected = segment(model, image_processor, photos, **options)
        found = segment(load_onnx(folder), image_processor, photos, **options)
        assert len(expected[0].unique()) > 2
        for labels, others in zip(found, expected, strict=True):
            assert share_equal(labels, others) > 0.999


def test_a_graph_for_one_window(one_window):
    """Its sides are no multiples of the patch, which it pads by itself."""
    model, folder = one_window
    exported = load_onnx(folder)
    assert (exported.input_size, exported.config.window_size, exported.config.window_stride) == ((36, 36), 36, 20)
    pixel_values = random_images(3, 3, 36, 36)
    with torch.no_grad():
        torch.testing.assert_close(exported(pixel_values).logits, model(pixel_values).logits, **TOLERANCE)
    with pytest.raises(ValueError, match=r"Got images of 30x24 pixels, but the graph takes 36x36"):
        exported(torch.zeros(1, 3, 30, 24))


def test_position_embeddings_are_baked(one_window):
    """The graph for one window computes no interpolation; its positions are those of the window's grid."""
    _, folder = one_window
    graph = onnx.load(folder / "model.onnx").graph
    assert not [node for node in graph.node if node.op_type == "Resize"]
    positions = [values.dims for values in graph.initializer if list(values.dims) == [1, 1 + 5 * 5, 24]]
    assert len(positions) == 1


def test_half_precision_models_with_a_backbone_for_one_size(tmp_path):
    """The file computes in float32; the model stays as it is; the settings beside the file fit its input."""
    model = export_tiny("linear", backbone_config=backbone(), window_size=32, num_labels=300).half().train()
    model.config.backbone_config._name_or_path = "/home/somebody/dinov2"
    model.config.auto_map = {"AutoConfig": "configuration_depict.DepictConfig"}
    image_processor = DepictImageProcessor(do_resize=False, image_mean=(0.1, 0.2, 0.3))
    image_processor.auto_map = {"AutoImageProcessor": "image_processing_depict.DepictImageProcessor"}
    exported = export_model(model, image_processor, tmp_path, size=(40, 56), labels=True)
    assert exported.output_names == ["logits", "labels"]
    nodes = onnx.load(exported.path).graph.node
    assert len([node for node in nodes if node.op_type == "Resize"]) == 1  # for the labels, none for positions
    assert model.dtype == torch.float16 and model.training and model.config.window_size == 32

    full = copy.deepcopy(model).float().eval()
    full.config.window_size = None
    pixel_values = random_images(3, 3, 40, 56)
    outputs = run(tmp_path, pixel_values)
    logits, labels = expected_outputs(full, pixel_values)
    torch.testing.assert_close(outputs["logits"], logits, **TOLERANCE)
    assert outputs["labels"].dtype == torch.int64
    assert share_equal(outputs["labels"], labels) > 0.999

    text = (tmp_path / "config.json").read_text() + (tmp_path / "preprocessor_config.json").read_text()
    assert "auto_map" not in text and "somebody" not in text
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    saved = DepictImageProcessor.from_pretrained(tmp_path)
    assert tuple(saved.image_mean) == (0.1, 0.2, 0.3)
    found = segment(load_onnx(tmp_path), saved, [STREET])[0]
    assert share_equal(found, segment(full, saved, [STREET])[0]) > 0.999
    with pytest.raises(ValueError, match=r"Got images of 80x112 pixels, but the graph takes 40x56; .* at scale 1"):
        segment(load_onnx(tmp_path), saved, [STREET], scales=(2.0,))


def test_torch_export_takes_multiples_of_the_patch(tmp_path):
    """Also the grid of the position embeddings; other sizes are refused instead of cut."""
    model = export_tiny("cbsa")
    path, size, _ = export_model(model, DepictImageProcessor(), tmp_path, "torch-export", labels=True)
    assert (path.name, size) == ("model.pt2", None)
    program = torch.export.load(path).module()
    for shape in ((1, 3, 32, 32), (3, 3, 80, 72), (2, 3, 32, 48)):
        pixel_values = random_images(*shape)
        outputs = program(pixel_values)
        logits, labels = expected_outputs(model, pixel_values)
        torch.testing.assert_close(outputs["logits"], logits, **TOLERANCE)
        assert share_equal(outputs["labels"], labels) > 0.999
    # 12 x 64 pixels of two images are as many as 8 x 64 of three.
    for shape in ((1, 3, 43, 64), (1, 3, 32, 52), (2, 3, 12, 64)):
        # In the words of PyTorch from 2.9 on, or of 2.8.
        with pytest.raises((AssertionError, RuntimeError), match=r"Guard failed|to be of the form 8\*"):
            program(random_images(*shape))


def test_torch_export_for_one_size(tmp_path):
    model = export_tiny("mask_transformer")
    path, _, _ = export_model(model, DepictImageProcessor(), tmp_path, "torch-export", size=(43, 56))
    program = torch.export.load(path)
    assert program.state_dict["encoder.embeddings.position_embeddings"].shape == (1, 1 + 6 * 7, 24)
    pixel_values = random_images(3, 3, 43, 56)
    [found] = program.module()(pixel_values).values()
    torch.testing.assert_close(found, expected_outputs(model, pixel_values)[0], **TOLERANCE)


def test_files_that_compute_something_else_are_refused(tmp_path, monkeypatch):
    trace = writing.trace

    def trace_another(graph, *args):
        other = copy.deepcopy(graph)
        other.decoder.classifier.bias.data[0] += 1
        return trace(other, *args)

    monkeypatch.setattr(writing, "trace", trace_another)
    message = (
        r"cannot be exported for images of 32x32 pixels .* on a made photograph of 480 x 360 pixels, the file differs"
    )
    with pytest.raises(ValueError, match=message):
        export_model(export_tiny("linear"), DepictImageProcessor(), tmp_path, "torch-export", size=(32, 32))
    assert not list(tmp_path.iterdir())


def test_backbones_bound_to_a_size_are_told_apart(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("sizes are compared")

    monkeypatch.setattr(writing, "trace", fail)
    message = (
        r"for images of any size \(RuntimeError: sizes are compared\); fix one with size=\(height, width\), --size"
    )
    with pytest.raises(ValueError, match=message):
        export_model(export_tiny("linear"), DepictImageProcessor(), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"file_format": "tflite"}, "Unknown format 'tflite'; choose one of onnx, torch-export"),
        ({"size": (0, 32)}, r"Got size=\(0, 32\), needed positive pixels"),
    ],
)
def test_wrong_arguments_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_model(export_tiny("linear"), DepictImageProcessor(), tmp_path, **options)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = r'package onnxruntime is needed for ONNX .* pip install "depict-hf\[onnx\]"'
    with pytest.raises(ImportError, match=message):
        export_model(export_tiny("linear"), DepictImageProcessor(), tmp_path)
    with pytest.raises(ImportError, match=message):
        start_session(tmp_path / "model.onnx")


def test_folders_and_devices_that_do_not_fit_are_refused(one_window, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model\.onnx; make such a folder with `depict export"):
        load_onnx(tmp_path)
    with pytest.raises(ValueError, match=r"does not compute on 'abacus:0', only with .*CPUExecutionProvider"):
        load_onnx(one_window[1], device="abacus:0")
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match=r"model\.onnx is no ONNX file"):
        load_onnx(tmp_path)


def test_images_of_one_channel(tmp_path):
    """The number of channels comes from the model, not from habit."""
    model = export_tiny("linear", num_channels=1)
    path, _, _ = export_model(model, DepictImageProcessor(), tmp_path, "torch-export", size=(32, 32))
    pixel_values = random_images(1, 1, 32, 32)
    [found] = torch.export.load(path).module()(pixel_values).values()
    torch.testing.assert_close(found, expected_outputs(model, pixel_values)[0], **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("decoder_type", DECODER_TYPES)
@pytest.mark.parametrize("size", [None, (43, 56)])
@pytest.mark.parametrize("encoder", ["native", "backbone"])
@pytest.mark.parametrize("file_format", ["onnx", "torch-export"])
def test_every_combination(decoder_type, size, encoder, file_format, tmp_path):
    model = tiny_model(decoder_type, backbone_config=backbone() if encoder == "backbone" else None)
    exported = export_model(model, DepictImageProcessor(), tmp_path, file_format, size=size, labels=True)
    for shape in [(1, 3, 48, 80), (2, 3, 64, 40)] if size is None else [(1, 3, *size), (3, 3, *size)]:
        pixel_values = random_images(*shape)
        if file_format == "onnx":
            outputs = run(tmp_path, pixel_values)
        else:
            outputs = torch.export.load(exported.path).module()(pixel_values)
        logits, labels = expected_outputs(model, pixel_values)
        if outputs["logits"].shape[-2:] == pixel_values.shape[-2:]:
            logits = at_pixels(logits, pixel_values)
        torch.testing.assert_close(outputs["logits"], logits, **TOLERANCE)
        assert share_equal(outputs["labels"], labels) > 0.999


@pytest.mark.slow
def test_the_shipped_model(tmp_path):
    """At the size that it was made for, on a photograph as it comes."""
    from depict_hf import DepictForSemanticSegmentation

    folder = Path(depict_hf.__file__).parent / "default_model"
    model = DepictForSemanticSegmentation.from_pretrained(folder, dtype=torch.float32)
    image_processor = DepictImageProcessor.from_pretrained(folder)
    export_model(model, image_processor, tmp_path)
    photo = PIL.Image.fromarray(np.array(load_photo(STREET))[:300])
    [expected] = segment(model, image_processor, [photo])
    [found] = segment(load_onnx(tmp_path), DepictImageProcessor.from_pretrained(tmp_path), [photo])
    assert share_equal(found, expected) > 0.999


@torch.no_grad()
def test_int8_files_multiply_in_integers_and_stay_close(tmp_path):
    model = export_tiny("sa", window_size=32)
    export_model(model, DepictImageProcessor(), tmp_path, int8=True)
    graph = onnx.load(tmp_path / "model.onnx").graph
    # Encoder: queries with keys and values, output, two layers of the perceptron. Decoder: projection, output.
    assert [node.op_type for node in graph.node].count("MatMulInteger") == 6
    assert not [each for each in graph.initializer if each.data_type == onnx.TensorProto.FLOAT and len(each.dims) == 2]
    pixel_values = random_images(4, 3, 32, 32)
    logits, expected = run(tmp_path, pixel_values)["logits"], model(pixel_values).logits
    assert 0 < (logits - expected).abs().mean() < 0.1 * expected.std()


def test_int8_is_for_onnx(tmp_path):
    with pytest.raises(ValueError, match="Got int8 for format 'torch-export', needed \"onnx\""):
        export_model(export_tiny(), DepictImageProcessor(), tmp_path / "out", "torch-export", int8=True)
    assert not (tmp_path / "out").exists()


def old_export(folder: Path) -> tuple[torch.nn.Module, Path]:
    """What earlier versions wrote for images of any size: scores on the grid of the padded image, as `patch_logits`."""

    class OldGraph(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.encoder, self.decoder = model.encoder, model.decoder

        def forward(self, pixel_values):
            height, width = pixel_values.shape[-2:]
            padded = F.pad(pixel_values, (0, -width % PATCH, 0, -height % PATCH))
            return self.decoder(*self.encoder(padded, LayerRecord()), LayerRecord())

    model = export_tiny("linear")
    sides = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(OldGraph(model), (torch.zeros(2, 3, 87, 103),), dynamic_shapes=(sides,), strict=False)
    options = {"input_names": ["pixel_values"], "output_names": ["patch_logits"], "dynamo": True, "verbose": False}
    torch.onnx.export(program, (), **options).save(folder / "model.onnx")
    model.config.to_json_file(folder / "config.json")
    return model, folder


def test_exports_of_earlier_versions_go_on_working(tmp_path):
    model, folder = old_export(tmp_path)
    exported, image_processor = load_onnx(folder), DepictImageProcessor(size={"shortest_edge": 50})
    pixel_values = random_images(2, 3, 43, 59)
    with torch.no_grad():
        torch.testing.assert_close(exported(pixel_values).logits, model(pixel_values).logits, **TOLERANCE)
    [found], [expected] = (segment(each, image_processor, [STREET]) for each in (exported, model))
    assert share_equal(found, expected) > 0.999


def test_damaged_exports_end_in_one_line(one_window, tmp_path):
    """A flipped bit in a weight changes no shape, so that ONNX Runtime computes with it."""
    from depict_hf.loading import load_model

    def refuse(message):
        with pytest.raises(ValueError, match=message) as caught:
            load_model(tmp_path / "copy", backend="onnxruntime")
        assert "\n" not in str(caught.value)

    shutil.copytree(one_window[1], tmp_path / "copy")
    path, beside, config = (tmp_path / "copy" / name for name in ("model.onnx", "model.json", "config.json"))
    whole, settings = path.read_bytes(), config.read_text()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    path.write_bytes(damaged)
    refuse(r"model\.onnx is damaged: its checksum is")
    path.write_bytes(whole)
    load_model(tmp_path / "copy", backend="onnxruntime")
    config.write_text(json.dumps(json.loads(settings) | {"id2label": {"0": "a", "1": "b"}, "label2id": None}))
    refuse("logits of 5 classes, but config.json beside it has 2")
    config.write_text(settings)
    beside.write_text("{")
    refuse(r"model\.json is not JSON")
    beside.unlink()
    path.write_bytes(whole[:1000])
    refuse(r"model\.onnx is no ONNX file")


def test_weights_outside_of_the_file_are_refused(one_window, tmp_path):
    """ONNX Runtime up to 1.23 reads whatever file a tensor names; also one within a branch of the graph."""
    (tmp_path / "secret").write_bytes(bytes(16))
    model = onnx.load(one_window[1] / "model.onnx")
    tensor = onnx.TensorProto(name="w", dims=[4], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    branch = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["w"], ["x"])], "branch", [], [], [tensor])
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    shutil.copytree(one_window[1], tmp_path / "copy")
    (tmp_path / "copy" / "model.json").unlink()
    for additions in ({"initializer": [tensor]}, {"node": [node]}):
        changed = copy.deepcopy(model)
        changed.graph.MergeFrom(onnx.GraphProto(**additions))
        (tmp_path / "copy" / "model.onnx").write_bytes(changed.SerializeToString())
        with pytest.raises(ValueError, match=r"has \d tensors, such as w, that lie in other files, needed all"):
            load_onnx(tmp_path / "copy")
