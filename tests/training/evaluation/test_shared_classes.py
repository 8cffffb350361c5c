"""Models evaluated on data with other classes: which pixels count, and for which class."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, save_model, save_split

from depict_hf.inference import segment
from depict_hf.loading import load_model
from training import evaluate

# Ids of the data; "street" and "lane" are the model's road, "box" is left out.
THEIRS = ("air", "street", "lane", "box", "bush")
TABLE = {"road": ["street", "lane"], "tree": ["bush"], "sky": ["air"]}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: index for index, name in enumerate(CLASSES)}}
    return save_model(tmp_path_factory.mktemp("model"), **names)


@pytest.fixture(scope="module")
def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    """Photographs, and label maps of all five ids and 255."""
    rng = np.random.default_rng(0)
    photos = [rng.integers(0, 256, (height, 48, 3), np.uint8) for height in (32, 40, 36)]
    ids = np.array([0, 1, 2, 3, 4, 255], np.uint8)
    return [(photo, rng.choice(ids, photo.shape[:2])) for photo in photos]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pairs) -> Path:
    folder = save_split(tmp_path_factory.mktemp("data"), "test", *map(list, zip(*pairs, strict=True)))
    listed = ", ".join(f"{index} {name}" for index, name in enumerate(THEIRS))
    (folder / "README.md").write_text(f"# Views\n\nClasses: {listed}.\n")
    return folder


def run(model_folder, folder, table, tmp_path, *options) -> int:
    (tmp_path / "table.json").write_text(table if isinstance(table, str) else json.dumps(table))
    given = ["--classes", tmp_path / "table.json", "--output", tmp_path / "record.json", "--workers", "0", *options]
    return evaluate.main([str(each) for each in (model_folder, folder, *given)])


def test_merged_classes_count_and_others_are_wrong_or_ignored(model_folder, folder, pairs, tmp_path, capsys):
    """Against sets of pixels: fails if car and pole, which no pixel can be, pull the mean down, or do not count."""
    assert run(model_folder, folder, TABLE, tmp_path) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    model, image_processor = load_model(model_folder)
    predictions = np.concatenate([segment(model, image_processor, [photo])[0].numpy().ravel() for photo, _ in pairs])
    ids = np.concatenate([labels.ravel() for _, labels in pairs])
    labelled = np.isin(ids, [THEIRS.index(name) for each in TABLE.values() for name in each])
    assert 0.1 < np.isin(predictions[labelled], [CLASSES.index("car"), CLASSES.index("pole")]).mean() < 0.9
    ious, right = {}, 0
    for name, theirs in TABLE.items():
        meant = np.isin(ids, [THEIRS.index(each) for each in theirs])
        found = labelled & (predictions == CLASSES.index(name))
        ious[name] = (meant & found).sum() / (meant | found).sum()
        right += (meant & found).sum()
    assert record["per_class_iou"] == pytest.approx(ious, abs=1e-12)
    assert record["mean_iou"] == pytest.approx(np.mean(list(ious.values())), abs=1e-12)
    assert record["overall_accuracy"] == pytest.approx(right / labelled.sum(), abs=1e-12)
    assert list(record["per_class_accuracy"]) == ["sky", "road", "tree"] and record["num_images"] == 3
    assert record["protocol"]["classes"] == {"road": ["street", "lane"], "tree": ["bush"], "sky": ["air"]}
    assert "pole" not in capsys.readouterr().out


def test_the_models_own_classes_by_name_are_the_usual_evaluation(model_folder, pairs, tmp_path):
    """The same ids, so that the table changes nothing."""
    folder = save_split(tmp_path / "own", "test", *map(list, zip(*pairs, strict=True)))
    (folder / "README.md").write_text(f"Classes: {', '.join(f'{i} {name}' for i, name in enumerate(CLASSES))}.\n")
    assert run(model_folder, folder, {name: [name] for name in CLASSES}, tmp_path) == 0
    usual = ["--workers", "0", "--output", str(tmp_path / "usual.json")]
    assert evaluate.main([str(model_folder), str(folder), *usual]) == 0
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("record", "usual")]
    for name in ("mean_iou", "mean_accuracy", "overall_accuracy", "per_class_iou", "per_class_accuracy"):
        assert records[0][name] == records[1][name]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ([], "needed a table such as"),
        ({"road": "street"}, r"holds .*needed a table such as .*vegetation"),
        ({"road": []}, "needed a table such as"),
        ({"road": [1]}, "needed a table such as"),
        ({"road": ["lane"], "tree": ["lane"]}, "names 'lane' twice; a class of the data can mean one"),
        ({"rode": ["lane"]}, "names 'rode', which is no class of the model: sky, road"),
        ({"road": ["lame"]}, "names 'lame', which is no class of the data: air, street"),
    ],
)
def test_tables_that_do_not_fit_are_refused(table, message, model_folder, folder, tmp_path, capsys):
    assert run(model_folder, folder, table, tmp_path) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "record.json").exists()


def test_what_does_not_go_together_is_refused(model_folder, folder, tmp_path, capsys):
    assert run(model_folder, folder, TABLE, tmp_path, "--metric", "evaluate") == 1
    assert "--metric evaluate with --classes; that metric scores all classes" in capsys.readouterr().err
    assert run(model_folder, folder, TABLE, tmp_path, "--split", "night") == 1
    assert "night" in capsys.readouterr().err
    nameless = save_split(tmp_path / "nameless", "test", [np.zeros((8, 8, 3), np.uint8)], [np.zeros((8, 8), np.uint8)])
    assert run(model_folder, nameless, TABLE, tmp_path) == 1
    assert "names no classes, which --classes needs; write a classes.txt" in capsys.readouterr().err
    (tmp_path / "table.json").unlink()
    assert evaluate.main([str(model_folder), str(folder), "--classes", str(tmp_path / "table.json")]) == 1
    assert "table.json" in capsys.readouterr().err
