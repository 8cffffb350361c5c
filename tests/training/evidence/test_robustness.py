"""Models side by side under corruptions, and the means of their figures."""

import json

import pytest
from conftest import save_labelled_by, save_model

from training import evaluate
from training import robustness as command_module
from training.evidence import robustness


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models and a dataset labelled by the first."""
    root = tmp_path_factory.mktemp("robustness")
    models = [save_model(root / name, name) for name in ("sa", "linear")]
    return [str(each) for each in (*models, save_labelled_by(root / "dataset", models[0]))]


def test_models_are_compared_on_the_same_corrupted_photographs(folders, tmp_path, capsys):
    """Each model's figures are those of `training.evaluate` for it alone."""
    first, second, dataset = folders
    options = ["--corruptions", "shot_noise", "contrast:3", "--severities", "1", "4", "--max-images", "3"]
    common = ["--workers", "0", "--batch-size", "1"]
    output = tmp_path / "robustness.json"
    assert command_module.main([first, second, dataset, *options, *common, "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert list(record["models"]) == [first, second]
    assert record["num_images"] == 3 and record["split"] == "test" and record["environment"]["torch"]
    table = capsys.readouterr().out
    corruptions = ["--corruption", "shot_noise:1", "shot_noise:4", "contrast:3", "--max-images", "3"]
    for model in (first, second):
        alone = tmp_path / "alone.json"
        assert evaluate.main([model, dataset, *corruptions, *common, "--output", str(alone), "--overwrite"]) == 0
        expected, found = json.loads(alone.read_text()), record["models"][model]
        assert found["mean_iou"] == expected["mean_iou"]
        assert found["corruptions"] == expected["corruptions"]
        values = [each["mean_iou"] for each in expected["corruptions"]]
        summary = found["summary"]
        assert summary["per_corruption"] == pytest.approx(
            {"shot_noise": (values[0] + values[1]) / 2, "contrast": values[2]}
        )
        assert summary["mean_corrupted"] == pytest.approx(((values[0] + values[1]) / 2 + values[2]) / 2)
        assert summary["retention"] == pytest.approx(summary["mean_corrupted"] / expected["mean_iou"])
    assert robustness.render_comparison(record) in table
    clean = [100 * record["models"][model]["mean_iou"] for model in (first, second)]
    assert f"clean           {clean[0]:6.2f}  {clean[1]:6.2f}" in table
    assert clean[0] > clean[1] + 10  # the labels are the first model's


def under(name: str, severity: int, mean_iou: float | None) -> dict:
    return {"corruption": name, "severity": severity, "mean_iou": mean_iou}


def test_corruptions_count_alike_whatever_their_severities():
    results = [under("fog", 1, 0.4), under("fog", 2, 0.2), under("contrast", 1, 0.1)]
    summary = robustness.summarize({"mean_iou": 0.5}, results)
    assert summary["per_corruption"] == pytest.approx({"fog": 0.3, "contrast": 0.1})
    assert summary["mean_corrupted"] == pytest.approx(0.2)
    assert summary["retention"] == pytest.approx(0.4)


@pytest.mark.parametrize("clean", [0.0, None])
def test_nothing_is_retained_of_nothing(clean):
    assert robustness.summarize({"mean_iou": clean}, [under("fog", 1, 0.0)])["retention"] is None
    assert robustness.summarize({"mean_iou": 0.5}, [under("fog", 1, None)])["mean_corrupted"] is None


def test_the_table_is_in_percent_and_names_every_model():
    def model(clean: float, fog: float) -> dict:
        results = [under("fog", 1, fog), under("fog", 3, fog)]
        return {
            "mean_iou": clean,
            "corruptions": results,
            "summary": robustness.summarize({"mean_iou": clean}, results),
        }

    models = {"runs/depict": model(0.6, 0.45), "runs/segmenter": model(0.5, 0.25)}
    table = robustness.render_comparison({"num_images": 20, "models": models})
    assert table.splitlines() == [
        "mean IoU in percent, 20 images, severities 1, 3",
        "                depict  segmenter",
        "clean            60.00      50.00",
        "fog              45.00      25.00",
        "mean corrupted   45.00      25.00",
        "retained         75.00      50.00",
    ]
    same = {"a/final": model(0.6, 0.45), "b/final": model(0.5, 0.25)}
    assert robustness.render_comparison({"num_images": 20, "models": same}).splitlines()[1].split() == [
        "a/final",
        "b/final",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda first, second, dataset: [first, first, dataset], "needed each only once"),
        (lambda *folders: [*folders, "--severities", "6"], "Got severity 6 of gaussian_noise"),
        (lambda *folders: [*folders, "--corruptions", "snow"], "Got corruption 'snow'"),
        (lambda *folders: [*folders, "--batch-size", "0"], "Got --batch-size 0"),
    ],
)
def test_command_line_refuses(folders, change, message, capsys):
    assert command_module.main([*change(*folders), "--workers", "0"]) == 1
    assert message in capsys.readouterr().err


def test_models_of_other_classes_are_refused(folders, tmp_path, capsys):
    first, _, dataset = folders
    other = save_model(tmp_path / "other", id2label=dict(enumerate("abcde")))
    options = ["--workers", "0", "--corruptions", "contrast:1"]
    assert command_module.main([first, str(other), dataset, *options]) == 1
    assert f"{other} and {first} have different classes" in capsys.readouterr().err
