"""Explanations: their numbers are those of the instruments and of `segment`, and the page holds them unchanged."""

import base64
import json
import re
import zlib

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_model

from depict_hf import DepictImageProcessor, default_model
from depict_hf.analysis import (
    analyze,
    attention,
    attention_map,
    class_gram,
    contributions,
    deviation_from_identity,
    lens,
    rate_curves,
    step_sizes,
    subspace_statistics,
)
from depict_hf.cli import main
from depict_hf.explain import Layout, explain
from depict_hf.explain import page as page_module
from depict_hf.explain.explanation import rate_sentence
from depict_hf.inference import segment

NAMES = ("sky", "road", "</script><b>bold", 'car "&" co', "<!--tree")
WINDOWS = {"window_size": 32, "window_stride": 24}


def small_model(decoder_type: str = "sa", **overrides):
    """Temperature and class names are not those that come by default."""
    names = dict(enumerate(NAMES))
    return tiny_model(decoder_type, id2label=names, label2id={v: k for k, v in names.items()}, **overrides)


def small_processor() -> DepictImageProcessor:
    return DepictImageProcessor(size={"shortest_edge": 48})


@pytest.fixture
def photo() -> PIL.Image.Image:
    """90 x 60 pixels, resized to 72 x 48: 9 x 6 patches, or 3 x 2 windows of 4 x 4, which overlap."""
    noise = np.random.default_rng(3).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((90, 60), PIL.Image.Resampling.BICUBIC)


def data_of(page: str) -> dict:
    """What the page's script reads."""
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def unpack(packed: dict) -> np.ndarray:
    values = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), np.dtype(packed["dtype"]))
    return values.reshape(packed["shape"]) * packed["scale"]


@pytest.mark.parametrize("windows", [{}, WINDOWS], ids=["whole", "windows"])
def test_numbers_are_those_of_the_instruments(decoder_type, windows, photo):
    model, processor = small_model(decoder_type, temperature=2.0, **windows), small_processor()
    at = (70, 20)
    explanation = explain(model, processor, photo, at=at, name="p.png")
    numbers = json.loads(json.dumps(explanation.numbers, allow_nan=False))
    count = 6 if windows else 1
    recordings = [analyze(model, processor, photo, window=k if windows else None) for k in range(count)]

    # x = 70 is 56.4 of 72 pixels: nearest to the centre of the window that starts at 40; y = 20 is 16.4 of 48.
    place = (2, 2, 2) if windows else (0, 2, 7)
    patch = numbers["patch"]
    assert (patch["window"], patch["row"], patch["column"]) == place
    left, top, right, bottom = patch["box"]
    assert left <= at[0] < right and top <= at[1] < bottom

    recording, row = recordings[place[0]], place[1] * recordings[0].grid_size[1] + place[2]
    stages = recording.logits[:, None] if decoder_type == "linear" else lens(model, recording)
    probabilities = (stages[0, :, :, place[1], place[2]].double() / 2).softmax(-1)
    for reading, each in zip(patch["readings"], probabilities, strict=True):
        order = each.argsort(descending=True)
        assert [reading["class"], reading["runner_up"]] == order[:2].tolist()
        assert reading["probability"] == pytest.approx(each[order[0]].item())
        assert reading["runner_up_probability"] == pytest.approx(each[order[1]].item())
        assert reading["label_probability"] == pytest.approx(each[patch["class"]].item())
    assert patch["class"] == recording.logits[0, :, place[1], place[2]].argmax()
    assert patch["confidence"] - patch["runner_up_probability"] == pytest.approx(patch["margin"])

    split = contributions(model, recording, [row], [patch["class"], patch["runner_up"]])
    assert [(each["kind"], each["layer"], each["head"]) for each in patch["contributions"]] == [
        (term.kind, term.layer, term.head) for term in split.terms
    ]
    for side, (value, score) in enumerate((("value", "score"), ("runner_up_value", "runner_up_score"))):
        found = [each[value] for each in patch["contributions"]]
        assert found == pytest.approx(split.values[0, :, 0, side].tolist())
        assert sum(found) == pytest.approx(patch[score], abs=1e-5)
    assert patch["quantity"] == split.quantity

    if decoder_type == "linear":
        assert patch["attention"] is None and numbers["class_tokens"] is None and numbers["rates"] is None
        assert set(numbers["missing"]) == {"attention", "class_tokens", "rates", "subspaces"}
        return
    for layer in range(2):
        expected = attention_map(model, recording, layer, patch=place[1:])[0]
        assert np.allclose(patch["attention"][layer], expected, atol=1e-6)
    curves = [rate_curves(model, each, normalize=True) for each in recordings]
    assert numbers["rates"]["patch_nats"] == pytest.approx(
        torch.cat([each.patch_rates_nats for each in curves]).mean(0).tolist()
    )
    grams = torch.cat([class_gram(model, each) for each in recordings])
    shown = numbers["class_tokens"]["classes"]
    assert np.allclose(numbers["class_tokens"]["gram"], grams.mean(0)[:, shown][:, :, shown])
    assert numbers["class_tokens"]["deviation"] == pytest.approx(deviation_from_identity(grams).mean(0).tolist())
    assert len(numbers["class_tokens"]["stages"]) == grams.shape[1]
    if decoder_type == "mask_transformer":
        assert numbers["subspaces"] is None and "black box" in numbers["missing"]["subspaces"]
        assert numbers["rates"]["patch_compression_nats"] is None
        return
    assert not numbers["missing"]
    assert np.allclose(
        numbers["rates"]["patch_compression_nats"],
        torch.cat([each.patch_compression_nats for each in curves]).mean(0),
    )
    parts = ("decoder", "cross") if decoder_type == "ca" else ("decoder",)
    expected = [each for part in parts for each in subspace_statistics(model, part == "cross")]
    assert [each["deviation"] for each in numbers["subspaces"]] == pytest.approx(
        [each.deviations.mean().item() for each in expected]
    )
    assert [each["overlap"] for each in numbers["subspaces"]] == pytest.approx(
        [each.overlaps[0, 1].item() for each in expected]
    )
    sizes = [each for part in parts for each in step_sizes(model, part == "cross").tolist()]
    assert [each["step_sizes"] for each in numbers["subspaces"]] == sizes


def test_classes_and_doubts_are_those_of_segment(photo):
    model, processor = small_model(**WINDOWS), small_processor()
    numbers = explain(model, processor, photo).numbers
    [expected] = segment(model, processor, [photo], return_confidence=True)
    for each in numbers["classes"]:
        mask = expected.labels == each["id"]
        assert each["share"] == pytest.approx(mask.double().mean().item())
        assert each["confidence"] == pytest.approx(expected.confidence[mask].double().mean().item())
    assert sum(each["share"] for each in numbers["classes"]) == pytest.approx(1)
    unsure = numbers["unsure"]
    assert unsure["share"] == pytest.approx((expected.margin < unsure["margin"]).double().mean().item())
    assert unsure["confidence"] == pytest.approx(expected.confidence.double().mean().item())


@pytest.mark.parametrize("mode", ["RGBA", "L", "turned"])
def test_photographs_are_read_as_segment_reads_them(mode, photo, tmp_path):
    """Fails if transparency, grey or the EXIF orientation is treated in another way."""
    path = tmp_path / "photo.png"
    if mode == "turned":
        exif = PIL.Image.Exif()
        exif[0x0112] = 6
        photo.save(path, exif=exif)
    else:
        photo.putalpha(photo.convert("L"))
        photo.convert(mode).save(path)
    model, processor = small_model(), small_processor()
    [expected] = segment(model, processor, [path])
    for given in (path, PIL.Image.open(path)):
        explanation = explain(model, processor, given)
        assert torch.equal(explanation.labels, expected)
        assert (explanation.photo.height, explanation.photo.width) == tuple(expected.shape)


def test_pairs_that_are_confused(photo):
    """Counted by brute force over the pixels of the photograph; every pixel counts once, also where windows overlap."""
    explanation = explain(small_model(**WINDOWS), small_processor(), photo)
    layout, patches = explanation.layout, explanation.patches
    counts: dict[tuple[int, int], int] = {}
    for x in range(90):
        for y in range(60):
            index = layout.index(*layout.locate(x, y))
            (first, second), (high, low) = patches.classes[index, -1], patches.probabilities[index, -1]
            if high - low < explanation.numbers["unsure"]["margin"]:
                pair = (min(first, second), max(first, second))
                counts[pair] = counts.get(pair, 0) + 1
    pairs = explanation.numbers["unsure"]["pairs"]
    assert pairs and {tuple(each["classes"]): round(each["share"] * 90 * 60) for each in pairs} == counts
    for each in pairs:
        assert sorted(patches.classes[each["patch"], -1]) == each["classes"]


def test_every_pixel_belongs_to_a_patch_that_covers_it(photo):
    for windows in ({}, WINDOWS):
        layout = explain(small_model(**windows), small_processor(), photo).layout
        assert layout.areas(layout.photo).sum() == pytest.approx(1)
        for x in range(0, 90, 7):
            for y in range(0, 60, 7):
                place = layout.locate(x, y)
                left, top, right, bottom = layout.box(*place)
                assert left <= x + 0.5 < right and top <= y + 0.5 < bottom
                assert layout.place(layout.index(*place)) == place


def test_a_pixel_belongs_to_the_window_with_the_nearest_centre():
    layout = Layout((48, 100), (48, 100), (48, 48), ([0], [0, 24, 48, 52]), (6, 6), 8)
    window, column = layout.along(1, 100)
    # Centres at 24, 48, 72, 76.
    assert [window[each] for each in (0, 35, 36, 59, 60, 73, 74, 99)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert column[36] == (36 - 24) // 8 and column[99] == 5


@pytest.mark.parametrize("windows", [{}, WINDOWS], ids=["whole", "windows"])
def test_page_holds_the_numbers_of_all_patches(decoder_type, windows, photo):
    model, processor = small_model(decoder_type, **windows), small_processor()
    explanation = explain(model, processor, photo, class_name="road")
    data = data_of(explanation.page())
    layout, patches = explanation.layout, explanation.patches
    used = sorted({layout.index(*layout.locate(x, y)) for x in range(90) for y in range(60)})
    readings = {
        "reading_classes": (patches.classes, 0),
        "reading_probabilities": (patches.probabilities, 1e-5),
        "label_probabilities": (patches.label_probabilities, 1e-5),
        "class_probabilities": (patches.final[:, data["shown_classes"]], 2e-3),
        "contributions": (patches.contributions, 1e-4),
        "scores": (patches.scores, 1e-4),
    }
    for name, (expected, tolerance) in readings.items():
        assert np.allclose(unpack(data[name])[used], expected[used], atol=tolerance, rtol=0), name
    assert np.array_equal(unpack(data["labels"]), explanation.labels)
    assert np.allclose(unpack(data["confidence"]), explanation.confidence[::2, ::2], atol=2e-3)
    assert data["numbers"]["class"]["id"] == 1
    if decoder_type == "linear":
        assert data["maps"] is None
        return

    assert (data["maps"]["sharing"], data["maps"]["square"]) == (1, 1)
    for index in used:
        window, row, column = layout.place(index)
        recording = explanation.recordings[window]
        for layer in range(2):
            expected = attention_map(model, recording, layer, patch=(row, column))[0].flatten(1).numpy()
            check_maps(data["maps"]["patches"], (window, row * layout.grid[1] + column, layer), expected)
    part = "cross" if decoder_type == "ca" else "decoder"
    for window, recording in enumerate(explanation.recordings):
        for position, label in enumerate(data["shown_classes"]):
            expected = attention_map(model, recording, 1, label=label, part=part)[0].flatten(1).numpy()
            check_maps(data["maps"]["classes"], (window, position, 1), expected)


def check_maps(packed: dict, place: tuple[int, ...], expected: np.ndarray) -> None:
    """Shares within what 63 levels of brightness can hold, of which each is a square root."""
    peaks = unpack(packed["peaks"])[place]
    assert np.allclose(peaks, expected.max(-1), rtol=1e-6)
    assert np.allclose(unpack(packed["sums"])[place], expected.sum(-1), rtol=1e-6)
    levels = unpack(packed["maps"])[place]
    assert np.abs(levels / 63 - np.sqrt(expected / peaks[:, None])).max() < 0.5001 / 63


def test_coarse_maps_are_averages_of_patches_and_sums_over_squares(photo, monkeypatch):
    """A grid that squares do not divide: 6 x 9 patches in squares of 2 and of 4."""
    monkeypatch.setattr(page_module, "COARSENINGS", ((2, 4),))
    model, processor = small_model(), small_processor()
    explanation = explain(model, processor, photo)
    maps = data_of(explanation.page())["maps"]
    weights = attention(model, explanation.recordings[0], 1)[0, :, :54, :54].reshape(2, 6, 9, 6, 9)
    expected = torch.zeros(2, 3, 5, 2, 3, dtype=torch.float64)
    for row in range(3):
        for column in range(5):
            looking = weights[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((1, 2))
            for i in range(2):
                for j in range(3):
                    square = looking[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                    expected[:, row, column, i, j] = square.sum((1, 2))
    for index in range(15):
        check_maps(maps["patches"], (0, index, 1), expected[:, index // 5, index % 5].flatten(1).numpy())


def test_maps_become_coarser_until_they_fit(photo, monkeypatch):
    explanation = explain(small_model(), small_processor(), photo)
    whole = len(json.dumps(data_of(explanation.page())["maps"]))
    others = len(json.dumps(data_of(explanation.page()))) - whole
    monkeypatch.setattr(page_module, "MOST_BYTES", others + whole // 2)
    data = data_of(explanation.page())
    assert data["maps"]["sharing"] * data["maps"]["square"] > 1 and len(json.dumps(data)) <= others + whole // 2 + 10
    monkeypatch.setattr(page_module, "MOST_BYTES", others)
    with pytest.raises(ValueError, match="maps of 1 windows do not fit into a page; crop the photograph"):
        explanation.page()


def test_nothing_from_files_is_markup(photo):
    name = "<img src=x onerror=alert(1)>.png"
    page = explain(small_model(), small_processor(), photo, class_name=NAMES[2], name=name).page()
    assert "<b>" not in page and "<img" not in page and "<!--" not in page
    assert page.count("</script>") == 2
    assert "<title>&lt;img src=x onerror=alert(1)&gt;.png explained</title>" in page
    data = data_of(page)
    assert tuple(data["numbers"]["model"]["class_names"]) == NAMES and data["numbers"]["photo"]["name"] == name


def test_page_asks_for_nothing_from_elsewhere(photo):
    """The policy forbids it, and there is nothing to forbid."""
    page = explain(small_model(), small_processor(), photo).page()
    assert "default-src 'none'; img-src data:;" in page
    addresses = set(re.findall(r"https?://[^\s\"'<]*", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not an address


@pytest.mark.parametrize(
    ("rates", "compressions", "words"),
    [
        ([40.0, 60.0], [[50.0, 45.0]], ["rises, from 40.0 nats", "(+50 %)", "not compressed", "every layer lowers"]),
        ([40.0, 20.0], [[50.0, 55.0]], ["falls, from 40.0", "(-50 %)", "more alike", "no layer lowers the rate"]),
        ([40.0, 50.0, 40.1], [[3.0, 2.0], [2.0, 2.5]], ["hardly changes", "1 of 2 layers", "layer 1 does"]),
        ([40.0, 50.0, 30.0], None, ["falls"]),
    ],
)
def test_sentence_says_what_the_rates_do(rates, compressions, words):
    sentence = rate_sentence(rates, compressions)
    for each in words:
        assert each in sentence
    assert ("heads" in sentence) == (compressions is not None)


def test_a_class_that_does_not_occur_is_told():
    model, processor, photo = small_model(), small_processor(), PIL.Image.new("RGB", (90, 60), "gray")
    occurring = segment(model, processor, [photo])[0].unique()
    absent = next(label for label in range(5) if label not in occurring)
    explanation = explain(model, processor, photo, class_name=NAMES[absent].upper())
    assert explanation.numbers["class"]["share"] == 0 and absent in explanation.shown_classes
    expected = attention_map(model, explanation.recordings[0], 0, label=absent)[0]
    assert np.allclose(explanation.numbers["class"]["attention"][0][0], expected, atol=1e-6)
    assert "NaN" not in explanation.page()


def test_what_does_not_exist_is_named(photo):
    model, processor = small_model(), small_processor()
    with pytest.raises(
        ValueError, match=r"x=90, y=5, but the upright photograph has 90 x 60 pixels; x goes from 0 to 89"
    ):
        explain(model, processor, photo, at=(90, 5))
    with pytest.raises(ValueError, match="no class 'lamp'; choose one of: sky, road"):
        explain(model, processor, photo, class_name="lamp")
    with pytest.raises(ValueError, match="one class"):
        explain(tiny_model("linear", num_labels=1), processor, photo)


def test_command_writes_the_page_or_the_numbers(tmp_path, photo, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_model().save_pretrained("model")
    small_processor().save_pretrained("model")
    photo.save("street.png")
    assert main(["explain", "street.png", "--model", "model", "--at", "70", "20", "--class", "road"]) == 0
    assert capsys.readouterr().out == "street.png -> street_explained.html\n"
    data = data_of((tmp_path / "street_explained.html").read_text(encoding="utf-8"))
    assert (data["numbers"]["patch"]["row"], data["numbers"]["patch"]["column"]) == (2, 7)

    assert main(["explain", "street.png", "--model", "model", "--at", "70", "20", "--class", "road", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = explain(small_model(), small_processor(), photo, (70, 20), "road", "street.png").numbers
    assert printed.keys() == expected.keys() and printed["photo"] == expected["photo"]
    assert printed["patch"]["score"] == pytest.approx(expected["patch"]["score"])
    assert main(["explain", "street.png", "--model", "model", "--json", "--output", "new/numbers.json"]) == 0
    assert json.loads((tmp_path / "new" / "numbers.json").read_text())["patch"]["index"] == 3 * 9 + 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["street.png", "--output", "street.png"], "would be overwritten"),
        (["missing.png"], "missing.png: "),
        (["broken.png"], "broken.png: "),
    ],
)
def test_command_says_why_it_cannot_start(arguments, message, tmp_path, photo, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photo.save("street.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "street.png").read_bytes()[:100])
    assert main(["explain", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_documented_keys(photo):
    """Every key of the numbers is named in the docstring, so that readers of the JSON find it."""
    numbers = explain(small_model("ca", **WINDOWS), small_processor(), photo, class_name="road").numbers

    def keys(value) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(keys, value))
        return set(value).union(*map(keys, value.values())) if isinstance(value, dict) else set()

    missing = {key for key in keys(numbers) if key.removeprefix("random_") not in explain.__doc__}
    assert not missing


@pytest.mark.slow
def test_page_of_the_default_model_is_small(request):
    model, processor = default_model()
    photo = request.path.parent / "data" / "street.jpg"
    page = explain(model, processor, photo).page()
    assert len(page.encode()) < 3_000_000
    assert data_of(page)["maps"]["square"] <= 2
