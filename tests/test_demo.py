"""What the demo's page answers equals `segment` and `explain`; its errors are lines; its Space is whole."""

import io
import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import free_port, needs_gradio, save_model, tiny_model

import depict_hf.demo
from depict_hf import DepictImageProcessor, options, segment
from depict_hf.cli import main
from depict_hf.demo import Choices, Demo, write_space
from depict_hf.demo.answers import LONGEST_SIDE, MAX_PHOTO_PIXELS, SIZES
from depict_hf.demo.space import GRADIO
from depict_hf.explain import explain
from depict_hf.inference import score_stream
from depict_hf.windows import score_bands

WINDOWS = {"window_size": 32, "window_stride": 24}
EXAMPLES = Path(options.__file__).parent / "demo" / "examples"


def made_demo(decoder_type: str = "sa", **overrides) -> Demo:
    return Demo(
        "tiny", tiny_model(decoder_type, **(WINDOWS | overrides)), DepictImageProcessor(size={"shortest_edge": 40})
    )


@pytest.fixture
def photo(tmp_path) -> Path:
    """90 x 60 pixels of smooth noise, in a file without losses."""
    noise = np.random.default_rng(3).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    PIL.Image.fromarray(noise).resize((90, 60), PIL.Image.Resampling.BICUBIC).save(path)
    return path


def probabilities(demo: Demo, path: Path, sizes: str) -> torch.Tensor:
    """Of all classes at every pixel, `(height, width, classes)`: those that `segment` decides by, kept whole."""
    scales, flip, _ = SIZES[sizes]
    [views] = score_stream(demo.model, demo.image_processor, [path], scales, flip)
    height, width = PIL.Image.open(path).height, PIL.Image.open(path).width
    result = torch.zeros(height, width, demo.model.config.num_labels, dtype=torch.float64)
    for rows, columns, scores in score_bands(views):
        result[rows, columns] = sum(
            (each.double() / demo.model.config.temperature).softmax(-1) for each in scores
        ) / len(views)
    return result


@pytest.mark.parametrize(("sizes", "temperature"), [("one", 1.0), ("one", 2.5), ("three", 1.0), ("six", 0.6)])
def test_every_reading_is_what_segment_says(sizes, temperature, photo):
    """Fails if rows and columns are mixed up, mirror images not mirrored back, or a temperature is left out."""
    demo = made_demo(temperature=temperature)
    answer = demo.answer(photo, Choices(sizes))
    scales, flip, _ = SIZES[sizes]
    [expected] = segment(demo.model, demo.image_processor, [photo], scales, flip, return_confidence=True)
    assert np.array_equal(answer.labels, expected.labels.numpy())
    names = demo.model.config.id2label
    whole = probabilities(demo, photo, sizes)
    for y, x in [(0, 0), (59, 89), (31, 7), (7, 31), (44, 60)]:
        found = answer.read(x, y)
        label = int(expected.labels[y, x])
        assert (found.x, found.y, found.label) == (x, y, names[label])
        assert found.confidence == pytest.approx(float(expected.confidence[y, x]), abs=1e-5)
        assert found.confidence - found.runner_up_probability == pytest.approx(float(expected.margin[y, x]), abs=1e-5)
        others = whole[y, x].clone()
        others[label] = 0
        assert found.runner_up == names[int(others.argmax())]


def test_a_reading_is_a_sentence_with_everything_in_it(photo):
    found = made_demo().answer(photo).read(12, 34)
    assert found.sentence() == (
        f"{found.label}, {100 * found.confidence:.1f} %; next would be {found.runner_up}, "
        f"{100 * found.runner_up_probability:.1f} % (x 12, y 34)"
    )


def test_one_class_has_no_runner_up(photo):
    found = made_demo("linear", num_labels=1).answer(photo).read(1, 2)
    assert (found.confidence, found.runner_up) == (1, None) and "next" not in found.sentence()


@pytest.mark.parametrize("pixel", [(-1, 0), (90, 0), (0, 60), (1.5, 2), ("1", 2), (None, None)])
def test_pixels_that_are_not_there_are_refused(pixel, photo):
    """The browser says which pixel, and anybody can write what a browser says."""
    with pytest.raises(ValueError, match="needed one of the 90 x 60 of the photograph"):
        made_demo().answer(photo).read(*pixel)


@pytest.mark.parametrize(("overlap", "stride"), [(0, 32), (50, 16), (25, 24), (75, 8)])
def test_the_overlap_is_that_of_windows(overlap, stride, photo):
    demo = made_demo()
    assert demo.overlap == 25
    answer = demo.answer(photo, Choices(overlap=overlap))
    other = tiny_model(window_size=32, window_stride=stride)
    [expected] = segment(other, demo.image_processor, [photo], return_confidence=True)
    assert np.array_equal(answer.labels, expected.labels.numpy())
    assert answer.record["mean_confidence"] == pytest.approx(float(expected.confidence.mean()), abs=2e-6)
    assert answer.record["protocol"] == {
        "scales": [1.0],
        "flip": False,
        "window_size": 32,
        "window_stride": stride,
    }
    assert demo.model.config.window_stride == 24


def test_an_own_stride_is_kept_where_percent_are_rounded(photo):
    demo = made_demo(window_stride=29)  # 9.4 %
    assert demo.answer(photo, Choices(overlap=demo.overlap)).record["protocol"]["window_stride"] == 29


def test_an_overlap_beyond_the_slider_is_refused(photo):
    with pytest.raises(ValueError, match="Got an overlap of 99 %, needed 0 to 75"):
        made_demo().answer(photo, Choices(overlap=99))


def test_no_windows_no_overlap(photo):
    demo = made_demo(window_size=None, window_stride=None)
    assert demo.overlap is None
    assert demo.answer(photo, Choices(overlap=50)).record["protocol"]["window_size"] is None


def test_visitors_at_once_get_their_own_answers(photo, tmp_path):
    """Fails if one visitor's windows are written into the model that all share."""
    demo = made_demo()
    other = tmp_path / "other.png"
    PIL.Image.open(photo).transpose(PIL.Image.Transpose.ROTATE_90).save(other)
    wanted = [(path, overlap) for path in (photo, other) for overlap in (0, 25, 75)] * 2
    alone = [demo.answer(path, Choices(overlap=overlap)) for path, overlap in wanted]
    together: list = [None] * len(wanted)

    def visit(index: int) -> None:
        path, overlap = wanted[index]
        together[index] = demo.answer(path, Choices(overlap=overlap))

    threads = [threading.Thread(target=visit, args=(index,)) for index in range(len(wanted))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for one, two in zip(alone, together, strict=True):
        assert one.record == two.record and np.array_equal(one.labels, two.labels)
    assert alone[0].record != alone[2].record  # else nothing could be mixed up


def test_record_and_label_map_are_those_of_segment(photo, tmp_path):
    """What is downloaded is what `depict segment` writes and prints."""
    folder = save_model(tmp_path / "model", **WINDOWS)
    demo = Demo.load(str(folder))
    answer = demo.answer(photo)
    arguments = ["segment", str(photo), "--model", str(folder), "--output", str(tmp_path / "out"), "--dtype", "float32"]
    assert main([*arguments, "--format", "png", "--confidence"]) == 0
    with PIL.Image.open(tmp_path / "out" / "photo_labels.png") as expected:
        found = PIL.Image.open(io.BytesIO(answer.label_map()))
        assert found.mode == expected.mode == "P" and found.getpalette() == expected.getpalette()
        assert np.array_equal(np.asarray(found), np.asarray(expected))
    record = answer.record
    counts = np.bincount(answer.labels.ravel(), minlength=5)
    assert {each["id"]: each["share"] for each in record["classes"]} == {
        index: round(count / 5400, 6) for index, count in enumerate(counts) if count
    }
    names = demo.model.config.id2label
    assert record["shares"] == {names[each["id"]]: each["share"] for each in record["classes"]}
    assert (record["file"], record["width"], record["height"]) == ("photo.png", 90, 60)
    [expected] = segment(demo.model, demo.image_processor, [photo], return_confidence=True)
    for each in record["classes"]:
        mean = expected.confidence[expected.labels == each["id"]].double().mean()
        assert each["mean_confidence"] == pytest.approx(float(mean), abs=1e-6)


def decoded(url: str) -> bytes:
    with urllib.request.urlopen(url) as response:
        return response.read()


def test_the_page_gets_ids_at_the_size_of_its_picture(tmp_path):
    """Fails if a large photograph is sent whole, or its ids are blended where it is made smaller."""
    path = tmp_path / "large.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (4, 8, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).resize((3000, 1500)).save(path)
    answer = made_demo().answer(path)
    sent = answer.for_page()
    picture, ids = (PIL.Image.open(io.BytesIO(decoded(sent[key]))) for key in ("picture", "ids"))
    assert picture.size == ids.size == (LONGEST_SIDE, LONGEST_SIDE // 2)
    assert (sent["width"], sent["height"]) == (3000, 1500)
    rows, columns = (((np.arange(count) + 0.5) * 3000 / LONGEST_SIDE).astype(int) for count in (640, 1280))
    assert np.array_equal(np.asarray(ids), answer.labels[np.ix_(rows, columns)])
    files = {each["name"]: decoded(each["url"]) for each in sent["files"]}
    assert np.array_equal(np.asarray(PIL.Image.open(io.BytesIO(files["large_labels.png"]))), answer.labels)
    assert json.loads(files["large.json"]) == answer.record


def test_the_explanation_is_that_of_explain(photo):
    demo = made_demo()
    model = tiny_model(window_size=32, window_stride=16)
    expected = explain(model, demo.image_processor, photo, (70, 20)).page()
    assert demo.explanation(photo, Choices("six", 50), (70, 20)) == expected


def damaged(kind: str, folder: Path) -> tuple[Path, str]:
    path = folder / "photo.jpg"
    if kind == "empty":
        path.write_bytes(b"")
        return path, "it is empty"
    if kind == "no image":
        path.write_bytes(b"%PDF-1.7 and so on")
        return path, "it is no image of a format that is read"
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    return path, "it is cut off"


@pytest.mark.parametrize("kind", ["empty", "no image", "cut off"])
def test_damaged_files_cost_a_line(kind, tmp_path):
    path, words = damaged(kind, tmp_path)
    for ask in (made_demo().answer, made_demo().explanation):
        with pytest.raises(ValueError, match=words) as raised:
            ask(path)
        assert "\n" not in str(raised.value)


def test_large_photographs_are_bounded(tmp_path, photo):
    """By their files' pixels, and by what they would become for the model, as strips do."""
    demo = made_demo()
    small = Demo(demo.name, demo.model, demo.image_processor, None, 5399)
    for ask in (small.answer, small.explanation):
        with pytest.raises(ValueError, match="it has 90 x 60 pixels, more than the 5399 allowed"):
            ask(photo)
    strip = tmp_path / "strip.png"
    PIL.Image.new("RGB", (30_000, 2)).save(strip)
    for ask in (demo.answer, demo.explanation):
        with pytest.raises(ValueError, match="it has 30000 x 2 pixels, which become 600000 x 40 for the model"):
            ask(strip)


def test_the_help_names_the_bound(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    assert f"({MAX_PHOTO_PIXELS})" in capsys.readouterr().out


def test_photographs_unlike_the_models_own_are_warned_of():
    """The page of text among the examples is there to show it."""
    demo = Demo.load("default")
    paths = sorted(EXAMPLES.glob("*.jpg"))
    assert len(paths) == 3
    judged = {
        path.stem: demo.familiarity.judge(demo.model, demo.image_processor, PIL.Image.open(path)) for path in paths
    }
    assert judged["page_of_text"]["distance"] > 2 * max(judged[name]["distance"] for name in judged if "street" in name)
    assert "do not rely on the label map" in judged["page_of_text"]["warning"]


def test_what_is_computed_needs_no_gradio():
    code = """
import sys
sys.modules["gradio"] = None
from depict_hf.demo import Demo, Choices, write_space
try:
    from depict_hf.demo import serve
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "The demo's page needs Gradio: pip install 'depict-hf[demo]'\n"


def test_the_command_says_that_gradio_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "depict_hf.demo.page", raising=False)
    monkeypatch.delattr(depict_hf.demo, "page", raising=False)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == "depict: The demo's page needs Gradio: pip install 'depict-hf[demo]'\n"


@needs_gradio
def test_gradio_installs_beside_this_package():
    """Both take one pillow: Gradio's upper bound and our lower one leave releases between them."""
    packaging = pytest.importorskip("packaging.requirements", reason="packaging is not installed")
    declared = [packaging.Requirement(line) for line in requires("gradio")]
    [theirs] = [each.specifier for each in declared if each.name == "pillow"]
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    ours = packaging.Requirement(re.search(r'"(pillow.*?)"', text)[1]).specifier
    assert list((theirs & ours).filter(f"12.{minor}.0" for minor in range(10)))


def test_a_space_installs_a_gradio_that_the_extra_takes():
    packaging = pytest.importorskip("packaging.requirements", reason="packaging is not installed")
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert GRADIO in packaging.Requirement(re.search(r'"(gradio[<>=].*?)"', text)[1]).specifier


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Path:
    model = save_model(tmp_path_factory.mktemp("space") / "tiny")
    (model / "notes.txt").write_text("not the model's")
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    folder = tmp_path_factory.mktemp("space") / "space"
    assert main(["demo", "--space", str(folder), "--model", str(model)]) == 0
    return folder


def test_a_space_holds_what_it_needs(space):
    """Fails if it needs the machine that wrote it, or carries what no Space needs."""
    from huggingface_hub import SpaceCard

    card = SpaceCard.load(space / "README.md")
    wanted = {"sdk": "gradio", "sdk_version": GRADIO, "app_file": "app.py", "license": "mit"}
    assert {key: card.data.to_dict()[key] for key in wanted} == wanted
    assert len(card.data.short_description) <= 60  # the Hub takes no longer ones
    lines = (space / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("transformers") for line in lines) and not any("extra" in line for line in lines)
    assert sorted(path.name for path in (space / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    for path in space.rglob("*"):
        assert path.is_dir() or path.stat().st_size < 2**20
        assert not {"__pycache__", "training", "default_model", "notes.txt"} & set(path.relative_to(space).parts)
    assert str(space.parent) not in "".join(path.read_text() for path in space.glob("*.*") if path.is_file())


def test_a_space_of_the_default_model_brings_it_along(tmp_path):
    write_space(tmp_path / "space")
    assert (tmp_path / "space" / "depict_hf" / "default_model" / "model.safetensors").is_file()
    assert "license: cc-by-nc-4.0" in (tmp_path / "space" / "README.md").read_text()
    assert "serve('default'" in (tmp_path / "space" / "app.py").read_text()
    with pytest.raises(ValueError, match="is not an empty folder"):
        write_space(tmp_path / "space")


@pytest.mark.slow
@needs_gradio
def test_app_builds_the_page(space):
    """As a Space runs it: from its folder, with the package that lies there."""
    code = "import depict_hf, runpy; print(depict_hf.__file__); runpy.run_path('app.py', run_name='__main__')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"GRADIO_SERVER_PORT": str(free_port()), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=space, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout.readline().strip() == str(space / "depict_hf" / "__init__.py")
        address = process.stdout.readline().split()[2]
        with urllib.request.urlopen(f"{address}config", timeout=30) as response:
            config = json.load(response)
    finally:
        process.terminate()
        process.wait(30)
    assert not config["analytics_enabled"]
    assert {each["props"].get("elem_id") for each in config["components"]} >= {"photograph", "viewer", "explanation"}
