"""Cost against accuracy: which ways to run a model, what is measured of them, which are best, what is written."""

import json

import pytest
from conftest import save_model, save_scenes

from depict_hf.loading import load_model
from training import tradeoff
from training.evidence.tradeoff import Point, front, points_of, render_tradeoff


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    names = dict(enumerate(("sky", "road", "tree", "car", "pole")))
    save_model(
        folder, "sa", window_size=32, window_stride=16, id2label=names, label2id={v: k for k, v in names.items()}
    )
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = save_scenes(tmp_path_factory.mktemp("scenes"), 37, 50, {"validation": 3})
    (folder / "classes.txt").write_text("sky\nroad\ntree\ncar\npole\n", encoding="utf-8")
    return folder


def test_points_are_multiples_of_patches_and_each_is_there_once():
    points = points_of("default", 728, 392, 203, 14)
    assert len({point.name for point in points}) == len(points) == 12
    assert {point.window_stride for point in points} == {392, 203}
    assert {point.window_stride for point in points_of("default", 728, 392, None, 14)} == {392, 196}
    assert {point.size for point in points} == {None, 364, 546, 910}
    assert points[0] == Point("default", window_stride=392)
    assert points[-1].scales == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75) and points[-1].flip
    assert {point.window_stride for point in points_of("default", 512, None, None, 16)} == {None}


def test_points_have_the_names_that_the_command_line_gives_them():
    """Fails if the table shows a quality beside figures of another protocol."""
    named = {point.quality: point for point in points_of("default", 728, 392, 203, 14) if point.quality}
    assert named == {
        "fast": Point("default", dtype="bfloat16", window_stride=392, quality="fast"),
        "balanced": Point("default", dtype="bfloat16", window_stride=203, quality="balanced"),
        "best": Point("default", "pytorch", "bfloat16", None, 203, (0.75, 1.0, 1.25), True, "best"),
    }
    assert "fast, balanced" in {point.quality for point in points_of("default", 512, None, None, 16)}


def test_best_are_those_that_no_other_beats():
    figures = {"a": (10, 0.5), "b": (20, 0.4), "c": (30, 0.6), "d": (30, 0.7), "e": (40, 0.7)}
    points = {name: {"milliseconds": time, "mean_iou": score} for name, (time, score) in figures.items()}
    assert front(points) == ["a", "d"]


def test_the_command_measures_goes_on_and_writes(model, scenes, tmp_path, capsys):
    """Figures are those of `depict evaluate`; a point that is there is not measured again."""
    from training import evaluate

    arguments = [str(scenes), str(tmp_path / "out"), "--model", str(model)]
    assert tradeoff.main(arguments) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "tradeoff.json").read_text())
    assert (record["dataset"], record["split"], len(record["points"])) == (scenes.name, "validation", 12)
    name, point = next(iter(record["points"].items()))
    assert name == "tiny, float32, size as shipped, stride 32" and point["num_images"] == 3
    options = [
        "--split",
        "validation",
        "--window-stride",
        "32",
        "--workers",
        "0",
        "--output",
        str(tmp_path / "one.json"),
    ]
    assert evaluate.main([str(model), str(scenes), *options]) == 0
    assert point["mean_iou"] == json.loads((tmp_path / "one.json").read_text())["mean_iou"]
    record["points"][name]["milliseconds"] = 1e-3
    (tmp_path / "out" / "tradeoff.json").write_text(json.dumps(record))
    assert tradeoff.main(arguments) == 0
    again = json.loads((tmp_path / "out" / "tradeoff.json").read_text())
    assert again == record
    table = (tmp_path / "out" / "README.md").read_text()
    assert table == render_tradeoff(record) and f"| 1 | {name} | 0 | {100 * point['mean_iou']:.2f} | yes |  |" in table
    assert (tmp_path / "out" / "tradeoff.png").stat().st_size > 10_000


def test_records_of_other_images_are_kept(model, scenes, tmp_path, capsys):
    (tmp_path / "tradeoff.json").write_text(json.dumps({"dataset": "other", "split": "test", "max_images": None}))
    assert tradeoff.main([str(scenes), str(tmp_path), "--model", str(model)]) == 1
    assert "take another folder, or delete it" in capsys.readouterr().err
    assert "other" in (tmp_path / "tradeoff.json").read_text()


def test_sizes_need_a_shorter_side(model, scenes, tmp_path, capsys):
    loaded, image_processor = load_model(model)
    image_processor.size = {"height": 32, "width": 48}
    for each in (loaded, image_processor):
        each.save_pretrained(tmp_path / "fixed")
    assert tradeoff.main([str(scenes), str(tmp_path / "out"), "--model", str(tmp_path / "fixed")]) == 1
    assert "needed shortest_edge" in capsys.readouterr().err
