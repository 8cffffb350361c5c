"""Published figures reproduced: a made published file, a made data set that it labels itself, and made rows."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from depict_hf import DepictConfig
from depict_hf.configuration_depict import ENCODER_PRESETS
from depict_hf.conversion import PUBLISHED_SIZES, convert_checkpoint
from depict_hf.inference import segment
from depict_hf.labels import class_names
from training import reproduce
from training.evidence import paper
from training.evidence.paper import PAPER_ROWS, PUBLISHED_SCALES, PaperRow, find_row, judge
from training.recipes import RECIPES, get_recipe

CHECKPOINT = Path(__file__).parents[1] / "data" / "published" / "cbsa"
SCALES = (0.25, 0.5)  # instead of all the published ones, for speed
ROW = PaperRow("made", "ade20k", "cbsa", (8, 48, 2, 3, False), 64, 0.0, 0.0, "made", (2,))


def mean_iou(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Percent, by the definition: over the whole split, classes that occur nowhere left out."""
    predicted, true = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    predicted, true = predicted[true != 255], true[true != 255]
    ious = []
    for label in range(150):
        either = (predicted == label) | (true == label)
        if either.any():
            ious.append(((predicted == label) & (true == label)).sum() / either.sum())
    return 100 * float(np.mean(ious))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[str, dict[bool, float]]:
    """ADE20K's layout with photographs that the model labelled at a single scale, and a quarter of the rows wrong.

    Returns:
        The folder, and mIoU in percent by whether several scales are averaged.
    """
    root = tmp_path_factory.mktemp("ade20k") / "ADEChallengeData2016"
    model, image_processor = convert_checkpoint(CHECKPOINT)
    rng = np.random.default_rng(0)
    pairs: dict[bool, list] = {False: [], True: []}
    for kind in ("images", "annotations"):
        (root / kind / "validation").mkdir(parents=True)
    for index, (height, width) in enumerate([(40, 56), (48, 32)]):
        ramp = np.linspace(0, 200, width)[None, :, None] * rng.random((1, 1, 3))
        photo = (ramp + rng.integers(0, 50, (height, width, 3))).astype(np.uint8)
        path = root / "images" / "validation" / f"ADE_val_{index}.jpg"
        Image.fromarray(photo).save(path, quality=95)
        photo = np.array(Image.open(path))
        predicted = segment(model, image_processor, [photo])[0].numpy().astype(np.int64)
        several = segment(model, image_processor, [photo], SCALES, True)[0].numpy()
        truth = predicted.copy()
        truth[: height // 4] = (truth[: height // 4] + 1) % 150
        truth[-3:] = 255
        ids = np.where(truth == 255, 0, truth + 1).astype(np.uint8)  # 0 is ignored, and 1 the first class
        Image.fromarray(ids).save(root / "annotations" / "validation" / f"ADE_val_{index}.png")
        pairs[False].append((predicted, truth))
        pairs[True].append((several, truth))
    return str(root.parent), {several: mean_iou(each) for several, each in pairs.items()}


def run(monkeypatch, tmp_path, dataset: str, rows: tuple[PaperRow, ...], *options: str) -> tuple[int, dict]:
    monkeypatch.setattr(reproduce, "PAPER_ROWS", rows)
    output = tmp_path / "record.json"
    code = reproduce.main(
        [str(CHECKPOINT), dataset, "--workers", "0", "--output", str(output), "--overwrite", *options]
    )
    return code, json.loads(output.read_text())


def test_a_figure_is_reproduced(made, monkeypatch, tmp_path, capsys, datasets_cache):
    """The protocol is the published one: the made truth is the model's own map by it, but for the rows changed."""
    dataset, figures = made
    row = replace(ROW, single_scale=round(figures[False], 1), multi_scale=99.0)
    code, record = run(monkeypatch, tmp_path, dataset, (replace(row, crop_size=32), row))
    assert (code, record["verdict"]) == (0, "reproduced")
    assert record["measured_percent"] == pytest.approx(figures[False], abs=1e-9)
    assert record["difference_points"] == pytest.approx(figures[False] - row.single_scale, abs=1e-9)
    assert record["paper"]["model"] == "made" and record["published_percent"] == row.single_scale
    assert record["evaluation"]["protocol"] == {
        "size": {"shortest_edge": 512, "longest_edge": 2048},
        "window_size": 64,
        "window_stride": 32,
        "scales": [1.0],
        "flip": False,
        "corruption": None,
        "resolution": "each photograph's own",
    }
    said = capsys.readouterr().out
    assert f"mIoU {row.single_scale} single-scale, 99.0 multi-scale (made; not measured here)" in said
    assert f"reproduced: single-scale mIoU {figures[False]:.2f} measured here, {row.single_scale} published" in said


def test_a_figure_that_differs_is_said_by_how_much(made, monkeypatch, tmp_path, capsys, datasets_cache):
    """By several scales with mirror images, against the row's figure for those."""
    assert PUBLISHED_SCALES == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    monkeypatch.setattr(paper, "PUBLISHED_SCALES", SCALES)
    dataset, figures = made
    row = replace(ROW, single_scale=figures[True], multi_scale=figures[True] - 0.25)
    code, record = run(monkeypatch, tmp_path, dataset, (row,), "--multi-scale")
    assert (code, record["verdict"]) == (3, "not reproduced")
    assert record["measured_percent"] == pytest.approx(figures[True], abs=1e-9)
    assert record["evaluation"]["protocol"]["scales"] == list(SCALES)
    assert record["evaluation"]["protocol"]["flip"] is True
    assert "not reproduced: multi-scale" in (said := capsys.readouterr().out) and "+0.25 points; tolerance 0.1" in said


def test_other_files_have_no_row(made, monkeypatch, tmp_path, capsys, datasets_cache):
    dataset, _ = made
    options = ("--max-images", "1", "--im-size", "256")
    code, record = run(monkeypatch, tmp_path, dataset, (replace(ROW, decoder_type="sa"),), *options)
    assert (code, record["verdict"], record["paper"], record["difference_points"]) == (4, "no figure", None, None)
    said = capsys.readouterr().out
    assert "published row: none for data set ade20k, decoder cbsa, 2 layers of width 48 and patches of 8" in said
    assert "no published figure is known for this file" in said
    assert record["evaluation"]["protocol"]["size"] == {"shortest_edge": 256, "longest_edge": 1024}
    # A part of the split is compared with nothing, whichever figure is given.
    code, record = run(monkeypatch, tmp_path, dataset, (replace(ROW, single_scale=50.0),), *options)
    assert (code, record["verdict"]) == (4, "not comparable")
    assert "on 1 images; 50.0 published (made), of other images" in capsys.readouterr().out


def test_files_at_fault_are_an_error(made, tmp_path, capsys):
    assert reproduce.main([str(tmp_path), made[0]]) == 1
    assert "checkpoint.pth does not exist" in capsys.readouterr().err
    assert reproduce.main([str(CHECKPOINT), made[0], "--tolerance", "-1"]) == 1
    assert "Got a tolerance of -1.0 points" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        reproduce.main([str(CHECKPOINT), made[0], "--batch-size", "0"])
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("measured", "published", "images", "verdict"),
    [
        (52.95, 52.9, 2000, "reproduced"),
        (53.0, 52.9, 2000, "reproduced"),  # 0.1 is less than the difference of these two binary numbers
        (52.8, 52.9, 2000, "reproduced"),
        (53.01, 52.9, 2000, "not reproduced"),
        (52.79, 52.9, 2000, "not reproduced"),
        (52.9, 52.9, 1999, "not comparable"),
        (None, 52.9, 2000, "not comparable"),
        (52.9, None, 2000, "no figure"),
    ],
)
def test_verdicts(measured, published, images, verdict):
    assert judge(measured, published, 0.1, images, (2000,)) == verdict


def test_every_row_is_one_model():
    """No two rows fit one file; every headline recipe with a published figure has its row, by its own fields."""
    keys = [(row.dataset, row.decoder_type, row.encoder, row.crop_size) for row in PAPER_ROWS]
    assert len(set(keys)) == len(keys)
    for row in PAPER_ROWS:
        assert row.dataset in PUBLISHED_SIZES and row.single_scale < row.multi_scale < 100
    found = set()
    for name in RECIPES:
        recipe = get_recipe(name)
        if recipe.model.encoder is not None:
            dataset = next(each for each in PUBLISHED_SIZES if name.startswith(each))
            config = DepictConfig.from_preset(
                recipe.model.encoder,
                decoder_type=recipe.model.decoder_type,
                num_labels=len(class_names(dataset)),
                window_size=recipe.evaluation.window_size,
            )
            if (row := find_row(config, dataset)) is not None:
                found.add(name)
                assert row.encoder == ENCODER_PRESETS[recipe.model.encoder]
    large = {"ade20k_vit_large_640", "cityscapes_vit_large", "pascal_context_vit_large"}
    small = {f"ade20k_vit_{size}_mask_transformer" for size in ("tiny", "small", "base")}
    assert found == small | {f"{row}_{kind}" for row in large for kind in ("sa", "mask_transformer")}
