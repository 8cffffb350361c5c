"""`depict calibrate` and `training.evaluate --calibration`, on labels drawn by scores at a known temperature."""

import json
import multiprocessing
import os
import re
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import save_split

from depict_hf.cli import main as depict
from depict_hf.inference import score_stream, segment
from depict_hf.loading import load_model
from depict_hf.windows import score_bands
from training import calibrate, evaluate

TEMPERATURE = 2.5


@pytest.fixture(scope="module")
def drawn_folder(tmp_path_factory, model_folder) -> Path:
    """Photographs of unequal sizes; each pixel's label is drawn by the model's scores divided by `TEMPERATURE`."""
    model, image_processor = load_model(model_folder)
    rng = np.random.default_rng(0)
    images, labels = [], []
    for height, width in [(64, 96), (80, 64), (48, 48), (64, 64)]:
        ramp = np.linspace(0, 200, width)[None, :, None] * rng.random((1, 1, 3))
        images.append((ramp + rng.integers(0, 50, (height, width, 3))).astype(np.uint8))
        [views] = score_stream(model, image_processor, [images[-1]])
        truth = np.zeros((height, width), dtype=np.uint8)
        for rows, columns, scores in score_bands(views):
            likely = (next(scores) / TEMPERATURE).softmax(-1).numpy()
            draws = rng.random((*likely.shape[:2], 1))
            truth[rows, columns] = (likely.cumsum(-1) < draws).sum(-1).clip(0, 4)
        truth[:2] = 255
        labels.append(truth)
    folder = tmp_path_factory.mktemp("drawn")
    return save_split(save_split(folder, "validation", images, labels), "test", images[:2], labels[:2])


@pytest.fixture
def own_model(tmp_path, model_folder) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "own"))


def test_the_temperature_is_fitted_written_and_changes_no_label(own_model, drawn_folder, tmp_path, capsys):
    """Fails if the config is written with overrides or without something, or labels move."""
    photo = np.random.default_rng(5).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    config = json.loads((own_model / "config.json").read_text())
    [before] = segment(*load_model(own_model), [photo], return_confidence=True)
    options = ["--workers", "0", "--window-size", "none", "--diagram", str(tmp_path / "diagram.png")]
    assert depict(["calibrate", str(own_model), str(drawn_folder), *options]) == 0

    record = json.loads((own_model / "calibration.json").read_text())
    assert record["temperature"] == pytest.approx(TEMPERATURE, rel=0.1)
    assert record["split"] == "validation" and record["num_images"] == 4
    assert record["labelled_pixels"] == record["before"]["num_pixels"] == sum([62 * 96, 78 * 64, 46 * 48, 62 * 64])
    assert json.loads((own_model / "config.json").read_text()) == config | {"temperature": record["temperature"]}
    for name in ("expected_calibration_error", "negative_log_likelihood"):
        assert record["after"][name] < record["before"][name]
    assert record["after"]["accuracy"] == record["before"]["accuracy"]
    assert record["before"]["temperature"] == 1 and record["after"]["temperature"] == record["temperature"]
    assert (tmp_path / "diagram.png").exists()
    printed = capsys.readouterr().out
    for name in ("before", "after"):
        assert f"{name}:" in printed
        assert f"calibration error {100 * record[name]['expected_calibration_error']:.2f} %" in printed

    [after] = segment(*load_model(own_model), [photo], return_confidence=True)
    assert torch.equal(after.labels, before.labels)
    assert after.confidence.mean() < before.confidence.mean() - 0.05


def test_a_second_time_starts_from_the_first(own_model, drawn_folder, tmp_path):
    """The temperature is that of the scores themselves, not one on top of the other; the record goes where told."""
    temperatures = []
    for name in ("first", "second"):
        output = tmp_path / f"{name}.json"
        arguments = [str(own_model), str(drawn_folder), "--workers", "0", "--output", str(output)]
        assert calibrate.main(arguments) == 0
        temperatures.append(json.loads(output.read_text())["temperature"])
    assert temperatures[0] == temperatures[1]
    assert json.loads(output.read_text())["before"]["temperature"] == temperatures[0]
    assert not (own_model / "calibration.json").exists()


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (None, [], "is no folder with a model, .* save a model of the Hub first, by model.save_pretrained"),
        (
            ["config.json", "model.onnx"],
            [],
            r"holds an export, model\.onnx, .* calibrate the model that it was made of",
        ),
        (["config.json", "model.pt2"], [], r"holds an export, model\.pt2, .* calibrate the model that it was"),
        (["config.json"], ["--backend", "onnxruntime"], "Got --backend onnxruntime, which runs exports"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(files, options, message, tmp_path, drawn_folder, capsys):
    name = "somebody/model"
    if files:
        name = str(tmp_path / "folder")
        Path(name).mkdir()
        for each in files:
            (Path(name) / each).touch()
    assert calibrate.main([name, str(drawn_folder), *options]) == 1
    assert re.search(f"error: .*{message}", capsys.readouterr().err)


def test_evaluation_reports_calibration(own_model, drawn_folder, tmp_path, capsys):
    """With the model's temperature and without; the figures that it had before stay as they are."""
    calibrate.write_temperature(own_model, TEMPERATURE)
    plain, output, diagram = tmp_path / "plain.json", tmp_path / "with.json", tmp_path / "diagram.png"
    arguments = [str(own_model), str(drawn_folder), "--workers", "0", "--output"]
    assert evaluate.main([*arguments, str(plain)]) == 0
    assert evaluate.main([*arguments, str(output), "--calibration", str(diagram)]) == 0
    record, without = (json.loads(each.read_text()) for each in (output, plain))
    assert record["per_class_iou"] == without["per_class_iou"] and "calibration" not in without
    assert record["calibration"]["temperature"] == TEMPERATURE and record["uncalibrated"]["temperature"] == 1
    assert record["calibration"]["accuracy"] == pytest.approx(record["overall_accuracy"])
    assert record["calibration"]["expected_calibration_error"] < 0.03
    assert record["uncalibrated"]["expected_calibration_error"] > 0.05
    assert diagram.exists()
    printed = capsys.readouterr().out
    assert "at temperature 2.5: calibration error" in printed and "at temperature 1: calibration error" in printed
    assert evaluate.main([*arguments, str(output), "--calibration", "model"]) == 1
    assert "Got the diagram model, needed a name that ends in .png" in capsys.readouterr().err


def test_two_processes_calibrate_as_one(own_model, drawn_folder, tmp_path):
    """Fails if sums are not those of all processes, or each fits a temperature of its own."""
    commands = {
        "evaluate": [str(own_model), str(drawn_folder), "--split", "validation", "--calibration", "--output"],
        "calibrate": [str(own_model), str(drawn_folder), "--output"],
    }
    records = {}
    for name, arguments in commands.items():
        one, two = (tmp_path / f"{name}-{count}.json" for count in ("one", "two"))
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        start = multiprocessing.get_context("fork").Process
        processes = [
            start(target=run_as_one_of_two, args=(rank, port, name, [*arguments, str(two)])) for rank in (0, 1)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=120)
        assert [process.exitcode for process in processes] == [0, 0]
        calibrate.write_temperature(own_model, 1.0)
        assert globals()[name].main([*arguments, str(one), "--workers", "0"]) == 0
        records[name] = [json.loads(each.read_text()) for each in (one, two)]
    one, two = (each["calibration"] for each in records["evaluate"])
    assert two["reliability"]["count"] == one["reliability"]["count"]
    for name in ("expected_calibration_error", "negative_log_likelihood", "brier_score"):
        assert two[name] == pytest.approx(one[name], rel=1e-5)
    assert two["risk_coverage"]["area"] == pytest.approx(one["risk_coverage"]["area"], rel=1e-5)
    one, two = records["calibrate"]
    assert two["num_processes"] == 2 and two["labelled_pixels"] == one["labelled_pixels"]
    assert two["temperature"] == pytest.approx(one["temperature"], rel=1e-3)


def run_as_one_of_two(rank: int, port: int, command: str, arguments: list[str]) -> None:
    """As a launcher starts processes, on the CPU."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    PartialState._reset_state()
    sys.exit(globals()[command].main([*arguments, "--workers", "0"]))
